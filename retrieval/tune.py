"""Which index to build where time counts: of the kinds that reach the recall target on real queries, the fastest within a budget.

In: vectors, the queries that people really ask, and `IndexConfig` with a `budget_ms`. Out: one built `VectorIndex` that says what
was measured: its recall by exact search, and the milliseconds of one query. Without a budget size alone chooses the kind, and the
the same data gives the same bytes; times differ from run to run, and so may what is chosen by them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np

from retrieval.checks import Floats, checked_rows
from retrieval.index import VectorIndex
from retrieval.int8 import multiplies_int8
from retrieval.kinds import IndexConfig

TIMED_QUERIES: Final = 32
_ROUNDS: Final = 3
_SLOW_TO_BUILD: Final = 300_000
"""Above this many items a graph is built only when nothing else is quick enough: one thread takes minutes."""

Clock = Callable[[], float]


def build_index(
    vectors: Floats, config: IndexConfig, queries: Floats | None = None, clock: Clock = time.perf_counter
) -> VectorIndex:
    """`VectorIndex.build`, and with `budget_ms` and kind "auto" the choice among all kinds. Errors as there.

    Where no kind reaches the target within the budget, the one with the best recall is built, the faster of equals, and its
    `in_budget` is False.
    """
    if not config.budget_ms or not len(vectors):
        return VectorIndex.build(vectors, config, queries)
    asked = vectors if queries is None else queries
    kinds = _kinds(len(vectors), config) if config.kind == "auto" else [config.kind]
    built = [_timed(VectorIndex.build(vectors, replace(config, kind=kind), queries), asked, clock) for kind in kinds]
    late = [kind for kind in ("hnsw",) if config.kind == "auto" and kind not in kinds and not any(map(_is_good, built))]
    built += [_timed(VectorIndex.build(vectors, replace(config, kind=kind), queries), asked, clock) for kind in late]
    chosen = best_of(built)
    return replace(chosen, config=replace(chosen.config, kind=config.kind))


def best_of(built: list[VectorIndex]) -> VectorIndex:
    """The fastest of those that reach their target within their budget, else the one with the best recall."""
    good = [index for index in built if _is_good(index)]
    if good:
        return min(good, key=lambda index: index.milliseconds or 0.0)
    return min(built, key=lambda index: (-index.recall, index.milliseconds or 0.0))


def _is_good(index: VectorIndex) -> bool:
    return index.recall >= index.config.target_recall and bool(index.in_budget)


def _kinds(count: int, config: IndexConfig) -> list[str]:
    """What is worth a try at this size, exact ones first."""
    kinds = ["flat", "int8"] if multiplies_int8() and config.storage == "float32" else ["flat"]
    return kinds + (["ivf"] if count > _SLOW_TO_BUILD else ["ivf", "hnsw"])


def _timed(index: VectorIndex, queries: Floats, clock: Clock) -> VectorIndex:
    """The median of single searches for `config.k` items, as a service makes them; the first round does not count."""
    rows = checked_rows(queries, "queries")[np.linspace(0, len(queries) - 1, TIMED_QUERIES).astype(np.int64)]
    k = min(index.config.k, index.count)
    taken = []
    for number in range(_ROUNDS):
        for row in rows:
            began = clock()
            index.search(row[None, :], k)
            if number:
                taken.append((clock() - began) * 1000)
    return replace(index, milliseconds=round(float(np.median(taken)), 4))
