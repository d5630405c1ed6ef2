"""Several sources' answers -> one list of candidates per request, where every item says who returned it, at what rank and score.

In: scores and ids by source, best first. Out: `Candidates`, unique per request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.query_batch import Answer, Floats, Ids, Mask
from tandem.core.errors import InputError


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


def stacked(parts: Sequence[Candidates]) -> Candidates:
    names = parts[0].names
    return Candidates(
        np.concatenate([part.ids for part in parts]),
        {name: np.concatenate([part.scores[name] for part in parts]) for name in names},
        {name: np.concatenate([part.ranks[name] for part in parts]) for name in names},
        np.concatenate([part.source for part in parts]),
        names,
    )


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
