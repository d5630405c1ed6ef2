"""A user's history as features: the last events, and the categories that they fall into.

In: history events [user_id, item_id, event_timestamp, value] sorted by (user_id, event_timestamp, event_id), and the items. Out:
tables [user_id, event_timestamp, features...], one row per user and instant with an event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from feature_repo.views import TIMESTAMP

_BLOCK_CELLS: Final = 250_000
"""Cells of the dense event x category block that `user_categories_table` holds at a time: small enough for the cache."""


def user_history_table(history: pl.DataFrame, length: int) -> pl.DataFrame:
    """The `user_history` table: the last `length` history events at each instant with one, oldest first."""
    numbered = history.with_row_index("row").with_columns(pl.col("row").cast(pl.Int64))
    lists = numbered.rolling("row", period=f"{length}i", group_by="user_id").agg(
        pl.col(TIMESTAMP).last(),
        pl.col("item_id").alias("history_items"),
        pl.col(TIMESTAMP).dt.epoch("us").alias("history_times"),
        pl.col("value").fill_null(0.0).alias("history_values"),
    )
    return lists.sort("row").filter(_last_of_instant()).drop("row")


def _last_of_instant() -> pl.Expr:
    """Is a row of a table sorted by (user, instant) the last of its user and instant?"""
    instant = pl.struct("user_id", TIMESTAMP)
    return instant.ne_missing(instant.shift(-1))


# --- categories -------------------------------------------------------------------------------------------------------


def user_categories_table(history: pl.DataFrame, items: pl.DataFrame, top: int) -> pl.DataFrame:
    """The `user_categories` table: the `top` categories of a user's history so far and the share of its events that has each.

    An event whose item has several categories counts for each of them, so shares may sum to more than one; ties go to
    the name that sorts first.
    """
    categories = _item_categories(items)
    names = categories["category"].unique().sort()
    counter = _category_counter(history, categories, names)
    codes, counts = _top_counts(counter, top)
    keep = history.select(_last_of_instant()).to_series()
    codes, counts = codes[keep.to_numpy()], counts[keep.to_numpy()]
    events_so_far = history.select(pl.int_range(1, pl.len() + 1).over("user_id")).to_series().filter(keep).to_numpy()
    filled = counts > 0
    offsets = np.concatenate([[0], np.cumsum(filled.sum(axis=1))])
    shares = (counts / events_so_far[:, None])[filled]
    return (
        history.select("user_id", TIMESTAMP)
        .filter(keep)
        .with_columns(
            _lists("top_categories", names.gather(codes[filled]), offsets),
            _lists("category_shares", pl.Series(shares, dtype=pl.Float64), offsets),
        )
    )


def _item_categories(items: pl.DataFrame) -> pl.DataFrame:
    """(item_id, category) pairs; a category that an item names twice is two rows and counts once later."""
    pairs = items.select("item_id", pl.col("categories").cast(pl.List(pl.String)).alias("category"))
    return pairs.explode("category").drop_nulls()


@dataclass(frozen=True)
class _CategoryCounter:
    """History events and their categories as numbers, ready to be counted densely, user by user.

    Categories are numbered within each user, in the order of their names: a user has met few of all categories.
    `size (E,)`: categories that the event's user ever meets; `first (E,)`: where they start in `code_of`; `start (E,)`:
    the event at which its user begins; `event (C,)` and `local (C,)`: occurrences, by event; `code_of`: number in the whole.
    """

    size: NDArray[np.int64]
    first: NDArray[np.int64]
    start: NDArray[np.int64]
    event: NDArray[np.int64]
    local: NDArray[np.int64]
    code_of: NDArray[np.int64]


def _category_counter(history: pl.DataFrame, categories: pl.DataFrame, names: pl.Series) -> _CategoryCounter:
    runs = history["user_id"].rle().struct.field("len").to_numpy().astype(np.int64)
    user = np.repeat(np.arange(len(runs)), runs)
    coded = categories.with_columns(pl.col("category").replace_strict(names, np.arange(len(names)), return_dtype=pl.Int64))
    pairs = history.select("item_id").with_row_index("event").join(coded, on="item_id").sort("event")
    event = pairs["event"].to_numpy().astype(np.int64)
    met, place = np.unique(user[event] * len(names) + pairs["category"].to_numpy().astype(np.int64), return_inverse=True)
    size = np.bincount(met // max(len(names), 1), minlength=len(runs))
    first = np.cumsum(size) - size
    return _CategoryCounter(
        size=size[user],
        first=first[user],
        start=(np.cumsum(runs) - runs)[user],
        event=event,
        local=place - first[user[event]],
        code_of=met % max(len(names), 1),
    )


def _top_counts(counter: _CategoryCounter, top: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Codes and counts (E, top) of each event's user up to and including it, most frequent first; count 0 where there are fewer.

    Events are taken in blocks of users that have met about as many categories, so that a dense block wastes little.
    """
    total = len(counter.size)
    codes, counts = np.zeros((total, top), np.int64), np.zeros((total, top), np.int64)
    order = np.argsort(counter.size, kind="stable")
    sizes = counter.size[order]
    carried = np.zeros(0, np.int32)
    begin = int(np.searchsorted(sizes, 1))
    while begin < total:
        events = order[begin : _block_end(sizes, begin)]
        running = _running_counts(counter, events, carried)
        carried = running[-1]
        local, found = _largest(running, top)
        codes[events, : local.shape[1]] = counter.code_of[
            np.minimum(counter.first[events, None] + local, len(counter.code_of) - 1)
        ]
        counts[events, : local.shape[1]] = found
        begin += len(events)
    return codes, counts


def _block_end(sizes: NDArray[np.int64], begin: int) -> int:
    """The end of a block of rows from `begin` whose dense form has about `_BLOCK_CELLS` cells at most; `sizes` ascend."""
    widest = sizes[min(begin + max(_BLOCK_CELLS // sizes[begin], 1), len(sizes)) - 1]
    return min(begin + max(_BLOCK_CELLS // int(widest), 1), len(sizes))


def _running_counts(counter: _CategoryCounter, events: NDArray[np.int64], carried: NDArray[np.int32]) -> NDArray[np.int32]:
    """Counts (B, D) of each category for each event's user so far; `carried` continues a user cut by the block before."""
    low, high = np.searchsorted(counter.event, events), np.searchsorted(counter.event, events, side="right")
    occurrences = np.repeat(low - np.cumsum(high - low) + (high - low), high - low) + np.arange((high - low).sum())
    running = np.zeros((len(events) + 1, int(counter.size[events[-1]])), np.int32)
    running[np.repeat(np.arange(1, len(events) + 1), high - low), counter.local[occurrences]] = 1
    if counter.start[events[0]] < events[0]:
        running[0, : len(carried)] = carried
    np.cumsum(running, axis=0, out=running)
    begins = np.arange(len(events)) - (events - counter.start[events])
    before = running[np.maximum(begins, 0)]
    before[begins < 0] = 0
    return running[1:] - before


def _largest(counts: NDArray[np.int32], top: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Columns and values (B, min(top, D)) of each row's largest counts, descending, ties by lower column."""
    width = counts.shape[1]
    keys = counts.astype(np.int64) * -width + np.arange(width)
    if width > top:
        keys = np.partition(keys, top, axis=1)[:, :top]
    best = -np.sort(keys, axis=1)
    found = -(-best // width)
    return found * width - best, found


def _lists(name: str, values: pl.Series, offsets: NDArray[np.int64]) -> pl.Series:
    """A list column whose row i holds values[offsets[i] : offsets[i + 1]]."""
    flat = values.to_arrow()
    lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), flat)
    return pl.Series(name, lists, dtype=pl.List(values.dtype))
