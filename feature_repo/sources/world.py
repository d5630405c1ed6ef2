"""The built-in world: a shop whose best possible recommendation is known.

In: numbers of users, items and days, and a seed. Out: `World(raw, truth)`: `raw` as any reader gives it, and `truth`, which no
stage may look at, with the probabilities that made the events, so that reports can say how close a slate comes to the best
there is.

How it works. An item is a department, a subtype, a style and a brand, which its words tell, plus a little noise, which they do
not. A user likes a few subtypes and styles, and slowly turns from one set of them to another. A session is a slate of 20 that
an older recommender drew (chance, popularity and a lagging idea of the user's taste) with its propensities logged. A click needs
that the user looks at the position and that the item appeals: P(click) = examine(position) x sigmoid(base + taste(user, time) .
latent(item) + quality(item)); a like may follow a click, a purchase a like. Positions count from 1, where everybody looks:
examine(p) = p ** -decay.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl

from feature_repo.sources.clean import finish_events
from feature_repo.sources.raw import Raw, no_rejections
from feature_repo.sources.world_text import (
    BRAND_NAMES,
    DEPARTMENT_NAMES,
    DEPARTMENT_OF,
    STYLE_NAMES,
    STYLE_OF_BRAND,
    SUBTYPE_NAMES,
    Kind,
    bio,
    describe_items,
    prices,
)
from feature_repo.sources.world_words import BUDGETS, DEVICES, REGIONS, SURFACES
from tandem.core.errors import InputError, NotFoundError
from tandem.core.folders import read_json, whole_folder, write_json
from tandem.core.schema import MICROSECONDS_PER_DAY, TIME, Source, Task

START: Final = datetime(2025, 1, 1, tzinfo=UTC)

SOURCE: Final = Source(
    kind="world",
    tasks=(Task("click", "click"), Task("like", "like"), Task("purchase", "purchase")),
    positive="click",
    history=("click",),
    exclude_seen=True,
    split="time",
    impression="impression",
    credit="Simulated by Tandem.",
)

SLATE: Final = 20
"""Items that a session shows."""

_NOISE: Final = 6
_WIDTH: Final = len(DEPARTMENT_NAMES) + len(SUBTYPE_NAMES) + len(STYLE_NAMES) + len(BRAND_NAMES) + _NOISE
_YEAR_US: Final = 365 * MICROSECONDS_PER_DAY
_LAG_US: Final = 5 * MICROSECONDS_PER_DAY
"""How far the older recommender's idea of a taste lags behind it."""

_LATE_SHARE: Final = 0.25
_OPEN_FROM: Final = 8
_OPEN_HOURS: Final = 14


@dataclass(frozen=True)
class Behaviour:
    """The numbers behind the world, which a saved truth carries, and the probabilities made of them."""

    decay: float = 0.35
    click_base: float = -4.6
    like_base: float = -2.3
    like_slope: float = 0.35
    purchase_base: float = -0.3
    price_weight: float = 0.9
    explore: float = 0.10
    popular: float = 0.10
    sessions_per_user: float = 11.0

    def examine(self, positions: np.ndarray) -> np.ndarray:
        """(P,) probability that a user looks at a position; 1 at position 1."""
        return np.asarray(np.asarray(positions, dtype=np.float64) ** -self.decay)

    def click(self, affinity: np.ndarray, quality: np.ndarray) -> np.ndarray:
        """P(click | looked at)."""
        return _sigmoid(self.click_base + affinity + quality)

    def like(self, affinity: np.ndarray, quality: np.ndarray) -> np.ndarray:
        """P(like | clicked)."""
        return _sigmoid(self.like_base + self.like_slope * affinity + quality)

    def purchase(self, price_gap: np.ndarray, quality: np.ndarray) -> np.ndarray:
        """P(purchase | liked); `price_gap` is how far the price level lies from the user's budget."""
        return _sigmoid(self.purchase_base - self.price_weight * price_gap + 0.5 * quality)


@dataclass(frozen=True)
class Truth:
    """What made the events. Latents have D dimensions; times are UTC microseconds.

    latents (N, D), quality (N,), price_level (N,), available (N,) int64 of `item_ids`; before, after (U, D), turn (U,) int64 the
    middle of the change and pace (U,) int64 its length, budget (U,) of `user_ids`.
    """

    item_ids: tuple[str, ...]
    user_ids: tuple[str, ...]
    latents: np.ndarray
    quality: np.ndarray
    price_level: np.ndarray
    available: np.ndarray
    before: np.ndarray
    after: np.ndarray
    turn: np.ndarray
    pace: np.ndarray
    budget: np.ndarray
    behaviour: Behaviour

    @cached_property
    def _item_rows(self) -> dict[str, int]:
        return {item: row for row, item in enumerate(self.item_ids)}

    @cached_property
    def _user_rows(self) -> dict[str, int]:
        return {user: row for row, user in enumerate(self.user_ids)}

    def click_probability(self, user_id: str, time: datetime, item_ids: Sequence[str] | None = None) -> np.ndarray:
        """(N,) float64: P(click) at position 1, so without position bias.

        Of `item_ids`, or of all items in the order of `self.item_ids`. Raises NotFoundError for an unknown user or item.
        """
        return self.task_probability("click", user_id, time, item_ids)

    def task_probability(self, task: str, user_id: str, time: datetime, item_ids: Sequence[str] | None = None) -> np.ndarray:
        """(N,) float64: P(click), P(click and like) or P(click, like and purchase) at position 1.

        Raises InputError for another task, NotFoundError for an unknown user or item.
        """
        if task not in ("click", "like", "purchase"):
            raise InputError(f"the world has no task {task!r}; it has click, like and purchase")
        user, rows = self._user(user_id), self._items(item_ids)
        affinity = self.latents[rows] @ self.taste(np.array([user]), np.array([_microseconds(time)]))[0]
        chance = self.behaviour.click(affinity, self.quality[rows])
        if task != "click":
            chance = chance * self.behaviour.like(affinity, self.quality[rows])
        if task == "purchase":
            gap = np.abs(self.price_level[rows] - self.budget[user])
            chance = chance * self.behaviour.purchase(gap, self.quality[rows])
        return chance

    def expected_clicks(self, user_id: str, time: datetime, slate: Sequence[str]) -> float:
        """Expected clicks on a slate, best position first: the sum of P(looks at the position) x P(click)."""
        chances = self.click_probability(user_id, time, slate)
        return float(chances @ self.behaviour.examine(np.arange(1, len(slate) + 1)))

    def best_slate(
        self, user_id: str, time: datetime, k: int, available: np.ndarray | None = None, exclude: Collection[str] = ()
    ) -> list[str]:
        """The k items with most expected clicks, best first; fewer where fewer are left.

        `available` (N,) bool defaults to what is on sale at `time`; unknown items in `exclude` are ignored.
        """
        chances = self.click_probability(user_id, time)
        allowed = self.available <= _microseconds(time) if available is None else available.copy()
        allowed[self._items([item for item in exclude if item in self._item_rows])] = False
        order = np.argsort(np.where(allowed, -chances, np.inf), kind="stable")[: min(k, int(allowed.sum()))]
        return [self.item_ids[row] for row in order]

    def taste(self, users: np.ndarray, times: np.ndarray) -> np.ndarray:
        """(B, D): tastes of the users in rows (B,) at times (B,)."""
        share = _sigmoid((times - self.turn[users]) / self.pace[users])[:, None]
        return np.asarray((1 - share) * self.before[users] + share * self.after[users])

    def save(self, folder: Path) -> None:
        """Write items.parquet, users.parquet and world.json into `folder`, whole or not at all."""
        with whole_folder(folder) as target:
            items = {name: getattr(self, name) for name in _ITEM_ARRAYS}
            users = {name: getattr(self, name) for name in _USER_ARRAYS}
            pl.DataFrame({"item_id": list(self.item_ids), **items}).write_parquet(target / "items.parquet")
            pl.DataFrame({"user_id": list(self.user_ids), **users}).write_parquet(target / "users.parquet")
            write_json(target / "world.json", asdict(self.behaviour))

    @classmethod
    def load(cls, folder: Path) -> Truth:
        """Read what `save` wrote. Raises NotFoundError when there is none: only the built-in world has a truth."""
        if not (folder / "world.json").is_file():
            raise NotFoundError(f"{folder} holds no truth; only `tandem simulate` makes one")
        items, users = pl.read_parquet(folder / "items.parquet"), pl.read_parquet(folder / "users.parquet")
        arrays: dict[str, Any] = {name: items[name].to_numpy() for name in _ITEM_ARRAYS}
        arrays |= {name: users[name].to_numpy() for name in _USER_ARRAYS}
        return cls(_ids(items), _ids(users), **arrays, behaviour=Behaviour(**read_json(folder / "world.json")))

    def _user(self, user_id: str) -> int:
        row = self._user_rows.get(user_id)
        if row is None:
            raise NotFoundError(f"the world has no user {user_id!r}")
        return row

    def _items(self, item_ids: Sequence[str] | None) -> np.ndarray:
        if item_ids is None:
            return np.arange(len(self.item_ids))
        missing = [item for item in item_ids if item not in self._item_rows]
        if missing:
            raise NotFoundError(f"the world has no item {missing[0]!r}")
        return np.array([self._item_rows[item] for item in item_ids], dtype=np.int64)


_ITEM_ARRAYS: Final = ("latents", "quality", "price_level", "available")
_USER_ARRAYS: Final = ("before", "after", "turn", "pace", "budget")


@dataclass(frozen=True)
class World:
    """What can be seen and what made it."""

    raw: Raw
    truth: Truth


@dataclass(frozen=True)
class _Sessions:
    """Who came when: user (S,) rows, time (S,) int64, day (S,), sorted by time; no user comes twice a day."""

    user: np.ndarray
    time: np.ndarray
    day: np.ndarray


def simulate(
    users: int, items: int, days: int, seed: int, *, start: datetime = START, behaviour: Behaviour | None = None
) -> World:
    """Make a world of `users` x `items` over `days` from `start`. Same arguments, same world.

    Raises InputError for sizes below 1 user, 2 items or 2 days.
    """
    if users < 1 or items < 2 or days < 2:
        raise InputError(f"a world needs at least 1 user, 2 items and 2 days, not {users}, {items} and {days}")
    behaviour = behaviour or Behaviour()
    catalogue, people, traffic = (np.random.default_rng([seed, stream]) for stream in range(3))
    start_us = _microseconds(start)
    item_table, item_arrays = _make_items(items, days, start_us, catalogue)
    user_table, user_arrays = _make_users(users, days, start_us, people)
    truth = Truth(_ids(item_table), _ids(user_table), **item_arrays, **user_arrays, behaviour=behaviour)
    sessions = _make_sessions(users, days, start_us, behaviour, traffic)
    events = _make_events(truth, sessions, traffic)
    return World(Raw(events, item_table, user_table, SOURCE, no_rejections()), truth)


def _make_items(count: int, days: int, start_us: int, rng: np.random.Generator) -> tuple[pl.DataFrame, dict[str, Any]]:
    subtypes = rng.integers(len(SUBTYPE_NAMES), size=count)
    brands = rng.integers(len(BRAND_NAMES), size=count)
    own_style = rng.random(count) < 0.8
    styles = np.where(own_style, STYLE_OF_BRAND[brands], rng.integers(len(STYLE_NAMES), size=count))
    kinds = [Kind(*map(int, row)) for row in zip(subtypes, styles, brands, strict=True)]
    level = rng.normal(0, 1, count)
    available = _arrivals(count, days, start_us, rng)
    arrays = {
        "latents": _item_latents(subtypes, styles, brands, rng),
        "quality": rng.normal(0, 0.6, count),
        "price_level": level,
        "available": available,
    }
    words = describe_items(kinds, rng)
    width = len(str(count))
    table = pl.DataFrame({"item_id": [f"i{place:0{width}d}" for place in range(count)]}).hstack(words)
    table = table.with_columns(
        pl.concat_list("department", "subtype").alias("categories"),
        pl.Series("available_from", available).cast(TIME),
        pl.Series("price", prices(kinds, level, rng)),
    )
    return table.select("item_id", "title", "text", "categories", "available_from", "price", "brand"), arrays


def _arrivals(count: int, days: int, start_us: int, rng: np.random.Generator) -> np.ndarray:
    """(N,) int64: a quarter of the items arrive while we watch, the others came in the year before."""
    before = start_us - rng.integers(1, _YEAR_US, size=count)
    while_watching = start_us + rng.integers(0, int(days * 0.95 * MICROSECONDS_PER_DAY), size=count)
    late = rng.permutation(count) < round(_LATE_SHARE * count)
    return np.where(late, while_watching, before)


def _item_latents(subtypes: np.ndarray, styles: np.ndarray, brands: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N, D): one-hot blocks for department, subtype, style and brand, then noise that no word tells."""
    blocks = [
        np.eye(len(DEPARTMENT_NAMES))[DEPARTMENT_OF[subtypes]],
        np.eye(len(SUBTYPE_NAMES))[subtypes],
        np.eye(len(STYLE_NAMES))[styles],
        np.eye(len(BRAND_NAMES))[brands],
        rng.normal(0, 1, (len(subtypes), _NOISE)),
    ]
    return np.concatenate(blocks, axis=1)


def _make_users(count: int, days: int, start_us: int, rng: np.random.Generator) -> tuple[pl.DataFrame, dict[str, Any]]:
    people = [_Person.draw(rng) for _ in range(count)]
    budget = rng.normal(0, 1, count)
    span = days * MICROSECONDS_PER_DAY
    arrays = {
        "before": np.stack([person.before for person in people]),
        "after": np.stack([person.after for person in people]),
        "turn": start_us + (rng.uniform(0.1, 1.2, count) * span).astype(np.int64),
        "pace": (rng.uniform(0.03, 0.1, count) * span).astype(np.int64),
        "budget": budget,
    }
    width = len(str(count))
    told = np.digitize(budget + rng.normal(0, 0.5, count), (-0.6, 0.6))
    table = pl.DataFrame(
        {
            "user_id": [f"u{place:0{width}d}" for place in range(count)],
            "text": [person.bio for person in people],
            "region": [REGIONS[place] for place in rng.integers(len(REGIONS), size=count)],
            "budget": [BUDGETS[place] for place in told],
        }
    )
    return table, arrays


@dataclass(frozen=True)
class _Person:
    """A user's taste before and after their turn, and how their bio tells the first."""

    before: np.ndarray
    after: np.ndarray
    bio: str

    @classmethod
    def draw(cls, rng: np.random.Generator) -> _Person:
        departments = [int(place) for place in rng.choice(len(DEPARTMENT_NAMES), size=3, replace=False, p=_DEPARTMENT_SHARES)]
        styles = [int(place) for place in rng.choice(len(STYLE_NAMES), size=4, replace=False)]
        common = _noise_taste(rng)
        before = _taste(departments[:2], styles[:2], styles[3], common, rng)
        # The first love stays, the second gives way to something new; so do the styles.
        after = _taste([departments[0], departments[2]], [styles[0], styles[2]], styles[3], common, rng)
        return cls(before, after, bio(departments[:2], styles[0], rng))


_DEPARTMENT_SHARES: Final = (lambda raw: raw / raw.sum())(1.0 / np.arange(1, len(DEPARTMENT_NAMES) + 1) ** 0.5)
_SUBTYPES_AT: Final = len(DEPARTMENT_NAMES)
_STYLES_AT: Final = _SUBTYPES_AT + len(SUBTYPE_NAMES)
_BRANDS_AT: Final = _STYLES_AT + len(STYLE_NAMES)


def _noise_taste(rng: np.random.Generator) -> np.ndarray:
    taste = np.zeros(_WIDTH)
    taste[_BRANDS_AT:-_NOISE] = rng.normal(0, 0.15, len(BRAND_NAMES))
    taste[-_NOISE:] = rng.normal(0, 0.08, _NOISE)
    return taste


def _taste(departments: list[int], styles: list[int], disliked: int, common: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(D,): a strong and a weaker department, two liked subtypes in each, a strong and a weaker style, one style disliked."""
    taste = common.copy()
    for department, weight in zip(departments, (3.0, 2.8), strict=True):
        taste[department] = weight
        own = np.flatnonzero(department == DEPARTMENT_OF)
        taste[_SUBTYPES_AT + rng.choice(own, size=2, replace=False)] = 0.7
    for style, weight in zip(styles, (2.4, 2.2), strict=True):
        taste[_STYLES_AT + style] = weight
    taste[_STYLES_AT + disliked] = -0.6
    return taste


def _make_sessions(users: int, days: int, start_us: int, behaviour: Behaviour, rng: np.random.Generator) -> _Sessions:
    """Seven in ten users are there from the first day, the others join later; some come often, some hardly ever."""
    joined = np.where(rng.random(users) < 0.7, 0, rng.integers(0, days, size=users))
    rate = behaviour.sessions_per_user / days * rng.lognormal(-0.18, 0.6, users)
    comes = rng.random((users, days)) < np.minimum(rate, 0.9)[:, None]
    comes &= np.arange(days)[None, :] >= joined[:, None]
    user, day = np.nonzero(comes)
    hours = _OPEN_FROM + _OPEN_HOURS * rng.beta(2.5, 1.7, len(user))
    time = start_us + day * MICROSECONDS_PER_DAY + (hours * 3600).astype(np.int64) * 1_000_000
    order = np.lexsort((user, time))
    return _Sessions(user[order], time[order], day[order])


def _make_events(truth: Truth, sessions: _Sessions, rng: np.random.Generator) -> pl.DataFrame:
    """Play the days in turn: the logging policy knows the clicks of the days before and shows nobody what they clicked."""
    clicks = np.zeros(len(truth.item_ids))
    seen = np.zeros((len(truth.user_ids), len(truth.item_ids)), dtype=bool)
    blur = rng.normal(0, 0.25, truth.before.shape)
    slates = [_NO_SLATES]
    for day in np.unique(sessions.day):
        rows = np.flatnonzero(sessions.day == day)
        user, time = sessions.user[rows], sessions.time[rows]
        believed = truth.taste(user, time - _LAG_US) + blur[user]
        allowed = (truth.available[None, :] <= time[:, None]) & ~seen[user]
        policy = _policy(allowed, clicks, believed.astype(np.float32) @ truth.latents.T.astype(np.float32), truth.behaviour)
        slate = _answered(truth, user, time, *_draw_slates(policy, rng), rng)
        clicked = slate.filter("clicked")
        np.add.at(clicks, clicked["item"].to_numpy(), 1)
        seen[clicked["user"].to_numpy(), clicked["item"].to_numpy()] = True
        slates.append(slate.with_columns(pl.col("session") + rows[0]))
    return _event_table(truth, pl.concat(slates), len(sessions.user), rng)


_NO_SLATES: Final = pl.DataFrame(
    schema={
        "session": pl.Int64(),
        "user": pl.Int64(),
        "item": pl.Int64(),
        "time": pl.Int64(),
        "position": pl.Int64(),
        "propensity": pl.Float64(),
        "clicked": pl.Boolean(),
        "liked": pl.Boolean(),
        "bought": pl.Boolean(),
        "dwell": pl.Float64(),
    }
)


def _answered(
    truth: Truth, user: np.ndarray, time: np.ndarray, item: np.ndarray, propensity: np.ndarray, rng: np.random.Generator
) -> pl.DataFrame:
    """What the users (S,) do with their slates (S, K): one row per shown item, as `_NO_SLATES`."""
    shown = propensity > 0
    session, place = np.nonzero(shown)
    items, users, behaviour = item[shown], user[session], truth.behaviour
    affinity = np.einsum("pd,pd->p", truth.taste(user, time)[session], truth.latents[items])
    quality, gap = truth.quality[items], np.abs(truth.price_level[items] - truth.budget[users])
    clicked = rng.random(len(items)) < behaviour.examine(place + 1) * behaviour.click(affinity, quality)
    liked = clicked & (rng.random(len(items)) < behaviour.like(affinity, quality))
    bought = liked & (rng.random(len(items)) < behaviour.purchase(gap, quality))
    dwell = np.round(rng.lognormal(2.3 + 0.3 * np.minimum(affinity, 6.0), 0.6), 1)
    columns = (session, users, items, time[session], place + 1, propensity[shown], clicked, liked, bought, dwell)
    return pl.DataFrame(dict(zip(_NO_SLATES.columns, columns, strict=True)), schema=_NO_SLATES.schema)


def _policy(allowed: np.ndarray, clicks: np.ndarray, appeal: np.ndarray, behaviour: Behaviour) -> np.ndarray:
    """(S, N) float32 probabilities of the logging policy: chance, popularity of the days before and a lagging idea of taste."""
    chance = _normalised(allowed.astype(np.float32))
    popular = _normalised(allowed * (clicks + 0.1).astype(np.float32)[None, :])
    personal = _normalised(allowed * np.exp(np.minimum(appeal, 12.0)))
    mixed = behaviour.explore * chance + behaviour.popular * popular + (1 - behaviour.explore - behaviour.popular) * personal
    return np.asarray(mixed, dtype=np.float32)


def _draw_slates(policy: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(S, K) items in the order drawn, without repeats, and (S, K) their propensities; 0 where a user has fewer items left.

    A propensity is the chance that the policy draws this item at this place, given the items above it. Drawing one after
    another by weight equals the order in which exponential clocks of these rates ring (Plackett-Luce; Yellott 1977).
    """
    size = min(SLATE, policy.shape[1])
    waits = np.maximum(rng.standard_exponential(policy.shape, dtype=np.float32), np.float32(1e-12))
    with np.errstate(divide="ignore"):
        rings = waits / policy
    first = np.argpartition(rings, size - 1, axis=1)[:, :size]
    item = np.take_along_axis(first, np.argsort(np.take_along_axis(rings, first, axis=1), axis=1), axis=1)
    chosen = np.take_along_axis(policy, item, axis=1).astype(np.float64)
    left = policy.sum(axis=1, keepdims=True, dtype=np.float64) - np.cumsum(chosen, axis=1) + chosen
    return item, np.where(chosen > 0, np.clip(chosen / np.maximum(left, 1e-12), 1e-12, 1.0), 0.0)


def _event_table(truth: Truth, slates: pl.DataFrame, sessions: int, rng: np.random.Generator) -> pl.DataFrame:
    """Impressions at the session's time, clicks from top to bottom after it, then likes and purchases of what was clicked."""
    device = rng.choice(len(DEVICES), sessions, p=(0.6, 0.3, 0.1))
    surface = rng.choice(len(SURFACES), sessions, p=(0.7, 0.2, 0.1))
    click_time = pl.col("time") + 4_000_000 + pl.col("position") * 6_000_000
    like_time = click_time + (pl.col("dwell") * 1e6).cast(pl.Int64)
    nothing = pl.lit(None, dtype=pl.Float64)
    chain = [
        _events_of(slates, "impression", pl.col("time"), nothing),
        _events_of(slates.filter("clicked"), "click", click_time, pl.col("dwell")),
        _events_of(slates.filter("liked"), "like", like_time, nothing),
        _events_of(slates.filter("bought"), "purchase", like_time + 90_000_000, nothing),
    ]
    played = pl.concat(chain)
    names = {
        "user_id": np.array(truth.user_ids, dtype=object)[played["user"].to_numpy()],
        "item_id": np.array(truth.item_ids, dtype=object)[played["item"].to_numpy()],
        "device": np.array(DEVICES, dtype=object)[device[played["session"].to_numpy()]],
        "surface": np.array(SURFACES, dtype=object)[surface[played["session"].to_numpy()]],
    }
    named = played.with_columns(pl.Series(name, values.tolist(), dtype=pl.String) for name, values in names.items())
    return finish_events(named.with_row_index("row").drop("user", "item", "session"))


def _events_of(slates: pl.DataFrame, action: str, time_us: pl.Expr, value: pl.Expr) -> pl.DataFrame:
    return slates.select(
        "user",
        "item",
        "session",
        pl.lit(action).alias("action"),
        value.alias("value"),
        time_us.cast(TIME).alias("timestamp"),
        pl.format("s{}", pl.col("session").cast(pl.String).str.zfill(7)).alias("request_id"),
        pl.col("position").cast(pl.Int32),
        "propensity",
        pl.lit(None, dtype=pl.String).alias("split"),
    )


def _ids(table: pl.DataFrame) -> tuple[str, ...]:
    """The table's first column, which holds its ids."""
    return tuple(table.to_series(0).to_list())


def _normalised(weights: np.ndarray) -> np.ndarray:
    return np.asarray(weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-30))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(logits, -60, 60))))


def _microseconds(time: datetime) -> int:
    """UTC microseconds; a naive time counts as UTC."""
    aware = time if time.tzinfo else time.replace(tzinfo=UTC)
    return int(aware.timestamp()) * 1_000_000 + aware.microsecond
