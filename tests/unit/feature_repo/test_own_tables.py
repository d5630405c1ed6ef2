"""A table that somebody else computed becomes a view, or is refused with the row that is wrong."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from feature_repo.features import OwnTable
from feature_repo.own_tables import read_own_table, read_own_tables
from feature_repo.views import TIMESTAMP
from tandem.core.errors import InputError, NotFoundError
from tandem.core.schema import TIME

CSV = """item_id,event_timestamp,margin,stock,shelf
i2,2026-01-02,0.5,7,upper
i1,2026-01-02T06:00:00Z,,3,
i1,2026-01-01,0.25,12,lower
"""


def at(day: int, hour: int = 0) -> datetime:
    return datetime(2026, 1, day, hour, tzinfo=UTC)


def read(tmp_path: Path, text: str, declared: OwnTable | None = None) -> pl.DataFrame:
    (tmp_path / "own.csv").write_text(text)
    return read_own_table(tmp_path / "own.csv", declared or OwnTable("own.csv", "item"))


def test_a_csv_is_sorted_and_typed(tmp_path: Path) -> None:
    table = read(tmp_path, CSV)
    assert dict(table.schema) == {
        "item_id": pl.String(),
        TIMESTAMP: TIME,
        "margin": pl.Float64(),
        "stock": pl.Int64(),
        "shelf": pl.String(),
    }
    assert table.rows() == [
        ("i1", at(1), 0.25, 12, "lower"),
        ("i1", at(2, 6), None, 3, None),
        ("i2", at(2), 0.5, 7, "upper"),
    ]


def test_a_parquet_with_names_of_its_own(tmp_path: Path) -> None:
    frame = pl.DataFrame({"member": [7, 8], "day": [at(1), at(2)], "vip": [True, False], "worth": [1.5, float("nan")]})
    frame.write_parquet(tmp_path / "members.parquet")
    declared = OwnTable("members.parquet", "user", key="member", timestamp="day")
    (table,) = read_own_tables(tmp_path, {"user_worth": declared}).values()
    assert table.rows() == [("7", at(1), 1, 1.5), ("8", at(2), 0, None)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (CSV.replace("item_id", "sku"), "no column 'item_id'; it has"),
        (CSV.replace("event_timestamp", "day"), "no column 'event_timestamp'"),
        ("item_id,event_timestamp\ni1,2026-01-01\n", "no feature beside item_id and event_timestamp"),
        (CSV + ",2026-01-05,1,1,x\n", "1 rows have a item_id that is no id, the first of them row 4"),
        (CSV + "i9,yesterday,1,1,x\n", "event_timestamp that is no time, the first of them row 4"),
        (CSV + "i1,2026-01-01,1,1,x\n", "key and time that an earlier row has already, the first of them row 4"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(tmp_path, text)


def test_lists_are_no_features_and_files_must_exist(tmp_path: Path) -> None:
    pl.DataFrame({"item_id": ["i"], TIMESTAMP: [at(1)], "tags": [["a"]]}).write_parquet(tmp_path / "lists.parquet")
    with pytest.raises(InputError, match="column 'tags' is List"):
        read_own_table(tmp_path / "lists.parquet", OwnTable("lists.parquet", "item"))
    with pytest.raises(NotFoundError, match=r"gone\.csv"):
        read_own_table(tmp_path / "gone.csv", OwnTable("gone.csv", "item"))
