"""Several sources -> one list of candidates per request: unique, eligible, and never fewer than k while k items are eligible.

In: a batch of requests (query vectors, histories, what to leave out) and the sources. Out: `Candidates`, where every item carries
its score and rank from each source that returned it. Spine: every source answers -> what is barred is struck out -> merge.
"Popular" is always asked last; because it can name any k eligible items, the merged list is full whenever that is possible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from retrieval.baselines import ItemKNN
from retrieval.checks import MAX_K
from retrieval.index import VectorIndex
from retrieval.topk import best
from tandem.core.errors import IncompatibleError, InputError
from tandem.core.schema import MICROSECONDS_PER_DAY

Floats: TypeAlias = NDArray[np.float32]
Ids: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]
Answer: TypeAlias = tuple[Floats, Ids]
"""Scores (B, k) float32 and ids (B, k) int64, best first, -inf and -1 as padding."""

POPULAR: Final = "popular"
_BLOCK_CELLS: Final = 4_000_000
_BLOCK_ROWS: Final = 1_024
_SUM_CELLS: Final = 1_000_000


@dataclass(frozen=True, eq=False)
class QueryBatch:
    """B requests over N items. Ids are dense item ids.

    `vectors` (B, D) float32; `history` (B, H) int64, oldest first, padded with -1 on the left; `exclude`: per request the ids
    that must not be returned (seen or removed); `allowed` (N,) bool and the named masks in `filters` hold for the whole batch.
    """

    vectors: Floats
    history: Ids
    exclude: Sequence[Ids]
    allowed: Mask | None = None
    filters: Mapping[str, Mask] = field(default_factory=dict)
    _barred: dict[int, Mask] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = {"vectors": len(self.vectors), "history": len(self.history), "exclude": len(self.exclude)}
        if len(set(sizes.values())) != 1:
            raise IncompatibleError(f"a batch's parts differ in length: {sizes}; give one row of each per request")

    def __len__(self) -> int:
        return len(self.history)

    def rows(self, start: int, end: int) -> QueryBatch:
        """The requests start..end-1."""
        return QueryBatch(self.vectors[start:end], self.history[start:end], self.exclude[start:end], self.allowed, self.filters)

    def eligible(self) -> Mask | None:
        """(N,) bool: allowed and passed by every filter; None when nothing is filtered."""
        masks = [mask for mask in (self.allowed, *self.filters.values()) if mask is not None]
        return np.logical_and.reduce(masks) if masks else None

    def excluded(self) -> tuple[Ids, Ids]:
        """(rows, ids) of everything excluded, flat."""
        rows = np.repeat(np.arange(len(self)), [len(ids) for ids in self.exclude])
        return rows, np.concatenate([np.empty(0, np.int64), *self.exclude]).astype(np.int64)

    def barred(self, items: int) -> Mask:
        """(B, N) bool: what must not be returned to each request. Made once, all sources ask for it."""
        if items not in self._barred:
            self._barred[items] = self._bar(items)
        return self._barred[items]

    def _bar(self, items: int) -> Mask:
        eligible = self.eligible()
        if eligible is not None and eligible.shape != (items,):
            raise IncompatibleError(
                f"the batch filters {eligible.shape} items but the source holds {items}; use one release's parts"
            )
        barred = np.zeros((len(self), items), np.bool_)
        if eligible is not None:
            barred[:] = ~eligible
        rows, ids = self.excluded()
        known = (ids >= 0) & (ids < items)
        barred[rows[known], ids[known]] = True
        return barred


class CandidateSource(Protocol):
    """Something that proposes items: eligible, unique per request, best first."""

    @property
    def name(self) -> str: ...

    def candidates(self, batch: QueryBatch, k: int) -> Answer:
        """Up to k eligible items per request."""
        ...


@dataclass(frozen=True, eq=False)
class TowerSource:
    """Nearest items of the query vector. A vector that is zero or not finite gets no answer: the other sources fill in."""

    index: VectorIndex
    name: str = "towers"

    def candidates(self, batch: QueryBatch, k: int) -> Answer:
        """Ask for as many more as a request excludes, then strike those out; requests with similar numbers go together."""
        scores, ids = _nothing(len(batch), k)
        usable = np.isfinite(batch.vectors).all(axis=1) & batch.vectors.any(axis=1)
        spare = _round_up(np.array([len(ids) for ids in batch.exclude], np.int64))
        barred = batch.barred(self.index.count)
        for extra in np.unique(spare[usable]):
            rows = np.flatnonzero(usable & (spare == extra))
            wide = max(1, min(k + int(extra), self.index.count, MAX_K))
            found = self.index.search(batch.vectors[rows], wide, batch.eligible())
            scores[rows], ids[rows] = _strike(*found, barred[rows], k)
        return scores, ids


@dataclass(frozen=True, eq=False)
class LinearSource:
    """Sum of item-to-item weights over the newest `last` items of the history; only positive sums count.

    `neighbours` (N, K) int32, padded with -1, and their `weights` (N, K) float32.
    """

    name: str
    neighbours: NDArray[np.int32]
    weights: Floats
    last: int = 50

    def candidates(self, batch: QueryBatch, k: int) -> Answer:
        """As many more as a request excludes are looked up, then struck out: cheaper than striking out before."""
        items = len(self.neighbours)
        barred = batch.barred(items)
        scores, ids = _nothing(len(batch), k)
        step = max(1, _SUM_CELLS // (items + 1))
        for start in range(0, len(batch), step):
            block = slice(start, start + step)
            total = self._sums(batch.history[block, -self.last :])
            eligible = batch.eligible()
            if eligible is not None:
                total[:, ~eligible] = 0.0
            found, places = best(total, k + _most_excluded(batch.exclude[block]))
            scores[block], ids[block] = _strike(found, np.where(found > 0, places, -1), barred[block], k)
        return scores, ids

    def _sums(self, history: Ids) -> Floats:
        """(B, N) float32: each different item of a history adds its neighbours' weights."""
        items = len(self.neighbours)
        ids = np.sort(history, axis=1)
        known = (ids >= 0) & (ids < items)
        known[:, 1:] &= ids[:, 1:] != ids[:, :-1]
        rows, places = np.nonzero(known)
        near = self.neighbours[ids[rows, places]]
        cells = np.where(near >= 0, near, items) + rows[:, None] * (items + 1)  # padding falls into one column too many
        weights = self.weights[ids[rows, places]].ravel()
        total = np.bincount(cells.ravel(), weights, minlength=len(history) * (items + 1))
        return np.ascontiguousarray(total.reshape(len(history), items + 1)[:, :items], np.float32)


@dataclass(frozen=True, eq=False)
class RankedSource:
    """The same order for everybody: `order` (M,) ids, best first, and `values` (M,) their scores."""

    name: str
    order: Ids
    values: Floats
    items: int

    def candidates(self, batch: QueryBatch, k: int) -> Answer:
        """Read the order from the top, further down only for as long as some request is short."""
        barred = batch.barred(self.items)
        width = k + _most_excluded(batch.exclude)
        while True:
            head = np.broadcast_to(self.order[:width], (len(batch), min(width, len(self.order))))
            values = np.broadcast_to(self.values[:width], head.shape)
            scores, ids = _strike(values, head, barred, k)
            if width >= len(self.order) or (ids[:, -1:] >= 0).all():
                return scores, ids
            width *= 4


@dataclass(frozen=True, eq=False)
class HistorySource:
    """What the user took before, most often first, the newest of equals first: for sources where people buy again."""

    items: int
    name: str = "history"

    def candidates(self, batch: QueryBatch, k: int) -> Answer:
        """Score = how often + how late (below 1)."""
        history = batch.history
        if not history.shape[1]:
            return _nothing(len(batch), k)
        same = (history[:, :, None] == history[:, None, :]) & (history >= 0)[:, :, None]
        newest = ~np.triu(same, 1).any(axis=2)
        late = (np.arange(history.shape[1]) + 1) / (history.shape[1] + 1)
        value = same.sum(axis=2) + late
        usable = newest & _is_eligible(history, batch.barred(self.items))
        scores, places = best(np.where(usable, value, -np.inf).astype(np.float32), k)
        return scores, np.where(places >= 0, np.take_along_axis(history, np.maximum(places, 0), axis=1), -1)


def covisit_source(neighbours: ItemKNN, keep: int = 100, last: int = 50) -> LinearSource:
    """Items that the same people touched: the `keep` nearest neighbours of the newest `last` items of the history."""
    return LinearSource("covisit", neighbours.indices[:, :keep], neighbours.values[:, :keep], last)


def popular_source(counts: Floats) -> RankedSource:
    """Every item by how many users touched it; equals by lower id."""
    order = np.argsort(-counts, kind="stable")
    return RankedSource(POPULAR, order, counts[order].astype(np.float32), len(counts))


def new_source(available_us: Ids, now_us: int, days: float) -> RankedSource:
    """Items that became available in the last `days` before `now_us`, newest first; score = minus the age in days."""
    age = (now_us - available_us) / MICROSECONDS_PER_DAY
    order = np.argsort(age, kind="stable")
    order = order[(age[order] >= 0) & (age[order] <= days)]
    return RankedSource("new", order, -age[order].astype(np.float32), len(available_us))


def category_source(categories: Ids, counts: Floats, keep: int = 100, last: int = 50) -> LinearSource:
    """The `keep` most popular items that share categories with the history's. `categories` (N, C) int64 codes padded with -1."""
    items, width = categories.shape
    rows, codes = np.repeat(np.arange(items), width), categories.ravel()
    known = codes >= 0
    cells = (np.ones(int(known.sum()), np.float32), (rows[known], codes[known]))
    member = sparse.csr_matrix(cells, shape=(items, int(codes.max(initial=-1)) + 1))
    related = (member @ _best_of_category(member, counts, keep)).tocsr()
    return LinearSource("category", *_padded_rows(related, keep), last)


@dataclass(frozen=True)
class CandidateConfig:
    """`k` candidates per request, of which each source is sure of a share for its own best (`shares`, at most 1 in all)."""

    k: int = 200
    shares: Mapping[str, float] = field(
        default_factory=lambda: {"towers": 0.5, "covisit": 0.2, "history": 0.1, "new": 0.05, "category": 0.05, POPULAR: 0.1}
    )

    def __post_init__(self) -> None:
        if not 1 <= self.k <= MAX_K:
            raise InputError(f"k = {self.k} candidates is outside 1..{MAX_K:,}; 200 is the default")
        total = sum(self.shares.values())
        if min(self.shares.values(), default=0) < 0 or total > 1 + 1e-9:
            raise InputError(
                f"candidate shares {dict(self.shares)} add up to {total:g}; use shares of 0 or more, at most 1 in all"
            )

    def quotas(self, names: Sequence[str]) -> dict[str, int]:
        """Guaranteed slots of each source that is there."""
        return {name: int(self.shares.get(name, 0.0) * self.k + 1e-9) for name in names}


@dataclass(frozen=True, eq=False)
class Candidates:
    """`ids` (B, k) int64, -1 as padding; per source `scores` and `ranks` (B, k) float32, NaN where it did not return the item.

    `source` (B, k) int8: number in `names` of the first source that returned the item, -1 as padding. Ranks start at 0.
    """

    ids: Ids
    scores: dict[str, Floats]
    ranks: dict[str, Floats]
    source: NDArray[np.int8]
    names: tuple[str, ...]


def retrieve(batch: QueryBatch, sources: Sequence[CandidateSource], popular: RankedSource, config: CandidateConfig) -> Candidates:
    """Ask every source, popular last, and merge. Order of the answer: first source's items by its ranks, then the next one's."""
    everyone = _with_popular(sources, popular)
    quotas = config.quotas([source.name for source in everyone])
    step = min(_BLOCK_ROWS, max(16, _BLOCK_CELLS // max(popular.items, 1)))
    starts = range(0, max(len(batch), 1), step)
    return _stacked(
        [_retrieve_block(batch.rows(start, start + step), everyone, popular.items, quotas, config.k) for start in starts]
    )


def merge(results: Mapping[str, Answer], quotas: Mapping[str, int], k: int) -> Candidates:
    """One list per request from the sources' answers, in the order of `results`.

    The first `quotas[name]` items of each source are in for sure; what room is left goes to the sources' items in turn, the first
    source's first. The list is ordered by (first source that returned the item, rank there). InputError for quotas above k.
    """
    _check_quotas(results, quotas, k)
    names = tuple(results)
    sizes = [ids.shape[1] for _, ids in results.values()]
    source, rank = np.repeat(np.arange(len(names)), sizes), np.concatenate([np.arange(size) for size in sizes])
    ids = np.concatenate([ids for _, ids in results.values()], axis=1)
    sure = rank < np.array([quotas.get(name, 0) for name in names])[source]
    first = _first_columns(ids, source)
    columns = _choose(first, sure, k)
    slots = np.split(_slots(columns, first), np.cumsum(sizes)[:-1], axis=1)
    ranks = {name: _ranks(part, k) for name, part in zip(names, slots, strict=True)}
    return Candidates(
        _at(ids, columns),
        {name: _scores_at(results[name][0], ranks[name]) for name in names},
        ranks,
        np.append(source, -1)[columns].astype(np.int8),
        names,
    )


@dataclass(frozen=True)
class Trace:
    """What became of one item in one request: `removed` is None for a candidate, else the reason; `position` counts from 0.

    `found`: per source that knows the item within the depth searched, its rank and score.
    """

    item: int
    removed: str | None
    position: int | None
    found: dict[str, tuple[int, float]]


def removed_by(batch: QueryBatch, request: int, item: int, items: int) -> str | None:
    """Name of the filter that bars `item` from request number `request`: "unknown", "allowed", a filter's name or "excluded"."""
    if not 0 <= item < items:
        return "unknown"
    if batch.allowed is not None and not batch.allowed[item]:
        return "allowed"
    for name, mask in batch.filters.items():
        if not mask[item]:
            return name
    return "excluded" if item in batch.exclude[request] else None


def trace(
    batch: QueryBatch,
    request: int,
    item: int,
    sources: Sequence[CandidateSource],
    popular: RankedSource,
    config: CandidateConfig,
    depth: int = 1_000,
) -> Trace:
    """Why `item` is, or is not, a candidate of request number `request`; sources are searched down to rank `depth`.

    `removed` is what `removed_by` says, or "not found" (no source has it within the depth), "too deep" (sources have it, but
    beyond rank k) or "crowded out" (a source returned it, and other items took the room).
    """
    one = batch.rows(request, request + 1)
    reason = removed_by(one, 0, item, popular.items)
    if reason is not None:
        return Trace(item, reason, None, {})
    found = {
        source.name: _place(source.candidates(one, max(depth, config.k)), item) for source in _with_popular(sources, popular)
    }
    known = {name: place for name, place in found.items() if place is not None}
    position = np.flatnonzero(retrieve(one, sources, popular, config).ids[0] == item)
    if len(position):
        return Trace(item, None, int(position[0]), known)
    near = any(rank < config.k for rank, _ in known.values())
    return Trace(item, "crowded out" if near else "too deep" if known else "not found", None, known)


def _with_popular(sources: Sequence[CandidateSource], popular: RankedSource) -> list[CandidateSource]:
    everyone = [*sources, popular]
    names = [source.name for source in everyone]
    if len(set(names)) < len(names):
        raise InputError(f"candidate sources {names} share a name; give each its own, and popular only once")
    return everyone


def _retrieve_block(
    batch: QueryBatch, sources: Sequence[CandidateSource], items: int, quotas: Mapping[str, int], k: int
) -> Candidates:
    barred = batch.barred(items)
    return merge({source.name: _checked(source.candidates(batch, k), barred, k) for source in sources}, quotas, k)


def _checked(answer: Answer, barred: Mask, k: int) -> Answer:
    """No source is trusted with the invariant: whatever is barred is struck out here at the latest."""
    scores, ids = answer
    return _strike(scores, ids, barred, k) if (_is_eligible(ids, barred) != (ids >= 0)).any() else answer


def _place(answer: Answer, item: int) -> tuple[int, float] | None:
    scores, ids = answer
    rank = np.flatnonzero(ids[0] == item)
    return (int(rank[0]), float(scores[0, rank[0]])) if len(rank) else None


def _nothing(rows: int, k: int) -> Answer:
    return np.full((rows, k), -np.inf, np.float32), np.full((rows, k), -1, np.int64)


def _is_eligible(ids: Ids, barred: Mask) -> Mask:
    """(B, W) bool: an item's id, and not barred from its request."""
    rows, items = barred.shape
    eligible: Mask = (ids >= 0) & (ids < items)
    if items:
        cells = np.where(eligible, ids, 0) + np.arange(rows)[:, None] * items
        eligible &= ~barred.ravel()[cells]
    return eligible


def _strike(scores: Floats, ids: Ids, barred: Mask, k: int) -> Answer:
    """Leave out padding, unknown and barred ids, and move the rest up; k columns."""
    kept = _is_eligible(ids, barred)
    place = np.cumsum(kept, axis=1, dtype=np.int64) - 1
    place[~kept | (place >= k)] = k  # one column too many takes what is left out
    left_scores, left_ids = _nothing(len(ids), k + 1)
    np.put_along_axis(left_scores, place, scores, axis=1)
    np.put_along_axis(left_ids, place, ids, axis=1)
    return left_scores[:, :k], left_ids[:, :k]


def _most_excluded(exclude: Sequence[Ids]) -> int:
    return max((len(ids) for ids in exclude), default=0)


def _round_up(counts: Ids) -> Ids:
    """0, or the next power of two, at least 16: few different widths, so few searches."""
    return np.where(counts > 0, 1 << np.ceil(np.log2(np.maximum(counts, 16))).astype(np.int64), 0)


def _padded_rows(matrix: Any, keep: int) -> tuple[NDArray[np.int32], Floats]:
    """The `keep` heaviest cells of each row of a CSR (N, N): columns (N, keep) int32 and weights, -1 and 0 as padding."""
    columns = np.full((matrix.shape[0], keep), -1, np.int32)
    weights = np.zeros((matrix.shape[0], keep), np.float32)
    for start in range(0, matrix.shape[0], _BLOCK_ROWS):
        found, places = best(matrix[start : start + _BLOCK_ROWS].toarray(), keep)
        some = (places >= 0) & (found > 0)
        columns[start : start + _BLOCK_ROWS] = np.where(some, places, -1)
        weights[start : start + _BLOCK_ROWS] = np.where(some, found, 0.0)
    return columns, weights


def _best_of_category(member: Any, counts: Floats, keep: int) -> Any:
    """CSR (categories, N): each category's `keep` most popular items, weighing between 0 and 1 by popularity."""
    by_category = member.T.tocsr()
    items = by_category.indices
    category = np.repeat(np.arange(by_category.shape[0]), np.diff(by_category.indptr))
    order = np.lexsort((items, -counts[items], category))
    place = np.arange(len(order)) - by_category.indptr[category[order]]
    kept = order[place < keep]
    weight = (1.0 + counts[items[kept]]) / (1.0 + counts.max(initial=0.0))
    return sparse.csr_matrix((weight.astype(np.float32), (category[kept], items[kept])), shape=by_category.shape)


def _check_quotas(results: Mapping[str, Answer], quotas: Mapping[str, int], k: int) -> None:
    unknown = sorted(set(quotas) - set(results))
    if unknown:
        raise InputError(f"quotas name the sources {unknown}, there are {sorted(results)}; leave them out")
    if k < 1 or min(quotas.values(), default=0) < 0 or sum(quotas.values()) > k:
        raise InputError(f"quotas {dict(quotas)} do not fit into k = {k} slots; use counts of 0 or more, at most k in all")


def _first_columns(ids: Ids, source: Ids) -> Ids:
    """(B, W): the column where each entry's item appears first in its row; W for padding and for what its source said before.

    Found by sorting (item, column) packed into one number, in 32 bits where they fit.
    """
    rows, width = ids.shape
    items = int(ids.max(initial=-1)) + 1
    kind: Any = np.int32 if (items + 1) * width < np.iinfo(np.int32).max else np.int64
    keys = np.where(ids >= 0, ids, items).astype(kind) * kind(width) + np.arange(width, dtype=kind)
    keys.sort(axis=1)
    item = keys // kind(max(width, 1))
    column = keys - item * kind(width)
    again = np.zeros((rows, width), np.bool_)
    again[:, 1:] = item[:, 1:] == item[:, :-1]
    found = np.maximum.accumulate(np.where(again, kind(0), keys), axis=1) - item * kind(width)
    again[:, 1:] &= source[column[:, 1:]] == source[column[:, :-1]]
    first = np.empty((rows, width), np.int64)
    np.put_along_axis(first, column, np.where(again | (item == items), kind(width), found), axis=1)
    return first


def _choose(first: Ids, sure: Mask, k: int) -> Ids:
    """(B, k) columns chosen for each request, ascending, W as padding: first the sure items, then by column."""
    rows, width = first.shape
    certain = np.zeros((rows, width + 1), np.bool_)
    np.put_along_axis(certain, first[:, sure], True, axis=1)
    column = np.arange(width, dtype=np.int32)
    preference = np.full((rows, max(width, k)), 2 * width, np.int32)
    preference[:, :width] = np.where(first == column, column + np.int32(width) * ~certain[:, :width], 2 * width)
    chosen = np.partition(preference, k - 1, axis=1)[:, :k]
    return np.sort(np.where(chosen < width, chosen, chosen - width), axis=1).astype(np.int64)


def _slots(columns: Ids, first: Ids) -> Ids:
    """(B, W) int64: the slot that each entry's item got, k for none."""
    rows, k = columns.shape
    slot = np.full((rows, first.shape[1] + 1), k, np.int64)
    np.put_along_axis(slot, columns, np.arange(k)[None, :], axis=1)
    slot[:, -1] = k
    return np.take_along_axis(slot, first, axis=1)


def _ranks(slots: Ids, k: int) -> Floats:
    """(B, k) float32: a source's rank of the item in each slot, NaN where it has none."""
    ranks = np.full((len(slots), k + 1), np.nan, np.float32)  # one column too many takes what was not chosen
    np.put_along_axis(ranks, slots, np.arange(slots.shape[1], dtype=np.float32)[None, :], axis=1)
    return ranks[:, :k]


def _scores_at(scores: Floats, ranks: Floats) -> Floats:
    """(B, k) float32: the scores (B, W) at those ranks, NaN at NaN."""
    known = np.isfinite(ranks)
    if not scores.shape[1]:
        return ranks
    found = np.take_along_axis(scores, np.where(known, ranks, 0).astype(np.int64), axis=1)
    return np.where(known, found, np.float32(np.nan))


def _at(ids: Ids, columns: Ids) -> Ids:
    """Ids (B, W) at the columns (B, k); -1 at column W."""
    width = ids.shape[1]
    if not width:
        return np.full(columns.shape, -1, np.int64)
    return np.where(columns < width, np.take_along_axis(ids, np.minimum(columns, width - 1), axis=1), -1)


def _stacked(parts: Sequence[Candidates]) -> Candidates:
    names = parts[0].names
    return Candidates(
        np.concatenate([part.ids for part in parts]),
        {name: np.concatenate([part.scores[name] for part in parts]) for name in names},
        {name: np.concatenate([part.ranks[name] for part in parts]) for name in names},
        np.concatenate([part.source for part in parts]),
        names,
    )
