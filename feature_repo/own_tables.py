"""Features that somebody else computes: a table of their own, named in `tandem.toml`, as a view like the others.

In: [features.tables.<view>] and a CSV, Parquet or JSON-lines file with a key, a time and features. Out: an offline table
[user_id or item_id, event_timestamp, features...]. A row that cannot be used fails the build, naming the row: features must not
go missing silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from feature_repo.features import OwnTable
from feature_repo.sources.files import read_table, require_columns
from feature_repo.sources.times import parse_times
from feature_repo.views import ENTITIES, TIMESTAMP
from tandem.core.errors import InputError
from tandem.core.schema import id_problem


def read_own_tables(workspace: Path, tables: Mapping[str, OwnTable]) -> dict[str, pl.DataFrame]:
    """Every declared table by its view's name. Raises NotFoundError or InputError, naming the file and what is wrong with it."""
    return {name: read_own_table(workspace / each.path, each) for name, each in tables.items()}


def read_own_table(path: Path, declared: OwnTable) -> pl.DataFrame:
    """One table, sorted by (key, event_timestamp); numbers that a CSV spelt out are numbers again."""
    raw = read_table(path)
    key = ENTITIES[declared.entity]
    own = declared.key or key
    require_columns(raw, (own, declared.timestamp), path.name)
    features = [name for name in raw.columns if name not in (own, declared.timestamp, "row")]
    if not features:
        raise InputError(f"{path.name} has no feature beside {own} and {declared.timestamp}; add a column")
    table = raw.select(
        pl.col(own).cast(pl.String).alias(key),
        parse_times(raw[declared.timestamp]).alias(TIMESTAMP),
        *(_feature(raw[name], path.name) for name in features),
        pl.col("row"),
    )
    _check_rows(table, key, declared, path.name)
    return table.drop("row").sort(key, TIMESTAMP)


def _feature(column: pl.Series, file: str) -> pl.Series:
    """A number or a text; whole numbers stay whole."""
    dtype = column.dtype
    if dtype == pl.String:
        text = column.str.strip_chars().replace("", None)
        for kind in (pl.Int64(), pl.Float64()):
            number = text.cast(kind, strict=False)
            if number.null_count() == text.null_count() and number.null_count() < len(text):
                return _without_nan(number)
        return text
    if dtype.is_integer() or dtype == pl.Boolean:
        return column.cast(pl.Int64)
    if dtype.is_float() or dtype.is_decimal():
        return _without_nan(column.cast(pl.Float64))
    if dtype in (pl.Categorical, pl.Enum):
        return column.cast(pl.String)
    raise InputError(
        f"{file}: column {column.name!r} is {dtype}; a feature is a number or a text. Turn it into one, or leave it out"
    )


def _without_nan(column: pl.Series) -> pl.Series:
    return column.fill_nan(None) if column.dtype.is_float() else column


def _check_rows(table: pl.DataFrame, key: str, declared: OwnTable, file: str) -> None:
    """Raise InputError for the first row without a usable key or time, and for two rows of one key and time."""
    bad = pl.Series([value is None or id_problem(value) is not None for value in table[key]], dtype=pl.Boolean)
    _refuse(table.filter(bad), file, f"{declared.key or key} that is no id")
    _refuse(table.filter(pl.col(TIMESTAMP).is_null()), file, f"{declared.timestamp} that is no time")
    _refuse(table.filter(~pl.struct(key, TIMESTAMP).is_first_distinct()), file, "key and time that an earlier row has already")


def _refuse(rows: pl.DataFrame, file: str, what: str) -> None:
    if rows.height:
        raise InputError(
            f"{file}: {rows.height} rows have a {what}, the first of them row {rows['row'][0] + 1} of the data; mend them"
        )
