"""Single events as they come: kept at once, and in the features of their user and item within the same call.

In: a draft of events (columns `NEEDED`, `OPTIONAL` and the context's, any may be text). Out: a part of new events in the data
folder; the rows that they change in the offline tables and the online store; the items' rows over the snapshot. Each `event_id`
counts once. An event is on disk before its features are updated: when those are busy or fail, the next call updates them. Events
from which no features can be made are set aside after a few tries, so that they hold nobody up.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import polars as pl

from feature_repo.aggregates import AggregateConfig, rows_since
from feature_repo.item_changes import ItemChanges
from feature_repo.live_snapshot import write_fresh
from feature_repo.made import fillings
from feature_repo.materialize import push_rows
from feature_repo.offline import LOCK, open_own
from feature_repo.sources.clean import clean_events, with_event_ids
from feature_repo.store import (
    append_events,
    load_items_until,
    load_source,
    mark_applied,
    pending_parts,
    scan_events,
    set_aside_part,
)
from feature_repo.versions import conforming
from feature_repo.views import ViewSchema, all_views
from tandem.core.errors import BusyError, InputError, NotFoundError
from tandem.core.folders import held
from tandem.core.schema import EVENTS

if TYPE_CHECKING:
    from feast import FeatureStore

NEEDED: Final = ("user_id", "item_id", "action", "timestamp")
OPTIONAL: Final = ("event_id", "value", "request_id", "position", "propensity")
_WAIT_S: Final = 0.5
_TRIES: Final = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EventLimits:
    """How many events of one user and UTC day are taken one by one (0: all): a script that clicks must not make things popular.

    The limit lies far above what people do, impressions included. An import brings in what it brings in.
    """

    per_user_per_day: int = 5_000

    def __post_init__(self) -> None:
        if self.per_user_per_day < 0:
            raise InputError(f"events.per_user_per_day = {self.per_user_per_day}; write 0 for no limit, or a number above it")


@dataclass(frozen=True)
class Pushed:
    """What became of a draft: received = appended + duplicates + refused.

    `refused` is [row, reason]. `pending`: events are kept, but their features wait for the next call.
    """

    received: int
    appended: int
    duplicates: int
    refused: pl.DataFrame
    users: int
    items: int
    pending: bool


Changed = tuple[ViewSchema, pl.DataFrame]
"""A version of a view, and its rows that events change."""


class EventGate:
    """Takes events into one workspace; holds its Feast store open between calls.

    Items are read at every call, since an import may have brought new ones meanwhile.
    """

    def __init__(self, workspace: Path, config: AggregateConfig, limits: EventLimits | None = None) -> None:
        self._workspace, self._data, self._config = workspace, workspace / "data", config
        self._limits = limits or EventLimits()
        self._changes = ItemChanges(self._data)
        self._store: FeatureStore | None = None

    def push(self, draft: pl.DataFrame, now: datetime) -> Pushed:
        """Keep the events of a draft, then update features. Raises InputError when a needed column is missing."""
        missing = [name for name in NEEDED if name not in draft.columns]
        if missing:
            raise InputError(f"events lack the columns {missing}; they need {list(NEEDED)} and may have {list(OPTIONAL)}")
        events, refused = self._cleaned(draft, now)
        fresh, refused = self._kept(events, refused, now)
        users, items, pending = self._try_apply(now)
        duplicates = draft.height - fresh.height - refused.height
        return Pushed(draft.height, fresh.height, duplicates, refused.select("row", "reason"), users, items, pending)

    def _kept(self, events: pl.DataFrame, refused: pl.DataFrame, now: datetime) -> tuple[pl.DataFrame, pl.DataFrame]:
        """`append_events`; a part of earlier events that cannot be read is first set aside, for it would stop every call."""
        try:
            return append_events(self._data, events, refused, self._limits.per_user_per_day)
        except pl.exceptions.PolarsError:
            self.apply_pending(now)
            return append_events(self._data, events, refused, self._limits.per_user_per_day)

    def apply_pending(self, now: datetime, wait_s: float = _WAIT_S) -> tuple[int, int]:
        """Bring events that are kept into the features; returns how many users and items changed. Raises BusyError."""
        with held(self._workspace / LOCK, "features push", wait_s):
            if not pending_parts(self._data):
                return 0, 0
            parts, touched, changed = self._changed_rows(now)
            if touched.height:  # an erasure may have emptied them
                self._update(changed, now)
            for part in parts:
                mark_applied(part)
            return touched["user_id"].n_unique(), touched["item_id"].n_unique()

    def _try_apply(self, now: datetime) -> tuple[int, int, bool]:
        """Events are kept by now: whatever keeps their features from being updated is for the next call, and the log."""
        try:
            return *self.apply_pending(now), False
        except (BusyError, NotFoundError):  # a build or materialisation is under way, or was never run: it will see the events
            return 0, 0, True
        except Exception as error:  # a store, a disk or the registry: its message may name values
            _log.warning("events are kept, their features wait for the next call: %s", type(error).__name__)
            return 0, 0, True

    def _changed_rows(self, now: datetime) -> tuple[list[Path], pl.DataFrame, list[Changed]]:
        """Pending parts, their events, and the rows that they change. Parts of which nothing can be made are set aside first."""
        try:
            return self._rows_of(pending_parts(self._data), scan_events(self._data), now)
        except Exception:
            poisoned = [(part, why) for part in pending_parts(self._data) if (why := self._poison(part, now))]
            if not poisoned:
                raise
            for part, why in poisoned:
                set_aside_part(self._data, part, f"no features can be made: {why}")
            return self._rows_of(pending_parts(self._data), scan_events(self._data), now)

    def _poison(self, part: Path, now: datetime) -> str | None:
        """The error that this part alone makes every time; None when a try succeeds."""
        for _ in range(_TRIES):
            try:
                self._rows_of([part], pl.scan_parquet(part), now)
            except Exception as error:
                why = type(error).__name__
            else:
                return None
        return why

    def _rows_of(
        self, parts: Sequence[Path], events: pl.LazyFrame, now: datetime
    ) -> tuple[list[Path], pl.DataFrame, list[Changed]]:
        columns = ["user_id", "item_id", "timestamp"]
        none = pl.DataFrame(schema={name: EVENTS[name] for name in columns})
        touched = pl.concat([none, *(pl.read_parquet(part, columns=columns) for part in parts)])
        changed = list(self._changed(events, touched, now)) if touched.height else []
        return list(parts), touched, changed

    def _cleaned(self, draft: pl.DataFrame, now: datetime) -> tuple[pl.DataFrame, pl.DataFrame]:
        rows = draft.with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("row"))
        context = [name for name in self._config.context if name in draft.columns]
        good, refused = clean_events(rows, known_items=self._items()["item_id"], now=now, context=context)
        events = with_event_ids(good).with_columns(good["row"].sort())
        if "event_id" in draft.columns:
            given = rows.select("row", pl.col("event_id").cast(pl.String).alias("given"))
            own = events.select("row").join(given, on="row", how="left", maintain_order="left")["given"]
            events = events.with_columns(pl.coalesce(own, pl.col("event_id")).alias("event_id"))
        return events, refused

    def _items(self) -> pl.DataFrame:
        return load_items_until(self._data, self._changes)[0]

    def _update(self, changed: Sequence[Changed], now: datetime) -> None:
        self._store = store = self._store or open_own(self._workspace)
        for view, rows in changed:
            push_rows(store, self._workspace, view, rows, now)
            if view.entity == "item":
                write_fresh(self._workspace / "snapshot", view, rows)

    def _changed(self, events: pl.LazyFrame, touched: pl.DataFrame, now: datetime) -> Iterator[Changed]:
        """The rows that events change, of every version in use, each made as the version was defined."""
        config, views = replace(self._config, until=now), all_views(self._workspace / "features")
        items = self._items()
        for own, source, filled in fillings(views, config, load_source(self._data)):
            rows = rows_since(events, items, source, own, touched, only=[view.base for view in filled])
            for view in filled:
                if view.base in rows and (fitting := conforming(rows[view.base], view)) is not None:
                    yield view, fitting
