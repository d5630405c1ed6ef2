"""Exact search: the k best inner products in float32, without ever holding the whole score matrix. The judge of every index.

In: vectors (N, D) and queries (B, D) float32, finite; row number = item id. Out: scores (B, k) float32 and ids (B, k) int64, best
first, equal scores by lower id, padded with -inf and -1 only when fewer than k items are allowed. The scan itself is `tiles.py`;
few queries or few items are scored directly, because there the score matrix is small.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from retrieval import tiles
from retrieval.checks import Floats, Mask, check_k, check_width, checked_mask, checked_rows
from retrieval.topk import best, in_order

Ids = NDArray[np.int64]

_DIRECT_CELLS: Final = 4_000_000
_DIRECT_QUERIES: Final = 8
QUERIES: Final = 256


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
    if len(queries) < _DIRECT_QUERIES or len(vectors) < 4 * max(k, tiles.TILE):
        return _scan_directly(vectors, queries, k, allowed)
    blocks = [_scan_block(vectors, queries[start : start + QUERIES], k, allowed) for start in range(0, len(queries), QUERIES)]
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

    def product(start: int, end: int, out: Any) -> None:
        torch.mm(rows[start:end], columns, out=out)

    near = tiles.scan(product, torch.empty((tiles.TILE, len(queries))), len(vectors), k, allowed)
    if near is None:
        return _scan_directly(vectors, queries, k, allowed)
    return in_order(near.queries, near.ids, near.scores, len(queries), k)
