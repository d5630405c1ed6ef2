"""Running counts of users or items: at each instant with an event, and at each midnight at which a day leaves a window.

In: marked events in the order of time, [user_id, item_id, event_timestamp, value, valued, 0/1 columns...]. Out: one row per (key,
instant), sorted, with what had been counted up to and including that instant and in the last w days. Keys are numbered, and a
time is its place on one axis of instants: so (key, time) is one int64, what is known of an instant is looked up by its place, and
everything is a cumulative sum, a merge of sorted arrays or a gather. Arrays as long as all events are narrow; what is wide is
made for a block of keys, several blocks at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from feature_repo.views import ENTITIES, TIMESTAMP
from tandem.core.schema import MICROSECONDS_PER_DAY as _DAY
from tandem.core.schema import TIME, to_us

Ints = NDArray[np.int64]
Numbers = NDArray[Any]
"""Numbers of any width."""

_BLOCK: Final = 250_000
"""Events of a block; one key with more is a block of its own."""

_EXACT: Final = 2**53
_GRAIN: Final = 1024
"""Sums of multiples of 1 / _GRAIN are exact while they stay below _EXACT / _GRAIN."""


@dataclass(frozen=True)
class Counting:
    """What is counted: names of the 0/1 columns, `history` first; windows in days; no midnights after `until`."""

    names: tuple[str, ...]
    windows: tuple[int, ...]
    until: datetime | None


# --- the axis of time --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timeline:
    """Everybody's events (E,) on one axis of instants (T,): those with an event, and midnights at which a day leaves a window.

    `us` (T,) ascends; `day` (T,) is counted from that of the first; `midnight` has the place of each day's first moment where
    the axis has it; `last_midnight` is the last day that gets a row for its midnight alone. `totals` are everybody's counts so
    far (T,). Of the events: `place` on the axis, `ids` by column, `marks` of which none equals another (`same`: which of them a
    name's are), and `value`, whose sums are `exact` or depend on the order.
    """

    us: Ints
    day: Ints
    midnight: Ints
    last_midnight: int
    totals: pl.DataFrame
    place: NDArray[np.int32]
    ids: dict[str, pl.Series]
    marks: dict[str, NDArray[np.uint8]]
    same: dict[str, str]
    value: NDArray[np.float64]
    exact: bool

    @property
    def days(self) -> int:
        return len(self.midnight)


def timeline(marked: pl.DataFrame, counting: Counting, exact: bool) -> Timeline:
    """The axis of marked events, and the events on it; `exact` as `exact_in_any_order` has it."""
    us = marked[TIMESTAMP].to_physical().to_numpy()
    marks = {name: marked[name].to_numpy() for name in (*counting.names, "valued")}
    same = _same(marks)
    ends = _ends(us)
    begins, instants = np.append(0, ends[:-1] + 1)[: len(ends)], us[ends]
    found = {name: np.add.reduceat(marks[name], begins, dtype=np.int64) for name in set(same.values())}
    midnights = _midnights(instants[found["history"] > 0], counting)
    axis = _distinct([instants, midnights])
    known = np.searchsorted(instants, axis, side="right")
    day = axis // _DAY
    first, last = (int(day[0]), int(day[-1])) if len(day) else (0, 0)
    return Timeline(
        us=axis,
        day=day - first,
        midnight=np.searchsorted(axis, np.arange(first, last + 1) * _DAY),
        last_midnight=int(midnights[-1]) // _DAY - first if len(midnights) else -1,
        totals=pl.DataFrame({name: np.append(0, np.cumsum(found[same[name]]))[known] for name in counting.names}),
        place=np.repeat(np.searchsorted(axis, instants).astype(np.int32), np.diff(ends, prepend=-1)),
        ids={key: marked[key] for key in ENTITIES.values()},
        marks={name: marks[name] for name in set(same.values())},
        same=same,
        value=marked["value"].to_numpy(),
        exact=exact,
    )


def exact_in_any_order(values: NDArray[np.float64]) -> bool:
    """Are sums of these values the same in whatever order they are added? Those of quantities, and of ratings by halves, are."""
    largest = 0.0
    for start in range(0, len(values), _BLOCK):
        grains = values[start : start + _BLOCK] * _GRAIN
        if not (np.rint(grains) == grains).all():
            return False
        largest = max(largest, grains.max(), -grains.min())
    return bool(largest * len(values) < _EXACT)


def _same(columns: dict[str, NDArray[np.uint8]]) -> dict[str, str]:
    """For each column the first with the same values: where history is what was bought, the two are counted once."""
    same: dict[str, str] = {}
    for name, column in columns.items():
        same[name] = next((other for other in same.values() if np.array_equal(columns[other], column)), name)
    return same


def _midnights(instants: Ints, counting: Counting) -> Ints:
    """Every midnight (µs) at which somebody's day of history, with one of these instants, leaves a window."""
    days = _distinct([instants // _DAY])
    found = _distinct([days + window for window in counting.windows]) * _DAY
    return found if counting.until is None else found[found <= to_us(counting.until)]


def _distinct(ascending: Sequence[Ints]) -> Ints:
    """What ascending arrays hold, each once, ascending: merging runs is several times faster than numpy's `unique`."""
    merged = np.sort(np.concatenate(ascending), kind="stable")
    return merged[_ends(merged)]


def _ends(values: Numbers) -> Ints:
    """Places of values that differ from the one after them; the last does."""
    return np.flatnonzero(_differs(values))


def _differs(values: Numbers) -> NDArray[np.bool_]:
    differs = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=differs[:-1])
    return differs


# --- events by key -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Events:
    """Events sorted by (key, time), (E,) each: key's number, place on the axis, marks and value."""

    key: Numbers
    place: NDArray[np.int32]
    marks: dict[str, NDArray[np.uint8]]
    value: NDArray[np.float64]


@dataclass(frozen=True)
class _Keys:
    """The keys (K,) there are, sorted; `order` (E,) sorts events by (key, time), and those of key k begin at `borders[k]` of
    (K + 1,).
    """

    names: pl.Series
    order: Ints
    borders: Ints

    @classmethod
    def of(cls, ids: pl.Series) -> _Keys:
        names, number = _numbered(ids)
        return cls(names, _stable_order(number), np.append(0, np.cumsum(np.bincount(number, minlength=len(names)))))

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(first, end) of keys with about `_BLOCK` events; (0, 0) when there are none."""
        at, keys = 0, len(self.names)
        while at == 0 or at < keys:
            end = int(np.searchsorted(self.borders, self.borders[at] + _BLOCK, side="right")) - 1
            end = min(max(end, at + 1), keys)
            yield at, end
            at = max(end, 1)

    def events(self, line: Timeline, first: int, end: int) -> _Events:
        """The events of the keys first..end."""
        order = self.order[self.borders[first] : self.borders[end]]
        key = np.repeat(np.arange(first, end), np.diff(self.borders[first : end + 1]))
        return _Events(key, line.place[order], {name: column[order] for name, column in line.marks.items()}, line.value[order])


def running_counts(key: str, counting: Counting, line: Timeline, known: pl.DataFrame, columns: Sequence[pl.Expr]) -> pl.DataFrame:
    """[key, event_timestamp, columns...], where columns are made of counts..., valued, value_sum, first_time, last_time,
    window_<w>..., known....

    `known` (T,) is what else is known of each instant. `first_time` and `last_time` are those of history events in µs, null
    before the first one. Blocks are counted side by side, on as many threads as Polars has.
    """
    keys = _Keys.of(line.ids[key])

    def counted(block: tuple[int, int]) -> pl.DataFrame:
        return _rows(keys.events(line, *block), keys.names, counting, line, known).select(key, TIMESTAMP, *columns)

    with ThreadPoolExecutor(pl.thread_pool_size()) as pool:
        return pl.concat(pool.map(counted, keys.blocks()))


def _numbered(ids: pl.Series) -> tuple[pl.Series, Numbers]:
    """The ids there are, sorted, and for each event (E,) the place of its id among them."""
    code = ids.to_physical().to_numpy()
    somewhere = np.full(int(code.max(initial=0)) + 1, -1, np.int32)
    somewhere[code] = np.arange(len(code), dtype=np.int32)
    names = ids.gather(somewhere[somewhere >= 0]).cast(pl.String)
    order = names.arg_sort()
    width = np.uint16 if len(names) <= 1 << 16 else np.uint32
    place = np.zeros(len(somewhere), width)
    place[np.flatnonzero(somewhere >= 0)[order.to_numpy()]] = np.arange(len(names), dtype=width)
    return names.gather(order), place[code]


def _stable_order(number: Numbers) -> Ints:
    """What sorts the numbers and keeps equal ones in their order: 16 bits at a time, for which numpy has a radix sort. The high
    ones come first, so that the rest is within reach of the caches.
    """
    low = number.astype(np.uint16, copy=False)
    if number.dtype == np.uint16:
        return np.argsort(low, kind="stable")
    high = (number >> 16).astype(np.uint16)
    order = np.argsort(high, kind="stable")
    borders = np.append(0, np.cumsum(np.bincount(high)))
    for start, end in pairwise(borders):
        part = order[start:end]
        order[start:end] = part[np.argsort(low[part], kind="stable")]
    return order


# --- the rows of a block -----------------------------------------------------------------------------------------------


def _rows(events: _Events, names: pl.Series, counting: Counting, line: Timeline, known: pl.DataFrame) -> pl.DataFrame:
    """The rows of a block of keys."""
    last = np.flatnonzero(_differs(events.key) | _differs(events.place))
    number, place = events.key[last], events.place[last].astype(np.int64)
    ends = _ends(number)
    key = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=-1))
    running = {name: np.cumsum(column, dtype=np.int64)[last] for name, column in events.marks.items()}
    history = _History.of(running["history"], key, place, ends, line)
    at, midnight, midnight_key_day = _with_midnights(history, key, place, counting, line)

    def at_rows(at_events: Numbers, at_midnights: Numbers) -> Numbers:
        rows = at_events[at]
        rows[midnight] = at_midnights
        return rows

    row_place = at_rows(place, line.midnight[midnight_key_day % line.days])
    counts = {name: _of_key(column, key, ends)[at] for name, column in running.items()}
    columns = {
        TIMESTAMP: line.us[row_place],
        **{name: counts[same] for name, same in line.same.items()},
        "value_sum": _value_sums(events, line.exact, last, key, ends)[at],
        "first_time": _begun(history.first_us[key[at]], counts["history"]),
        "last_time": _begun(history.last_us[at], counts["history"]),
        **history.windows(at_rows(history.key_day, midnight_key_day), counts["history"], counting.windows, line),
        **{name: known[name].to_numpy()[row_place] for name in known.columns},
    }
    return pl.DataFrame({names.name: names.gather(number[at]), **columns}).with_columns(pl.col(TIMESTAMP).cast(TIME))


def _begun(times: Ints, history: Ints) -> pl.Series:
    """The times, null where there is no history yet."""
    return pl.Series(times) if history.all() else pl.Series(times).set(pl.Series(history == 0), None)


def _of_key(running: Numbers, key: Ints, ends: Ints) -> Numbers:
    """Running sums (I,) of a block less what keys before had; each of the keys has its last instant at one of `ends`."""
    found: Numbers = running - np.append(0, running[ends[:-1]])[key]
    return found


def _value_sums(events: _Events, exact: bool, last: Ints, key: Ints, ends: Ints) -> NDArray[np.float64]:
    """Running sums of values within each key, at the events `last`. Those of fractions would lose digits as differences of one
    sum, and a key's sums must not depend on what other keys there are.
    """
    if exact:
        return _of_key(np.cumsum(events.value)[last], key, ends)
    frame = pl.DataFrame({"key": events.key, "value": events.value})
    return frame.select(pl.col("value").cum_sum().over("key")).to_series().to_numpy()[last]


@dataclass(frozen=True)
class _History:
    """History of a block's instants (I,), whose `key_day` is a number of (key, day).

    `day` (D,) are the numbers of days with some, ascending; `up_to` (D + 1,) what the block has before each and in all, of
    which `before` (K,) are those of earlier keys. `first_us` (K,) is the time of each key's first event, `last_us` (I,) that of
    the last one so far; anything where none is.
    """

    key_day: Ints
    day: Ints
    up_to: Ints
    before: Ints
    first_us: Ints
    last_us: Ints

    @classmethod
    def of(cls, running: Ints, key: Ints, place: Ints, ends: Ints, line: Timeline) -> _History:
        key_day = key * line.days + line.day[place]
        grows = np.diff(running, prepend=0) > 0
        at = np.flatnonzero(grows)
        us, owner, day = line.us[place[at]], key[at], key_day[at]
        day_ends = _ends(day)
        before = np.append(0, running[ends[:-1]])[: len(ends)]
        first_us = np.zeros(len(ends), np.int64)
        first_us[owner[::-1]] = us[::-1]
        up_to = np.append(0, running[at[day_ends]])
        return cls(key_day, day[day_ends], up_to, before, first_us, np.append(0, us)[np.cumsum(grows)])

    def windows(self, key_day: Ints, total: Ints, windows: Sequence[int], line: Timeline) -> dict[str, Ints]:
        """`window_<w>` of rows sorted by (key, time): the total less that of the days before the window."""
        ends = _ends(key_day)
        day, row_day = key_day[ends], np.repeat(np.arange(len(ends)), np.diff(ends, prepend=-1))
        owner = day // line.days
        found = {}
        for window in windows:
            first = np.maximum(day - (window - 1), owner * line.days)
            earlier = self.up_to[np.searchsorted(self.day, first)] - self.before[owner]
            found[f"window_{window}"] = total - earlier[row_day]
        return found


def _with_midnights(history: _History, key: Ints, place: Ints, counting: Counting, line: Timeline) -> tuple[Ints, Ints, Ints]:
    """The rows (R,) of instants (I,) and of midnights at which their key has no event: each row's newest instant so far, which
    rows are midnights, and the number of their (key, day).
    """
    day = history.day % line.days
    ends = _distinct([history.day[kept] + window for window in counting.windows for kept in [day + window <= line.last_midnight]])
    owner, day = np.divmod(ends, line.days)
    instants, midnights = key * len(line.us) + place, owner * len(line.us) + line.midnight[day]
    after = np.searchsorted(instants, midnights)
    new = np.append(instants, -1)[after] != midnights
    rows = after[new] + np.arange(np.count_nonzero(new))
    is_event = np.ones(len(key) + len(rows), bool)
    is_event[rows] = False
    at = np.cumsum(is_event)
    at -= 1
    return at, rows, ends[new]
