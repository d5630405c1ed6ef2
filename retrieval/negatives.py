"""Which items a batch is contrasted with: its own positives, a uniform sample and a popularity sample, mixed.

In-batch negatives alone collapse (popular items are negatives most often, rare ones never); the mix, with the expected
count of every candidate known, is what `loss.sampled_softmax` corrects for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Negatives:
    """A shared candidate set: `items` (C,) int64 ascending and unique, `log_expected` (C,) float32."""

    items: np.ndarray
    log_expected: np.ndarray


class NegativeSampler:
    """Draws candidate sets for a catalogue of N items from popularity counts (N,)."""

    def __init__(self, popularity: np.ndarray, uniform: int, popular: int, smoothing: float = 0.75) -> None:
        weights = np.power(popularity.astype(np.float64) + 1e-9, smoothing)
        self._popular_share = weights / weights.sum()
        self._batch_share = (popularity + 1e-9) / (popularity.sum() + 1e-9 * len(popularity))
        self._uniform, self._popular = uniform, popular

    def draw(self, positives: np.ndarray, random: np.random.Generator) -> Negatives:
        """Candidates for a batch whose targets are `positives` (T,) int64; the whole catalogue when it is small enough."""
        count = len(self._popular_share)
        if count <= self._uniform + self._popular:
            return Negatives(np.arange(count), np.zeros(count, np.float32))
        uniform = random.integers(0, count, self._uniform)
        popular = random.choice(count, self._popular, p=self._popular_share)
        items = np.unique(np.concatenate([positives, uniform, popular]))
        return Negatives(items, self._log_expected(items, len(positives)))

    def _log_expected(self, items: np.ndarray, positives: int) -> np.ndarray:
        """Log of the chance that an item is in the set at all: one minus the chance that every draw misses it."""
        missed = self._uniform * np.log1p(-1.0 / len(self._popular_share))
        missed = missed + self._popular * np.log1p(-self._popular_share[items])
        missed = missed + positives * np.log1p(-np.minimum(self._batch_share[items], 0.5))
        return np.asarray(np.log(-np.expm1(missed)), np.float32)


class SharedNegatives:
    """Negatives that all positions of a batch share, half uniform and half by popularity; their positives stand beside them."""

    def __init__(self, popularity: np.ndarray, count: int, smoothing: float = 0.75) -> None:
        weights = np.power(popularity.astype(np.float64) + 1e-9, smoothing)
        self._shares = weights / weights.sum()
        self._ends = np.cumsum(self._shares)
        self._half = max(1, count // 2)

    def draw(self, random: np.random.Generator) -> Negatives:
        """Distinct items (C,), C <= count, with the log of the chance of each to be drawn."""
        items = len(self._shares)
        uniform = random.integers(0, items, self._half)
        popular = np.minimum(np.searchsorted(self._ends, random.random(self._half), side="right"), items - 1)
        drawn = np.unique(np.concatenate([uniform, popular]))
        return Negatives(drawn, self.log_expected(drawn))

    def log_expected(self, items: np.ndarray) -> np.ndarray:
        """(len(items),) float32: log of the chance that an item is among the negatives."""
        missed = self._half * (np.log1p(-1.0 / max(2, len(self._shares))) + np.log1p(-np.minimum(self._shares[items], 0.999)))
        return np.asarray(np.log(-np.expm1(missed)), np.float32)
