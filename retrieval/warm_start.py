"""A start that already retrieves well: a low-rank linear autoencoder in closed form, for the towers to improve on.

Random towers need many epochs to reach what linear algebra gives at once. So the item vectors begin as the best
rank-D answer of EASE (Steck, WWW 2019): scores `X @ inner @ outer.T` approximate `X @ B`.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.linalg import lapack
from sklearn.utils.extmath import randomized_svd

DENSE_LIMIT = 20_000
"""Largest catalogue whose N x N weights are inverted; above it the plain spectral autoencoder is used."""


def warm_start(matrix: sp.csr_matrix, dimension: int, ridge: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Item vectors as history and as candidate, `inner` and `outer` (N, D) float32, from users x items (U, N) binary.

    `ridge` is the L2 weight of the regression. Both have the same mean square, so that one learning rate fits both.
    """
    touched = np.flatnonzero(np.asarray(matrix.sum(0)).ravel())
    dense = matrix.astype(np.float32)[:, touched]
    rank = max(1, min(dimension, min(dense.shape) - 1))
    few_inner, few_outer = (_ease if len(touched) <= DENSE_LIMIT else _spectral)(dense, rank, ridge, seed)
    inner, outer = (np.zeros((matrix.shape[1], rank), np.float32) for _ in range(2))
    inner[touched], outer[touched] = few_inner, few_outer
    balance = np.sqrt(np.sqrt((inner**2).mean() / max((outer**2).mean(), 1e-12)))
    padding = ((0, 0), (0, dimension - rank))
    return np.pad(inner / max(balance, 1e-12), padding).astype(np.float32), np.pad(outer * balance, padding).astype(np.float32)


def _ease(matrix: sp.csr_matrix, rank: int, ridge: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Best rank-D basis of X @ B: the leading eigenvectors of B' X' X B, found without forming the dense X @ B."""
    dense = (matrix.T @ matrix).toarray()
    dense[np.diag_indices_from(dense)] += ridge
    factor, failed = lapack.spotrf(dense, lower=1, overwrite_a=1)
    if failed:
        raise np.linalg.LinAlgError(f"the Gram matrix is not positive definite at ridge = {ridge}; raise the ridge")
    inverse, _ = lapack.spotri(factor, lower=1, overwrite_c=1)
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    weights = -inverse / np.diag(inverse)[None, :]
    np.fill_diagonal(weights, 0.0)
    basis = _leading(weights, matrix, rank, seed)
    return weights @ basis, basis


def _leading(weights: np.ndarray, matrix: sp.csr_matrix, rank: int, seed: int, rounds: int = 3) -> np.ndarray:
    """Leading right singular vectors (N, rank) of matrix @ weights by subspace iteration (Halko et al. 2011)."""
    random = np.random.default_rng(seed)
    block = random.standard_normal((len(weights), min(rank + 16, len(weights))), dtype=np.float32)
    for _ in range(rounds):
        block, _ = np.linalg.qr(weights.T @ (matrix.T @ (matrix @ (weights @ block))))
    answers = matrix @ (weights @ block)
    values, vectors = np.linalg.eigh(answers.T @ answers)
    basis = block @ vectors[:, np.argsort(-values)[:rank]]
    return np.ascontiguousarray(basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(rank)]))


def _spectral(matrix: sp.csr_matrix, rank: int, ridge: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Truncated ridge autoencoder: V diag(s^2 / (s^2 + ridge)) V', which needs no N x N matrix."""
    _, values, rows = randomized_svd(matrix, rank, n_iter=4, random_state=seed)
    basis = rows.T
    return basis * (values**2 / (values**2 + ridge)), basis


def content_map(content: np.ndarray, targets: np.ndarray, counts: np.ndarray, ridge: float = 10.0) -> np.ndarray:
    """Ridge regression from content (N, C) to item vectors (N, D), weighted by how often an item was seen: (C, D)."""
    weight = np.minimum(counts, 50.0).astype(np.float32)[:, None]
    left = (content * weight).T @ content + ridge * np.eye(content.shape[1], dtype=np.float32)
    return np.asarray(np.linalg.solve(left, (content * weight).T @ targets), np.float32)
