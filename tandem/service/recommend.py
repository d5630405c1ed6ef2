"""The online spine: request -> user row -> query -> candidates -> item columns -> predictions -> rerank -> slate -> served-log.

In: an `Ask`. Out: a `Slate`. Each stage is timed under its own name and has a named fallback; the slate says what degraded.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from feature_repo.online import UserRow
from feature_repo.replay import features_read
from ranking.ranker import probabilities
from ranking.rerank import by_score, explore, mmr
from retrieval.candidates import Candidates
from retrieval.filters import CATEGORY, Filters
from retrieval.listing import Listing
from retrieval.retriever import Queries
from tandem.core.errors import InputError, NotFoundError, UnavailableError
from tandem.core.schema import check_id, to_us
from tandem.service.assemble import Users, pairs
from tandem.service.live_items import LiveItems
from tandem.service.parts import Parts
from tandem.service.reasons import Reasons
from tandem.service.retrieve import Retrieved, retrieved_items
from tandem.service.slate import Ask, Slate, SlateItem, Why
from tandem.service.stage_clock import StageClock

STALE: Final = "stale_features"
WORDS_WEIGHT: Final = 1.5
"""What closeness to a sentence weighs against the ranker's order, both standardised."""


class Recommender:
    """One loaded release that answers; immutable, shared between threads. `wiring.open_recommender` makes one."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.release = parts.release
        self._reasons = Reasons(parts)
        self._rng = np.random.default_rng()

    def recommend(self, ask: Ask, now: datetime | None = None) -> Slate:
        """The spine. Unknown users, items and words are answered; raises InputError only for an ask that means nothing."""
        ask, now = _checked(ask), now or self._parts.clock()
        clock = self._started(ask.deadline)
        users, cold, read = self._user(ask, now, clock)
        sentence, truncated = self._sentence(ask, clock)
        queries = self._queries(ask, users, sentence, now)
        found, tower = self._candidates(queries, max(self._parts.config.k, ask.k), clock)
        as_of = self._usable_as_of(now, clock)
        features, names, known = self._features(users, found, tower, as_of, clock)
        scores, predictions = self._predict(found, tower, features, names, clock)
        scores = self._with_words(scores, found, queries)
        order, propensity = self._rerank(found, scores, ask.k, clock)
        with clock.stage("explain"):
            items = self._reasons.items(users, found, order, propensity, scores, predictions, queries, now)
        slate = self._slate(ask, items, cold, truncated, clock)
        self._log(ask, slate, read, as_of, self._first_item(known, order) if as_of else None)
        return slate

    def retrieve(self, ask: Ask, now: datetime | None = None) -> Retrieved:
        """The spine up to its candidates: k of them, with the rank and score of each source that named them."""
        ask, now = _checked(ask), now or self._parts.clock()
        clock, retriever = self._started(ask.deadline), self._parts.retriever
        users, cold, _ = self._user(ask, now, clock)
        sentence, truncated = self._sentence(ask, clock)
        queries = self._queries(ask, users, sentence, now)
        found, tower = self._candidates(queries, ask.k, clock)
        rows = found.ids[0].tolist()
        items = retrieved_items(found, tower[0], [self._now.item_id(row) for row in rows], [self._now.title(row) for row in rows])
        eligible, removed = retriever.eligible(queries)
        request_id = ask.request_id or uuid.uuid4().hex
        return Retrieved(
            items, self.release, request_id, retriever.index.kind, eligible, removed, tuple(clock.degraded), clock.total(),
            cold, truncated,
        )  # fmt: skip

    def rank(self, ask: Ask, item_ids: Sequence[str], now: datetime | None = None) -> Slate:
        """The caller's own items, best score first; what the release does not hold is left out. Nothing is reranked or logged.

        Ranks and scores by source, which the ranker reads, are those among these items, as with any other filter.
        """
        own = tuple(dict.fromkeys(check_id(each, "item_id") for each in item_ids))
        filters = replace(ask.filters, include=own, seen=True, available=False)
        ask, now = _checked(replace(ask, k=max(len(own), 1), filters=filters)), now or self._parts.clock()
        clock = self._started(ask.deadline)
        users, cold, _ = self._user(ask, now, clock)
        sentence, truncated = self._sentence(ask, clock)
        queries = self._queries(ask, users, sentence, now)
        found, tower = self._candidates(queries, ask.k, clock)
        features, names, _ = self._features(users, found, tower, self._usable_as_of(now, clock), clock)
        scores, predictions = self._predict(found, tower, features, names, clock)
        scores = self._with_words(scores, found, queries)
        with clock.stage("explain"):
            order, sure = by_score(scores), np.ones(len(scores))
            items = self._reasons.items(users, found, order, sure, scores, predictions, queries, now)
        return self._slate(ask, items, cold, truncated, clock)

    def similar(self, item_id: str, k: int = 10, filters: Filters | None = None, now: datetime | None = None) -> Slate:
        """The items nearest to one. Raises NotFoundError for an item that the release does not hold."""
        retriever, clock, filters = self._parts.retriever, self._started(), filters or Filters()
        item = self._row(item_id)
        with clock.stage("similar"):
            masks = retriever.masks(filters, to_us(now or self._parts.clock()))
            rows, scores = retriever.similar(item, k, masks, retriever.rows(filters.exclude))
        title = self._now.title(item)
        items = tuple(
            SlateItem(
                self._now.item_id(row), self._now.title(row), self._now.categories(row), float(score), {},
                f"Similar to {title}", "similar_to", "towers", place + 1, 1.0,
            )
            for place, (row, score) in enumerate(zip(rows.tolist(), scores, strict=True))
        )  # fmt: skip
        return Slate(items, self.release, uuid.uuid4().hex, tuple(clock.degraded), clock.total())

    def why(self, user_id: str, item_id: str, now: datetime | None = None) -> Why:
        """Which stage dropped the item for this user, or at what rank and score it passed each of them."""
        now, clock = now or self._parts.clock(), self._started()
        item = self._row(item_id)
        ask = _checked(Ask(user_id=user_id))
        users, _, _ = self._user(ask, now, clock)
        queries = self._queries(ask, users, None, now)
        traced = self._parts.retriever.trace(queries, item, self._parts.config)
        stages: list[tuple[str, str, int | None, float | None]] = [
            ("filters", "removed" if traced.removed in queries.filters or traced.removed == "excluded" else "kept", None, None)
        ]
        stages += [(f"candidates: {name}", "found", rank + 1, score) for name, (rank, score) in traced.found.items()]
        if traced.removed is not None:
            return Why(user_id, item_id, self._now.title(item), _removed(traced.removed), tuple(stages))
        found, tower = self._candidates(queries, self._parts.config.k, clock)
        features, names, _ = self._features(users, found, tower, self._usable_as_of(now, clock), clock)
        scores, predictions = self._predict(found, tower, features, names, clock)
        place = int(np.flatnonzero(found.ids[0] == item)[0])
        rank = int((scores > scores[place]).sum()) + 1
        slate, _ = self._rerank(found, scores, 10, clock)
        shown = np.flatnonzero(slate == place)
        stages.append(
            ("ranker", _spoken({name: float(values[place]) for name, values in predictions.items()}), rank, float(scores[place]))
        )
        stages.append(
            ("slate", "shown" if len(shown) else "not among the first 10", int(shown[0]) + 1 if len(shown) else None, None)
        )
        verdict = (
            f"shown at position {int(shown[0]) + 1}"
            if len(shown)
            else f"ranked {rank} of {len(scores)} candidates: not among the first 10"
        )
        values = features[place].tolist() if len(features) else []
        read = {name: None if value != value else value for name, value in zip(names, values, strict=False)}
        return Why(user_id, item_id, self._now.title(item), verdict, tuple(stages), read)

    @property
    def live(self) -> LiveItems:
        """Where single items are put and deleted. Raises UnavailableError for a release without a workspace."""
        if self._parts.live is None:
            raise UnavailableError(f"{self.release} answers without a workspace; open it in one to change items")
        return self._parts.live

    def _started(self, deadline: float = math.inf) -> StageClock:
        """A request's clock, after a look at what was put and deleted since the last one."""
        clock = StageClock(deadline)
        if self._parts.live is not None and not self._parts.live.look():
            clock.degraded.append("item_changes_unavailable")
        return clock

    @property
    def _now(self) -> Listing:
        """The catalogue of this moment. Dense ids keep their meaning, so stages may each look at a newer one."""
        return self._parts.retriever.listing

    @property
    def attributes(self) -> Mapping[str, str]:
        """What filters may ask of items beside categories: names, and whether their values are numbers or texts."""
        return self._parts.retriever.attributes

    def check(self, filters: Filters) -> None:
        """Raise InputError for filters by what items do not have."""
        self._parts.retriever.check(filters)

    @property
    def features_as_of(self) -> datetime | None:
        """The moment that the item features in use were written for."""
        return None if self._parts.items is None else self._parts.items.as_of

    @property
    def features_age(self) -> timedelta | None:
        """How old those features are by the clock that requests are answered by."""
        as_of = self.features_as_of
        return None if as_of is None else self._parts.clock() - as_of

    @property
    def rows_dropped(self) -> int:
        """Rows that the served-log gave up."""
        return 0 if self._parts.log is None else self._parts.log.dropped

    def warm(self) -> None:
        """Load now what is otherwise loaded at the first sentence. What fails here degrades an answer later, which says so."""
        self._sentence(Ask(query="warm up"), StageClock())

    def close(self) -> None:
        """Write what the served-log still holds."""
        if self._parts.log is not None:
            self._parts.log.close()

    # ------------------------------------------------------------------------------------------------------------- stages

    def _user(self, ask: Ask, now: datetime, clock: StageClock) -> tuple[Users, bool, UserRow | None]:
        """The user's features with the session's items behind their history, and the row that they came from, if one was read.

        An unknown user has only the session.
        """
        read: UserRow | None = None
        with clock.stage("user", "user_features_unavailable"):
            if ask.user_id is not None and self._parts.users is not None:
                (read,) = self._parts.users.read([ask.user_id])
        if read is not None and read.expired:
            clock.degraded.append(STALE)
        row = {} if read is None else dict(read.features)
        cold = not row.get("history_items")
        if ask.session:
            row["history_items"] = [*(row.get("history_items") or ()), *ask.session]
            row["history_times"] = [*(row.get("history_times") or ()), *[to_us(now)] * len(ask.session)]
        return self._parts.assembler.users([row], np.array([to_us(now)], np.int64), [ask.context]), cold, read

    def _sentence(self, ask: Ask, clock: StageClock) -> tuple[NDArray[np.float32] | None, bool]:
        """The sentence's vector (1, T), and whether the model could not read all of it."""
        vector: NDArray[np.float32] | None = None
        truncated = False
        with clock.stage("query", "text_encoder_unavailable"):
            if ask.query and ask.query.strip():
                clock.in_time()
                if self._parts.encode is None:
                    raise RuntimeError("no encoder")
                vector, truncated = self._parts.encode([ask.query]), self._parts.encode.truncates(ask.query)
        return vector, truncated

    def _queries(self, ask: Ask, users: Users, sentence: NDArray[np.float32] | None, now: datetime) -> Queries:
        retriever = self._parts.retriever
        out = retriever.rows((*ask.exclude, *ask.filters.exclude))
        if retriever.exclude_seen if ask.filters.seen is None else not ask.filters.seen:
            seen = self._parts.seen.of(ask.user_id) if ask.user_id is not None and self._parts.seen is not None else ()
            history = users.histories[0]
            out = np.unique(np.concatenate([out, history[history >= 0], retriever.rows(seen)]))
        masks = retriever.masks(ask.filters, to_us(now))
        if ask.categories:
            mask = retriever.masks(Filters(categories_any=ask.categories, available=False), 0)[CATEGORY]
            masks[CATEGORY] = masks[CATEGORY] & mask if CATEGORY in masks else mask
        return Queries(users.histories, [out], to_us(now), sentence, masks)

    def _candidates(self, queries: Queries, k: int, clock: StageClock) -> tuple[Candidates, NDArray[np.float32]]:
        config = replace(self._parts.config, k=k)
        with clock.stage("candidates"):
            found, tower = self._parts.retriever.candidates(queries, config)
            real = found.ids[0] >= 0
            found = Candidates(
                found.ids[:, real],
                {name: values[:, real] for name, values in found.scores.items()},
                {name: values[:, real] for name, values in found.ranks.items()},
                found.source[:, real],
                found.names,
            )
        if self._parts.retriever.index.gpu_lost:
            clock.degraded.append("cpu")
        if not found.ids.shape[1]:
            clock.degraded.append("nothing_eligible" if self._now.listed.any() else "empty_catalogue")
        if not np.isfinite(tower[:, real]).all():  # the other sources have answered
            clock.degraded.append("query_vector_unusable")
            tower = np.nan_to_num(tower, nan=0.0, posinf=0.0, neginf=0.0)
        return found, tower[:, real]

    def _usable_as_of(self, now: datetime, clock: StageClock) -> datetime | None:
        """The moment that the item features in use were written for; None where there are none, or none young enough."""
        as_of, limit = self.features_as_of, self._parts.stale_after
        if as_of is None or limit is None or now - as_of <= limit:
            return as_of
        if STALE not in clock.degraded:
            clock.degraded.append(STALE)
        return None

    def _features(
        self, users: Users, found: Candidates, tower: NDArray[np.float32], as_of: datetime | None, clock: StageClock
    ) -> tuple[NDArray[np.float32], tuple[str, ...], dict[str, NDArray[Any]]]:
        """The ranker's matrix, its names, and the item features as they are stored; all empty where they could not be read."""
        features: NDArray[np.float32] = np.empty((0, 0), np.float32)
        names: tuple[str, ...] = ()
        stored: dict[str, NDArray[Any]] = {}
        with clock.stage("items", "item_features_unavailable"):
            clock.in_time()
            stored = self._item_columns(pairs(found)[1], as_of)
            features, names = self._parts.assembler.features(users, found, tower, stored)
        return features, names, stored

    def _item_columns(self, items: NDArray[np.int64], as_of: datetime | None) -> dict[str, NDArray[Any]]:
        known = self._parts.items
        if known is None or as_of is None:
            return dict.fromkeys(self._parts.assembler.item_names, np.full(len(items), np.nan))
        old = items < len(self._parts.retriever.items)
        values = np.full((len(items), len(known.names)), np.nan)
        values[old] = known.gather(items[old])
        columns = dict(zip(known.names, values.T, strict=True))
        changed = self._now.changed(items)
        for name in set(columns) & self._now.stock.columns.numbers.keys() if changed.any() else ():
            columns[name][changed] = self._now.attribute(name, items[changed])  # an attribute is known as soon as it is put
        return columns

    def _predict(
        self,
        found: Candidates,
        tower: NDArray[np.float32],
        features: NDArray[np.float32],
        names: tuple[str, ...],
        clock: StageClock,
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
        scores, predictions = tower[0], dict[str, NDArray[np.float32]]()
        with clock.stage("predict", "ranker_unavailable"):
            clock.in_time()
            if names and len(features):
                logits = self._parts.ranker.logits(features, names)
                predictions, scores = probabilities(logits), self._parts.ranker.utility.of_logits(logits)
        return scores, predictions

    def _with_words(self, scores: NDArray[np.float32], found: Candidates, queries: Queries) -> NDArray[np.float32]:
        """With a sentence: the ranker's order and closeness to the words, both as z-scores over the candidates, added.

        The ranker has never seen a sentence, so the words weigh more; without a history it has only popularity to say.
        """
        close = self._reasons.close_to_words(queries, found.ids[0])
        if close is None or len(scores) < 2:
            return scores
        personal = 1.0 if (queries.histories >= 0).any() else 0.25
        return personal * _standardised(scores) + WORDS_WEIGHT * _standardised(close)

    def _rerank(
        self, found: Candidates, scores: NDArray[np.float32], k: int, clock: StageClock
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        own = self._parts.rerank
        order, propensity = by_score(scores)[:k], np.ones(min(k, len(scores)))
        with clock.stage("rerank", "rerank_skipped"):
            clock.in_time()
            categories = self._parts.assembler.categories(found.ids[0])
            if own.epsilon > 0:
                explored = explore(mmr(scores, categories, own.diversity, 2 * k), k, own.epsilon, min(own.slot, k - 1), self._rng)
                order, propensity = explored.order, explored.propensity
            else:
                order = mmr(scores, categories, own.diversity, k)
        return order, propensity

    def _slate(self, ask: Ask, items: tuple[SlateItem, ...], cold: bool, truncated: bool, clock: StageClock) -> Slate:
        return Slate(
            items, self.release, ask.request_id or uuid.uuid4().hex, tuple(clock.degraded), clock.total(), cold, truncated
        )

    def _first_item(self, columns: Mapping[str, NDArray[Any]], order: NDArray[np.int64]) -> dict[str, float] | None:
        """The slate's first item's features as they are stored; None when there is none, or no features could be read."""
        if self._parts.items is None or not columns or not len(order):
            return None
        return {name: float(columns[name][order[0]]) for name in self._parts.assembler.item_names}

    def _log(
        self, ask: Ask, slate: Slate, read: UserRow | None, items_as_of: datetime | None, first: Mapping[str, float] | None
    ) -> None:
        if self._parts.log is None:
            return
        kept = features_read(read, items_as_of, first)
        now = datetime.now(UTC)
        self._parts.log.write(
            [
                {
                    "request_id": slate.request_id, "user_id": ask.user_id, "item_id": item.item_id, "position": item.position,
                    "score": item.score, "propensity": item.propensity, "timestamp": now, "release": slate.release,
                    "view_versions": self._parts.views, "features_read": kept if item.position == 1 else None,
                    "took_ms": slate.took_ms["total"], "degraded": ",".join(slate.degraded), **ask.noted,
                }
                for item in slate.items
            ]
        )  # fmt: skip

    def _row(self, item_id: str) -> int:
        item_id = check_id(item_id, "item_id")
        row = self._now.row(item_id)
        if row is None or not self._now.listed[row]:
            raise NotFoundError(
                f"release {self.release} holds no item {item_id!r}; `tandem search WORDS` finds items by their text"
            )
        return row


def _checked(ask: Ask) -> Ask:
    if ask.k < 1:
        raise InputError(f"k = {ask.k}; ask for at least 1 item")
    user = None if ask.user_id is None else check_id(ask.user_id, "user_id")
    return replace(ask, user_id=user, session=tuple(check_id(each, "session item") for each in ask.session))


def _removed(why: str) -> str:
    spoken = {
        "excluded": "removed: the user has already had it",
        "not found": "no candidate source returned it within reach",
        "too deep": "candidate sources know it, but too far down their lists",
        "crowded out": "a candidate source returned it, but better candidates took the room",
    }
    return spoken.get(why, f"removed by filter: {why}")


def _spoken(predictions: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in predictions.items())


def _standardised(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean 0 and standard deviation 1 over the candidates."""
    return np.asarray((values - values.mean()) / (values.std() + 1e-9), np.float32)
