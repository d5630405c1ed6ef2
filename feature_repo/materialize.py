"""Offline tables -> Feast's online store and the columnar snapshot; and single rows pushed to both sides.

In: a workspace whose definitions were applied. Out: newest row per entity online, `snapshot/<version>/`, and in
`state/quarantine/<view>/` the rows stamped further ahead than clocks may differ. One lock, `state/materialize.lock`, is held.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import polars as pl

from feature_repo.offline import LOCK, check_applied, open_own, open_store, quiet, reaching_registry
from feature_repo.snapshot import write_snapshot
from feature_repo.views import MAX_AHEAD, TIMESTAMP, ViewSchema, all_views, view_named
from tandem.core.errors import IncompatibleError, InputError
from tandem.core.folders import held, sweep_partials
from tandem.core.schema import TIME

if TYPE_CHECKING:
    from feast import FeatureStore

Progress = Callable[[str, int, int], None]
BEGINNING: Final = datetime(1970, 1, 1, tzinfo=UTC)
QUARANTINE: Final = "state/quarantine"


@dataclass(frozen=True)
class ViewCounts:
    """Entities of one view: stored online, older than what was stored, and rows quarantined for being in the future."""

    written: int
    late: int
    quarantined: int


@dataclass(frozen=True)
class MaterializeCounts:
    """What one materialisation did: counts by view, the moment up to which it looked, and the snapshot's version."""

    views: dict[str, ViewCounts]
    until: datetime
    snapshot: str

    @property
    def written(self) -> int:
        """Entities stored, over all views."""
        return sum(each.written for each in self.views.values())

    @property
    def quarantined(self) -> int:
        """Future rows kept out, over all views."""
        return sum(each.quarantined for each in self.views.values())


def materialize(
    workspace: Path, until: datetime | None = None, since: datetime | None = None, progress: Progress | None = None
) -> MaterializeCounts:
    """Store every entity's newest row in [since, until] online through Feast, and write a snapshot as of `until`.

    Defaults: from the beginning (late rows are found, and what did not change is written again) until now. Feast looks one
    hour further back than `since`, and moves a view's watermark only after the store counted what was written. `progress` is told
    a view's name, entities done, and about how many there are.
    Raises BusyError while another run holds the lock, and IncompatibleError, before anything is stored, when what was built has
    not been applied or a table does not have the columns that its view says.
    """
    now = datetime.now(UTC)
    end = min(until or now, now + MAX_AHEAD)
    views = all_views(workspace / "features")
    with held(workspace / LOCK, "features materialize"), reaching_registry(workspace):
        sweep_partials(workspace / "snapshot")
        _check_tables(workspace, views)
        ahead = {view.name: _quarantine_table(workspace, view, now) for view in views}
        store = open_own(workspace)
        if progress:
            store.provider.batch_engine.progress = _Counting(workspace, views, progress)
        written = _through_feast(store, views, since or BEGINNING, end)
        version = write_snapshot(workspace / "features", workspace / "snapshot", end)
    counts = {name: ViewCounts(each[0], each[1], ahead[name]) for name, each in written.items()}
    return MaterializeCounts(counts, end, version)


class _Counting:
    """The engine's progress (view, entities more) as ours (view, entities done, about how many)."""

    def __init__(self, workspace: Path, views: Sequence[ViewSchema], progress: Progress) -> None:
        keys = {view.name: _table(workspace, view).select(pl.col(view.key).approx_n_unique()) for view in views}
        self._totals = {name: int(counted.collect().item()) for name, counted in keys.items()}
        self._done = dict.fromkeys(self._totals, 0)
        self._progress = progress

    def __call__(self, view: str, more: int) -> None:
        self._done[view] += more
        self._progress(f"materialize {view}", self._done[view], max(self._totals[view], self._done[view]))


def push(workspace: Path, view: str, frame: pl.DataFrame) -> ViewCounts:
    """Add rows [key, event_timestamp, features...] to a view's offline table and, where they are newest, online.

    Late rows stay out of the online store, future ones go to the quarantine. Rows pushed offline last until the next build
    of the features. Raises InputError when columns are missing, unknown or of another type.
    """
    schema = view_named(all_views(workspace / "features"), view)
    rows = _conform(frame, schema)
    with held(workspace / LOCK, f"features push {view}"):
        return push_rows(open_own(workspace), workspace, schema, rows, datetime.now(UTC))


def push_rows(store: FeatureStore, workspace: Path, schema: ViewSchema, rows: pl.DataFrame, now: datetime) -> ViewCounts:
    """`push` of rows that have the view's columns, for a caller who holds the lock and has the store open."""
    from feature_repo.engine import write_newest

    check_applied(store, [schema])
    in_time, ahead = _split_future(rows, now)
    if ahead.height:
        _keep(ahead, workspace, schema, f"pushed-{uuid.uuid4().hex}")
    if in_time.is_empty():
        return ViewCounts(0, 0, ahead.height)
    feature_view = store.get_feature_view(schema.name)
    store.provider.ingest_df_to_offline_store(feature_view, in_time.to_arrow(compat_level=pl.CompatLevel.oldest()))
    done = write_newest(store.provider.online_store, store.config, feature_view, in_time, now)
    return ViewCounts(done.written, done.late, ahead.height)


def forget(workspace: Path) -> int:
    """Empty every online view; for when imported data were replaced, since newer rows of the old data would win for ever."""
    store = open_own(workspace)
    with held(workspace / LOCK, "features forget"):
        return sum(store.provider.online_store.clear(store.config, view) for view in store.list_feature_views())


def freshness(workspace: Path) -> pl.DataFrame:
    """How fresh each view is, one row per view in schema order.

    [view, entity, version, offline_rows, offline_newest, online_entities, online_newest, materialized_until]; times are UTC
    microseconds and null where there is nothing.
    """
    store = open_store(workspace)
    rows = [_freshness_of(workspace, store, view) for view in all_views(workspace / "features")]
    return pl.DataFrame(rows, schema=_FRESHNESS, orient="row")


_FRESHNESS: Final = {
    "view": pl.String(),
    "entity": pl.String(),
    "version": pl.Int64(),
    "offline_rows": pl.Int64(),
    "offline_newest": TIME,
    "online_entities": pl.Int64(),
    "online_newest": TIME,
    "materialized_until": TIME,
}


def _freshness_of(workspace: Path, store: FeatureStore, view: ViewSchema) -> tuple[object, ...]:
    feature_view = store.get_feature_view(view.name)
    offline = _table(workspace, view).select(pl.len(), pl.col(TIMESTAMP).max().alias("newest")).collect().row(0)
    online = store.provider.online_store.extent(store.config, feature_view)
    return view.name, view.entity, view.version, *offline, *online, feature_view.most_recent_end_time


def _through_feast(
    store: FeatureStore, views: Sequence[ViewSchema], since: datetime, until: datetime
) -> dict[str, tuple[int, int]]:
    check_applied(store, views)
    with quiet():
        store.materialize(since, until, feature_views=[view.name for view in views])
    done = store.provider.batch_engine.written
    return {view.name: (done[view.name].written, done[view.name].late) for view in views}


def _check_tables(workspace: Path, views: Sequence[ViewSchema]) -> None:
    """Has every part of every table its view's columns, in types that are the view's or become them without a loss?"""
    for view in views:
        path = workspace / view.path
        for part in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
            found = pl.read_parquet_schema(part)
            wrong = {name: found.get(name) for name, dtype in view.columns.items() if not _fits(found.get(name), dtype)}
            if wrong:
                said = ", ".join(f"{name} is {dtype or 'missing'}, not {view.columns[name]}" for name, dtype in wrong.items())
                raise IncompatibleError(f"{part.relative_to(workspace)}: {said}; run `tandem features build`, nothing was stored")


def _fits(found: pl.DataType | None, wanted: pl.DataType) -> bool:
    if isinstance(wanted, pl.Datetime):
        return isinstance(found, pl.Datetime)
    return found == wanted or (found is not None and found.is_integer() and wanted == pl.Int64 and found != pl.UInt64)


def _quarantine_table(workspace: Path, view: ViewSchema, now: datetime) -> int:
    """Copy the future rows of an offline table beside it and count them; materialisation does not read that far."""
    ahead = _table(workspace, view).filter(pl.col(TIMESTAMP) > now + MAX_AHEAD).collect()
    _keep(ahead, workspace, view, "offline")
    return ahead.height


def _split_future(frame: pl.DataFrame, now: datetime) -> tuple[pl.DataFrame, pl.DataFrame]:
    ahead = pl.col(TIMESTAMP) > now + MAX_AHEAD
    return frame.filter(~ahead), frame.filter(ahead)


def _keep(rows: pl.DataFrame, workspace: Path, view: ViewSchema, name: str) -> None:
    path = workspace / QUARANTINE / view.name / f"{name}.parquet"
    if rows.is_empty():
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.write_parquet(path)


def _table(workspace: Path, view: ViewSchema) -> pl.LazyFrame:
    path = workspace / view.path
    return pl.scan_parquet(str(path / "*.parquet") if path.is_dir() else str(path), glob=path.is_dir())


def _conform(frame: pl.DataFrame, view: ViewSchema) -> pl.DataFrame:
    """The frame with exactly the view's columns and types."""
    given, wanted = set(frame.columns), set(view.columns)
    if given != wanted:
        raise InputError(f"rows for view {view.name!r} lack {sorted(wanted - given)} and have unknown {sorted(given - wanted)}")
    if frame[view.key].null_count() or frame[TIMESTAMP].null_count():
        raise InputError(f"rows for view {view.name!r} have nulls in {view.key} or {TIMESTAMP}; fill or drop them")
    try:
        return frame.select(pl.col(name).cast(dtype) for name, dtype in view.columns.items())
    except pl.exceptions.PolarsError as error:
        raise InputError(f"rows for view {view.name!r} do not fit its columns: {error}") from None
