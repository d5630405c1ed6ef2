"""Events to timestamped feature tables: what was known about users and items, and when.

In: the `events`, `items`, `users` frames of a source. Out: one Polars table per view, `[key, event_timestamp, features...]`,
sorted by (key, event_timestamp), at most one row per pair. A row holds everything up to and including its own instant, so
the newest row at or before t is exact for counts, histories and shares at every t. Smoothed rates are exact at the row's own
instant: their prior, the global mean, moves with everybody's events.

Window counts run over [floor_day(t) - (w - 1) days, t] in UTC: rows stand at events and at the midnights at which an event leaves
a window. Ages and recency are not stored; `crosses.py` takes them from the stored times.

Counts, rates and histories are about the source's *history events* (clicks, ratings, purchases: not impressions). The rate of a
task is its positives per history event, or per impression when the source logs impressions and the task's action answers them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from feature_repo.counts import Counting, Totals, running_counts
from feature_repo.views import ENTITIES, TIMESTAMP, ViewSchema, write_views
from tandem.core.errors import InputError
from tandem.core.folders import whole_folder
from tandem.core.schema import ITEMS, TIME, USERS, Source, Task

VIEW_VERSION: Final = 1
FIRST_PART: Final = "part-0.parquet"
"""The file of a view's folder that a build writes."""

_BLOCK_CELLS: Final = 250_000
"""Cells of the dense event x category block that `_user_categories` holds at a time: small enough for the cache."""
_EPOCH: Final = pl.lit(0).cast(TIME)
_ENTITY_OF_VIEW: Final = {
    "user_stats": "user",
    "user_history": "user",
    "user_categories": "user",
    "item_stats": "item",
    "item_attributes": "item",
    "user_attributes": "user",
}


@dataclass(frozen=True)
class AggregateConfig:
    """What to aggregate.

    `windows` are in days. `prior_strength` is how many pseudo-events of the global mean a smoothed rate starts with.
    `until` stops the midnight rows of windows that run out later than the present; None writes them all.
    """

    history_length: int = 50
    windows: tuple[int, ...] = (1, 7, 30)
    top_categories: int = 8
    prior_strength: float = 20.0
    until: datetime | None = None

    def __post_init__(self) -> None:
        if min(self.history_length, self.top_categories, *self.windows) < 1 or self.prior_strength <= 0:
            raise InputError(f"{self} has a length, window or strength below 1; use positive numbers")


def build_tables(
    events: pl.DataFrame, items: pl.DataFrame, users: pl.DataFrame, source: Source, config: AggregateConfig | None = None
) -> dict[str, pl.DataFrame]:
    """Every feature view's offline table by view name.

    `user_attributes` is left out when users have no attribute columns. Raises InputError when one feature name would
    stand in two views.
    """
    config = config or AggregateConfig()
    marked = _marked(events.lazy(), source)
    history = _history_events(marked)
    totals = _totals_of(marked, source)
    tables = {
        "user_stats": _stats(marked, "user", source, config, totals),
        "user_history": _user_history(history, config.history_length),
        "user_categories": _user_categories(history, items, config.top_categories),
        "item_stats": _stats(marked, "item", source, config, totals),
        "item_attributes": _item_attributes(items),
    }
    attributes = _attributes(users, USERS)
    if attributes:
        tables["user_attributes"] = users.select("user_id", _EPOCH.alias(TIMESTAMP), *attributes).sort("user_id")
    _check_names(tables)
    return tables


def rows_since(
    events: pl.LazyFrame, items: pl.DataFrame, source: Source, config: AggregateConfig, touched: pl.DataFrame
) -> dict[str, pl.DataFrame]:
    """The rows that new events change, by view name: of each touched user and item, those at or after its oldest new event.

    `events` is all events, the new ones among them; `touched` the new ones [user_id, item_id, timestamp]. The rows equal those of
    `build_tables` over all events, but cost the time of the touched histories and of one pass over the counts.
    """
    totals = _totals_in(events, source)
    found: dict[str, pl.DataFrame] = {}
    for entity, key in ENTITIES.items():
        since = touched.group_by(key).agg(pl.col("timestamp").min().alias("since"))
        marked = _marked(events.filter(pl.col(key).is_in(since[key].implode())), source)
        tables = {f"{entity}_stats": _stats(marked, entity, source, config, totals, since)}
        if entity == "user":
            history = _history_events(marked)
            tables["user_history"] = _from(_user_history(history, config.history_length), key, since)
            tables["user_categories"] = _from(_user_categories(history, items, config.top_categories), key, since)
        found |= tables
    return found


def write_tables(tables: Mapping[str, pl.DataFrame], features_folder: Path) -> tuple[ViewSchema, ...]:
    """Write a folder `<view>/` for each table, each whole or not at all, then `schema.json`; returns the views.

    Rows that are pushed later become further parts of the folder.
    """
    features_folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        with whole_folder(features_folder / name) as folder:
            table.write_parquet(folder / FIRST_PART, compression="zstd", compression_level=1)
    views = tuple(_view(name, table) for name, table in tables.items())
    write_views(features_folder, views)
    return views


def _view(name: str, table: pl.DataFrame) -> ViewSchema:
    described = ViewSchema.of_table(name, _ENTITY_OF_VIEW[name], table, version=VIEW_VERSION)
    return replace(described, path=f"features/{name}")


# --- which events count for what ---------------------------------------------------------------------------------------


def _marked(events: pl.LazyFrame, source: Source) -> pl.DataFrame:
    """Events that any feature looks at, in (timestamp, event_id) order, with 0/1 columns for what they are."""
    marked = _marks(events, source).collect()
    return marked if _in_order(marked) else marked.sort(TIMESTAMP, "event_id")


def _in_order(marked: pl.DataFrame) -> bool:
    """Are events in (timestamp, event_id) order? Those of a workspace are, and to look costs far less than to sort."""
    time, name = pl.col(TIMESTAMP), pl.col("event_id")
    if not marked[TIMESTAMP].is_sorted():
        return False
    equal = marked.lazy().filter((time == time.shift()) | (time == time.shift(-1)))
    one_after_another = (time != time.shift()) | (name >= name.shift())
    return bool(equal.select(one_after_another.slice(1).fill_null(False).all()).collect().item())


def _marks(events: pl.LazyFrame, source: Source) -> pl.LazyFrame:
    """A NaN value is a missing one: Polars tells them apart, features must not."""
    impression = pl.lit(False) if source.impression is None else pl.col("action") == source.impression
    value = pl.col("value").cast(pl.Float64).fill_nan(None)
    frame = events.with_columns(value).select(
        "event_id",
        "user_id",
        "item_id",
        pl.col("timestamp").alias(TIMESTAMP),
        "value",
        source.is_history().cast(pl.Int64).alias("history"),
        impression.cast(pl.Int64).alias("impressions"),
        *(task.matches().cast(pl.Int64).alias(_task_column(task)) for task in source.tasks),
    )
    marks = ["history", "impressions", *(_task_column(task) for task in source.tasks)]
    return frame.filter(pl.any_horizontal(pl.col(marks) > 0))


def _history_events(marked: pl.DataFrame) -> pl.DataFrame:
    """History events sorted by (user_id, timestamp, event_id)."""
    columns = pl.col("user_id", "item_id", TIMESTAMP, "value")
    return marked.filter(pl.col("history") > 0).select(columns).sort("user_id", maintain_order=True)


def _task_column(task: Task) -> str:
    return f"task_{task.name}"


def _follows_impression(task: Task, source: Source) -> bool:
    """Is the task's action the answer to an impression (a click), not to a history event (a purchase after the click)?"""
    return source.impression is not None and task.action in source.history


# --- counts, windows and rates -----------------------------------------------------------------------------------------


def _stats(
    marked: pl.DataFrame,
    entity: str,
    source: Source,
    config: AggregateConfig,
    totals_at: Totals,
    since: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """The `user_stats` or `item_stats` table; with `since` [key, since] only the rows at or after that time."""
    key = ENTITIES[entity]
    counting = Counting(tuple(_counted(source)), config.windows, config.until)
    rows = running_counts(marked, key, counting, totals_at)
    if since is not None:
        rows = _from(rows, key, since)
    return rows.select(key, TIMESTAMP, *_stat_columns(entity, source, config))


def _from(rows: pl.DataFrame, key: str, since: pl.DataFrame) -> pl.DataFrame:
    return rows.join(since, on=key, maintain_order="left").filter(pl.col(TIMESTAMP) >= pl.col("since")).drop("since")


def _counted(source: Source) -> list[str]:
    return ["history", "impressions", *(_task_column(task) for task in source.tasks)]


def _totals_of(marked: pl.DataFrame, source: Source) -> Totals:
    """Totals at every instant with an event; whatever is asked finds the one at or before it."""
    counted, time = pl.col(_counted(source)), pl.col(TIMESTAMP)
    running = marked.lazy().select(time, counted.cum_sum().name.prefix("all_"))
    totals = running.filter(time.ne_missing(time.shift(-1))).collect()
    return lambda instants: totals


def _totals_in(events: pl.LazyFrame, source: Source) -> Totals:
    """Totals at a few instants, in one pass over all events."""
    counted = pl.col(_counted(source))

    def totals(instants: pl.Series) -> pl.DataFrame:
        asked = instants.unique().sort()
        place = pl.col(TIMESTAMP).map_batches(lambda times: asked.search_sorted(times, side="left").cast(pl.Int64), pl.Int64)
        counts = _marks(events, source).select(place.alias("place"), counted).group_by("place").agg(counted.sum())
        rows = pl.LazyFrame({TIMESTAMP: asked}).with_row_index("place").with_columns(pl.col("place").cast(pl.Int64))
        filled = rows.join(counts, on="place", how="left").sort("place").with_columns(counted.fill_null(0))
        return filled.select(TIMESTAMP, counted.cum_sum().name.prefix("all_")).collect()

    return totals


def _stat_columns(entity: str, source: Source, config: AggregateConfig) -> list[pl.Expr]:
    """The features of `<entity>_stats`, from the running, window and global totals."""
    mean = pl.when(pl.col("value_count") > 0).then(pl.col("value_sum") / pl.col("value_count"))
    columns = [
        pl.col("history").alias(f"{entity}_events"),
        *(pl.col(f"window_{window}").alias(f"{entity}_events_{window}d") for window in config.windows),
    ]
    if source.impression is not None:
        columns.append(pl.col("impressions").alias(f"{entity}_impressions"))
    for task in source.tasks:
        columns.append(pl.col(_task_column(task)).alias(f"{entity}_{task.name}"))
        columns.append(_smoothed_rate(task, source, config.prior_strength).alias(f"{entity}_{task.name}_rate"))
    if entity == "item":
        columns.append(pl.col("first_time").alias("item_first_time"))
    columns.append(pl.col("last_time").alias(f"{entity}_last_time"))
    columns.append(mean.alias(f"{entity}_mean_value"))
    return columns


def _smoothed_rate(task: Task, source: Source, strength: float) -> pl.Expr:
    """(positives + strength * global mean) / (trials + strength): the mean of a beta posterior around the global mean then."""
    trials = "impressions" if _follows_impression(task, source) else "history"
    hits = _task_column(task)
    mean = pl.when(pl.col(f"all_{trials}") > 0).then(pl.col(f"all_{hits}") / pl.col(f"all_{trials}")).otherwise(0.0)
    return (pl.col(hits) + strength * mean) / (pl.col(trials) + strength)


# --- histories ---------------------------------------------------------------------------------------------------------


def _user_history(history: pl.DataFrame, length: int) -> pl.DataFrame:
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


# --- categories --------------------------------------------------------------------------------------------------------


def _user_categories(history: pl.DataFrame, items: pl.DataFrame, top: int) -> pl.DataFrame:
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


# --- attributes --------------------------------------------------------------------------------------------------------


def _attributes(frame: pl.DataFrame, known: Mapping[str, pl.DataType]) -> list[pl.Expr]:
    """Expressions for a frame's number and string columns that are not in `known`; other types are no features."""
    columns = []
    for name, dtype in frame.schema.items():
        if name in known:
            continue
        if dtype.is_float() or dtype.is_decimal():
            columns.append(pl.col(name).cast(pl.Float64).fill_nan(None))
        elif dtype.is_integer() or dtype == pl.Boolean:
            columns.append(pl.col(name).cast(pl.Int64))
        elif dtype in (pl.String, pl.Categorical, pl.Enum):
            columns.append(pl.col(name).cast(pl.String))
    return columns


def _item_attributes(items: pl.DataFrame) -> pl.DataFrame:
    """The `item_attributes` table: one row per item, known since it became available, or for ever."""
    available = pl.col("available_from").cast(TIME)
    frame = items.select(
        "item_id",
        available.fill_null(_EPOCH).alias(TIMESTAMP),
        *_attributes(items, ITEMS),
        available.dt.epoch("us").alias("item_available_from"),
    )
    return frame.sort("item_id")


# --- names and files ---------------------------------------------------------------------------------------------------


def _check_names(tables: Mapping[str, pl.DataFrame]) -> None:
    """Raise InputError when two views hold a feature of one name: a training frame has each column once."""
    owner: dict[str, str] = {}
    for view, table in tables.items():
        for name in table.columns[2:]:
            if name in owner:
                raise InputError(f"feature {name!r} stands in both {owner[name]} and {view}; rename the attribute column")
            owner[name] = view
