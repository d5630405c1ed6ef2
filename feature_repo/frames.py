"""Frames as Feast hands them over and as it wants them: columns by the view's names, times in UTC, plain Arrow types."""

from __future__ import annotations

from datetime import datetime
from typing import Final, TypeAlias, cast

import pandas as pd
import polars as pl
import pyarrow as pa
from feast.data_source import DataSource

from tandem.core.errors import InputError
from tandem.core.schema import TIME

EntityFrame: TypeAlias = pl.DataFrame | pl.LazyFrame | pd.DataFrame | pa.Table | None
_LARGEST_ARRAY: Final = 2**31 - 1


def mapped(rows: pl.LazyFrame, source: DataSource) -> pl.LazyFrame:
    """Rows with the source's field mapping applied, to the columns that are there under their old names."""
    there = rows.collect_schema().names() if source.field_mapping else []
    return rows.rename({old: new for old, new in source.field_mapping.items() if old in there and old != new})


def utc(rows: pl.LazyFrame, timestamp_field: str, *created: str) -> pl.LazyFrame:
    """Rows with their times as UTC microseconds (a push may have left nanoseconds); a creation column may be of any kind."""
    schema = rows.collect_schema()
    times = [name for name in created if isinstance(schema.get(name), pl.Datetime | pl.Date)]
    return rows.with_columns(as_utc(schema, name) for name in (timestamp_field, *times))


def as_utc(schema: pl.Schema, column: str) -> pl.Expr:
    """Expression: `column` as UTC microseconds; times without a zone are read as UTC. Raises InputError for other types."""
    dtype = schema.get(column)
    if dtype is None:
        raise InputError(f"no timestamp column {column!r}; there are {schema.names()}")
    if dtype == pl.Date or (isinstance(dtype, pl.Datetime) and dtype.time_zone is None):
        return pl.col(column).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    if isinstance(dtype, pl.Datetime):
        return pl.col(column).cast(pl.Datetime("us", dtype.time_zone)).dt.convert_time_zone("UTC")
    raise InputError(f"column {column!r} has type {dtype}, not a timestamp; convert it before asking")


def as_polars(frame: EntityFrame) -> pl.DataFrame:
    """Any of the frames that Feast passes on, as a Polars DataFrame of the same rows in the same order."""
    if isinstance(frame, pl.LazyFrame):
        return frame.collect()
    if isinstance(frame, pd.DataFrame):
        return pl.from_pandas(frame)
    if isinstance(frame, pa.Table):
        return cast(pl.DataFrame, pl.from_arrow(frame))
    if isinstance(frame, pl.DataFrame):
        return frame
    raise InputError(f"an entity frame cannot be a {type(frame).__name__}; pass a Polars, pandas or Arrow frame")


def plain_arrow(frame: pl.DataFrame) -> pa.Table:
    """An Arrow table of one chunk with the types that Feast knows: `string` and `list` where their 32-bit offsets reach."""
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest()).combine_chunks()
    types = [_plain(column.type) if column.nbytes < _LARGEST_ARRAY else column.type for column in table.columns]
    return table.cast(pa.schema(list(zip(table.column_names, types, strict=True))))


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_large_binary(kind):
        return pa.binary()
    if pa.types.is_large_list(kind):
        return pa.list_(_plain(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _plain(field.type)) for field in kind])
    return kind


def between(rows: pl.LazyFrame, field: str, start: datetime | None, end: datetime | None) -> pl.LazyFrame:
    if start is not None:
        rows = rows.filter(pl.col(field) >= _utc(start))
    if end is not None:
        rows = rows.filter(pl.col(field) <= _utc(end))
    return rows


def _utc(moment: datetime) -> pl.Expr:
    naive = moment.tzinfo is None
    literal = pl.lit(moment)
    return (literal.dt.replace_time_zone("UTC") if naive else literal.dt.convert_time_zone("UTC")).cast(TIME)


# --- questions that cannot be answered ----------------------------------------------------------------------------------------


def named(column: str | None) -> list[str]:
    return [column] if column else []
