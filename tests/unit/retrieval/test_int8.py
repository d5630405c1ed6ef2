"""Whole numbers first, then float32: the same answers as the judge, on every kind of vector, and what happens without int8."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval import exact, int8, tiles
from retrieval.exact import exact_search
from retrieval.int8 import Codes


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 64 items: 1,500 items are many tiles. The processor is taken to multiply int8, so that the path is walked."""
    monkeypatch.setattr(tiles, "TILE", 64)
    monkeypatch.setattr(exact, "QUERIES", 16)
    monkeypatch.setattr(int8, "multiplies_int8", lambda: True)


def drawn(shape: str, count: int, width: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed)
    rows = noise.normal(size=(count, width))
    if shape == "unit":
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    if shape == "uneven coordinates":
        rows *= np.geomspace(1e-3, 1e3, width)
    if shape == "uneven lengths":
        rows *= noise.exponential(size=(count, 1))
    if shape == "one coordinate":
        rows[:, 1:] = 0
    if shape == "near each other":
        rows = 1 + 1e-4 * rows
    return rows.astype(np.float32)


SHAPES = ["plain", "unit", "uneven coordinates", "uneven lengths", "one coordinate", "near each other"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [None, 0.8, 0.1])
@pytest.mark.parametrize(("queries", "k"), [(1, 10), (5, 10), (37, 1), (37, 90)])
def test_the_answers_are_the_judges(shape: str, share: float | None, queries: int, k: int) -> None:
    vectors, asked = drawn(shape, 1_500, 24, 0), drawn(shape, queries, 24, 1)
    allowed = None if share is None else np.random.default_rng(2).random(1_500) < share
    scores, ids = Codes.of(vectors).scan(vectors, asked, k, allowed)
    wanted, truth = exact_search(vectors, asked, k, allowed)
    scale = np.linalg.norm(asked, axis=1, keepdims=True) * np.linalg.norm(vectors, axis=1).max()
    assert (np.abs(scores - wanted) <= 1e-5 * scale).all()
    true = np.einsum("bd,bkd->bk", asked.astype(np.float64), vectors[ids].astype(np.float64))
    assert (true >= wanted[:, -1:] - 1e-5 * scale).all()
    assert all(len(set(row)) == k for row in ids.tolist())
    if shape in ("plain", "unit", "uneven lengths"):
        assert (ids == truth).mean() > 0.999


def test_ties_go_to_the_lower_id() -> None:
    vectors = np.random.default_rng(0).integers(-2, 3, (1_500, 6)).astype(np.float32)
    queries = np.random.default_rng(1).integers(-3, 4, (20, 6)).astype(np.float32)
    scores, ids = Codes.of(vectors).scan(vectors, queries, 30)
    order = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :30]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(scores, np.take_along_axis(queries @ vectors.T, order, axis=1))


@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_errors_stay_within_the_bound_that_decides(shape: str) -> None:
    vectors, queries = drawn(shape, 800, 24, 3), drawn(shape, 20, 24, 4)
    codes = Codes.of(vectors)
    columns, slack = codes._rounded(queries)
    whole = codes.rows.astype(np.float64) @ columns
    scaled = queries * codes.steps
    step = np.abs(scaled).max(axis=1) / 127
    error = np.abs(vectors.astype(np.float64) @ queries.T / step - whole)
    assert (2 * error <= slack).all()


def test_vectors_that_are_all_alike_are_left_to_the_float32_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_TOO_MANY", 2)
    vectors, queries = np.ones((1_500, 4), np.float32), np.ones((20, 4), np.float32)
    _, ids = Codes.of(vectors).scan(vectors, queries, 5)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 20


def test_zeros_and_no_queries_are_answered() -> None:
    vectors = np.zeros((1_500, 4), np.float32)
    _, ids = Codes.of(vectors).scan(vectors, np.zeros((2, 4), np.float32), 3)
    assert ids.tolist() == [[0, 1, 2]] * 2
    assert Codes.of(vectors).scan(vectors, np.zeros((0, 4), np.float32), 3)[1].shape == (0, 3)


def test_a_processor_without_int8_gets_the_float32_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "multiplies_int8", lambda: False)
    monkeypatch.setattr(Codes, "_near", None)
    vectors = drawn("plain", 1_500, 8, 5)
    np.testing.assert_array_equal(Codes.of(vectors).scan(vectors, vectors[:20], 7)[1], exact_search(vectors, vectors[:20], 7)[1])
