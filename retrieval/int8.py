"""Exact search that looks at whole numbers first: the same answers as `exact.py`, where the processor multiplies int8 natively.

In: vectors (N, D) float32. Out, as `exact.scan`: scores (B, k) float32 and ids (B, k) int64. Each coordinate is divided by its
own step and rounded to -127..127; the steps move into the query, which is rounded with one step of its own. How far the product
of the rounded can lie from the true one is bounded for every query (Cauchy-Schwarz on both rounding errors), so the scan keeps
every item within twice that bound of the k-th best, and those few are scored in float32. Costs N * D bytes beside the vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from retrieval import exact, tiles
from retrieval.checks import Floats, Mask

Ids = NDArray[np.int64]
Doubles = NDArray[np.float64]

_TOP: Final = 127
_WIDEST: Final = 1_024
_BLOCK: Final = 65_536
_CELLS: Final = 1 << 20
_TRIALS: Final = 10


@dataclass(frozen=True, eq=False)
class Codes:
    """Vectors in whole numbers: `steps` (D,) per coordinate; lengths of the worst rounding error and of the longest row.

    `furthest` and `longest` are Euclidean, in steps.
    """

    rows: NDArray[np.int8]
    steps: Doubles
    furthest: float
    longest: float

    @classmethod
    def of(cls, vectors: Floats) -> Self:
        """Round `vectors` (N, D), by blocks of rows."""
        largest = np.maximum(vectors.max(axis=0, initial=0), -vectors.min(axis=0, initial=0)).astype(np.float64)
        steps = np.where(largest > 0, largest / _TOP, 1.0)
        rows = np.empty(vectors.shape, np.int8)
        furthest = longest = 0.0
        for start in range(0, len(vectors), _BLOCK):
            exactly = vectors[start : start + _BLOCK] / steps
            rounded = np.rint(exactly)
            rows[start : start + _BLOCK] = rounded
            furthest = max(furthest, float(np.sqrt(np.square(exactly - rounded).sum(axis=1).max())))
            longest = max(longest, float(np.sqrt(np.square(rounded).sum(axis=1).max())))
        return cls(rows, steps, furthest, longest)

    def scan(self, vectors: Floats, queries: Floats, k: int, allowed: Mask | None = None) -> tuple[Floats, Ids]:
        """The k best of `vectors` (N, D), whose codes these are; of the items that `allowed` (N,) names, if given.

        Left to the float32 scan: few queries, few items, many coordinates, and processors where it is the faster one.
        """
        eligible = len(vectors) if allowed is None else int(np.count_nonzero(allowed))
        few = len(queries) < exact.DIRECT_QUERIES or eligible < max(len(vectors) // 2, 4 * k, 4 * tiles.TILE)
        if few or vectors.shape[1] > _WIDEST or not multiplies_int8():
            return exact.scan(vectors, queries, k, allowed)
        try:
            return exact.in_blocks(
                lambda part, first, last: self._near(vectors, queries[part], k, allowed, first, last), queries, len(vectors), k
            )
        except tiles.TooManyError:
            return exact.scan(vectors, queries, k, allowed)

    def _near(self, vectors: Floats, queries: Floats, k: int, allowed: Mask | None, first: int, end: int) -> tiles.Near:
        """What may be among the k best of the items first..end-1, with true scores."""
        import torch

        columns, slack = self._rounded(queries)
        rows, turned = torch.from_numpy(self.rows), torch.from_numpy(columns)

        def product(start: int, stop: int, out: Any) -> None:
            torch._int_mm(rows[start:stop], turned, out=out)

        tile = torch.empty((exact.rows_of_tile(len(queries)), len(queries)), dtype=torch.int32)
        near = tiles.scan(product, tile, first, end, k, allowed, slack)
        return replace(near, scores=_true_scores(vectors, queries, near))

    def _rounded(self, queries: Floats) -> tuple[NDArray[np.int8], Floats]:
        """Queries in whole numbers (D, B) int8, and how much (B,) a score may differ from the k-th best's to count, in steps.

        With q' = query * steps = s * whole + rest, a score is s * whole . row + e with |e| <= |q'| * furthest + |rest| * longest.
        """
        scaled = queries * self.steps
        step = np.maximum(np.abs(scaled).max(axis=1, keepdims=True), np.finfo(np.float32).tiny) / _TOP
        whole = np.rint(scaled / step)
        error = np.linalg.norm(scaled, axis=1) * self.furthest + np.linalg.norm(scaled - whole * step, axis=1) * self.longest
        slack = 2 * error / step[:, 0] * 1.0001 + 2  # a little more than the bound, for the rounding of float32 itself
        return np.ascontiguousarray(whole.T.astype(np.int8)), slack.astype(np.float32)


@cache
def multiplies_int8() -> bool:
    """Does torch multiply int8 matrices here, and faster than float32? Asked once, by doing both: some ten milliseconds.

    The quickest of several trials decides, because other work on the machine can only make a trial slower.
    """
    import time

    import torch

    if not hasattr(torch, "_int_mm"):
        return False
    whole, real = torch.ones((4_096, 64), dtype=torch.int8), torch.ones((4_096, 64))
    quickest = [np.inf, np.inf]
    for _ in range(_TRIALS):
        for which, (multiply, rows) in enumerate(((torch._int_mm, whole), (torch.mm, real))):
            began = time.perf_counter()
            multiply(rows, rows[:256].T.contiguous())
            quickest[which] = min(quickest[which], time.perf_counter() - began)
    return quickest[0] < quickest[1]


def _true_scores(vectors: Floats, queries: Floats, near: tiles.Near) -> Floats:
    """(n,) float32 inner products of what is near."""
    scores = np.empty(len(near.ids), np.float32)
    step = max(1, _CELLS // vectors.shape[1])
    for start in range(0, len(scores), step):
        part = slice(start, start + step)
        np.einsum("nd,nd->n", vectors[near.ids[part]], queries[near.queries[part]], out=scores[part])
    return scores
