"""Counts over windows and decayed counts at every instant at which they change: the arithmetic of declared features.

In: events as 0/1 columns and values per (key, instant). Out: rows [key, event_timestamp, features...], each holding everything up
to and including its own instant. The same function builds whole tables, and the few rows that new events change.

A window of w days reaches from w - 1 UTC midnights before the day of the instant up to the instant. A decayed sum is exact at the
instant of its last event, which is stored beside it; `crosses.faded` brings it to the moment of a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from feature_repo.features import Declared, rule_of, stored_time
from feature_repo.views import ENTITIES, TIMESTAMP
from tandem.core.schema import MICROSECONDS_PER_DAY, Source

_EDGE: Final = "__edge"


def numbered(frame: pl.DataFrame, key: str, names: pl.Series) -> pl.DataFrame:
    """The frame with each id as its place in the sorted `names`: numbers sort alike, and join several times faster."""
    return frame.with_columns(pl.col(key).cast(pl.Enum(names)).to_physical())


def rows_from(rows: pl.DataFrame, key: str, since: pl.DataFrame) -> pl.DataFrame:
    """The rows at or after each key's time in `since` [key, since]."""
    return rows.join(since, on=key, maintain_order="left").filter(pl.col(TIMESTAMP) >= pl.col("since")).drop("since")


def with_midnights(sums: pl.DataFrame, key: str, windows: Mapping[str, Sequence[int]], until: datetime | None) -> pl.DataFrame:
    """(key, instant) of every row of `sums`, and of every midnight at which a day leaves a window.

    `windows`: column of `sums` -> the windows, in days, over the instants at which it is above 0. `until` stops the midnights.
    """
    instants = sums.lazy().select(key, TIMESTAMP)
    midnights = []
    for column, lengths in windows.items():
        days = sums.lazy().filter(pl.col(column) > 0).select(key, pl.col(TIMESTAMP).dt.truncate("1d")).unique()
        midnights += [days.with_columns(pl.col(TIMESTAMP).dt.offset_by(f"{length}d")) for length in lengths]
    if until is not None:
        midnights = [each.filter(pl.col(TIMESTAMP) <= until) for each in midnights]
    return pl.concat([instants, *midnights]).unique().sort(key, TIMESTAMP).collect()


def before_window(rows: pl.DataFrame, totals: pl.DataFrame, key: str, columns: Sequence[str], days: int) -> pl.DataFrame:
    """The running totals of `columns` just before the first midnight of each row's window, one line per row; 0 before all events.

    Both frames are sorted by (key, instant).
    """
    first_midnight = pl.col(TIMESTAMP).dt.truncate("1d").dt.offset_by(f"-{days - 1}d")
    asked = rows.select(key, (first_midnight - pl.duration(microseconds=1)).alias(_EDGE))
    known = totals.select(key, pl.col(TIMESTAMP).alias(_EDGE), *columns)
    found = asked.join_asof(known, on=_EDGE, by=key, strategy="backward", check_sortedness=False)
    return found.select(pl.col(columns).fill_null(0))


def decayed_sums(
    first: NDArray[np.int64], times_us: NDArray[np.int64], amounts: NDArray[np.float64], half_life_days: float
) -> NDArray[np.float64]:
    """(N,) for each row the sum of its key's `amounts` up to it, each halved once per half-life that has passed since.

    `first` (N,): where each row's key begins; rows are sorted by (key, time). A doubling scan (Hillis and Steele 1986): after the
    pass of step d a row holds the 2d rows that end at it, and nothing over- or underflows however long the history is. What a row
    gets depends on the earlier rows of its own key alone.
    """
    place = np.arange(len(times_us))
    found, step = amounts.astype(np.float64), 1
    longest = int((place - first).max(initial=0)) + 1
    while step < longest:
        later = np.flatnonzero(place - step >= first)
        passed = (times_us[later] - times_us[later - step]) / (half_life_days * MICROSECONDS_PER_DAY)
        found[later] = found[later] + found[later - step] * np.exp2(-passed)
        step *= 2
    return found


def declared_table(
    events: pl.LazyFrame,
    entity: str,
    declared: Mapping[str, Declared],
    source: Source,
    until: datetime | None,
    since: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """The table of an entity's declared features [key, event_timestamp, features...]; with `since` [key, since] only later rows.

    Counts are Int64, sums and means Float64; a mean of nothing is null. A decayed count or sum is that of the instant in
    `<name>_time`, its last event. Sums of windows are differences of running totals, and so exact to their rounding.
    """
    key = ENTITIES[entity]
    sums = _sums(events, key, declared, source)
    names = sums[key].unique().sort()
    sums = numbered(sums, key, names)
    totals = sums.with_columns(pl.exclude(key, TIMESTAMP).cum_sum().over(key))
    windows = {_hits(name): (each.window_days,) for name, each in declared.items() if each.window_days is not None}
    rows = with_midnights(sums, key, windows, until)
    now = rows.join_asof(totals, on=TIMESTAMP, by=key, strategy="backward", check_sortedness=False)
    columns = [column for name, each in declared.items() for column in _feature(name, each, now, sums, totals, key)]
    table = now.select(names.gather(now[key]).alias(key), TIMESTAMP).with_columns(columns)
    return (table if since is None else rows_from(table, key, since)).sort(key, TIMESTAMP)


def _hits(name: str) -> str:
    return f"__hits_{name}"


def _amount(name: str) -> str:
    return f"__amount_{name}"


def _sums(events: pl.LazyFrame, key: str, declared: Mapping[str, Declared], source: Source) -> pl.DataFrame:
    """Per (key, instant) and feature how many events it counts and the sum of their values, sorted; only where there are some."""
    value = pl.col("value").cast(pl.Float64).fill_nan(None)
    marks, amounts = [], []
    for name, each in declared.items():
        hit = pl.any_horizontal(task.matches() for task in rule_of(name, each, source)).fill_null(False)
        if each.what != "count":
            hit &= value.is_not_null()
        marks.append(hit.cast(pl.Int64).alias(_hits(name)))
        amounts.append(pl.when(hit).then(value).otherwise(0.0).alias(_amount(name)))
    marked = events.select(key, pl.col("timestamp").alias(TIMESTAMP), "event_id", *marks, *amounts)
    counted = marked.filter(pl.any_horizontal(pl.col([_hits(name) for name in declared]) > 0)).sort(key, TIMESTAMP, "event_id")
    sums = counted.group_by(key, TIMESTAMP, maintain_order=True).agg(pl.exclude("event_id").sum())
    return sums.collect()


def _feature(
    name: str, declared: Declared, now: pl.DataFrame, sums: pl.DataFrame, totals: pl.DataFrame, key: str
) -> list[pl.Series]:
    """A feature's columns, a value for each row of `now`, which has the running totals."""
    if declared.half_life_days is not None:
        return _decayed(name, declared, now, sums, key)
    hits, amount = now[_hits(name)], now[_amount(name)]
    if declared.window_days is not None:
        earlier = before_window(now, totals, key, (_hits(name), _amount(name)), declared.window_days)
        hits, amount = hits - earlier[_hits(name)], amount - earlier[_amount(name)]
    return [_value(hits, amount, declared).alias(name)]


def _value(hits: pl.Series, amount: pl.Series, declared: Declared) -> pl.Series:
    if declared.what == "count":
        return hits.cast(pl.Int64)
    frame = pl.DataFrame({"hits": hits, "amount": amount})
    nothing = pl.lit(None if declared.what == "mean" else 0.0, pl.Float64)
    counted = pl.col("amount") / pl.col("hits") if declared.what == "mean" else pl.col("amount")
    return frame.select(pl.when(pl.col("hits") > 0).then(counted).otherwise(nothing)).to_series()


def _decayed(name: str, declared: Declared, now: pl.DataFrame, sums: pl.DataFrame, key: str) -> list[pl.Series]:
    own = sums.select(key, TIMESTAMP, pl.col(_hits(name)).alias("hits"), pl.col(_amount(name)).alias("amount")).filter(
        pl.col("hits") > 0
    )
    assert declared.half_life_days is not None
    first = own.with_row_index("row").select(pl.col("row").first().over(key).cast(pl.Int64)).to_series().to_numpy()
    times = own[TIMESTAMP].dt.epoch("us")
    columns = {"count": ["hits"], "sum": ["amount"], "mean": ["amount", "hits"]}[declared.what]
    found = [decayed_sums(first, times.to_numpy(), own[column].to_numpy(), declared.half_life_days) for column in columns]
    value = found[0] / found[1] if declared.what == "mean" else found[0]
    known = own.select(key, TIMESTAMP).with_columns(pl.Series("value", value, pl.Float64), times.alias("time"))
    last = now.select(key, TIMESTAMP).join_asof(known, on=TIMESTAMP, by=key, strategy="backward", check_sortedness=False)
    if not declared.decays:
        return [last["value"].alias(name)]
    return [last["value"].fill_null(0.0).alias(name), last["time"].alias(stored_time(name))]
