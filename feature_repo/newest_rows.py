"""The newest row of every entity of a source, however large it is: found by keys and times, then fetched range by range."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Final

import polars as pl
from feast.data_source import DataSource
from feast.repo_config import RepoConfig

from feature_repo.as_of import ROW
from feature_repo.frames import between, mapped, named, utc
from feature_repo.parquet import scan
from tandem.core.errors import BusyError

_MOST_RANGES: Final = 32
"""Each range is a scan of the whole source: beyond this many, ranges grow instead."""


def newest_by_range(
    config: RepoConfig,
    source: DataSource,
    join_key_columns: Sequence[str],
    feature_name_columns: Sequence[str],
    timestamp_field: str,
    created_timestamp_column: str | None,
    start: datetime,
    end: datetime,
    rows: int,
) -> Iterator[pl.DataFrame]:
    """The newest row per entity with start <= time <= end, about `rows` entities at a time.

    Which rows those are is found from keys and times alone; then they are fetched by their numbers, so that wide rows and lists
    are read once or a few times, and never sorted. Columns go by the view's names. Rows come in the order of the first key's
    length, then of the key: the order of Feast's serialized keys. Raises BusyError when the source is replaced meanwhile.
    """
    order = [timestamp_field, *named(created_timestamp_column)]
    columns = [*join_key_columns, *order]
    table = utc(mapped(scan(config, source), source), *order).with_row_index(ROW)
    narrow = between(table, timestamp_field, start, end).select(ROW, *columns).drop_nulls(list(join_key_columns))
    wide = table.select(ROW, *dict.fromkeys([*join_key_columns, *feature_name_columns, *order]))
    key = pl.col(join_key_columns[0]).cast(pl.String)
    at_most = max(rows, table.select(pl.len()).collect().item() // _MOST_RANGES)
    for chosen in _in_pieces(newest_of(narrow, join_key_columns, order, rows), at_most, key):
        fetched = _fetched(wide, chosen)
        if not fetched.select(columns).equals(chosen.sort(ROW).select(columns)):
            raise BusyError(f"source {source.name!r} was replaced while it was read; nothing is lost, run it again")
        yield fetched.sort(key.str.len_bytes(), key).drop(ROW)


def _in_pieces(parts: Iterable[pl.DataFrame], size: int, key: pl.Expr) -> Iterator[pl.DataFrame]:
    """Frames of ascending keys cut and put together to `size` rows; the last one may have fewer, or none."""
    waiting: list[pl.DataFrame] = []
    for part in parts:
        waiting.append(part.sort(key.str.len_bytes(), key))
        while sum(each.height for each in waiting) > size:
            whole = pl.concat(waiting)
            yield whole.head(size)
            waiting = [whole.slice(size)]
    yield pl.concat(waiting)


def _fetched(rows: pl.LazyFrame, chosen: pl.DataFrame) -> pl.DataFrame:
    """The rows whose numbers were chosen, in their order in the source; what lies before and after them all is skipped."""
    numbers = chosen[ROW]
    first, last = numbers.min(), numbers.max()
    if not isinstance(first, int) or not isinstance(last, int):
        return rows.head(0).collect()
    return rows.slice(first, last - first + 1).filter(pl.col(ROW).is_in(numbers.implode())).collect().sort(ROW)


def newest_of(rows: pl.LazyFrame, keys: Sequence[str], order: Sequence[str], size: int) -> Iterator[pl.DataFrame]:
    """The last row by `order` of each combination of `keys`, some `size` rows looked at a time."""
    for part in _key_ranges(rows, pl.col(keys[0]).cast(pl.String), size):
        yield _newest(rows.filter(part) if part is not None else rows, keys, order).collect()


def _newest(rows: pl.LazyFrame, keys: Sequence[str], order: Sequence[str]) -> pl.LazyFrame:
    ordered = rows.sort(*keys, *order, maintain_order=True)
    return ordered.unique(keys, keep="last", maintain_order=True)


def _key_ranges(rows: pl.LazyFrame, key: pl.Expr, size: int) -> list[pl.Expr | None]:
    """Conditions that cut the rows into ranges of (length of key, key), of about `size` rows at first; [None] for one range."""
    count = rows.select(pl.len()).collect().item()
    ranges = min(-(-count // size), _MOST_RANGES)
    if ranges < 2:
        return [None]
    step = max(1, count // (1000 * ranges))
    keys = rows.select(key.alias("key")).gather_every(step).drop_nulls()
    sample = keys.sort(pl.col("key").str.len_bytes(), "key").collect()["key"]
    borders = [sample[len(sample) * at // ranges] for at in range(1, ranges)]
    above = [pl.lit(True), *(_reaches(key, border) for border in borders)]
    below = [*(~_reaches(key, border) for border in borders), pl.lit(True)]
    return [one & other for one, other in zip(above, below, strict=True)]


def _reaches(key: pl.Expr, border: str) -> pl.Expr:
    """Is (length of key, key) at or above that of the border?"""
    length = key.str.len_bytes()
    size = len(border.encode())
    return (length > size) | ((length == size) & (key >= border))
