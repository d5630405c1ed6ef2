"""A Feast batch engine: offline table -> newest row per entity -> online store, in columns.

In: Feast's materialisation tasks, from our `materialize` and from `feast materialize` alike. Out: rows in the online store, and
per view what became of them in `PolarsComputeEngine.written`. Feast moves its watermark only when a task succeeds. A large table
is taken range by range of its keys, so that memory does not grow with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, cast

import polars as pl
from feast.feature_view import FeatureView
from feast.infra.common.materialization_job import MaterializationJob, MaterializationJobStatus, MaterializationTask
from feast.infra.compute_engines.base import ComputeEngine
from feast.infra.online_stores.online_store import OnlineStore
from feast.repo_config import RepoConfig
from feast.utils import _convert_arrow_to_proto

from feature_repo.ahead import ahead
from feature_repo.newest import NewestOnlineStore, Written, entity_key, rows_of_frame
from feature_repo.newest_rows import newest_by_range
from feature_repo.polars_store import PolarsOfflineStore
from feature_repo.views import MAX_AHEAD
from tandem.core.errors import InputError

OVERLAP: Final = timedelta(hours=1)
"""How far before its start a task looks again, for rows that arrived late."""

Progress = Callable[[str, int], None]
"""Told the view's name and how many more entities are stored."""

_ROWS_PER_WRITE: Final = 50_000
_ROWS_PER_RANGE: Final = 250_000
_FIRST: Final = datetime.min.replace(tzinfo=UTC)


def unwatched(view: str, stored: int) -> None:
    """Progress that nobody watches."""


@dataclass
class _Job(MaterializationJob):  # type: ignore[misc]
    """A task that has run; `failure` says why it did not succeed."""

    task: MaterializationTask
    failure: BaseException | None

    def status(self) -> MaterializationJobStatus:
        return MaterializationJobStatus.ERROR if self.failure else MaterializationJobStatus.SUCCEEDED

    def error(self) -> BaseException | None:
        return self.failure

    def should_be_retried(self) -> bool:
        return False

    def job_id(self) -> str:
        return f"{self.task.feature_view.name}-{self.task.end_time}"

    def url(self) -> str | None:
        return None


class PolarsComputeEngine(ComputeEngine):  # type: ignore[misc]
    """Feast's engine interface; `written` holds, by view name, the counts of the latest task of each view.

    `progress` may be set by whoever watches.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.written: dict[str, Written] = {}
        self.progress: Progress = unwatched

    def update(self, *_: Any, **__: Any) -> None:
        """Nothing to prepare: the engine runs in this process."""

    def teardown_infra(self, *_: Any, **__: Any) -> None:
        """Nothing to tear down."""

    def _materialize_one(self, registry: Any, task: MaterializationTask, **_: Any) -> _Job:
        try:
            self.written[task.feature_view.name] = self._run(task)
        except Exception as error:  # Feast takes the error out of the job, restores the view's state and raises it
            return _Job(task, error)
        return _Job(task, None)

    def _run(self, task: MaterializationTask) -> Written:
        if task.disable_event_timestamp:
            raise InputError("features keep their own event times here; run materialize without --disable-event-timestamp")
        now, view = datetime.now(UTC), task.feature_view
        newest = self._newest(view, max(task.start_time, _FIRST + OVERLAP) - OVERLAP, min(task.end_time, now + MAX_AHEAD))
        parts = (frame.slice(start, _ROWS_PER_WRITE) for frame in newest for start in range(0, frame.height, _ROWS_PER_WRITE))
        total = Written()
        for done in self._write(view, parts, now):
            self.progress(view.name, done.written + done.late)
            total += done
        return total

    def _write(self, view: FeatureView, parts: Iterator[pl.DataFrame], now: datetime) -> Iterator[Written]:
        """What became of each part; our own stores keep one while the next is read and encoded."""
        store, config = self.online_store, self.repo_config
        if not isinstance(store, NewestOnlineStore):
            yield from (_write_rows(store, config, view, part, now) for part in parts)
            return
        with closing(ahead(rows_of_frame(view, part, now) for part in parts)) as encoded:
            yield from (store.store_newest(config, view, rows) for rows in encoded)

    def _newest(self, view: FeatureView, start: datetime, end: datetime) -> Iterator[pl.DataFrame]:
        """The newest row per entity of a view, in the order of the stores' keys, in pieces that fit into memory."""
        source = view.batch_source
        columns: dict[str, Any] = {
            "join_key_columns": [column.name for column in view.entity_columns],
            "feature_name_columns": [each.name for each in view.features],
            "timestamp_field": source.timestamp_field,
            "created_timestamp_column": source.created_timestamp_column or None,
        }
        if isinstance(self.offline_store, PolarsOfflineStore):
            yield from newest_by_range(self.repo_config, source, **columns, start=start, end=end, rows=_ROWS_PER_RANGE)
            return
        pull = self.offline_store.pull_latest_from_table_or_query
        job = pull(config=self.repo_config, data_source=source, **columns, start_date=start, end_date=end)
        yield cast(pl.DataFrame, pl.from_arrow(job.to_arrow()))


def write_newest(online: OnlineStore, config: RepoConfig, view: FeatureView, frame: pl.DataFrame, now: datetime) -> Written:
    """Store the newest row per entity of a frame [key, event_timestamp, features...], unless the store holds a newer one.

    Our own stores do it in columns; for any other store the times are read first, which two writers at once could defeat.
    """
    if isinstance(online, NewestOnlineStore):
        return online.write_newest(config, view, frame, now)
    return _write_rows(online, config, view, frame, now)


def _write_rows(store: OnlineStore, config: RepoConfig, view: FeatureView, part: pl.DataFrame, now: datetime) -> Written:
    column, key = view.batch_source.timestamp_field, view.entity_columns[0].name
    in_time = part.filter(pl.col(column) <= now + MAX_AHEAD)
    newest = in_time.sort(column, maintain_order=True).unique(key, keep="last", maintain_order=True).rechunk()
    stored = store.online_read(config, view, [entity_key(key, value) for value in newest[key]], [view.features[0].name])
    known = pl.Series([when for when, _ in stored], dtype=newest[column].dtype)
    fresh = newest.filter((newest[column] >= known).fill_null(True)).rechunk()
    if fresh.height:
        keys = {each.name: each.dtype.to_value_type() for each in view.entity_columns}
        rows = _convert_arrow_to_proto(fresh.to_arrow(compat_level=pl.CompatLevel.oldest()), view, keys)
        store.online_write_batch(config, view, rows, None)
    return Written(written=fresh.height, late=newest.height - fresh.height, ahead=part.height - in_time.height)
