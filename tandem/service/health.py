"""`tandem features check`: every check of a workspace's features, each on a seeded sample.

In: the workspace's events, tables, stores, served-log and champion. Out: one `CheckResult` per line of the command's table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import polars as pl

from feature_repo.aggregates import rows_since
from feature_repo.checks import EVE, CheckResult, freshness, leakage, parity, views_fresh
from feature_repo.materialize import BEGINNING
from feature_repo.materialize import freshness as view_freshness
from feature_repo.offline import historical, open_store
from feature_repo.online import UserReader, UserRow
from feature_repo.replay import replay_items, replay_users
from feature_repo.served import ServedLog
from feature_repo.shift import drift
from feature_repo.snapshot import Snapshot
from feature_repo.store import EVENTS_FILE, load_events, load_items, load_source
from feature_repo.versions import FIRST_PART
from feature_repo.views import MAX_AHEAD, SCHEMA_FILE, TIMESTAMP, ViewSchema, all_views, read_views
from registry.store import ReleaseStore
from tandem.core.errors import NotFoundError
from tandem.core.schema import TIME
from tandem.service.clock import make_clock
from tandem.service.settings import Settings

_SAMPLE: Final = 2000
_USERS: Final = 200
_ENTITIES: Final = 100
_CUT: Final = 0.8
"""Share of the events after which the tables are asked what they knew."""

_NEWEST: Final = 10
"""Drift looks at the newest tenth of the events."""

_BEGINNING: Final = datetime(1, 1, 1, tzinfo=UTC)

_NO_FEATURES: Final = ("_time", "_from")
"""Ends of names of stored times: they always move, and models see ages made from them."""


def feature_checks(settings: Settings, now: datetime | None = None) -> list[CheckResult]:
    """Every check. Raises NotFoundError before features are built, applied and materialised."""
    plane = _Plane.open(settings)
    moment = now or make_clock(settings)()
    users = [view for view in plane.views if view.entity == "user"]
    served = ServedLog(settings.workspace / "served").read()
    return [
        leakage(training_sample(plane), plane.tables, plane.ttl),
        _known_in_time(plane, settings),
        _online_parity(plane, users),
        replay_users(served, all_views(settings.feature_tables), plane.workspace, plane.as_of),
        replay_items(served, all_views(settings.feature_tables), plane.workspace, plane.as_of),
        views_fresh(view_freshness(plane.workspace), plane.ttl, moment, settings.checks.freshness.fresh),
        _snapshot_fresh(plane, settings.checks.freshness.fresh, moment),
        _drifted(plane, settings),
    ]


def release_checks(settings: Settings) -> dict[str, CheckResult]:
    """What a release keeps of the state of its features, by figure: leakage, and parity online and of what was served."""
    plane = _Plane.open(settings)
    served = ServedLog(settings.workspace / "served").read()
    users = [view for view in plane.views if view.entity == "user"]
    results = [
        leakage(training_sample(plane), plane.tables, plane.ttl),
        _known_in_time(plane, settings),
        *([_online_parity(plane, users)] if users else []),
        replay_users(served, all_views(settings.feature_tables), plane.workspace, plane.as_of),
        replay_items(served, all_views(settings.feature_tables), plane.workspace, plane.as_of),
    ]
    return {result.name.replace(" ", "_"): result for result in results}


def wrong_values(result: CheckResult) -> int:
    """How many values a check of leakage or parity found wrong; rows that were written too late to judge are none."""
    return 0 if result.passed else result.table.filter(pl.col("kind") != "later").height


@dataclass(frozen=True)
class _Plane:
    """One workspace's current features: what the views are, their offline tables, the open Feast store, and the events."""

    workspace: Path
    views: tuple[ViewSchema, ...]
    tables: dict[str, pl.DataFrame]
    store: Any
    events: pl.DataFrame

    @classmethod
    def open(cls, settings: Settings) -> _Plane:
        views = read_views(settings.feature_tables)
        tables = {view.name: pl.read_parquet(settings.workspace / view.path) for view in views}
        events = load_events(settings.data)
        if events.is_empty():
            raise NotFoundError(f"{settings.data} holds no events; run `tandem import KIND PATH` first")
        return cls(settings.workspace, views, tables, open_store(settings.workspace), events)

    @property
    def ttl(self) -> dict[str, timedelta]:
        return {view.name: timedelta(days=view.ttl_days) for view in self.views if view.ttl_days}

    def as_of(self, asked: pl.DataFrame, view: str) -> pl.DataFrame:
        return historical(self.store, asked, [view])

    def training_rows(self, events: pl.DataFrame) -> pl.DataFrame:
        """A sample as the ranker would get it: real (user, item, time) triples with every feature as of that time."""
        sample = events.sort("event_id").sample(min(_SAMPLE, len(events)), seed=0)
        asked = sample.select("user_id", "item_id", event_timestamp="timestamp")
        return historical(self.store, asked, [view.name for view in self.views])


def training_sample(plane: _Plane) -> pl.DataFrame:
    """The rows that the leakage check judges."""
    return plane.training_rows(plane.events)


def _known_in_time(plane: _Plane, settings: Settings) -> CheckResult:
    """Does no row that was built know an event after its own time?

    The rows of some users and items are made again from the events up to a cut, and must be what the tables hold up to there.
    """
    name, path = "tables in time", settings.data / EVENTS_FILE
    if path.stat().st_mtime > (settings.feature_tables / SCHEMA_FILE).stat().st_mtime:
        return CheckResult(
            name, True, 0, "events changed after the last build; `tandem features build` makes them comparable", skipped=1
        )
    events = pl.read_parquet(path).sort("event_id")
    cut = events["timestamp"].sort()[int(_CUT * (len(events) - 1))]
    known = events.filter(pl.col("timestamp") <= cut)
    chosen = known.sample(min(_ENTITIES, len(known)), seed=0).select(
        "user_id", "item_id", pl.lit(BEGINNING).cast(TIME).alias("timestamp")
    )
    config = replace(settings.features, until=cut)
    again = rows_since(known.lazy(), load_items(settings.data), load_source(settings.data), config, chosen)
    results = [
        leakage(_built(plane, view, chosen, cut), {view.name: again[view.base]}) for view in plane.views if view.base in again
    ]
    wrong = [each.detail for each in results if not each.passed]
    rows = sum(each.rows for each in results)
    detail = (
        "; ".join(wrong) or f"{rows} rows of {len(results)} tables are the same when made from the events up to {cut.isoformat()}"
    )
    return CheckResult(name, not wrong, rows, detail, pl.concat([each.table for each in results]))


def _built(plane: _Plane, view: ViewSchema, chosen: pl.DataFrame, cut: datetime) -> pl.DataFrame:
    """A table's own rows of the chosen entities up to the cut, asked for just after each; pushed rows are left out."""
    rows = pl.read_parquet(plane.workspace / view.path / FIRST_PART)
    own = rows.filter(pl.col(view.key).is_in(chosen[view.key].implode()), pl.col(TIMESTAMP) <= cut)
    return own.with_columns(pl.col(TIMESTAMP) + EVE)


def _online_parity(plane: _Plane, views: Sequence[ViewSchema]) -> CheckResult:
    """Do users' online rows equal the newest rows of the offline tables, less what is of the future or older than its ttl?

    A user with a row online that is newer than all of its table is skipped: it was pushed, and the tables were built again
    from events that end before the push wrote it.
    """
    now = datetime.now(UTC)
    users = plane.tables[views[0].name]["user_id"].unique().sort().head(_USERS)
    rows = UserReader(plane.store, lambda: now).read(users.to_list())
    ahead = pl.Series([_is_ahead(row, plane, now) for row in rows], dtype=pl.Boolean)
    newest = pl.DataFrame({"user_id": users.filter(~ahead)})
    for view in views:
        known = pl.col(TIMESTAMP).is_between(now - plane.ttl.get(view.name, now - _BEGINNING), now + MAX_AHEAD)
        own = plane.tables[view.name].filter(pl.col("user_id").is_in(users.implode()), known)
        last = own.sort(TIMESTAMP, maintain_order=True).unique("user_id", keep="last", maintain_order=True).drop(TIMESTAMP)
        newest = newest.join(last, on="user_id", how="left")
    judged = [row.features for row, skipped in zip(rows, ahead, strict=True) if not skipped]
    online = pl.DataFrame(judged, schema={name: kind for name, kind in newest.schema.items() if name != "user_id"})
    result = parity(online.with_columns(newest["user_id"]), newest, ["user_id"])
    skipped = int(ahead.sum())
    said = f"; {skipped} skipped: their rows online are newer than the tables" if skipped else ""
    return CheckResult("online parity", result.passed, result.rows, result.detail + said, result.table, skipped)


def _is_ahead(row: UserRow, plane: _Plane, now: datetime) -> bool:
    """Is a row of the user online newer than all of its view's table, though not of the future?"""
    for view, when in row.times.items():
        end: Any = plane.tables[view][TIMESTAMP].max() if view in plane.tables else None
        if when is not None and end is not None and end < when <= now + MAX_AHEAD:
            return True
    return False


def _snapshot_fresh(plane: _Plane, limit: timedelta, now: datetime) -> CheckResult:
    found = freshness(Snapshot.load(plane.workspace / "snapshot").as_of, limit, now)
    return CheckResult("snapshot fresh", found.passed, found.rows, found.detail)


def _drifted(plane: _Plane, settings: Settings) -> CheckResult:
    """The newest tenth of the events against the training window: all of it, and its last part."""
    ordered = plane.events.sort("timestamp", "event_id")
    newest = ordered.tail(max(1, len(ordered) // _NEWEST))
    past = ordered.head(len(ordered) - len(newest))
    cut = _training_cut(settings)
    if cut is not None and (trained := past.filter(pl.col("timestamp") < cut)).height:
        past = trained
    if past.is_empty():
        return CheckResult("drift", True, 0, "too few events to compare", skipped=len(newest))
    current, whole, recent = (
        _features(plane.training_rows(rows), plane.views) for rows in (newest, past, past.tail(len(newest)))
    )
    return drift(current, whole, recent, settings.checks.drift)


def _features(frame: pl.DataFrame, views: Sequence[ViewSchema]) -> pl.DataFrame:
    names = [name for view in views for name in view.feature_names if not name.endswith(_NO_FEATURES)]
    return frame.select(names)


def _training_cut(settings: Settings) -> datetime | None:
    """Where the champion's training window ends, where its split is one of time; otherwise, or without a champion, None."""
    if (settings.split.kind or load_source(settings.data).split) != "time":
        return None
    if not settings.knows_releases:
        return None
    store = ReleaseStore(settings.registry_url, settings.releases)
    try:
        name = store.champion().name
        begin = None if name is None else store.get(name).manifest.window.get("test")
    finally:
        store.close()
    return None if begin is None else datetime.fromisoformat(begin)
