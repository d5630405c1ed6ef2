"""The judge against sorting by hand and against faiss: ties, tiles, running bounds, masks, numbers that overflow."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from retrieval import exact, tiles, workers
from retrieval.exact import exact_search
from retrieval.index import IndexConfig, VectorIndex
from tandem.core.errors import InputError


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32 items in groups of 4 and blocks of 16 queries: 300 items are many tiles."""
    monkeypatch.setattr(tiles, "TILE", 32)
    monkeypatch.setattr(tiles, "_GROUP", 4)
    monkeypatch.setattr(exact, "QUERIES", 16)


def sorted_by_hand(vectors: np.ndarray, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers only: their products are exact, so ties are ties."""
    scores = queries @ vectors.T
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(scores, order, axis=1)
    missing = ((0, 0), (0, k - order.shape[1]))
    ids = np.pad(np.where(np.isneginf(found), -1, order), missing, constant_values=-1)
    return np.pad(found, missing, constant_values=-np.inf), ids


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 15), st.just(3)), elements=st.integers(-2, 2).map(float)),
    hnp.arrays(np.float32, st.tuples(st.integers(0, 4), st.just(3)), elements=st.integers(-2, 2).map(float)),
    st.integers(1, 20),
    st.data(),
)
@settings(max_examples=50, deadline=None)
def test_the_judge_is_a_stable_sort_of_inner_products(
    vectors: np.ndarray, queries: np.ndarray, k: int, data: st.DataObject
) -> None:
    allowed = data.draw(st.none() | hnp.arrays(np.bool_, len(vectors)))
    eligible = range(len(vectors)) if allowed is None else np.flatnonzero(allowed)
    scores, ids = exact_search(vectors, queries, k, allowed)
    flat_scores, flat_ids = VectorIndex.build(vectors, IndexConfig("flat")).search(queries, k, allowed)
    for row, query in enumerate(queries):
        order = sorted(eligible, key=lambda item: (-float(vectors[item] @ query), item))[:k]
        assert ids[row].tolist() == order + [-1] * (k - len(order))
        assert scores[row, : len(order)].tolist() == [float(vectors[item] @ query) for item in order]
        assert (scores[row, len(order) :] == -np.inf).all()
    np.testing.assert_array_equal(flat_ids, ids)
    np.testing.assert_array_equal(flat_scores, scores)


def test_the_judge_by_hand() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8], [1, 0]], np.float32)
    scores, ids = exact_search(vectors, np.array([[1, 0]], np.float32), 3)
    assert ids.tolist() == [[0, 3, 2]]
    np.testing.assert_allclose(scores, [[1, 1, 0.6]])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("order", ["as drawn", "rising", "falling", "all the same"])
@pytest.mark.parametrize("k", [1, 7, 32, 60])
@pytest.mark.parametrize("share", [None, 0.7, 0.2, 0.0])
def test_tiles_give_what_sorting_gives(order: str, k: int, share: float | None) -> None:
    noise = np.random.default_rng(k)
    vectors = noise.integers(-2, 3, (301, 5)).astype(np.float32)
    queries = noise.integers(-3, 4, (37, 5)).astype(np.float32)
    if order != "as drawn":
        vectors = vectors[np.argsort(vectors @ queries[0], kind="stable")]
    vectors = {"falling": vectors[::-1], "all the same": np.ones_like(vectors)}.get(order, vectors)
    allowed = None if share is None else noise.random(301) < share
    scores, ids = exact_search(vectors, queries, k, allowed)
    wanted_scores, wanted_ids = sorted_by_hand(vectors, queries, k, allowed)
    np.testing.assert_array_equal(ids, wanted_ids)
    np.testing.assert_array_equal(scores, wanted_scores)


def test_tiles_of_the_usual_size_agree_with_faiss() -> None:
    noise = np.random.default_rng(0)
    vectors, queries = noise.normal(size=(9_001, 16)).astype(np.float32), noise.normal(size=(300, 16)).astype(np.float32)
    peer = faiss.IndexFlatIP(16)
    peer.add(vectors)
    peer_scores, peer_ids = peer.search(queries, 100)
    scores, ids = exact_search(vectors, queries, 100)
    np.testing.assert_allclose(scores, peer_scores, rtol=1e-4)
    assert (ids == peer_ids).mean() > 0.999


@pytest.mark.usefixtures("small_tiles")
def test_few_queries_get_the_same_as_many() -> None:
    noise = np.random.default_rng(1)
    vectors, queries = noise.normal(size=(301, 8)).astype(np.float32), noise.normal(size=(37, 8)).astype(np.float32)
    together, alone = exact_search(vectors, queries, 20), [exact_search(vectors, query[None], 20) for query in queries]
    np.testing.assert_array_equal(together[1], np.concatenate([ids for _, ids in alone]))
    np.testing.assert_allclose(together[0], np.concatenate([scores for scores, _ in alone]), atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e18, -1e18])
def test_numbers_that_have_no_inner_product_are_refused(value: float) -> None:
    vectors = np.ones((30, 4), np.float32)
    vectors[17, 2] = value
    with pytest.raises(InputError, match=r"rows \[17\]"):
        exact_search(vectors, np.ones((1, 4), np.float32), 3)
    assert np.isfinite(exact_search(np.full((2, 4), 1e17, np.float32), np.full((1, 4), 1e17, np.float32), 1)[0]).all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("queries", [9, 37])
@pytest.mark.parametrize("share", [None, 0.7])
def test_workers_that_share_the_items_find_the_same(queries: int, share: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(5)
    vectors, asked = noise.integers(-2, 3, (701, 5)).astype(np.float32), noise.integers(-3, 4, (queries, 5)).astype(np.float32)
    allowed = None if share is None else noise.random(701) < share
    monkeypatch.setattr(workers, "count", lambda: 4)
    for found, wanted in zip(exact_search(vectors, asked, 20, allowed), sorted_by_hand(vectors, asked, 20, allowed), strict=True):
        np.testing.assert_array_equal(found, wanted)
