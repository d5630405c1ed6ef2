"""Exact search: the k best inner products in float32, without ever holding the whole score matrix. The judge of every index.

In: vectors (N, D) and queries (B, D) float32, finite; row number = item id. Out: scores (B, k) float32 and ids (B, k) int64, best
first, equal scores by lower id, padded with -inf and -1 only when fewer than k items are allowed. The scan itself is `tiles.py`;
few queries or few items are scored directly, because there the score matrix is small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from retrieval import tiles, workers
from retrieval.checks import Floats, Mask, check_k, check_width, checked_mask, checked_rows
from retrieval.topk import best, in_order

Ids = NDArray[np.int64]

_DIRECT_CELLS: Final = 4_000_000
DIRECT_QUERIES: Final = 4
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
    if len(queries) < DIRECT_QUERIES or len(vectors) < 4 * max(k, tiles.TILE):
        return _scan_directly(vectors, queries, k, allowed)
    return in_blocks(lambda part, first, last: _near(vectors, queries[part], k, allowed, first, last), queries, len(vectors), k)


def in_blocks(near: Callable[[slice, int, int], tiles.Near], queries: Floats, count: int, k: int) -> tuple[Floats, Ids]:
    """Merge what `near(part of the queries, first item, end)` finds in blocks of queries and, for few queries, of items."""
    parts = [slice(start, start + QUERIES) for start in range(0, len(queries), QUERIES)]
    shares = max(1, min(workers.count() // len(parts), count // (4 * max(k, tiles.TILE))))
    ends = [count * share // shares for share in range(shares + 1)]
    spans = list(pairwise(ends))
    found = workers.run([partial(near, part, first, last) for part in parts for first, last in spans])
    blocks = [found[at : at + shares] for at in range(0, len(found), shares)]
    answers = [in_order(*_joined(block), len(queries[part]), k) for part, block in zip(parts, blocks, strict=True)]
    return np.concatenate([scores for scores, _ in answers]), np.concatenate([ids for _, ids in answers])


def rows_of_tile(queries: int) -> int:
    """Fewer queries leave room for more items at a time."""
    return tiles.TILE * max(1, QUERIES // queries)


def _joined(found: Sequence[tiles.Near]) -> tuple[Ids, Ids, Floats]:
    queries, ids = np.concatenate([near.queries for near in found]), np.concatenate([near.ids for near in found])
    return queries, ids, np.concatenate([near.scores for near in found])


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


def _near(vectors: Floats, queries: Floats, k: int, allowed: Mask | None, first: int, end: int) -> tiles.Near:
    """What may be among the k best of the items first..end-1."""
    import torch

    rows, columns = torch.from_numpy(vectors), torch.from_numpy(np.ascontiguousarray(queries.T))

    def product(start: int, stop: int, out: Any) -> None:
        torch.mm(rows[start:stop], columns, out=out)

    return tiles.scan(product, torch.empty((rows_of_tile(len(queries)), len(queries))), first, end, k, allowed)
