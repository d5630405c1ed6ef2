"""Who learns from what: events to requests, truth and training events, for any of the five splits.

In: events, the source and `SplitConfig`. Out: `SplitResult`. Nothing here looks at features; a request is a user and a moment,
its history is what that user did strictly before, its truth what the user did in the same part from then on.

    users         users are cut into the four parts; test and calibrate users are asked once, after the first 80% of their history
    time          all events are cut at three quantiles of time; every user of a part is asked at their first event there
    leave_one_out each user's last history event is the test, the one before calibrates, the one before that is the ranker's
    fraction      as `time`, with each user's own quantiles
    given         as `time`, with the parts that the column `split` names

Everything is decided by stable hashes of ids and the seed: row order, machine and library versions change nothing.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

import numpy as np
import polars as pl

from tandem.core.errors import InputError
from tandem.core.schema import PARTS, REQUESTS, TIME, Source, Split

GIVEN: Final[dict[str, str]] = {
    **{part: part for part in PARTS},
    "train": "towers",
    "valid": "calibrate",
    "validation": "calibrate",
    "val": "calibrate",
}
"""What the column `split` may say, and the part that it means."""

FRACTIONS: Final = (0.65, 0.15, 0.05, 0.15)
"""Shares of users in towers, ranker, calibrate, test."""

_ASKED: Final = ("ranker", "calibrate", "test")


@dataclass(frozen=True)
class SplitConfig:
    """How to split. `fractions` of users ("users"), `quantiles` of time or of each user's history where the other parts begin."""

    kind: Split
    seed: int = 0
    fractions: tuple[float, float, float, float] = FRACTIONS
    quantiles: tuple[float, float, float] = (0.70, 0.85, 0.90)
    fold_in: float = 0.8
    requests_per_user: int = 4

    def __post_init__(self) -> None:
        if min(self.fractions) < 0 or not math.isclose(sum(self.fractions), 1.0, abs_tol=1e-9):
            raise InputError(f"split fractions {self.fractions} must be four numbers >= 0 that add up to 1")
        if not 0 < self.quantiles[0] <= self.quantiles[1] <= self.quantiles[2] < 1:
            raise InputError(f"split quantiles {self.quantiles} must rise within (0, 1)")
        if not 0 < self.fold_in < 1:
            raise InputError(f"fold_in = {self.fold_in} must lie within (0, 1)")
        if self.requests_per_user < 1:
            raise InputError(f"requests_per_user = {self.requests_per_user} must be at least 1")


@dataclass(frozen=True)
class SplitResult:
    """A finished split.

    requests:        `schema.REQUESTS` + n_history (Int64: history events strictly before), sorted by (timestamp, request_id)
    truth:           [request_id, item_id, task], distinct, sorted; every request has a truth of the positive task
    training_events: what the towers and baselines may learn from, columns as in events
    cutoffs:         part -> when it begins: for "time" the cut itself, otherwise the part's earliest request
    """

    requests: pl.DataFrame
    truth: pl.DataFrame
    training_events: pl.DataFrame
    cutoffs: dict[str, datetime] = field(default_factory=dict)


def user_order(user_ids: pl.Series, seed: int, fractions: tuple[float, float, float, float] = FRACTIONS) -> pl.DataFrame:
    """Distinct users in seeded hash order: [user_id, rank (0..n-1), part].

    Parts are quantiles of the rank in the order of `schema.PARTS`, so that held-out users come last.
    """
    users = user_ids.drop_nulls().unique().sort()
    keys = [_hash(f"{seed}|{user}") for user in users.to_list()]
    ordered = pl.DataFrame({"user_id": users, "__key": pl.Series(keys, dtype=pl.UInt64)}).sort("__key", "user_id").drop("__key")
    edges = np.round(np.cumsum(fractions)[:-1] * ordered.height).astype(np.int64)
    ranks = np.arange(ordered.height, dtype=np.int64)
    parts = np.array(PARTS, dtype=object)[np.searchsorted(edges, ranks, side="right")]
    return ordered.with_columns(pl.Series("rank", ranks), pl.Series("part", parts.tolist(), dtype=pl.String))


def make_requests(events: pl.DataFrame, source: Source, config: SplitConfig) -> SplitResult:
    """Split `events` (`schema.EVENTS`) as `config` says. Raises InputError for "given" without usable `split` values.

    Requests without a positive truth are left out: they could teach and measure nothing about the order of items. Where the
    source excludes seen items, an item of the user's history before the request is no truth.
    """
    ordered = events.sort("timestamp", "event_id")
    parted = _with_parts(ordered, source, config)
    moments = _moments(parted, source, config)
    requests = _named(moments)
    truth = _truth(requests, parted, source)
    answered = truth.filter(pl.col("task") == source.positive).select("request_id").unique()
    requests = requests.join(answered, on="request_id", how="semi")
    truth = truth.join(answered, on="request_id", how="semi").sort("request_id", "item_id", "task")
    requests = _with_history_size(requests, ordered, source).sort("timestamp", "request_id")
    training = parted.filter(pl.col("part") == "towers").select(events.columns)
    return SplitResult(requests, truth, training, _cutoffs(requests, ordered, config))


def _with_parts(events: pl.DataFrame, source: Source, config: SplitConfig) -> pl.DataFrame:
    """Events with `part`: whose truth or training they may be; null for none."""
    match config.kind:
        case "users":
            parts = user_order(events["user_id"], config.seed, config.fractions).select("user_id", "part")
            return events.join(parts, on="user_id", how="left", maintain_order="left")
        case "time":
            return events.with_columns(_part_from([pl.lit(cut) for cut in _time_cuts(events, config)]))
        case "fraction":
            return _by_own_starts(events, _fraction_starts(events, source, config))
        case "leave_one_out":
            return _leave_one_out(events, source)
        case "given":
            return _given(events)


def _time_cuts(events: pl.DataFrame, config: SplitConfig) -> list[datetime]:
    if events.is_empty():
        raise InputError("there are no events to split; import some first")
    times = events["timestamp"].sort()
    return [times[min(len(times) - 1, math.floor(quantile * len(times)))] for quantile in config.quantiles]


def _part_from(starts: list[pl.Expr]) -> pl.Expr:
    """The last part whose start is not after the event; a null start is a part that does not happen."""
    ranker, calibrate, test = starts
    when = pl.col("timestamp")
    later = pl.when(when >= test).then(pl.lit("test")).when(when >= calibrate).then(pl.lit("calibrate"))
    return later.when(when >= ranker).then(pl.lit("ranker")).otherwise(pl.lit("towers")).alias("part")


def _by_own_starts(events: pl.DataFrame, starts: pl.DataFrame) -> pl.DataFrame:
    """Parts from each user's own starts [user_id, ranker, calibrate, test]; a user without any is all training."""
    beside = events.join(starts, on="user_id", how="left", maintain_order="left")
    return beside.with_columns(_part_from([pl.col(part) for part in _ASKED])).drop(*_ASKED)


def _fraction_starts(events: pl.DataFrame, source: Source, config: SplitConfig) -> pl.DataFrame:
    own = events.filter(source.is_history()).group_by("user_id", maintain_order=True).agg("timestamp")
    size = pl.col("timestamp").list.len()
    starts = [
        pl.col("timestamp").list.get((size * quantile).floor().cast(pl.Int64), null_on_oob=True).alias(part)
        for part, quantile in zip(_ASKED, config.quantiles, strict=True)
    ]
    return own.select("user_id", *starts)


def _leave_one_out(events: pl.DataFrame, source: Source) -> pl.DataFrame:
    """Windows begin at the last three history events, so that likes or returns of the left-out item come with it.

    Exactly one history event is left out per part: others of the same moment are neither truth nor training.
    """
    history = events.filter(source.is_history()).select("event_id", "user_id", "timestamp")
    from_end = pl.int_range(pl.len()).reverse().over("user_id")
    # The first history event always stays with the towers: nobody is left out whole.
    last = history.with_columns(from_end.alias("__left"), pl.int_range(pl.len()).over("user_id").alias("__place"))
    last = last.filter((pl.col("__left") < len(_ASKED)) & (pl.col("__place") > 0))
    named = last.with_columns(
        pl.col("__left").replace_strict([0, 1, 2], list(reversed(_ASKED)), return_dtype=pl.String).alias("__own")
    )
    starts = [pl.col("timestamp").filter(pl.col("__own") == part).first().alias(part) for part in _ASKED]
    parted = _by_own_starts(events, named.group_by("user_id").agg(*starts))
    chosen = parted.join(named.select("event_id", "__own"), on="event_id", how="left", maintain_order="left")
    tied = source.is_history() & (pl.col("part") != "towers")
    part = pl.when(tied).then(pl.col("__own")).otherwise(pl.col("part")).alias("part")
    return chosen.with_columns(part).drop("__own")


def _given(events: pl.DataFrame) -> pl.DataFrame:
    named = events["split"].drop_nulls().str.to_lowercase().unique().sort().to_list()
    unknown = [name for name in named if name not in GIVEN]
    if unknown or not named:
        found = f"holds {unknown[:3]}" if unknown else "is empty"
        raise InputError(f"split = 'given' needs events whose column split names a part, but it {found}; use {list(GIVEN)}")
    return events.with_columns(
        pl.col("split").str.to_lowercase().replace_strict(GIVEN, default=None, return_dtype=pl.String).alias("part")
    )


def _moments(parted: pl.DataFrame, source: Source, config: SplitConfig) -> pl.DataFrame:
    """When each user is asked: [user_id, part, timestamp], distinct."""
    asked = parted.filter(pl.col("part").is_in(list(_ASKED)))
    if config.kind == "users":
        once = _fold_in_moments(asked.filter(pl.col("part") != "ranker"), source, config)
    else:
        once = asked.filter(pl.col("part") != "ranker").group_by("user_id", "part").agg(pl.col("timestamp").min())
    return pl.concat([once, _ranker_moments(asked.filter(pl.col("part") == "ranker"), source, config)]).sort(
        "part", "user_id", "timestamp"
    )


def _history_moments(events: pl.DataFrame, source: Source) -> pl.DataFrame:
    """History events as [user_id, part, timestamp, place, size].

    `timestamp` is when the slate that led to the event was shown, where that is known and in the same events: asking at the
    click itself would put half a slate into the history and its other half into the truth.
    """
    history = events.filter(source.is_history()).select("user_id", "part", "timestamp", "request_id")
    if source.impression is not None:
        shown = events.filter(pl.col("action") == source.impression, pl.col("request_id").is_not_null())
        shown = shown.group_by("user_id", "request_id").agg(pl.col("timestamp").min().alias("__shown"))
        history = history.join(shown, on=["user_id", "request_id"], how="left", maintain_order="left")
        history = history.with_columns(pl.min_horizontal("timestamp", "__shown").alias("timestamp"))
    return history.select(
        "user_id",
        "part",
        "timestamp",
        pl.int_range(pl.len()).over("user_id").alias("place"),
        pl.len().over("user_id").alias("size"),
    )


def _fold_in_moments(asked: pl.DataFrame, source: Source, config: SplitConfig) -> pl.DataFrame:
    """The moment of the first history event after the fold-in.

    Where that moment holds the user's whole history before it too (many ratings in one second), the next moment, if there is one.
    """
    history = _history_moments(asked, source)
    cut = history.filter(pl.col("place") >= (pl.col("size") * config.fold_in).floor())
    begin = history.group_by("user_id").agg(pl.col("timestamp").min().alias("__begin"))
    later = cut.join(begin, on="user_id", how="left")
    moment = pl.coalesce(pl.col("timestamp").filter(pl.col("timestamp") > pl.col("__begin")).min(), pl.col("timestamp").min())
    return later.group_by("user_id", "part").agg(moment.alias("timestamp"))


def _ranker_moments(asked: pl.DataFrame, source: Source, config: SplitConfig) -> pl.DataFrame:
    """Up to `requests_per_user` distinct moments, chosen by hash.

    "users" holds all that a user did, so that nothing lies before the first moment: it is asked about only where it is the only
    one.
    """
    moments = _history_moments(asked, source).select("user_id", "part", "timestamp").unique().sort("user_id", "timestamp")
    if config.kind == "users":
        moments = moments.filter(
            (pl.col("timestamp") > pl.col("timestamp").min().over("user_id")) | (pl.len().over("user_id") == 1)
        )
    keys = [
        _hash(f"{config.seed}|{user}|{time}")
        for user, time in moments.select("user_id", pl.col("timestamp").cast(pl.Int64)).iter_rows()
    ]
    shuffled = moments.with_columns(pl.Series("__key", keys, dtype=pl.UInt64)).sort("user_id", "__key")
    return shuffled.filter(pl.int_range(pl.len()).over("user_id") < config.requests_per_user).drop("__key")


def _named(moments: pl.DataFrame) -> pl.DataFrame:
    rows = moments.select("part", "user_id", pl.col("timestamp").cast(pl.Int64)).iter_rows()
    ids = [hashlib.blake2b("|".join(map(str, row)).encode(), digest_size=12).hexdigest() for row in rows]
    named = moments.with_columns(pl.Series("request_id", ids, dtype=pl.String), pl.col("timestamp").cast(TIME))
    return named.select(*REQUESTS)


def _truth(requests: pl.DataFrame, parted: pl.DataFrame, source: Source) -> pl.DataFrame:
    """What each request's user did in its part from its moment on: distinct [request_id, item_id, task]."""
    labels = [parted.filter(task.matches()).with_columns(pl.lit(task.name).alias("task")) for task in source.tasks]
    labelled = pl.concat(
        [each.select("user_id", "part", "item_id", "task", pl.col("timestamp").alias("__done")) for each in labels]
    )
    labelled = labelled.filter(pl.col("part").is_in(list(_ASKED)))
    found = requests.join(labelled, on=["user_id", "part"], how="inner").filter(pl.col("__done") >= pl.col("timestamp"))
    if source.exclude_seen:
        history = parted.filter(source.is_history())
        first = history.group_by("user_id", "item_id").agg(pl.col("timestamp").min().alias("__seen"))
        found = found.join(first, on=["user_id", "item_id"], how="left")
        found = found.filter(pl.col("__seen").is_null() | (pl.col("__seen") >= pl.col("timestamp")))
    return found.select("request_id", "item_id", "task").unique()


def _with_history_size(requests: pl.DataFrame, events: pl.DataFrame, source: Source) -> pl.DataFrame:
    history = events.filter(source.is_history()).select("user_id", "timestamp")
    counted = history.with_columns(pl.int_range(1, pl.len() + 1).over("user_id").alias("n_history"))
    counted = counted.unique(["user_id", "timestamp"], keep="last", maintain_order=True).sort("timestamp")
    asked = requests.sort("timestamp")
    joined = asked.join_asof(
        counted, on="timestamp", by="user_id", strategy="backward", allow_exact_matches=False, check_sortedness=False
    )
    return joined.with_columns(pl.col("n_history").fill_null(0).cast(pl.Int64))


def _cutoffs(requests: pl.DataFrame, events: pl.DataFrame, config: SplitConfig) -> dict[str, datetime]:
    if config.kind == "time":
        return dict(zip(_ASKED, _time_cuts(events, config), strict=True))
    earliest = dict(requests.group_by("part").agg(pl.col("timestamp").min()).rows())
    return {part: earliest[part] for part in _ASKED if part in earliest}


def _hash(text: str) -> int:
    """64 stable bits of `text`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
