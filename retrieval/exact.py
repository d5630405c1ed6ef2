"""Exact search: the k best inner products in float32, without ever holding the whole score matrix. The judge of every index.

In: vectors (N, D) and queries (B, D) float32, finite; row number = item id. Out: scores (B, k) float32 and ids (B, k) int64, best
first, equal scores by lower id, padded with -inf and -1 only when fewer than k items are allowed.

How: items go through in tiles small enough for the processor's cache, multiplied with a block of queries. Of each tile only the
maxima of 16 items are compared with the query's running k-th best score; scores of blocks that reach it are taken out while they
are in the cache, and what was taken out raises that k-th best whenever enough has come together. So nearly all the time goes
into the matrix product. Few queries or few items are scored directly: there the score matrix is small.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from retrieval.checks import Floats, Mask, check_k, check_width, checked_mask, checked_rows
from retrieval.topk import best, best_keys, pack, unpack

Ids = NDArray[np.int64]
Keys = NDArray[np.uint64]

_DIRECT_CELLS: Final = 4_000_000
_DIRECT_QUERIES: Final = 8
_TILE: Final = 1_024
_QUERIES: Final = 256
_GROUP: Final = 16
_PATIENCE: Final = 1.0
_LOWEST: Final = float(np.finfo(np.float32).min)


def exact_search(vectors: Floats, queries: Floats, k: int, allowed: Mask | None = None) -> tuple[Floats, Ids]:
    """The judge: scores (B, k) float32 and ids (B, k) int64 of the k best inner products, among `allowed` (N,) bool if given.

    Raises InputError for NaN, infinity or k outside 1..100,000, IncompatibleError for a wrong width or mask length.
    """
    check_k(k)
    vectors, queries = checked_rows(vectors, "vectors"), checked_rows(queries, "queries")
    check_width(queries, vectors.shape[1])
    return scan(vectors, queries, k, checked_mask(allowed, len(vectors)))


def scan(vectors: Floats, queries: Floats, k: int, allowed: Mask | None = None) -> tuple[Floats, Ids]:
    """The k best items of `vectors` for each query: scores (B, k), ids (B, k); of the items that `allowed` (N,) names, if given.

    Few allowed vectors are gathered first; where most are allowed, the others' scores are struck out instead.
    """
    if allowed is not None and 2 * np.count_nonzero(allowed) < len(vectors):
        places = np.flatnonzero(allowed)
        scores, found = scan(vectors[places], queries, k)
        return scores, renamed(found, places)
    if len(queries) < _DIRECT_QUERIES or len(vectors) < 4 * max(k, _TILE):
        return _scan_directly(vectors, queries, k, allowed)
    blocks = [_scan_block(vectors, queries[start : start + _QUERIES], k, allowed) for start in range(0, len(queries), _QUERIES)]
    return np.concatenate([scores for scores, _ in blocks]), np.concatenate([ids for _, ids in blocks])


def renamed(places: Ids, ids: Ids) -> Ids:
    """`ids` at the places found, -1 where nothing was."""
    return np.where(places >= 0, ids[np.maximum(places, 0)], -1) if len(ids) else places


def _scan_directly(vectors: Floats, queries: Floats, k: int, allowed: Mask | None) -> tuple[Floats, Ids]:
    scores = np.full((len(queries), k), -np.inf, np.float32)
    ids = np.full((len(queries), k), -1, np.int64)
    step = max(1, _DIRECT_CELLS // max(len(vectors), 1))
    for start in range(0, len(queries) if len(vectors) else 0, step):
        products = queries[start : start + step] @ vectors.T
        if allowed is not None:
            products[:, ~allowed] = -np.inf
        scores[start : start + step], ids[start : start + step] = best(products, k)
    return scores, ids


def _scan_block(vectors: Floats, queries: Floats, k: int, allowed: Mask | None) -> tuple[Floats, Ids]:
    """One block of queries against all tiles of items."""
    import torch

    rows, columns = torch.from_numpy(vectors), torch.from_numpy(np.ascontiguousarray(queries.T))
    scores = torch.empty((_TILE, len(queries)))
    running = _Running(len(queries), k)
    for start in range(0, len(vectors), _TILE):
        size = min(_TILE, len(vectors) - start)
        torch.mm(rows[start : start + size], columns, out=scores[:size])
        scores[size:] = -torch.inf
        if allowed is not None:
            scores[np.flatnonzero(~allowed[start : start + size])] = -torch.inf
        if not start and k <= _TILE:
            running.expect(torch.topk(scores, k, dim=0).values[-1])
        running.take(start, *_reaching(scores, running.least))
    return unpack(np.sort(running.keys(), axis=1))


def _reaching(scores: Any, least: Any) -> tuple[Ids, Ids, Floats]:
    """(row in the tile, query, score) of every score (T, B) that is at least `least` (B,): groups first, then within them."""
    import torch

    groups = scores.view(-1, _GROUP, scores.shape[1])
    group, query = torch.nonzero(groups.amax(1) >= least, as_tuple=True)
    values = groups[group, :, query]
    pair, place = torch.nonzero(values >= least[query, None], as_tuple=True)
    return (group[pair] * _GROUP + place).numpy(), query[pair].numpy(), values[pair, place].numpy()


class _Running:
    """The k best (score, id) per query so far, as keys (B, k), and what came since. A score counts from `least` (B,) on."""

    def __init__(self, queries: int, k: int) -> None:
        import torch

        nothing = np.full((queries, k), -np.inf, np.float32), np.zeros((queries, k), np.int64)
        self.least = torch.full((queries,), _LOWEST)
        self._kept: Keys = pack(*nothing)
        self._new: list[tuple[Ids, Keys]] = []
        self._waiting = 0

    def expect(self, least: Any) -> None:
        """At least k items are known to score `least` (B,) or more; -inf where there are fewer."""
        self.least = least.clamp(min=_LOWEST)

    def take(self, start: int, rows: Ids, queries: Ids, scores: Floats) -> None:
        """Note scores of the items start + rows. Tiles come by ascending id: later items must beat the k-th best."""
        import torch

        self._new.append((queries, pack(scores, rows + start)))
        self._waiting += len(rows)
        if self._waiting > _PATIENCE * self._kept.size:
            kth, _ = unpack(self.keys()[:, -1])
            self.least = torch.from_numpy(np.nextafter(np.maximum(kth, _LOWEST), np.float32(np.inf)))

    def keys(self) -> Keys:
        """(B, k): the k best, of which the last is the k-th and the others stand in any order."""
        if self._new:
            queries, keys = (np.concatenate(parts) for parts in zip(*self._new, strict=True))
            self._kept, self._new, self._waiting = best_keys(self._kept, queries, keys), [], 0
        return self._kept
