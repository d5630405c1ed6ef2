"""Popularity, item-kNN and EASE against formulas written out densely, on worlds small enough to check by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from retrieval import baselines
from retrieval.baselines import EASE, ItemKNN, Popularity, TooLargeError, interaction_matrix, top_k
from tandem.core.errors import IncompatibleError, InputError, IntegrityError, NotFoundError

BY_HAND = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 0]], np.float32)
matrices = hnp.arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 9))).map(lambda cells: cells.astype(np.float32))


def cosines(matrix: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(matrix, axis=0)
    lengths[lengths == 0] = 1
    similar = (matrix / lengths).T @ (matrix / lengths)
    np.fill_diagonal(similar, 0)
    return similar


def test_interaction_matrix_has_sorted_users_given_items_and_ones() -> None:
    events = pl.DataFrame({"user_id": ["b", "a", "b", "b", "c"], "item_id": ["y", "x", "y", "x", "gone"]})
    matrix = interaction_matrix(events, ["x", "不", "y"])
    assert matrix.toarray().tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 0]]
    assert matrix.dtype == np.float32


def test_interaction_matrix_refuses_an_item_that_stands_twice() -> None:
    events = pl.DataFrame({"user_id": ["a"], "item_id": ["x"]})
    with pytest.raises(InputError, match="'x'"):
        interaction_matrix(events, ["x", "y", "x"])


def test_popularity_counts_users_and_orders_equals_by_lower_id() -> None:
    popularity = Popularity.fit(sparse.csr_matrix(BY_HAND))
    assert popularity.counts.tolist() == [3, 3, 2, 0]
    assert popularity.order().tolist() == [0, 1, 2, 3]
    assert popularity.scores(sparse.csr_matrix((2, 4))).tolist() == [[3, 3, 2, 0]] * 2


def test_item_knn_by_hand() -> None:
    knn = ItemKNN.fit(sparse.csr_matrix(BY_HAND), neighbours=3)
    assert knn.indices.tolist() == [[1, 2, -1], [2, 0, -1], [1, 0, -1], [-1, -1, -1]]
    np.testing.assert_allclose(knn.values[0], [2 / 3, 1 / np.sqrt(6), 0], rtol=1e-6)


@given(matrices, st.integers(1, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_item_knn_scores_are_sums_of_the_kept_cosines(matrix: np.ndarray, neighbours: int, seed: int) -> None:
    similar = cosines(matrix)
    kept = np.zeros_like(similar)
    for row in range(len(similar)):
        for column in sorted(range(len(similar)), key=lambda c: (-np.float32(similar[row, c]), c))[:neighbours]:
            kept[row, column] = similar[row, column]
    history = (np.random.default_rng(seed).random((3, matrix.shape[1])) < 0.4).astype(np.float32)
    knn = ItemKNN.fit(sparse.csr_matrix(matrix), neighbours)
    scores = knn.scores(sparse.csr_matrix(history))
    if neighbours >= matrix.shape[1] - 1:  # below that, float32 ties may keep another of two equal neighbours
        np.testing.assert_allclose(scores, history @ kept, atol=1e-5)
    np.testing.assert_allclose(knn.values.sum(), kept.sum(), atol=1e-4)
    one = knn.score_items(np.concatenate([[-1], np.flatnonzero(history[0]), np.flatnonzero(history[0])]))
    np.testing.assert_allclose(one, scores[0], atol=1e-5)


def test_item_knn_in_blocks_equals_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = sparse.random(200, 60, 0.1, "csr", np.float32, np.random.default_rng(0))
    matrix.data[:] = 1
    whole = ItemKNN.fit(matrix, 20)
    monkeypatch.setattr(baselines, "_BLOCK_CELLS", 60 * 7)
    blocks = ItemKNN.fit(matrix, 20)
    assert (whole.indices == blocks.indices).all()
    assert (whole.values == blocks.values).all()


@given(matrices, st.floats(0.5, 500))
@settings(max_examples=60, deadline=None)
def test_ease_is_its_closed_form(matrix: np.ndarray, l2: float) -> None:
    inverse = np.linalg.inv(matrix.T.astype(np.float64) @ matrix + l2 * np.eye(matrix.shape[1]))
    weights = np.eye(matrix.shape[1]) - inverse / np.diag(inverse)
    ease = EASE.fit(sparse.csr_matrix(matrix), l2)
    np.testing.assert_allclose(ease.weights, weights, atol=1e-4)
    assert (np.diagonal(ease.weights) == 0).all()
    np.testing.assert_allclose(ease.scores(sparse.csr_matrix(matrix)), matrix @ weights, atol=1e-3)


def test_ease_mirrors_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = sparse.csr_matrix((np.random.default_rng(0).random((80, 23)) < 0.2).astype(np.float32))
    whole = EASE.fit(matrix, 10)
    monkeypatch.setattr(baselines, "_MIRROR_ROWS", 5)
    np.testing.assert_array_equal(EASE.fit(matrix, 10).weights, whole.weights)


def test_ease_finds_the_taste_that_popularity_hides() -> None:
    """A checkerboard: even users like even items, odd users odd ones."""
    users, items = np.indices((40, 20))
    board = ((users + items) % 2 == 0) & (np.random.default_rng(1).random((40, 20)) < 0.7)
    history = np.zeros((2, 20), np.float32)
    history[0, :4:2] = history[1, 1:5:2] = 1
    for model in (
        EASE.fit(sparse.csr_matrix(board, dtype=np.float32), 1.0),
        ItemKNN.fit(sparse.csr_matrix(board, dtype=np.float32)),
    ):
        best = top_k(model.scores(sparse.csr_matrix(history)), 5, sparse.csr_matrix(history))
        assert (best[0] % 2 == 0).all()
        assert (best[1] % 2 == 1).all()


def test_ease_refuses_a_catalogue_it_cannot_hold_and_names_the_way_out() -> None:
    with pytest.raises(TooLargeError, match="20,000 most popular") as refusal:
        EASE.fit(sparse.csr_matrix((3, 20_001), dtype=np.float32))
    assert isinstance(refusal.value, InputError)


@pytest.mark.parametrize("l2", [0.0, -1.0, float("nan")])
def test_ease_refuses_an_l2_that_does_not_regularise(l2: float) -> None:
    with pytest.raises(InputError, match="l2"):
        EASE.fit(sparse.csr_matrix(BY_HAND), l2)


@given(hnp.arrays(np.float32, (3, 7), elements=st.integers(-2, 2).map(float)), st.integers(1, 9), st.data())
@settings(max_examples=80, deadline=None)
def test_top_k_is_a_stable_sort_without_the_excluded(scores: np.ndarray, k: int, data: st.DataObject) -> None:
    exclude = data.draw(hnp.arrays(np.bool_, (3, 7)))
    found = top_k(scores, k, sparse.csr_matrix(exclude, dtype=np.float32))
    for row in range(3):
        order = [column for column in np.argsort(-scores[row], kind="stable") if not exclude[row, column]][:k]
        assert found[row].tolist() == order + [-1] * (k - len(order))


def test_top_k_leaves_the_scores_as_they_were() -> None:
    scores = np.ones((1, 3), np.float32)
    assert top_k(scores, 2, sparse.csr_matrix(np.array([[1, 0, 0]], np.float32))).tolist() == [[1, 2]]
    assert scores.tolist() == [[1, 1, 1]]
    with pytest.raises(InputError, match="k = 0"):
        top_k(scores, 0)


def test_a_history_of_another_catalogue_is_refused_with_both_sizes() -> None:
    matrix, other = sparse.csr_matrix(BY_HAND), sparse.csr_matrix((1, 5), dtype=np.float32)
    for model in (Popularity.fit(matrix), ItemKNN.fit(matrix), EASE.fit(matrix)):
        with pytest.raises(IncompatibleError, match=r"5 columns.*4 items"):
            model.scores(other)


def test_saved_models_come_back_bit_for_bit(tmp_path: Path) -> None:
    matrix = sparse.csr_matrix(BY_HAND)
    knn, popularity = ItemKNN.fit(matrix, 5), Popularity.fit(matrix)
    knn.save(tmp_path / "covisit.safetensors")
    popularity.save(tmp_path / "popular.safetensors")
    loaded = ItemKNN.load(tmp_path / "covisit.safetensors")
    assert (loaded.indices.dtype, loaded.values.dtype, loaded.indices.shape) == (np.int32, np.float32, (4, 5))
    assert (loaded.indices == knn.indices).all()
    assert (loaded.values == knn.values).all()
    assert (Popularity.load(tmp_path / "popular.safetensors").counts == popularity.counts).all()


def test_a_damaged_or_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "covisit.safetensors"
    with pytest.raises(NotFoundError, match=r"covisit\.safetensors"):
        ItemKNN.load(path)
    ItemKNN.fit(sparse.csr_matrix(BY_HAND)).save(path)
    with pytest.raises(IntegrityError, match="counts"):
        Popularity.load(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(IntegrityError, match="whole safetensors"):
        ItemKNN.load(path)


def test_an_empty_world_answers() -> None:
    empty = sparse.csr_matrix((0, 3), dtype=np.float32)
    history = sparse.csr_matrix((1, 3), dtype=np.float32)
    for model in (Popularity.fit(empty), ItemKNN.fit(empty), EASE.fit(empty)):
        assert (model.scores(history) == 0).all()
    assert EASE.fit(sparse.csr_matrix((4, 0), dtype=np.float32)).weights.shape == (0, 0)
