"""Running counts of users or items: at each instant with an event, and at each midnight at which a day leaves a window.

In: marked events in the order of time, [key, event_timestamp, value, 0/1 columns...]. Out: one row per (key, instant), sorted,
with what had been counted up to and including that instant, in the last w days, and of everybody. Keys are numbered and times are
whole microseconds, so a sorted array of (key, time) is one of int64, and everything is a cumulative sum, a merge of sorted arrays
or a gather. Keys are taken in blocks that fit into the processor's caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from feature_repo.views import TIMESTAMP
from tandem.core.schema import TIME

Ints = NDArray[np.int64]
Totals = Callable[[pl.Series], pl.DataFrame]
"""Ascending instants -> totals over everybody up to and including each of them, as `all_*` columns, sorted by instant."""

_DAY: Final = 86_400_000_000
_BLOCK: Final = 500_000
"""Events of a block; one key with more is a block of its own."""

_LARGEST: Final = 2**62
_EXACT: Final = 2**53


@dataclass(frozen=True)
class Counting:
    """What is counted: names of the 0/1 columns, `history` first; windows in days; no midnights after `until`."""

    names: tuple[str, ...]
    windows: tuple[int, ...]
    until: datetime | None


@dataclass(frozen=True)
class _Events:
    """Events sorted by (key, time), (E,) each: key's number, µs, place among everybody's totals, marks and running value sums."""

    key: Ints
    us: Ints
    place: Ints
    marks: dict[str, Ints]
    value_sum: NDArray[np.float64]
    value_count: Ints

    def take(self, start: int, end: int) -> _Events:
        """Events start..end, their keys numbered from 0."""
        part = slice(start, end)
        key = self.key[part]
        marks = {name: column[part] for name, column in self.marks.items()}
        numbers = np.cumsum(_changes(key)) - 1
        return _Events(numbers, self.us[part], self.place[part], marks, self.value_sum[part], self.value_count[part])


def running_counts(marked: pl.DataFrame, key: str, counting: Counting, totals_at: Totals) -> pl.DataFrame:
    """[key, event_timestamp, counts..., value_sum, value_count, first_time, last_time, window_<w>..., all_<count>...].

    `marked` is sorted by time. `first_time` and `last_time` are those of history events in µs, null before the first one.
    """
    names = marked[key].unique().sort()
    midnights = _midnights(marked, counting)
    us = _us(marked[TIMESTAMP])
    begins = _changes(us)
    totals = totals_at(pl.Series(_distinct([us[begins], midnights])).cast(TIME))
    everybody = _us(totals[TIMESTAMP])
    place = (np.searchsorted(everybody, us[begins], side="right") - 1)[np.cumsum(begins) - 1]
    events = _events(marked, key, names, counting, place)
    days = _Days.of(midnights, us, everybody)
    shared = {name: totals[name].to_numpy() for name in totals.columns if name != TIMESTAMP}
    parts = [_rows(events.take(*block), events.key[block[0]], counting, days, shared) for block in _blocks(events, days)]
    none = _rows(events.take(0, 0), 0, counting, days, shared)
    rows = pl.concat(parts or [none])
    return rows.with_columns(names.gather(rows["number"]).alias(key)).drop("number")


def _us(times: pl.Series) -> Ints:
    return times.to_physical().to_numpy()


def _distinct(ascending: Sequence[Ints]) -> Ints:
    """What ascending arrays hold, each once, ascending: merging runs is several times faster than numpy's `unique`."""
    merged = np.sort(np.concatenate(ascending), kind="stable")
    found: Ints = merged[_changes(merged)]
    return found


def _changes(values: Ints) -> NDArray[np.bool_]:
    """Where a value differs from the one before it; the first does."""
    return np.append(np.ones(min(1, len(values)), bool), values[1:] != values[:-1])


def _midnights(marked: pl.DataFrame, counting: Counting) -> Ints:
    """Every midnight (µs) at which somebody's day of history leaves a window."""
    days = marked.lazy().filter(pl.col("history") > 0).select(pl.col(TIMESTAMP).dt.epoch("us").floordiv(_DAY).unique()).collect()
    ends = [days.to_series().to_numpy() + window for window in counting.windows]
    found = _distinct(ends) * _DAY
    return found if counting.until is None else found[found <= int(counting.until.timestamp() * 1_000_000)]


def _events(marked: pl.DataFrame, key: str, names: pl.Series, counting: Counting, place: Ints) -> _Events:
    """The events by key, each with the running sum of its key's values."""
    number = marked[key].cast(pl.Enum(names)).to_physical().cast(pl.UInt32).to_numpy()
    order = _stable_order(number)
    valued = marked.select(pl.when(pl.col("history") > 0).then(pl.col("value")).alias("value"))["value"]
    marks = {name: marked[name].cast(pl.UInt8).to_numpy()[order] for name in counting.names}
    sorted_key = number[order].astype(np.int64)
    return _Events(
        sorted_key,
        _us(marked[TIMESTAMP])[order],
        place[order],
        marks,
        _value_sums(valued.fill_null(0.0).to_numpy()[order], sorted_key),
        valued.is_not_null().cast(pl.UInt8).to_numpy()[order],
    )


def _stable_order(number: NDArray[np.uint32]) -> Ints:
    """What sorts the numbers and keeps equal ones in their order: 16 bits at a time, for which numpy has a radix sort."""
    order = np.argsort((number & 0xFFFF).astype(np.uint16), kind="stable")
    if len(number) and number.max() > 0xFFFF:
        order = order[np.argsort((number >> 16).astype(np.uint16)[order], kind="stable")]
    return order


def _value_sums(values: NDArray[np.float64], key: Ints) -> NDArray[np.float64]:
    """Running sums within each key. Whole numbers, such as ratings and quantities, are exact as differences of one sum; others
    would lose digits that way, and a key's sums must not depend on what other keys there are.
    """
    if not (np.rint(values) == values).all() or np.abs(values).sum() >= _EXACT:
        return pl.DataFrame({"key": key, "value": values}).select(pl.col("value").cum_sum().over("key")).to_series().to_numpy()
    starts = _changes(key)
    running = np.cumsum(values)
    before = (running - values)[starts]
    found: NDArray[np.float64] = running - before[np.cumsum(starts) - 1]
    return found


@dataclass(frozen=True)
class _Days:
    """The days there are: the first, how many, the last midnight that gets a row, and each midnight's place among the totals."""

    first: int
    count: int
    last: int
    place: Ints

    @classmethod
    def of(cls, midnights: Ints, us: Ints, everybody: Ints) -> _Days:
        edges = [each // _DAY for each in (midnights, us) if len(each)]
        first = int(min(each.min() for each in edges)) if edges else 0
        last = int(max(each.max() for each in edges)) if edges else 0
        place = np.searchsorted(everybody, np.arange(first, last + 1) * _DAY, side="right") - 1
        return cls(first, last - first + 1, int(midnights[-1]) // _DAY if len(midnights) else first - 1, place)


def _blocks(events: _Events, days: _Days) -> Iterator[tuple[int, int]]:
    """(start, end) of whole keys, of about `_BLOCK` events and so few keys that (key, time) fits into one number."""
    borders = np.append(np.flatnonzero(_changes(events.key)), len(events.key))
    most = max(1, _LARGEST // (days.count * _DAY))
    at = 0
    while at < len(borders) - 1:
        end = int(np.searchsorted(borders, borders[at] + _BLOCK, side="right")) - 1
        end = min(max(end, at + 1), at + most)
        yield int(borders[at]), int(borders[end])
        at = end


def _rows(events: _Events, number: int, counting: Counting, days: _Days, shared: dict[str, NDArray[np.int64]]) -> pl.DataFrame:
    """The rows of a block of keys, of which the first has this number."""
    starts, last = np.flatnonzero(_changes(events.key)), _last_of_instant(events)
    key, us = events.key[last], events.us[last]
    sums = {name: _since_start(column, starts, key, last) for name, column in events.marks.items()}
    history = _History.of(key, us, sums["history"], days)
    place, midnight_us = _midnight_rows(history, key, us, counting, days)

    def with_midnights(at_events: NDArray[np.int64], at_midnights: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.insert(at_events, place, at_midnights)

    at = with_midnights(np.arange(len(us)), place - 1)  # a midnight's key has had events before it
    row_key, row_us = key[at], with_midnights(us, midnight_us)
    counts = {name: column[at] for name, column in sums.items()}
    among = with_midnights(events.place[last], days.place[midnight_us // _DAY - days.first])
    columns = {
        "number": row_key + number,
        TIMESTAMP: row_us,
        **counts,
        "value_sum": events.value_sum[last][at],
        "value_count": _since_start(events.value_count, starts, key, last)[at],
        "first_time": history.first_us[row_key],
        "last_time": history.last_us[at],
        **history.windows(row_key, row_us, counts["history"], counting.windows, days),
        **{name: column[among] for name, column in shared.items()},
    }
    begun = [pl.when(pl.col("history") > 0).then(pl.col(name)).alias(name) for name in ("first_time", "last_time")]
    return pl.DataFrame(columns).with_columns(pl.col(TIMESTAMP).cast(TIME), *begun)


def _last_of_instant(events: _Events) -> Ints:
    differs = (events.key[1:] != events.key[:-1]) | (events.us[1:] != events.us[:-1])
    return np.flatnonzero(np.append(differs, np.ones(min(1, len(events.us)), bool)))


def _since_start(column: Ints, starts: Ints, key: Ints, at: Ints) -> Ints:
    """Running sums within each key, at the events `at`, which are of these keys; keys start at the events `starts`."""
    running = np.cumsum(column, dtype=np.int64)
    before = running[starts] - column[starts]
    found: Ints = running[at] - before[key]
    return found


@dataclass(frozen=True)
class _History:
    """History of a block's instants (I,): `day` (D,), numbers of (key, day) with some, ascending; `total` (D,) up to its end.

    `first_us` (K,) is the time of each key's first event, `last_us` (I,) that of the last one so far; anything where none is.
    """

    day: Ints
    total: Ints
    first_us: Ints
    last_us: Ints

    @classmethod
    def of(cls, key: Ints, us: Ints, total: Ints, days: _Days) -> _History:
        begins = _changes(key)
        grows = total > np.where(begins, 0, np.roll(total, 1))
        at = np.flatnonzero(grows)
        number = key[at] * days.count + us[at] // _DAY - days.first
        ends = np.flatnonzero(np.append(number[1:] != number[:-1], np.ones(min(1, len(at)), bool)))
        first_us = np.zeros(begins.sum(), np.int64)
        first_us[key[at][::-1]] = us[at][::-1]
        newest = np.maximum.accumulate(np.where(grows, np.arange(len(us)), 0))
        return cls(number[ends], total[at[ends]], first_us, us[newest])

    def windows(self, key: Ints, us: Ints, total: Ints, windows: Sequence[int], days: _Days) -> dict[str, Ints]:
        """`window_<w>` of rows sorted by (key, time): the total less that of the days before the window."""
        number = key * days.count + us // _DAY - days.first
        changes = _changes(number)
        day, row_day = number[changes], np.cumsum(changes) - 1
        first = day - day % days.count
        found = {}
        for window in windows:
            before = np.searchsorted(self.day, np.maximum(day - (window - 1), first)) - 1
            known = (before >= 0) & (self.day[before] >= first) if len(self.day) else np.zeros(len(day), bool)
            earlier = np.where(known, self.total[before], 0) if len(self.day) else np.zeros(len(day), np.int64)
            found[f"window_{window}"] = total - earlier[row_day]
        return found


def _midnight_rows(history: _History, key: Ints, us: Ints, counting: Counting, days: _Days) -> tuple[Ints, Ints]:
    """Midnights without an event of their key: (place among the instants `us`, µs), ascending by key and time."""
    owner, day = np.divmod(history.day, days.count)
    ends = [(owner[kept], day[kept] + window) for window in counting.windows for kept in [day + window <= days.last - days.first]]
    span = days.count * _DAY
    numbers = _distinct([owners * days.count + end for owners, end in ends])
    midnight_key, midnight_day = np.divmod(numbers, days.count)
    midnights = midnight_key * span + midnight_day * _DAY
    instants = key * span + (us - days.first * _DAY)
    place = np.searchsorted(instants, midnights)
    new = np.append(instants, -1)[place] != midnights
    return place[new], (midnight_day[new] + days.first) * _DAY
