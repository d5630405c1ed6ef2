"""`schema.json`: what is written is read back, and what no feature may be is refused."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from feature_repo.views import DTYPES, TIMESTAMP, FieldSchema, ViewSchema, read_views, view_named, write_views
from tandem.core.errors import InputError, NotFoundError
from tandem.core.schema import TIME


def table_of_every_type() -> pl.DataFrame:
    return pl.DataFrame(schema={"user_id": pl.String, TIMESTAMP: TIME} | {f"f_{name}": dtype for name, dtype in DTYPES.items()})


def test_a_table_of_every_type_survives_the_file(tmp_path: Path) -> None:
    table = table_of_every_type()
    view = ViewSchema.of_table("user_stats", "user", table, version=3, ttl_days=1.5)
    write_views(tmp_path, (view,))
    assert read_views(tmp_path) == (view,)
    assert view.columns == dict(table.schema)
    assert (view.path, view.key, view.version, view.ttl_days) == ("features/user_stats.parquet", "user_id", 3, 1.5)
    assert [each.name for each in view.fields if each.is_numeric] == ["f_Int64", "f_Float64"]


def test_a_type_that_no_feature_may_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"born.*Date"):
        ViewSchema.of_table("user_stats", "user", pl.DataFrame(schema={"user_id": pl.String, TIMESTAMP: TIME, "born": pl.Date}))


def test_views_that_cannot_be_are_refused(tmp_path: Path) -> None:
    clicks = (FieldSchema("clicks", "Int64"),)
    with pytest.raises(InputError, match="shop"):
        ViewSchema("stats", "shop", clicks)
    with pytest.raises(InputError, match="no features"):
        ViewSchema("stats", "user")
    with pytest.raises(InputError, match="one name"):
        write_views(tmp_path, (ViewSchema("stats", "user", clicks), ViewSchema("stats", "item", clicks)))


def test_what_is_missing_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="features build"):
        read_views(tmp_path)
    with pytest.raises(NotFoundError, match=r"'other'.*\['stats'\]"):
        view_named((ViewSchema("stats", "user", (FieldSchema("clicks", "Int64"),)),), "other")
