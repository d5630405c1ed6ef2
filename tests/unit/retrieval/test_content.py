"""Item content as numbers: finite, common categories only, missing attributes at the mean."""

import numpy as np
import polars as pl

from retrieval.content import content_matrix


def _items() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "item_id": list("abcdef"),
            "title": list("abcdef"),
            "text": list("abcdef"),
            "categories": [["x", "y"], ["x"], ["x"], ["y"], ["y", "rare"], []],
            "available_from": [None] * 6,
            "price": [1.0, 10.0, None, 100.0, float("nan"), 5.0],
            "brand": list("uvwxyz"),
        },
        schema_overrides={"available_from": pl.Datetime("us", "UTC")},
    )


def test_columns_and_values() -> None:
    text = np.eye(6, 4, dtype=np.float32)
    matrix = content_matrix(_items(), text)
    assert matrix.shape == (6, 4 + 2 + 1)
    assert np.isfinite(matrix).all()
    assert (matrix[:, :4] == text).all()
    assert matrix[0, 4:6].tolist() == [np.float32(1 / np.sqrt(2))] * 2
    assert matrix[5, 4:6].tolist() == [0.0, 0.0]
    assert matrix[2, 6] == matrix[4, 6] == 0.0
    assert matrix[1, 6] < matrix[3, 6]


def test_without_attributes_or_categories_the_text_stands_alone() -> None:
    items = _items().drop("price").with_columns(categories=pl.lit([], dtype=pl.List(pl.String)))
    text = np.ones((6, 3), np.float32)
    assert (content_matrix(items, text) == text).all()
