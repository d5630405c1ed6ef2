"""What an item says about itself, as one row of numbers: text vector, categories and numeric attributes.

In: the items table and its text vectors. Out: (N, C) float32, the input of the item tower's content map. What the columns mean is
fixed by the catalogue that a release was trained on, so that an item put later is read in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tandem.core.schema import ITEMS

MOST_CATEGORIES: Final = 256
FEWEST_ITEMS: Final = 3


def content_matrix(items: pl.DataFrame, text: NDArray[np.float32]) -> NDArray[np.float32]:
    """Text (N, T), then the common categories (rows of length 1 at most), then standardised numeric attributes; finite."""
    return ContentMap.of(items)(items, text)


@dataclass(frozen=True, eq=False)
class ContentMap:
    """Columns of one catalogue: its common `categories`, and its numeric `attributes` with the mean and spread of each, (A,)."""

    categories: tuple[str, ...]
    attributes: tuple[str, ...]
    mean: NDArray[np.float64]
    spread: NDArray[np.float64]

    @classmethod
    def of(cls, items: pl.DataFrame) -> ContentMap:
        """Of an items table: the most common categories, and every attribute that is a number."""
        names = tuple(name for name, kind in items.schema.items() if name not in ITEMS and kind.is_numeric())
        mean = spread = np.zeros(len(names))
        if len(items) and names:
            with np.errstate(invalid="ignore"):
                values = _compressed(items, names)
                mean, spread = np.nan_to_num(np.nanmean(values, axis=0)), np.nan_to_num(np.nanstd(values, axis=0))
        return cls(_common(items), names, mean, spread)

    def __call__(self, items: pl.DataFrame, text: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, C) float32 of items of this catalogue, or of new ones with the same columns, and their text vectors (n, T)."""
        return np.ascontiguousarray(np.concatenate([text, self._categories(items), self._numbers(items)], axis=1), np.float32)

    def _categories(self, items: pl.DataFrame) -> NDArray[np.float32]:
        """Multi-hot; a row with n of them holds 1/sqrt(n) each."""
        kept = _pairs(items).filter(pl.col("name").is_in(self.categories))
        table = np.zeros((len(items), len(self.categories)), np.float32)
        column = {name: place for place, name in enumerate(self.categories)}
        table[kept["row"].to_numpy(), [column[name] for name in kept["name"]]] = 1.0
        return np.asarray(table / np.sqrt(np.maximum(table.sum(1, keepdims=True), 1.0)), np.float32)

    def _numbers(self, items: pl.DataFrame) -> NDArray[np.float32]:
        """Attributes as z-scores of log-compressed values, scaled to weigh like one text coordinate; missing = the mean."""
        if not self.attributes:
            return np.zeros((len(items), 0), np.float32)
        scaled = np.nan_to_num((_compressed(items, self.attributes) - self.mean) / np.maximum(self.spread, 1e-6))
        return np.asarray(np.clip(scaled, -3, 3) * 0.05, np.float32)


def _common(items: pl.DataFrame) -> tuple[str, ...]:
    counted = _pairs(items).group_by("name").len().filter(pl.col("len") >= FEWEST_ITEMS)
    ordered = counted.sort(["len", "name"], descending=[True, False])
    return tuple(ordered["name"].head(MOST_CATEGORIES).sort().to_list())


def _pairs(items: pl.DataFrame) -> pl.DataFrame:
    """[row, name] of every category of every item."""
    return items.select(pl.int_range(pl.len()).alias("row"), name="categories").explode("name").drop_nulls("name")


def _compressed(items: pl.DataFrame, names: tuple[str, ...]) -> NDArray[np.float64]:
    """(n, A) float64: logarithms with the sign kept, NaN where there is no number."""
    numbers = items.select(pl.col(names).cast(pl.Float64)).to_numpy().astype(np.float64)
    values: NDArray[np.float64] = np.sign(numbers) * np.log1p(np.abs(numbers))
    values[~np.isfinite(values)] = np.nan
    return values
