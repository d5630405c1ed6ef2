"""What every report compares with: popularity, item-kNN and EASE.

In: a binary user-item matrix (U, N) in CSR, columns are dense item ids. Out: a scorer whose `.scores(history (B, N))` is a dense
(B, N) float32, higher is better; `top_k` turns scores into ids. ItemKNN's neighbours also feed the candidate source "covisit".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import lapack

from retrieval.tensors import load_tensors, save_tensors
from retrieval.topk import best
from tandem.core.errors import IncompatibleError, InputError, IntegrityError

Csr: TypeAlias = Any
"""scipy.sparse.csr_matrix or csr_array; scipy ships no types."""

EASE_LIMIT: Final = 20_000
_BLOCK_CELLS: Final = 16_000_000
_MIRROR_ROWS: Final = 1_024


class TooLargeError(InputError):
    """A catalogue is larger than a closed form can hold."""


def interaction_matrix(events: pl.DataFrame, item_ids: Sequence[str]) -> Csr:
    """Binary CSR (U, N): did the user touch the item? Rows are the users in order of their id, columns follow `item_ids`.

    `events` needs user_id and item_id. Events of items outside `item_ids` are left out; their users keep an empty row.
    """
    users = events.get_column("user_id").unique().sort()
    columns = pl.Series(item_ids, dtype=pl.String)
    _refuse_duplicates(columns)
    pairs = (
        events.select("user_id", "item_id")
        .unique()
        .join(_numbered(users, "user_id", "row"), on="user_id")
        .join(_numbered(columns, "item_id", "column"), on="item_id")
        .sort("row", "column")
    )
    cells = (pairs["row"].to_numpy(), pairs["column"].to_numpy())
    return sparse.csr_matrix((np.ones(len(pairs), np.float32), cells), shape=(len(users), len(columns)))


@dataclass(frozen=True, eq=False)
class Popularity:
    """The same scores for everybody: how many users touched each item, (N,) float32."""

    counts: NDArray[np.float32]

    @classmethod
    def fit(cls, matrix: Csr) -> Self:
        """Count the users of every item of `matrix` (U, N)."""
        return cls(np.bincount(matrix.indices, minlength=matrix.shape[1]).astype(np.float32))

    def scores(self, history: Csr) -> NDArray[np.float32]:
        """(B, N) float32, a read-only view of one row."""
        _check_width(history, len(self.counts))
        return np.broadcast_to(self.counts, history.shape)

    def order(self) -> NDArray[np.int64]:
        """(N,) int64: all item ids, most popular first, equals by lower id."""
        return np.argsort(-self.counts, kind="stable").astype(np.int64)

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        save_tensors(path, {"counts": self.counts})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; IntegrityError when it is damaged."""
        return cls(load_tensors(path, "counts")["counts"])


@dataclass(frozen=True, eq=False)
class ItemKNN:
    """Cosine similarity of items by their users, the best K per item (Sarwar et al. 2001; Deshpande & Karypis 2004).

    `indices` (N, K) int32: nearest first, never the item itself, padded with -1; `values` (N, K) float32, padded with 0.
    """

    indices: NDArray[np.int32]
    values: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.indices.shape != self.values.shape or self.indices.ndim != 2:
            raise IntegrityError(f"neighbours have shape {self.indices.shape} but similarities {self.values.shape}; fit again")

    @classmethod
    def fit(cls, matrix: Csr, neighbours: int = 200) -> Self:
        """Keep the `neighbours` most similar items of every item of `matrix` (U, N)."""
        if neighbours < 1:
            raise InputError(f"neighbours = {neighbours} keeps nothing; use 1 or more, 200 by default")
        items = matrix.shape[1]
        indices = np.full((items, neighbours), -1, np.int32)
        values = np.zeros((items, neighbours), np.float32)
        for start, block in _gram_blocks(_unit_columns(matrix)):
            rows = np.arange(len(block))
            block[rows, start + rows] = 0.0
            block[block <= 0] = -np.inf
            found, ids = best(block, neighbours)
            indices[start : start + len(block)] = ids
            values[start : start + len(block)] = np.where(ids >= 0, np.minimum(found, 1.0), 0.0)
        return cls(indices, values)

    def scores(self, history: Csr) -> NDArray[np.float32]:
        """(B, N) float32: for each item, the sum of its similarities to the items of the history that name it a neighbour."""
        _check_width(history, len(self.indices))
        return np.asarray((history @ self.similarities()).toarray(), np.float32)

    def score_items(self, items: NDArray[np.int64]) -> NDArray[np.float32]:
        """(N,) float32 for one history of dense ids (H,); ids of -1 count as absent. Under a millisecond at N = 10,000."""
        known = np.unique(items[items >= 0])
        near = self.indices[known].ravel()
        kept = near >= 0
        total = np.bincount(near[kept], self.values[known].ravel()[kept], minlength=len(self.indices))
        return total.astype(np.float32)

    def similarities(self) -> Csr:
        """The neighbours as a CSR (N, N), row = item of the history, column = neighbour."""
        kept = self.indices >= 0
        ends = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
        shape = (len(self.indices), len(self.indices))
        return sparse.csr_matrix((self.values[kept], self.indices[kept], ends), shape=shape)

    def save(self, path: Path) -> None:
        """Write one safetensors file: indices int32 (N, K), values float32 (N, K); atomically."""
        save_tensors(path, {"indices": self.indices, "values": self.values})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; IntegrityError when it is damaged."""
        tensors = load_tensors(path, "indices", "values")
        return cls(tensors["indices"], tensors["values"])


@dataclass(frozen=True, eq=False)
class EASE:
    """A linear item-item model without a diagonal, in closed form (Steck 2019, arXiv:1905.03375). `weights` (N, N) float32."""

    weights: NDArray[np.float32]

    @classmethod
    def fit(cls, matrix: Csr, l2: float = 250.0) -> Self:
        """Solve B = I - P / diag(P), P = (XᵀX + l2·I)⁻¹. N² memory and N³ time: TooLargeError above 20,000 items."""
        items = matrix.shape[1]
        if items > EASE_LIMIT:
            raise TooLargeError(
                f"EASE over {items:,} items would invert a matrix of {items * items * 4 / 1e9:.0f} GB; the limit is "
                f"{EASE_LIMIT:,}: keep the {EASE_LIMIT:,} most popular items, or compare with item-kNN only"
            )
        if not l2 > 0:
            raise InputError(f"l2 = {l2} does not regularise; use a number above 0, 250 to 500 suits most catalogues")
        inverse = _inverse(_gram(matrix, l2))
        inverse /= -np.diagonal(inverse).copy()[:, None]
        np.fill_diagonal(inverse, 0.0)
        return cls(inverse.T)  # P is symmetric: scaling rows and transposing scales columns, and gives C order without a copy

    def scores(self, history: Csr) -> NDArray[np.float32]:
        """(B, N) float32: history (B, N) times the weights."""
        _check_width(history, len(self.weights))
        return np.asarray(history @ self.weights, np.float32)


def top_k(scores: NDArray[np.float32], k: int, exclude: Csr | None = None) -> NDArray[np.int64]:
    """Ids (B, k) int64 of the best k columns, ties by lower id; -1 where a row has fewer left after `exclude` (B, N)."""
    if k < 1:
        raise InputError(f"k = {k} asks for nothing; use 1 or more")
    if exclude is not None:
        rows = np.repeat(np.arange(exclude.shape[0]), np.diff(exclude.indptr))
        scores = np.array(scores, np.float32)
        scores[rows, exclude.indices] = -np.inf
    return best(np.asarray(scores, np.float32), k)[1]


def _numbered(values: pl.Series, name: str, number: str) -> pl.DataFrame:
    return pl.DataFrame({name: values, number: pl.int_range(len(values), eager=True)})


def _refuse_duplicates(item_ids: pl.Series) -> None:
    twice = item_ids.filter(item_ids.is_duplicated()).unique().sort()
    if len(twice):
        raise InputError(f"{len(twice)} item ids stand twice in the catalogue, first {twice[0]!r}; keep one row per item")


def _check_width(history: Csr, items: int) -> None:
    if history.shape[1] != items:
        raise IncompatibleError(
            f"history has {history.shape[1]} columns but the model knows {items} items; fit on this catalogue"
        )


def _unit_columns(matrix: Csr) -> Csr:
    """Each column divided by its length, so that the Gram matrix holds cosines."""
    lengths = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=0), np.float64)).ravel()
    scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return (matrix @ sparse.diags(scale)).astype(np.float32).tocsr()


def _gram_blocks(matrix: Csr) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Rows of XᵀX as dense float32 blocks with their first row's number; memory is bounded by the block."""
    by_item = matrix.T.tocsr()
    items = matrix.shape[1]
    step = max(1, _BLOCK_CELLS // max(items, 1))
    for start in range(0, items, step):
        yield start, np.asarray((by_item[start : start + step] @ matrix).toarray(), np.float32)


def _gram(matrix: Csr, l2: float) -> NDArray[np.float32]:
    """XᵀX + l2·I in Fortran order, so that LAPACK works in place. Counts are exact in float32 up to 16 million users."""
    items = matrix.shape[1]
    gram = np.empty((items, items), np.float32, order="F")
    for start, block in _gram_blocks(matrix.astype(np.float32)):
        gram[:, start : start + len(block)] = block.T
    gram[np.diag_indices(items)] += l2
    return gram


def _inverse(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Inverse of a symmetric positive definite matrix by Cholesky, in place: half the work and memory of a general inverse."""
    if not len(matrix):
        return matrix
    factor, problem = lapack.spotrf(matrix, lower=1, overwrite_a=1)
    if problem:
        raise InputError(f"EASE: the Gram matrix is not positive definite at item {problem}; raise l2")
    inverse, _ = lapack.spotri(factor, lower=1, overwrite_c=1)
    return _mirror_lower(inverse)


def _mirror_lower(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Copy the lower triangle over the upper one, in place and by blocks: no second N x N matrix beside the first."""
    for start in range(0, len(matrix), _MIRROR_ROWS):
        end = start + _MIRROR_ROWS
        corner = np.tril(matrix[start:end, start:end])
        matrix[start:end, start:end] = corner + np.tril(corner, -1).T
        matrix[start:end, end:] = matrix[end:, start:end].T
    return matrix
