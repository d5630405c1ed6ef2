"""What an item says about itself, as one row of numbers: text vector, categories and numeric attributes.

In: the items table and its text vectors. Out: (N, C) float32, the input of the item tower's content map.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tandem.core.schema import ITEMS

MOST_CATEGORIES: Final = 256
FEWEST_ITEMS: Final = 3


def content_matrix(items: pl.DataFrame, text: NDArray[np.float32]) -> NDArray[np.float32]:
    """Text (N, T), then the common categories (rows of length 1 at most), then standardised numeric attributes; finite."""
    return np.ascontiguousarray(np.concatenate([text, _categories(items), _numbers(items)], axis=1), np.float32)


def _categories(items: pl.DataFrame) -> NDArray[np.float32]:
    """Multi-hot over the most common categories; a row with n of them holds 1/sqrt(n) each."""
    long = items.select(pl.int_range(pl.len()).alias("row"), name="categories").explode("name").drop_nulls("name")
    counted = long.group_by("name").len().filter(pl.col("len") >= FEWEST_ITEMS).sort(["len", "name"], descending=[True, False])
    names = counted["name"].head(MOST_CATEGORIES).sort().to_list()
    table = np.zeros((len(items), len(names)), np.float32)
    kept = long.filter(pl.col("name").is_in(names))
    column = {name: place for place, name in enumerate(names)}
    table[kept["row"].to_numpy(), [column[name] for name in kept["name"]]] = 1.0
    return np.asarray(table / np.sqrt(np.maximum(table.sum(1, keepdims=True), 1.0)), np.float32)


def _numbers(items: pl.DataFrame) -> NDArray[np.float32]:
    """Attributes as z-scores of log-compressed values, scaled to weigh like one text coordinate; missing = the mean."""
    names = [name for name, kind in items.schema.items() if name not in ITEMS and kind.is_numeric()]
    if not names:
        return np.zeros((len(items), 0), np.float32)
    values = items.select(pl.col(names).cast(pl.Float64)).to_numpy().astype(np.float64)
    values = np.sign(values) * np.log1p(np.abs(values))
    values[~np.isfinite(values)] = np.nan
    with np.errstate(invalid="ignore"):
        mean = np.nan_to_num(np.nanmean(values, axis=0)) if len(values) else 0.0
        spread = np.nan_to_num(np.nanstd(values, axis=0)) if len(values) else 1.0
    scaled = np.nan_to_num((values - mean) / np.maximum(spread, 1e-6))
    return np.asarray(np.clip(scaled, -3, 3) * 0.05, np.float32)
