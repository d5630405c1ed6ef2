"""Ranking and prediction metrics: one definition each, per user, vectorised.

In: ranked lists of dense item ids `(U, K) int64`, best first, unique in a row, padded with -1, and what each user really
took. Out: `(U,) float64`, NaN for a user without truth, so that gates can pair users; or one number over everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tandem.core.errors import InputError

CALIBRATION_BINS: Final = 15


def hit_matrix(ranked_ids: NDArray[np.int64], truth: Sequence[NDArray[np.int64]]) -> NDArray[np.bool_]:
    """(U, K) bool: is the item ranked there one that the user took? Padding (-1) never hits.

    `truth` holds one array of dense ids per user, in any order. Raises InputError when the two disagree about U.
    """
    if len(truth) != len(ranked_ids):
        raise InputError(f"{len(ranked_ids)} ranked lists but truth for {len(truth)} users; give one of each per user")
    wanted = np.concatenate([np.zeros(0, np.int64), *truth])
    owner = np.repeat(np.arange(len(truth)), [len(ids) for ids in truth])
    span = int(max(ranked_ids.max(initial=-1), wanted.max(initial=-1))) + 1
    found = np.isin(ranked_ids + np.arange(len(ranked_ids))[:, None] * span, wanted + owner * span)
    return found & (ranked_ids >= 0)


def truth_sizes(truth: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """(U,) int64: how many distinct items each user took."""
    return np.array([len(np.unique(ids)) for ids in truth], dtype=np.int64)


def recall_at_k(hits: NDArray[np.bool_], sizes: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """(U,) hits in the first k over min(k, truth): 1 is the best that any k items can do."""
    return _over(hits[:, : _checked(k)].sum(axis=1), np.minimum(sizes, k))


def ndcg_at_k(hits: NDArray[np.bool_], sizes: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """(U,) normalised discounted cumulative gain with binary gain and log2 discount (Järvelin & Kekäläinen 2002)."""
    discounts = 1.0 / np.log2(np.arange(2, _checked(k) + 2))
    gained = hits[:, :k] @ discounts[: hits.shape[1]]
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])[np.minimum(sizes, k)]
    return _over(gained, ideal)


def hit_rate_at_k(hits: NDArray[np.bool_], sizes: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """(U,) 1.0 where any of the first k hits, else 0.0."""
    return np.where(sizes > 0, hits[:, : _checked(k)].any(axis=1).astype(np.float64), np.nan)


def mrr_at_k(hits: NDArray[np.bool_], sizes: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """(U,) 1 / rank of the first hit among the first k, 0.0 without one; its mean is the mean reciprocal rank."""
    first = hits[:, : _checked(k)]
    if first.shape[1] == 0:
        return hit_rate_at_k(hits, sizes, k)
    reciprocal = np.where(first.any(axis=1), 1.0 / (first.argmax(axis=1) + 1), 0.0)
    return np.where(sizes > 0, reciprocal, np.nan)


def coverage_at_k(ranked_ids: NDArray[np.int64], k: int, items: int) -> float:
    """Share of the catalogue of `items` that stands in anybody's first k; NaN for an empty catalogue."""
    shown = np.unique(ranked_ids[:, : _checked(k)])
    return float((shown >= 0).sum() / items) if items else float("nan")


def ild_at_k(ranked_ids: NDArray[np.int64], categories: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """(U,) intra-list diversity: mean of 1 - Jaccard of the categories over all pairs in the first k; 1 is no overlap at all.

    `categories` (N, C) int64 codes by dense id, none twice in a row, padded with -1. Pairs without any category say nothing;
    NaN without a pair that says something. Ziegler et al. 2005, "Improving Recommendation Lists Through Topic Diversification".
    """
    shown = ranked_ids[:, : _checked(k)]
    codes = np.where((shown >= 0)[:, :, None], categories[shown], -1)
    real = shown >= 0
    sizes = (codes >= 0).sum(axis=2)
    total, pairs = np.zeros(len(shown)), np.zeros(len(shown), np.int64)
    for one in range(shown.shape[1]):
        for other in range(one):
            left, right = codes[:, one], codes[:, other]
            both = ((left[:, :, None] == right[:, None, :]) & (left >= 0)[:, :, None]).sum(axis=(1, 2))
            union = sizes[:, one] + sizes[:, other] - both
            known = real[:, one] & real[:, other] & (union > 0)
            total += np.where(known, 1.0 - both / np.maximum(union, 1), 0.0)
            pairs += known
    return _over(total, pairs)


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Chance that a positive scores above a negative, ties counting half (Mann-Whitney U); NaN with one class only."""
    values, positive = _pairs(scores, labels)
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return float("nan")
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2.0)[place]
    return float((ranks[positive].sum() - positives * (positives + 1) / 2.0) / (positives * negatives))


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike, bins: int = CALIBRATION_BINS) -> float:
    """Mean gap between predicted and observed rate over `bins` bins of equal mass, weighted by size; NaN without rows.

    Rows of one probability share their mean label, so that the order of the rows changes nothing
    (Nguyen & O'Connor 2015, "Posterior calibration and exploratory analysis", equal-mass bins).
    """
    predicted, positive = _pairs(probabilities, labels)
    if not len(predicted):
        return float("nan")
    _, place, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    observed = (np.bincount(place, weights=positive) / counts)[place]
    order = np.argsort(predicted, kind="stable")
    gaps = [abs(float((predicted[rows] - observed[rows]).sum())) for rows in np.array_split(order, _checked(bins))]
    return sum(gaps) / len(predicted)


def _over(numerator: NDArray[Any], denominator: NDArray[Any]) -> NDArray[np.float64]:
    """Quotient, NaN where the denominator is 0: a user without truth has no recall."""
    quotient = np.full(len(numerator), np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator > 0)
    return quotient


def _checked(k: int) -> int:
    if k < 1:
        raise InputError(f"k = {k}; it must be at least 1")
    return k


def _pairs(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores and labels as arrays of one length, without NaN scores, which no order holds."""
    values, positive = np.asarray(scores, np.float64), np.asarray(labels) > 0
    if values.shape != positive.shape or values.ndim != 1:
        raise InputError(f"scores of shape {values.shape} for labels of shape {positive.shape}; give one score per label")
    if np.isnan(values).any():
        raise InputError(f"{int(np.isnan(values).sum())} of {len(values)} scores are NaN; drop them or predict them")
    return values, positive
