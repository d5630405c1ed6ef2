"""The served-log: what was shown to whom, at which place, with which score and chance, by which release.

In: one row per item of each slate, written while the request is answered. Out: Parquet parts in one folder, read back as
one frame and joined to the events that followed. Writing only appends to a buffer and never raises into a request: a
background thread writes the parts, and rows that cannot be written are dropped and counted.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import polars as pl

from tandem.core.errors import InputError, IntegrityError
from tandem.core.folders import held
from tandem.core.schema import TIME

SERVED: Final[dict[str, pl.DataType]] = {
    "request_id": pl.String(),
    "user_id": pl.String(),
    "item_id": pl.String(),
    "position": pl.Int32(),
    "score": pl.Float64(),
    "propensity": pl.Float64(),
    "timestamp": TIME,
    "release": pl.String(),
    "view_versions": pl.String(),
    "features_read": pl.String(),
    "took_ms": pl.Float64(),
    "degraded": pl.String(),
    "experiment": pl.String(),
    "stage": pl.Int64(),
    "arm": pl.String(),
    "unit": pl.String(),
}
"""Columns of the served-log in order; those in `REQUIRED` are never null. `view_versions` is JSON, {view: version}.
`features_read`, in a slate's first row, is what `replay.py` holds against the as-of join. `degraded` names fallbacks, by commas.
While an experiment is open: its name, its stage (the change of percentage before), the arm, and a hash of whom the arm was drawn
for. More columns may follow."""

REQUIRED: Final = ("request_id", "item_id", "position", "timestamp")

ATTRIBUTION: Final = timedelta(hours=24)
"""How long after it was shown an item is credited with an event that names no request."""

Rows = pl.DataFrame | Sequence[Mapping[str, Any]]

_LOG: Final = logging.getLogger(__name__)
_PARTIAL: Final = ".partial-"


@dataclass(frozen=True)
class ServedLogConfig:
    """When the buffer is written (rows or seconds, whichever comes first) and how many rows it may hold while the disk fails."""

    flush_rows: int = 10_000
    flush_seconds: float = 5.0
    buffer_rows: int = 200_000


@dataclass
class _Counters:
    written: int = 0
    dropped: int = 0


@dataclass
class _Buffer:
    """Batches that wait for the disk; the oldest comes first."""

    batches: list[Rows] = field(default_factory=list)
    rows: int = 0


class ServedLog:
    """Thread-safe, append-only log in `folder`; several processes may write to one folder.

    Use it as a context manager or call `close`: what is buffered when a process is killed is lost, no more.
    """

    def __init__(
        self, folder: Path, config: ServedLogConfig | None = None, without: Callable[[pl.DataFrame], pl.DataFrame] | None = None
    ) -> None:
        """`without` takes rows away before they are written: those of users who were erased while the rows waited."""
        self.folder = folder
        self._without = without or (lambda rows: rows)
        self._config = config or ServedLogConfig()
        self._buffer = _Buffer()
        self._counters = _Counters()
        self._changed = threading.Condition()
        self._writing = threading.Lock()
        self._closed = False
        self._writer: threading.Thread | None = None

    @property
    def dropped(self) -> int:
        """Rows that were given up: bad rows, a full disk, a full buffer, or writing after `close`."""
        return self._counters.dropped

    @property
    def written(self) -> int:
        """Rows that this object has put on disk."""
        return self._counters.written

    def write(self, rows: Rows) -> None:
        """Append the rows of a slate, with the columns of `SERVED`. Takes microseconds and never raises."""
        size = len(rows)
        if not size:
            return
        with self._changed:
            if self._closed or self._buffer.rows + size > self._config.buffer_rows:
                self._counters.dropped += size
                return
            self._buffer.batches.append(rows)
            self._buffer.rows += size
            self._start_writer()
            if self._buffer.rows >= self._config.flush_rows:
                self._changed.notify()

    def flush(self) -> None:
        """Write what is buffered and return when it is on disk, or dropped and counted. Never raises."""
        with self._writing:
            with self._changed:
                buffer, self._buffer = self._buffer, _Buffer()
            if buffer.rows:
                self._write_batches(buffer.batches)

    def close(self) -> None:
        """Write what is buffered; later writes are dropped and counted."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            writer = self._writer
        if writer is not None:
            writer.join()
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def read(self, since: datetime | None = None) -> pl.DataFrame:
        """Served rows, every writer's, sorted by (timestamp, request_id, position); what is buffered here is flushed first.

        `since`: only what was served then or later; parts that were written before are not opened.

        Raises IntegrityError naming a part that cannot be read.
        """
        self.flush()
        if since is None:
            return _read_parts(_parts(self.folder))
        later = [part for part in _parts(self.folder) if _written_at(part) >= since]
        return _read_parts(later).filter(pl.col("timestamp") >= since)

    def join_events(self, events: pl.DataFrame, within: timedelta = ATTRIBUTION) -> pl.DataFrame:
        """`join_events` over everything in the log."""
        return join_events(self.read(), events, within)

    def compact(self) -> int:
        """Merge all parts into one; returns how many there were. A crash in between leaves doubles, which `read` removes.

        Raises BusyError while another process compacts.
        """
        with held(self.folder / "compact.lock", "served-log compaction"):
            parts = _parts(self.folder)
            if len(parts) > 1:
                _write_part(_read_parts(parts), self.folder)
                for part in parts:
                    part.unlink()
            return len(parts)

    def _start_writer(self) -> None:
        """Start the background thread if there is none: the first time, and in a process forked since."""
        if self._writer is not None and self._writer.is_alive():
            return
        writer = threading.Thread(target=self._run, name="served-log", daemon=True)
        try:
            writer.start()
        except RuntimeError as error:
            _LOG.warning("served-log: no thread to write with (%s); the next slate tries again", error)
        else:
            self._writer = writer

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._is_full(), timeout=self._config.flush_seconds)
                closed = self._closed
            self.flush()
            if closed:
                return

    def _is_full(self) -> bool:
        return self._buffer.rows >= self._config.flush_rows

    def _write_batches(self, batches: list[Rows]) -> None:
        frames = [frame for batch in batches if (frame := self._checked(batch)) is not None]
        if not frames:
            return
        rows = sum(len(frame) for frame in frames)
        try:
            _write_part(self._without(pl.concat(frames, how="diagonal_relaxed")), self.folder)
        except Exception as error:
            self._drop(rows, f"cannot be written: {error}")
        else:
            self._counters.written += rows

    def _checked(self, batch: Rows) -> pl.DataFrame | None:
        """The batch as a frame of the log's schema; one bad slate must not take its neighbours along."""
        try:
            return _as_served(batch)
        except Exception as error:
            self._drop(len(batch), f"are malformed: {error}")
            return None

    def _drop(self, rows: int, why: str) -> None:
        with self._changed:
            self._counters.dropped += rows
        _LOG.warning("served-log: %d rows dropped, they %s", rows, why)


def view_versions(versions: Mapping[str, int]) -> str:
    """{view: version} as the text of the `view_versions` column; equal versions give equal text."""
    return json.dumps(dict(versions), sort_keys=True, separators=(",", ":"))


def join_events(served: pl.DataFrame, events: pl.DataFrame, within: timedelta = ATTRIBUTION) -> pl.DataFrame:
    """Served rows with the events they led to: columns event_id, action, value, event_timestamp, matched_by.

    An event that carries a request_id belongs to its item's row in that request ("request"), whenever it came; another one
    to the newest row that showed its user its item at most `within` before it ("time"). An event is credited once. A
    served row stands once per event, or once with nulls when nothing followed; rows keep the order of `served`.
    """
    shown = served.with_row_index("shown")
    happened = events.select("event_id", "user_id", "item_id", "action", "value", "request_id", _EVENT_TIME)
    by_request = happened.filter(pl.col("request_id").is_not_null()).join(
        shown.select("request_id", "item_id", "shown"), on=["request_id", "item_id"]
    )
    by_time = (
        happened.filter(pl.col("request_id").is_null())
        .sort("event_timestamp", "event_id")
        .join_asof(
            shown.select("user_id", "item_id", "timestamp", "shown").sort("timestamp", "shown"),
            left_on="event_timestamp",
            right_on="timestamp",
            by=["user_id", "item_id"],
            strategy="backward",
            tolerance=within,
            check_sortedness=False,
        )
        .filter(pl.col("shown").is_not_null())
    )
    columns = ["shown", "event_id", "action", "value", "event_timestamp"]
    labels = pl.concat(
        [
            by_request.select(*columns, pl.lit("request").alias("matched_by")),
            by_time.select(*columns, pl.lit("time").alias("matched_by")),
        ]
    )
    joined = shown.join(labels, on="shown", how="left")
    return joined.sort("shown", "event_timestamp", "event_id", nulls_last=True).drop("shown")


_EVENT_TIME: Final = pl.col("timestamp").alias("event_timestamp")


def _as_served(rows: Rows) -> pl.DataFrame:
    """Rows in the log's schema, absent columns null, further columns behind.

    Raises InputError for a required column that is absent or null, and Polars' errors for values of another kind.
    """
    frame = (
        rows if isinstance(rows, pl.DataFrame) else pl.DataFrame(list(rows), schema_overrides=SERVED, infer_schema_length=None)
    )
    absent = [pl.lit(None).alias(name) for name in SERVED if name not in frame.columns]
    more = [name for name in frame.columns if name not in SERVED]
    frame = frame.with_columns(absent).select(*(pl.col(name).cast(dtype) for name, dtype in SERVED.items()), *more)
    for name in REQUIRED:
        if frame[name].null_count():
            raise InputError(f"column {name!r} of a slate is absent or null; every served row needs one")
    return frame


def _parts(folder: Path) -> list[Path]:
    """Whole parts, oldest first. Names begin with the writing time, so that they sort by it."""
    return sorted(folder.glob("part-*.parquet"))


def _written_at(part: Path) -> datetime:
    """When a part was written: after all that it holds was served."""
    nanoseconds = int(part.name.split("-")[1])
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC) + timedelta(milliseconds=1)


def _read_parts(parts: Sequence[Path]) -> pl.DataFrame:
    frames = [pl.DataFrame(schema=SERVED), *(_read_part(part) for part in parts)]
    rows = pl.concat(frames, how="diagonal_relaxed").unique(["request_id", "item_id"], keep="first", maintain_order=True)
    return rows.sort("timestamp", "request_id", "position")


def _read_part(part: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(part)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise IntegrityError(f"served-log part {part.name} cannot be read: {error}; move it away and read again") from error


def _write_part(frame: pl.DataFrame, folder: Path) -> None:
    """Write one part whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
    beside = folder / f"{_PARTIAL}{name}"
    try:
        frame.write_parquet(beside, compression="zstd")
        _sync(beside)
        beside.rename(folder / f"part-{name}.parquet")
        _sync(folder)
    finally:
        beside.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
