"""Single events as they come: kept at once, and in the features of their user and item within the same call.

In: a draft of events (columns `NEEDED` and `OPTIONAL`, any may be text). Out: a part of new events in the data folder; the rows
that they change in the offline tables and the online store; the items' rows over the snapshot. Each `event_id` counts once.
An event is on disk before its features are updated: when those are busy or fail, the next call updates them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import polars as pl

from feature_repo.aggregates import AggregateConfig, rows_since
from feature_repo.live_snapshot import write_fresh
from feature_repo.materialize import push_rows
from feature_repo.offline import LOCK, open_store
from feature_repo.sources.clean import clean_events, with_event_ids
from feature_repo.store import append_events, load_items, load_source, mark_applied, pending_parts, scan_events
from feature_repo.views import ENTITIES, TIMESTAMP, read_views
from tandem.core.errors import BusyError, InputError, NotFoundError
from tandem.core.folders import held

if TYPE_CHECKING:
    from feast import FeatureStore

NEEDED: Final = ("user_id", "item_id", "action", "timestamp")
OPTIONAL: Final = ("event_id", "value", "request_id", "position", "propensity")
_WAIT_S: Final = 0.5


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


class EventGate:
    """Takes events into one workspace; holds its Feast store open between calls.

    Items are read at every call, since an import may have brought new ones meanwhile.
    """

    def __init__(self, workspace: Path, config: AggregateConfig) -> None:
        self._workspace, self._data, self._config = workspace, workspace / "data", config
        self._store: FeatureStore | None = None

    def push(self, draft: pl.DataFrame, now: datetime) -> Pushed:
        """Keep the events of a draft, then update features. Raises InputError when a needed column is missing."""
        missing = [name for name in NEEDED if name not in draft.columns]
        if missing:
            raise InputError(f"events lack the columns {missing}; they need {list(NEEDED)} and may have {list(OPTIONAL)}")
        events, refused = self._cleaned(draft, now)
        fresh = append_events(self._data, events, refused)
        users, items, pending = self._try_apply(now)
        return Pushed(
            draft.height, fresh.height, events.height - fresh.height, refused.select("row", "reason"), users, items, pending
        )

    def apply_pending(self, now: datetime, wait_s: float = _WAIT_S) -> tuple[int, int]:
        """Bring events that are kept into the features; returns how many users and items changed. Raises BusyError."""
        with held(self._workspace / LOCK, "features push", wait_s):
            parts = pending_parts(self._data)
            if not parts:
                return 0, 0
            touched = pl.concat([pl.read_parquet(part, columns=["user_id", "item_id", "timestamp"]) for part in parts])
            if touched.height:  # an erasure may have emptied them
                self._update(touched, now)
            for part in parts:
                mark_applied(part)
            return touched["user_id"].n_unique(), touched["item_id"].n_unique()

    def _try_apply(self, now: datetime) -> tuple[int, int, bool]:
        try:
            return *self.apply_pending(now), False
        except (BusyError, NotFoundError):  # a build or materialisation is under way, or was never run: it will see the events
            return 0, 0, True

    def _cleaned(self, draft: pl.DataFrame, now: datetime) -> tuple[pl.DataFrame, pl.DataFrame]:
        rows = draft.with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("row"))
        good, refused = clean_events(rows, known_items=load_items(self._data)["item_id"], now=now)
        events = with_event_ids(good)
        if "event_id" in draft.columns:
            given = rows.select("row", pl.col("event_id").cast(pl.String).alias("given"))
            own = good.sort("row").select("row").join(given, on="row", how="left", maintain_order="left")["given"]
            events = events.with_columns(pl.coalesce(own, pl.col("event_id")).alias("event_id"))
        return events, refused

    def _update(self, touched: pl.DataFrame, now: datetime) -> None:
        config, source = replace(self._config, until=now), load_source(self._data)
        rows = rows_since(scan_events(self._data), load_items(self._data), source, config, touched)
        self._store = store = self._store or open_store(self._workspace)
        for view in read_views(self._workspace / "features"):
            if view.name in rows:
                push_rows(store, self._workspace, view, rows[view.name].select(*view.columns), now)
        item = ENTITIES["item"]
        newest = rows["item_stats"].sort(item, TIMESTAMP).unique(item, keep="last", maintain_order=True).drop(TIMESTAMP)
        write_fresh(self._workspace / "snapshot", newest)
