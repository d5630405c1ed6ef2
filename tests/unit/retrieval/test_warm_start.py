"""The closed-form start: at full rank it is EASE; at low rank its best basis; for huge catalogues the spectral form."""

import numpy as np
import pytest
import scipy.sparse as sp

import retrieval.warm_start as module
from retrieval.baselines import EASE
from retrieval.warm_start import content_map, warm_start


def _matrix(users: int = 300, items: int = 40, seed: int = 0) -> sp.csr_matrix:
    random = np.random.default_rng(seed)
    taste, topic = random.integers(0, 4, users), random.integers(0, 4, items)
    chance = np.where(taste[:, None] == topic[None, :], 0.4, 0.03)
    return sp.csr_matrix((random.random((users, items)) < chance).astype(np.float32))


def test_full_rank_reproduces_ease() -> None:
    matrix = _matrix()
    inner, outer = warm_start(matrix, 39, 50.0, 0)
    exact = EASE.fit(matrix, 50.0).scores(matrix)
    found = (matrix @ inner) @ outer.T
    assert np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


def test_low_rank_keeps_the_structure() -> None:
    matrix = _matrix()
    inner, outer = warm_start(matrix, 4, 50.0, 0)
    found, exact = (matrix @ inner) @ outer.T, EASE.fit(matrix, 50.0).scores(matrix)
    assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.85


def test_untouched_items_get_zero_vectors_and_the_rank_is_padded() -> None:
    matrix = sp.hstack([_matrix(items=10), sp.csr_matrix((300, 3), dtype=np.float32)]).tocsr()
    inner, outer = warm_start(matrix, 32, 50.0, 0)
    assert inner.shape == outer.shape == (13, 32)
    assert not inner[10:].any()
    assert not outer[10:].any()


def test_the_spectral_form_serves_catalogues_too_large_to_invert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DENSE_LIMIT", 10)
    matrix = _matrix()
    inner, outer = warm_start(matrix, 4, 1.0, 0)
    left, values, right = np.linalg.svd(matrix.toarray(), full_matrices=False)
    best = (left[:, :4] * values[:4] ** 3 / (values[:4] ** 2 + 1.0)) @ right[:4]
    assert np.abs((matrix @ inner) @ outer.T - best).max() < 0.05 * np.abs(best).max()


def test_content_map_recovers_a_linear_world() -> None:
    random = np.random.default_rng(0)
    content, truth = random.standard_normal((400, 8)).astype(np.float32), random.standard_normal((8, 3)).astype(np.float32)
    assert np.abs(content_map(content, content @ truth, np.full(400, 50.0), ridge=1e-3) - truth).max() < 1e-2
