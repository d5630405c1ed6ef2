"""Events to timestamped feature tables: what was known about users and items, and when.

In: the `events`, `items`, `users` frames of a source. Out: one Polars table per view, `[key, event_timestamp, features...]`,
sorted by (key, event_timestamp), at most one row per pair. A row holds everything up to and including its own instant, so
the newest row at or before t is exact for counts, histories and shares at every t. Smoothed rates are exact at the row's own
instant: their prior, the global mean, moves with everybody's events.

Window counts run over [floor_day(t) - (w - 1) days, t] in UTC: rows stand at events and at the midnights at which an event leaves
a window. Ages and recency are not stored; `crosses.py` takes them from the stored times.

What a workspace declares for itself is in `features.py`; `windows.py` counts.

Counts, rates and histories are about the source's *history events* (clicks, ratings, purchases: not impressions). The rate of a
task is its positives per history event, or per impression when the source logs impressions and the task's action answers them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from feature_repo.counts import Counting, Timeline, exact_in_any_order, running_counts, timeline
from feature_repo.features import DECLARED, Cross, Declared, OwnTable, check_crosses, check_declared, check_tables
from feature_repo.histories import user_categories_table, user_history_table
from feature_repo.views import ENTITIES, TIMESTAMP
from feature_repo.windows import declared_table, rows_from
from tandem.core.errors import InputError
from tandem.core.schema import EVENTS, ITEMS, TIME, USERS, Source, Task

_EPOCH: Final = pl.lit(0).cast(TIME)


@dataclass(frozen=True)
class AggregateConfig:
    """What to aggregate.

    `windows` are in days. `prior_strength` is how many pseudo-events of the global mean a smoothed rate starts with.
    `until` stops the midnight rows of windows that run out later than the present; None writes them all. `declared`, `tables` and
    `crosses` are the workspace's own features (see `features.py`), `context` the columns of events that say where a request came
    from, which a ranker sees where events have them.
    """

    history_length: int = 50
    windows: tuple[int, ...] = (1, 7, 30)
    top_categories: int = 8
    prior_strength: float = 20.0
    until: datetime | None = None
    declared: Mapping[str, Declared] = field(default_factory=dict)
    tables: Mapping[str, OwnTable] = field(default_factory=dict)
    crosses: Mapping[str, Cross] = field(default_factory=dict)
    context: tuple[str, ...] = ("device", "surface")

    def __post_init__(self) -> None:
        if min(self.history_length, self.top_categories, *self.windows) < 1 or self.prior_strength <= 0:
            raise InputError(f"{self} has a length, window or strength below 1; use positive numbers")
        if taken := set(self.context) & set(EVENTS):
            raise InputError(f"[features] context names {sorted(taken)}, which every event has; name columns beside those")
        check_declared(self.declared)
        check_tables(self.tables)
        check_crosses(self.crosses)

    def declared_of(self, entity: str) -> dict[str, Declared]:
        """The declared features of one entity, by name."""
        return {name: each for name, each in self.declared.items() if each.entity == entity}


def build_tables(
    events: pl.DataFrame,
    items: pl.DataFrame,
    users: pl.DataFrame,
    source: Source,
    config: AggregateConfig | None = None,
    only: Collection[str] | None = None,
) -> dict[str, pl.DataFrame]:
    """Every feature view's offline table by view name, or those named in `only`.

    `user_attributes` is left out when users have no attribute columns. Raises InputError when one feature name would
    stand in two views.
    """
    config = config or AggregateConfig()
    history = _history_events(events.lazy(), source)
    counted = [entity for entity in ENTITIES if only is None or f"{entity}_stats" in only]
    makers: dict[str, Callable[[], pl.DataFrame]] = {
        "user_history": lambda: user_history_table(history, config.history_length),
        "user_categories": lambda: user_categories_table(history, items, config.top_categories),
        "item_attributes": lambda: _item_attributes(items),
    }
    attributes = _attributes(users, USERS)
    if attributes:
        makers["user_attributes"] = lambda: _user_attributes(users, attributes)
    for entity, view in DECLARED.items():
        if own := config.declared_of(entity):
            makers[view] = partial(declared_table, events.lazy(), entity, own, source, config.until)
    tables = count_tables(counted_events(events.lazy(), source, config), counted, source, config) if counted else {}
    tables |= {name: make() for name, make in makers.items() if only is None or name in only}
    check_feature_names(tables)
    return tables


def rows_since(
    events: pl.LazyFrame,
    items: pl.DataFrame,
    source: Source,
    config: AggregateConfig,
    touched: pl.DataFrame,
    only: Collection[str] | None = None,
) -> dict[str, pl.DataFrame]:
    """The rows that new events change, by view name: of each touched user and item, those at or after its oldest new event.

    `events` is all events, the new ones among them; `touched` the new ones [user_id, item_id, timestamp]. The rows equal those of
    `build_tables` over all events, but cost the time of the touched histories and of one pass over the counts.
    """
    found: dict[str, pl.DataFrame] = {}
    for entity, key in ENTITIES.items():
        since = touched.group_by(key).agg(pl.col("timestamp").min().alias("since"))
        own_events = events.filter(pl.col(key).is_in(since[key].implode())).collect().lazy()
        makers: dict[str, Callable[[], pl.DataFrame]] = {
            f"{entity}_stats": partial(_stats_since, since, own_events, events, entity, source, config)
        }
        if entity == "user":
            history = _history_events(own_events, source)
            makers["user_history"] = lambda h=history, s=since: rows_from(  # type: ignore[misc]
                user_history_table(h, config.history_length), "user_id", s
            )
            makers["user_categories"] = lambda h=history, s=since: rows_from(  # type: ignore[misc]
                user_categories_table(h, items, config.top_categories), "user_id", s
            )
        if own := config.declared_of(entity):
            makers[DECLARED[entity]] = partial(declared_table, own_events, entity, own, source, config.until, since)
        found |= {name: make() for name, make in makers.items() if only is None or name in only}
    return found


# --- which events count for what ---------------------------------------------------------------------------------------


def _in_order(events: pl.LazyFrame) -> pl.LazyFrame:
    """Events in (timestamp, event_id) order. Those of a workspace are, and to look costs far less than to sort."""
    time, name = pl.col("timestamp"), pl.col("event_id")
    later = (time > time.shift()) | ((time == time.shift()) & (name >= name.shift()))
    in_order = events.select(later.slice(1).all()).collect().item()
    return events if in_order else events.sort("timestamp", "event_id")


def _marks(events: pl.LazyFrame, source: Source) -> pl.LazyFrame:
    """Events that any feature counts, with 0/1 columns for what they are, and their ids as categories.

    `value` is that of an event of history which has one (`valued`), else 0. A NaN value is a missing one: Polars tells them
    apart, features must not.
    """
    history, value = source.is_history(), pl.col("value").cast(pl.Float64).fill_nan(None)
    valued = history & value.is_not_null()
    marks = {"history": history} | {_task_column(task): task.matches() for task in source.tasks}
    if source.impression is not None:
        marks["impressions"] = pl.col("action") == source.impression
    ids = [pl.col(key).cast(pl.Categorical(pl.Categories.random())) for key in ENTITIES.values()]
    return events.filter(pl.any_horizontal(marks.values())).select(
        *ids,
        pl.col("timestamp").alias(TIMESTAMP),
        pl.when(valued).then(value).otherwise(0.0).alias("value"),
        valued.cast(pl.UInt8).alias("valued"),
        *(mark.cast(pl.UInt8).alias(name) for name, mark in marks.items()),
    )


def _history_events(events: pl.LazyFrame, source: Source) -> pl.DataFrame:
    """History events sorted by (user_id, timestamp, event_id)."""
    value, time = pl.col("value").cast(pl.Float64).fill_nan(None), pl.col("timestamp").alias(TIMESTAMP)
    history = _in_order(events.filter(source.is_history())).select("user_id", "item_id", time, value)
    return history.sort("user_id", maintain_order=True).collect()


def _task_column(task: Task) -> str:
    return f"task_{task.name}"


def _trials(task: Task, source: Source) -> str:
    """What a task's rate is of: impressions where the task's action (a click) answers them, else history events."""
    return "impressions" if source.impression is not None and task.action in source.history else "history"


# --- counts, windows and rates -----------------------------------------------------------------------------------------


def count_tables(line: Timeline, entities: Sequence[str], source: Source, config: AggregateConfig) -> dict[str, pl.DataFrame]:
    """The `<entity>_stats` tables, side by side: while the events of one are being sorted, another is counted."""
    priors = _priors(line.totals, source, config.prior_strength)
    with ThreadPoolExecutor(len(entities)) as pool:
        tables = pool.map(lambda entity: _stats(line, priors, entity, source, config), entities)
        return {f"{entity}_stats": table for entity, table in zip(entities, tables, strict=True)}


def counted_events(events: pl.LazyFrame, source: Source, config: AggregateConfig) -> Timeline:
    """The counted events on the axis of time.

    Events of one instant are in the order of their names only where sums of values depend on it: to read the names costs as much
    as all the rest.
    """
    marked = _marks(events, source).collect()
    exact = exact_in_any_order(marked["value"].to_numpy())
    if not (exact and marked[TIMESTAMP].is_sorted()):
        marked = _marks(_in_order(events), source).collect()
    return timeline(marked, _counting(source, config), exact)


def _stats(line: Timeline, priors: pl.DataFrame, entity: str, source: Source, config: AggregateConfig) -> pl.DataFrame:
    """The `user_stats` or `item_stats` table."""
    return running_counts(ENTITIES[entity], _counting(source, config), line, priors, _stat_columns(entity, source, config))


def _stats_since(
    since: pl.DataFrame, own: pl.LazyFrame, everybody: pl.LazyFrame, entity: str, source: Source, config: AggregateConfig
) -> pl.DataFrame:
    """The table's rows of the keys in `since` [key, since], whose events are `own`, at or after that time."""
    line = counted_events(own, source, config)
    priors = _priors(_totals_at(line.us, everybody, source), source, config.prior_strength)
    return rows_from(_stats(line, priors, entity, source, config), ENTITIES[entity], since)


def _counting(source: Source, config: AggregateConfig) -> Counting:
    return Counting(tuple(_counted(source)), config.windows, config.until)


def _counted(source: Source) -> list[str]:
    impressions = [] if source.impression is None else ["impressions"]
    return ["history", *impressions, *(_task_column(task) for task in source.tasks)]


def _totals_at(us: NDArray[np.int64], events: pl.LazyFrame, source: Source) -> pl.DataFrame:
    """Everybody's counts up to each of a few ascending instants, in one pass over all events."""
    counted, instants = pl.col(_counted(source)), pl.Series(us).cast(TIME)
    place = pl.col(TIMESTAMP).map_batches(lambda times: instants.search_sorted(times, side="left").cast(pl.Int64), pl.Int64)
    counts = _marks(events, source).select(place.alias("place"), counted).group_by("place").agg(counted.sum())
    rows = pl.LazyFrame({"place": np.arange(len(us))}).join(counts, on="place", how="left", maintain_order="left")
    return rows.select(counted.fill_null(0).cum_sum()).collect()


def _priors(totals: pl.DataFrame, source: Source, strength: float) -> pl.DataFrame:
    """What each task's rate starts with, from everybody's totals: `strength` times the mean so far, 0 before there is one."""
    means = {task: pl.col(_task_column(task)) / pl.col(_trials(task, source)) for task in source.tasks}
    return totals.select(
        (strength * pl.when(pl.col(_trials(task, source)) > 0).then(mean).otherwise(0.0)).alias(f"prior_{task.name}")
        for task, mean in means.items()
    )


def _stat_columns(entity: str, source: Source, config: AggregateConfig) -> list[pl.Expr]:
    """The features of `<entity>_stats`, from the running and window counts and the priors."""
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
    mean = pl.when(pl.col("valued") > 0).then(pl.col("value_sum") / pl.col("valued"))
    columns.append(mean.alias(f"{entity}_mean_value"))
    return columns


def _smoothed_rate(task: Task, source: Source, strength: float) -> pl.Expr:
    """(positives + prior) / (trials + strength): the mean of a beta posterior around the global mean then."""
    return (pl.col(_task_column(task)) + pl.col(f"prior_{task.name}")) / (pl.col(_trials(task, source)) + strength)


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


def _user_attributes(users: pl.DataFrame, attributes: list[pl.Expr]) -> pl.DataFrame:
    return users.select("user_id", _EPOCH.alias(TIMESTAMP), *attributes).sort("user_id")


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


# --- names ------------------------------------------------------------------------------------------------------------


def check_feature_names(tables: Mapping[str, pl.DataFrame]) -> None:
    """Raise InputError when two views hold a feature of one name: a training frame has each column once."""
    owner: dict[str, str] = {}
    for view, table in tables.items():
        for name in table.columns[2:]:
            if name in owner:
                raise InputError(f"feature {name!r} stands in both {owner[name]} and {view}; rename one of them")
            owner[name] = view
