"""Time columns of any make to UTC microseconds.

In: a column of dates, datetimes, epoch numbers or text. Out: the same rows as `schema.TIME`, null where a value cannot be read.
"""

from __future__ import annotations

from typing import Final, Literal

import polars as pl

from tandem.core.errors import InputError
from tandem.core.schema import TIME

Unit = Literal["s", "ms", "us", "ns"]

MICROSECONDS: Final[dict[str, float]] = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}
"""Microseconds in one of each unit."""

_ZONED: Final = ("%Y-%m-%dT%H:%M:%S%.f%#z", "%Y-%m-%d %H:%M:%S%.f%#z")
_NAIVE: Final = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M")
_LATEST: Final = 32_503_680_000 * 1_000_000
"""Year 3000: beyond it a number is not a time."""


def parse_times(column: pl.Series, unit: Unit | None = None, pattern: str | None = None) -> pl.Series:
    """UTC microseconds of `column` (N,); null where a value cannot be read.

    Naive times count as UTC. Epoch numbers are in `unit`, or guessed from their size. Text is ISO 8601, an epoch number, or
    `pattern` (a strftime pattern). Raises InputError for a column type that holds no times.
    """
    if isinstance(column.dtype, pl.Datetime):
        zoned = column if column.dtype.time_zone else column.dt.replace_time_zone("UTC")
        return zoned.dt.convert_time_zone("UTC").dt.cast_time_unit("us")
    if column.dtype == pl.Date:
        return column.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    if column.dtype.is_numeric():
        return _from_numbers(column.cast(pl.Float64), unit)
    if column.dtype == pl.Null:
        return column.cast(TIME)
    if column.dtype != pl.String:
        raise InputError(f"column {column.name!r} has type {column.dtype}, which holds no times; name another timestamp column")
    return _from_text(column.str.strip_chars(), unit, pattern)


def _from_numbers(column: pl.Series, unit: Unit | None) -> pl.Series:
    scale = MICROSECONDS[unit or _guess_unit(column)]
    # Float64 holds whole microseconds exactly until the year 2255, so that this loses nothing.
    microseconds = (
        (column * scale).to_frame().select(pl.when(pl.nth(0).is_finite() & (pl.nth(0).abs() < _LATEST)).then(pl.nth(0)))
    )
    return microseconds.to_series().round().cast(pl.Int64).cast(TIME)


def _guess_unit(column: pl.Series) -> Unit:
    """Seconds until 1e11 (the year 5138), then milliseconds, microseconds, nanoseconds: each a thousand times larger."""
    middle = column.drop_nulls().abs().median()
    size = float(middle) if isinstance(middle, int | float) else 0.0
    if size < 1e11:
        return "s"
    if size < 1e14:
        return "ms"
    return "us" if size < 1e17 else "ns"


def _from_text(column: pl.Series, unit: Unit | None, pattern: str | None) -> pl.Series:
    if pattern is not None:
        parsed = column.str.to_datetime(pattern, strict=False, time_unit="us")
        return parse_times(parsed)
    numbers = column.cast(pl.Float64, strict=False)
    readings = [_from_numbers(numbers, unit)]
    readings += [parse_times(column.str.to_datetime(each, strict=False, time_unit="us")) for each in _ZONED + _NAIVE]
    readings.append(parse_times(column.str.to_date("%Y-%m-%d", strict=False)))
    named = [reading.alias(str(place)) for place, reading in enumerate(readings)]
    return pl.DataFrame(named).select(pl.coalesce(pl.all())).to_series().alias(column.name)
