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

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Final

import polars as pl

from feature_repo.counts import Counting, Totals, running_counts
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
    marked = _marked(events.lazy(), source)
    history, totals = _history_events(marked), _totals_of(marked, source)
    makers: dict[str, Callable[[], pl.DataFrame]] = {
        "user_stats": lambda: _stats(marked, "user", source, config, totals),
        "user_history": lambda: user_history_table(history, config.history_length),
        "user_categories": lambda: user_categories_table(history, items, config.top_categories),
        "item_stats": lambda: _stats(marked, "item", source, config, totals),
        "item_attributes": lambda: _item_attributes(items),
    }
    attributes = _attributes(users, USERS)
    if attributes:
        makers["user_attributes"] = lambda: _user_attributes(users, attributes)
    for entity, view in DECLARED.items():
        if own := config.declared_of(entity):
            makers[view] = partial(declared_table, events.lazy(), entity, own, source, config.until)
    tables = {name: make() for name, make in makers.items() if only is None or name in only}
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
    totals = _totals_in(events, source)
    found: dict[str, pl.DataFrame] = {}
    for entity, key in ENTITIES.items():
        since = touched.group_by(key).agg(pl.col("timestamp").min().alias("since"))
        own_events = events.filter(pl.col(key).is_in(since[key].implode()))
        marked = _marked(own_events, source)
        makers: dict[str, Callable[[], pl.DataFrame]] = {
            f"{entity}_stats": partial(_stats, marked, entity, source, config, totals, since)
        }
        if entity == "user":
            history = _history_events(marked)
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
        rows = rows_from(rows, key, since)
    return rows.select(key, TIMESTAMP, *_stat_columns(entity, source, config))


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
