"""`best` against a stable sort of each row, for every kind of number that may turn up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from retrieval import topk
from retrieval.topk import best, best_keys, pack, unpack

numbers = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan]), st.floats(width=32))


def by_sorting(row: np.ndarray, k: int) -> list[int]:
    eligible = [column for column in range(len(row)) if not np.isnan(row[column]) and row[column] > -np.inf]
    order = sorted(eligible, key=lambda column: (-row[column], column))[:k]
    return order + [-1] * (k - len(order))


@given(hnp.arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(0, 12)), elements=numbers), st.integers(1, 15))
@settings(max_examples=200, deadline=None)
def test_best_is_a_stable_sort(scores: np.ndarray, k: int) -> None:
    found, ids = best(scores, k)
    assert ids.tolist() == [by_sorting(row, k) for row in scores]
    for row, (values, columns) in enumerate(zip(found, ids, strict=True)):
        assert (values[columns >= 0] == scores[row, columns[columns >= 0]]).all()
        assert (values[columns < 0] == -np.inf).all()


def test_many_ties_at_the_last_place_are_kept_by_lower_column(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).integers(0, 4, (50, 300)).astype(np.float32)
    monkeypatch.setattr(topk, "_BLOCK_CELLS", 900)
    assert best(scores, 90)[1].tolist() == [by_sorting(row, 90) for row in scores]


@given(
    hnp.arrays(np.float32, 6, elements=st.floats(width=32, allow_nan=False)),
    hnp.arrays(np.int64, 6, elements=st.integers(0, 2**32 - 1)),
)
def test_packed_keys_come_back_and_sort_by_falling_score(scores: np.ndarray, ids: np.ndarray) -> None:
    keys = pack(scores, ids)
    back, numbers_back = unpack(keys)
    assert (back == scores).all()
    assert (numbers_back == np.where(np.isneginf(scores), -1, ids)).all()
    order = np.lexsort((ids, -(scores + 0)))
    assert (np.argsort(keys, kind="stable") == order).all()


@given(hnp.arrays(np.uint64, (3, 4)), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2**64 - 1)), max_size=20))
@settings(max_examples=100, deadline=None)
def test_best_keys_keeps_the_smallest_and_puts_the_largest_last(kept: np.ndarray, loose: list[tuple[int, int]]) -> None:
    rows, keys = np.array([row for row, _ in loose], np.int64), np.array([key for _, key in loose], np.uint64)
    found = best_keys(kept, rows, keys)
    for row in range(3):
        wanted = sorted(kept[row].tolist() + [key for at, key in loose if at == row])[:4]
        assert sorted(found[row].tolist()) == wanted
        assert found[row, -1] == wanted[-1]
