"""The choice of an index by recall and time: with a clock by hand, and once with the real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from retrieval import tune
from retrieval.exact import exact_search
from retrieval.index import IndexConfig, VectorIndex
from retrieval.tune import best_of, build_index
from tandem.core.errors import InputError

NOISE = np.random.default_rng(0)
CENTRES = NOISE.standard_normal((30, 16))
VECTORS = (CENTRES[NOISE.integers(0, 30, 2_000)] + 0.5 * NOISE.standard_normal((2_000, 16))).astype(np.float32)
QUERIES = (CENTRES[NOISE.integers(0, 30, 50)] + 0.5 * NOISE.standard_normal((50, 16))).astype(np.float32)


def slow(monkeypatch: pytest.MonkeyPatch, milliseconds: dict[str, float]) -> Callable[[], float]:
    """A clock that each search moves by its kind's milliseconds, and by nothing else."""
    now, search = [0.0], VectorIndex.search

    def timed(self: VectorIndex, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> object:
        now[0] += next(taken for start, taken in milliseconds.items() if self.kind.startswith(start)) / 1000
        return search(self, queries, k, allowed)

    monkeypatch.setattr(VectorIndex, "search", timed)
    monkeypatch.setattr(tune, "multiplies_int8", lambda: False)
    return lambda: now[0]


@pytest.mark.parametrize(
    ("milliseconds", "budget", "chosen", "in_budget"),
    [
        ({"Flat": 9, "IVF": 3, "HNSW": 1}, 5, "HNSW", True),  # the fastest
        ({"Flat": 1, "IVF": 3, "HNSW": 2}, 5, "Flat", True),
        ({"Flat": 9, "IVF": 4, "HNSW": 6}, 5, "IVF", True),
        ({"Flat": 9, "IVF": 8, "HNSW": 7}, 5, "Flat", False),  # none in time: the best recall
    ],
)
def test_the_fastest_that_reaches_the_target_in_time_is_chosen(
    monkeypatch: pytest.MonkeyPatch, milliseconds: dict[str, float], budget: float, chosen: str, in_budget: bool
) -> None:
    config = IndexConfig(k=20, budget_ms=budget)
    built = build_index(VECTORS, config, QUERIES, clock=slow(monkeypatch, milliseconds))
    assert built.kind.startswith(chosen)
    assert built.milliseconds == pytest.approx(milliseconds[chosen])
    assert built.in_budget is in_budget
    assert built.recall >= 0.98
    assert built.config == config  # "auto" stays what was asked for


def test_a_quick_index_that_misses_the_target_is_not_taken() -> None:
    config = IndexConfig(k=20, budget_ms=5.0, target_recall=0.9)
    made = [VectorIndex.build(VECTORS, IndexConfig(kind, k=20), QUERIES) for kind in ("flat", "PQ4x4")]
    assert made[1].recall < 0.9
    exact, coarse = (
        VectorIndex(each.kind, 16, 2_000, each.recall, 0, config, each.index, milliseconds=taken)
        for each, taken in zip(made, (4.0, 0.1), strict=True)
    )
    assert best_of([coarse, exact]) is exact
    late = VectorIndex(exact.kind, 16, 2_000, 1.0, 0, config, exact.index, milliseconds=6.0)
    assert best_of([coarse, late]) is late
    assert late.in_budget is False


def test_many_items_get_a_graph_only_when_nothing_else_is_quick_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_SLOW_TO_BUILD", 1_000)
    for graph, chosen in ((1.0, "IVF"), (0.5, "IVF")):
        clock = slow(monkeypatch, {"Flat": 9, "IVF": 3, "HNSW": graph})
        assert build_index(VECTORS, IndexConfig(k=20, budget_ms=5.0), QUERIES, clock=clock).kind.startswith(chosen)
    clock = slow(monkeypatch, {"Flat": 9, "IVF": 8, "HNSW": 1})
    assert build_index(VECTORS, IndexConfig(k=20, budget_ms=5.0), QUERIES, clock=clock).kind.startswith("HNSW")


def test_what_was_measured_is_kept_and_a_named_kind_is_measured_too(tmp_path: Path) -> None:
    built = build_index(VECTORS, IndexConfig("ivf", k=20, budget_ms=1e6), QUERIES)
    assert built.kind.startswith("IVF")
    assert built.milliseconds is not None
    assert built.milliseconds > 0
    built.save(tmp_path / "index")
    loaded = VectorIndex.load(tmp_path / "index")
    assert (loaded.milliseconds, loaded.in_budget, loaded.recall) == (built.milliseconds, True, built.recall)
    hits = [set(a) & set(b) for a, b in zip(loaded.search(QUERIES, 20)[1], exact_search(VECTORS, QUERIES, 20)[1], strict=True)]
    assert np.mean([len(each) / 20 for each in hits]) >= 0.975


def test_without_a_budget_nothing_is_measured() -> None:
    empty = build_index(VECTORS[:0], IndexConfig(allow_empty=True, budget_ms=5.0))
    for built in (build_index(VECTORS, IndexConfig(k=20), QUERIES), empty):
        assert (built.kind, built.milliseconds, built.in_budget) == ("Flat", None, None)


@pytest.mark.parametrize("budget", [-1.0, float("nan"), float("inf")])
def test_a_budget_that_is_no_time_is_refused(budget: float) -> None:
    with pytest.raises(InputError, match="budget_ms"):
        IndexConfig(budget_ms=budget)
