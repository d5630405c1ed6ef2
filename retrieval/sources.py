"""Candidate sources: each proposes eligible items for a batch of requests, unique per request, best first.

In: a `QueryBatch`. Out: `Answer`s. Towers ask the index; co-visits and categories sum item-to-item weights over the history;
popular and new are one order for everybody; history is what a user took before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from retrieval.baselines import ItemKNN
from retrieval.checks import MAX_K
from retrieval.index import VectorIndex
from retrieval.query_batch import Answer, Floats, Ids, Mask, QueryBatch
from retrieval.tier import View
from retrieval.topk import best
from tandem.core.schema import MICROSECONDS_PER_DAY

POPULAR: Final = "popular"
_MOST_KEPT: Final = 20_000_000
_BLOCK_ROWS: Final = 1_024
_SUM_CELLS: Final = 1_000_000


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

    index: VectorIndex | View
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
            scores[rows], ids[rows] = strike(*found, barred[rows], k)
        return scores, ids


@dataclass(frozen=True, eq=False)
class LinearSource:
    """Sum of item-to-item weights over the newest `last` items of the history; only positive sums count.

    `neighbours` (N, K) int32, padded with -1, and their `weights` (N, K) float32. `items`: how many there are in all, where it
    is more than N; the others have no neighbours.
    """

    name: str
    neighbours: NDArray[np.int32]
    weights: Floats
    last: int = 50
    items: int = 0

    def candidates(self, batch: QueryBatch, k: int) -> Answer:
        """As many more as a request excludes are looked up, then struck out: cheaper than striking out before."""
        items = max(len(self.neighbours), self.items)
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
            scores[block], ids[block] = strike(found, np.where(found > 0, places, -1), barred[block], k)
        return scores, ids

    def _sums(self, history: Ids) -> Floats:
        """(B, items) float32: each different item of a history adds its neighbours' weights."""
        items = max(len(self.neighbours), self.items)
        ids = np.sort(history, axis=1)
        known = (ids >= 0) & (ids < len(self.neighbours))
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
            scores, ids = strike(values, head, barred, k)
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
        usable = newest & is_eligible(history, batch.barred(self.items))
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
    young = np.flatnonzero((available_us <= now_us) & (available_us >= now_us - int(days * MICROSECONDS_PER_DAY)))
    age = (now_us - available_us[young]) / MICROSECONDS_PER_DAY
    order = np.argsort(age, kind="stable")
    return RankedSource("new", young[order], -age[order].astype(np.float32), len(available_us))


def category_source(rows: Ids, codes: Ids, counts: Floats, keep: int = 100, last: int = 50) -> LinearSource:
    """The `keep` most popular items that share categories with the history's: item `rows` (M,) have the categories `codes` (M,).

    A large catalogue keeps fewer, so that the table stays below 160 MB.
    """
    items = len(counts)
    keep = max(1, min(keep, _MOST_KEPT // max(items, 1)))
    member = sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, codes)), shape=(items, int(codes.max(initial=-1)) + 1))
    related = (member @ _best_of_category(member, counts, keep)).tocsr()
    return LinearSource("category", *_padded_rows(related, keep), last)


def _nothing(rows: int, k: int) -> Answer:
    return np.full((rows, k), -np.inf, np.float32), np.full((rows, k), -1, np.int64)


def is_eligible(ids: Ids, barred: Mask) -> Mask:
    """(B, W) bool: an item's id, and not barred from its request."""
    rows, items = barred.shape
    eligible: Mask = (ids >= 0) & (ids < items)
    if items:
        cells = np.where(eligible, ids, 0) + np.arange(rows)[:, None] * items
        eligible &= ~barred.ravel()[cells]
    return eligible


def strike(scores: Floats, ids: Ids, barred: Mask, k: int) -> Answer:
    """Leave out padding, unknown and barred ids, and move the rest up; k columns."""
    kept = is_eligible(ids, barred)
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
