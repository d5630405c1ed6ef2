"""Feast's SQLite online store, with the two rules that the stock one lacks: the newest event wins, and the future stays out.

In: rows from Feast's own commands (`online_write_batch`) and whole columns from our engine (`write_newest`). Out: tables in
the stock layout, one row per (entity, feature), plus the column `event_us`: the stock `event_ts` keeps whole seconds only.
A write is one transaction: it reads the times that are there, skips what is late, upserts the rest and counts the result.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import polars as pl
from feast.entity import Entity
from feast.feature_view import FeatureView
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.helpers import compute_table_id, extract_text_and_num
from feast.infra.online_stores.sqlite import SqliteOnlineStore, SqliteOnlineStoreConfig
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import RepoConfig
from feast.type_map import python_values_to_proto_values
from feast.value_type import ValueType

from feature_repo.views import MAX_AHEAD
from tandem.core.errors import IntegrityError

_KEYS_PER_QUERY = 500
_KEY_VERSION = 3
_SECOND = 1_000_000
_SCALARS = (str, int, float)
_TIME = f"COALESCE(event_us, event_ts * {_SECOND})"

Cell = tuple[bytes, str | None]
"""One stored feature value: the serialized Feast Value, and its text for scalars."""


class NewestSqliteOnlineStoreConfig(SqliteOnlineStoreConfig):  # type: ignore[misc]
    """`online_store` in `feature_store.yaml`."""

    type: Literal["feature_repo.sqlite_store.NewestSqliteOnlineStore"] = "feature_repo.sqlite_store.NewestSqliteOnlineStore"


@dataclass(frozen=True)
class Written:
    """What became of the entities of one write: stored, older than what was there, or further ahead than clocks may differ."""

    written: int = 0
    late: int = 0
    ahead: int = 0


@dataclass(frozen=True)
class _Batch:
    """Entities by column: keys (N), event times in µs (N), and per feature its cells (N); None leaves what is stored."""

    keys: list[bytes]
    times: list[int]
    cells: dict[str, list[Cell | None]]

    def rows(self, chosen: Iterable[int]) -> Iterator[tuple[bytes, str, bytes, str | None, int, int]]:
        for at in chosen:
            key, when = self.keys[at], self.times[at]
            seconds = _stock_seconds(when)
            for name, column in self.cells.items():
                cell = column[at]
                if cell is not None:
                    yield key, name, cell[0], cell[1], seconds, when


class NewestSqliteOnlineStore(SqliteOnlineStore):  # type: ignore[misc]
    """SQLite online store in which a late event never replaces a newer one."""

    def __init__(self) -> None:
        super().__init__()
        self._writing = threading.Lock()

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Create and drop tables as Feast asks, in the stock layout plus our column."""
        super().update(config, tables_to_delete, tables_to_keep, entities_to_delete, entities_to_keep, partial)
        for table in tables_to_keep:
            name = table_of(config, table)
            _ensure_column(self._get_conn(config), name)
            self._get_conn(config).execute(f"DROP INDEX IF EXISTS {_quoted(name + '_ek')}")  # the primary key covers it

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: Sequence[tuple[EntityKey, dict[str, Value], datetime, datetime | None]],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Feast's row-wise write, with the guards; what is late or ahead is skipped."""
        names = {name for _, values, _, _ in data for name in values}
        self._store(config, table, _batch_of_rows(data, sorted(names)), datetime.now(UTC))
        if progress:
            progress(len(data))

    def write_newest(self, config: RepoConfig, view: FeatureView, frame: pl.DataFrame, now: datetime) -> Written:
        """Store a frame [key, event_timestamp, features...] of the view; of several rows of one entity the newest counts.

        Raises IntegrityError, with nothing changed, when the database does not hold afterwards what was written.
        """
        return self._store(config, view, _batch_of_frame(view, frame), now)

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: Sequence[EntityKey],
        requested_features: Sequence[str] | None = None,
    ) -> list[tuple[datetime | None, dict[str, Value] | None]]:
        """Per entity its event time (µs, UTC) and values by feature; (None, None) where it is unknown."""
        keys = [serialize_entity_key(key, _KEY_VERSION) for key in entity_keys]
        conn, wanted = self._get_conn(config), set(requested_features or ())
        found: dict[bytes, dict[str, Value]] = {}
        times: dict[bytes, int] = {}
        for key, name, value, when in _select(conn, table_of(config, table), keys):
            if not wanted or name in wanted:
                found.setdefault(key, {})[name] = Value.FromString(value)
                times[key] = max(when, times.get(key, when))
        return [(_moment(times[key]), found[key]) if key in found else (None, None) for key in keys]

    def clear(self, config: RepoConfig, view: FeatureView) -> int:
        """Forget every entity of a view; returns how many rows went."""
        with self._transaction(config) as conn:
            return conn.execute(f"DELETE FROM {_quoted(table_of(config, view))}").rowcount

    def extent(self, config: RepoConfig, view: FeatureView) -> tuple[int, datetime | None]:
        """How many entities a view holds, and the newest event time among them."""
        query = f"SELECT COUNT(DISTINCT entity_key), MAX({_TIME}) FROM {_quoted(table_of(config, view))}"
        entities, newest = self._get_conn(config).execute(query).fetchone()
        return entities, None if newest is None else _moment(newest)

    def _store(self, config: RepoConfig, view: FeatureView, batch: _Batch, now: datetime) -> Written:
        table, limit = table_of(config, view), _microseconds(now + MAX_AHEAD)
        in_time = [at for at, when in enumerate(batch.times) if when <= limit]
        newest = _newest_per_key(batch, in_time)
        with self._transaction(config) as conn:
            _ensure_column(conn, table)
            stored = _stored_times(conn, table, [batch.keys[at] for at in newest])
            fresh = [at for at in newest if batch.times[at] >= stored.get(batch.keys[at], batch.times[at])]
            conn.executemany(_UPSERT.format(table=_quoted(table)), batch.rows(fresh))
            _check_stored(conn, table, batch, fresh)
        return Written(written=len(fresh), late=len(newest) - len(fresh), ahead=len(batch.times) - len(in_time))

    def _transaction(self, config: RepoConfig) -> _Transaction:
        return _Transaction(self._get_conn(config), self._writing)

    _conn: sqlite3.Connection | None

    def _get_conn(self, config: RepoConfig) -> sqlite3.Connection:
        if self._conn is None:
            conn: sqlite3.Connection = super()._get_conn(config)
            conn.execute("PRAGMA busy_timeout = 10000")
            conn.execute("PRAGMA journal_mode = WAL")  # readers go on while a materialisation writes
            conn.execute("PRAGMA synchronous = NORMAL")
            conn.execute("PRAGMA cache_size = -65536")  # 64 MiB
            return conn
        return self._conn

    def _is_versioned_read_supported(self) -> bool:
        return True  # the stock check imports every other store's client first


class _Transaction:
    """One writer at a time in the process and in the database; commits at the end of the block, rolls back on an error."""

    def __init__(self, conn: sqlite3.Connection, lock: threading.Lock) -> None:
        self._conn, self._lock = conn, lock

    def __enter__(self) -> sqlite3.Connection:
        self._lock.acquire()
        try:
            self._conn.execute("BEGIN IMMEDIATE")
        except BaseException:
            self._lock.release()
            raise
        return self._conn

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._conn.commit()
            else:
                self._conn.rollback()
        finally:
            self._lock.release()


_UPSERT = (
    "INSERT INTO {table} (entity_key, feature_name, value, value_text, event_ts, event_us) VALUES (?, ?, ?, ?, ?, ?) "
    "ON CONFLICT (entity_key, feature_name) DO UPDATE SET value = excluded.value, value_text = excluded.value_text, "
    "event_ts = excluded.event_ts, event_us = excluded.event_us "
    "WHERE event_us IS NOT excluded.event_us OR value IS NOT excluded.value"  # what did not change costs no write
)


def table_of(config: RepoConfig, view: FeatureView) -> str:
    """Feast's name for the view's table."""
    name: str = compute_table_id(config.project, view, config.registry.enable_online_feature_view_versioning)
    return name


def entity_key(join_key: str, value: str) -> EntityKey:
    """Feast's key of one entity, such as ("user_id", "u1")."""
    return EntityKey(join_keys=[join_key], entity_values=[Value(string_val=value)])


def _batch_of_rows(data: Sequence[tuple[EntityKey, dict[str, Value], datetime, Any]], names: Sequence[str]) -> _Batch:
    keys = [serialize_entity_key(key, _KEY_VERSION) for key, _, _, _ in data]
    times = [_microseconds(when) for _, _, when, _ in data]
    cells: dict[str, list[Cell | None]] = {
        name: [_cell(values[name]) if name in values else None for _, values, _, _ in data] for name in names
    }
    return _Batch(keys, times, cells)


def _batch_of_frame(view: FeatureView, frame: pl.DataFrame) -> _Batch:
    join_key = view.entity_columns[0].name
    keys = [serialize_entity_key(entity_key(join_key, value), _KEY_VERSION) for value in frame[join_key]]
    times = frame[view.batch_source.timestamp_field].dt.timestamp("us").to_list()
    cells = {each.name: _column_cells(frame[each.name].to_list(), each.dtype.to_value_type()) for each in view.features}
    return _Batch(keys, times, cells)


def _column_cells(values: list[Any], kind: ValueType) -> list[Cell | None]:
    """Feast's own encoding of a column; null and NaN become the empty value."""
    encoded = [value.SerializeToString() for value in python_values_to_proto_values(values, kind)]
    return [
        (raw, str(value) if raw and isinstance(value, _SCALARS) else None) for raw, value in zip(encoded, values, strict=True)
    ]


def _cell(value: Value) -> Cell:
    return value.SerializeToString(), extract_text_and_num(value, False)[0]


def _newest_per_key(batch: _Batch, chosen: Sequence[int]) -> list[int]:
    """Positions of each key's newest row (of equals the last), in key order, in which SQLite writes fastest."""
    newest: dict[bytes, int] = {}
    for at in chosen:
        held = newest.get(batch.keys[at])
        if held is None or batch.times[at] >= batch.times[held]:
            newest[batch.keys[at]] = at
    return [newest[key] for key in sorted(newest)]


def _stored_times(conn: sqlite3.Connection, table: str, keys: Sequence[bytes]) -> dict[bytes, int]:
    """Event time in µs of those keys that are stored."""
    times: dict[bytes, int] = {}
    for chunk in _chunks(keys):
        query = f"SELECT entity_key, MAX({_TIME}) FROM {_quoted(table)} WHERE entity_key IN ({_marks(chunk)}) GROUP BY entity_key"
        times.update(conn.execute(query, chunk))
    return times


def _check_stored(conn: sqlite3.Connection, table: str, batch: _Batch, fresh: Sequence[int]) -> None:
    stored = _stored_times(conn, table, [batch.keys[at] for at in fresh])
    lost = sum(stored.get(batch.keys[at]) != batch.times[at] for at in fresh)
    if lost:
        raise IntegrityError(f"{table}: {lost} of {len(fresh)} entities were not stored; nothing was changed, run it again")


def _select(conn: sqlite3.Connection, table: str, keys: Sequence[bytes]) -> Iterator[tuple[bytes, str, bytes, int]]:
    for chunk in _chunks(keys):
        query = f"SELECT entity_key, feature_name, value, {_TIME} FROM {_quoted(table)} WHERE entity_key IN ({_marks(chunk)})"
        yield from conn.execute(query, chunk)


def _ensure_column(conn: sqlite3.Connection, table: str) -> None:
    columns = {row[1] for row in conn.execute(f"PRAGMA table_info({_quoted(table)})")}
    if columns and "event_us" not in columns:
        conn.execute(f"ALTER TABLE {_quoted(table)} ADD COLUMN event_us INTEGER")


def _chunks(keys: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    return (keys[start : start + _KEYS_PER_QUERY] for start in range(0, len(keys), _KEYS_PER_QUERY))


def _marks(keys: Sequence[bytes]) -> str:
    return ",".join("?" * len(keys))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _microseconds(moment: datetime) -> int:
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    since = aware - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * _SECOND + since.microseconds


def _moment(microseconds: int) -> datetime:
    seconds, rest = divmod(microseconds, _SECOND)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest)


def _stock_seconds(microseconds: int) -> int:
    """Whole seconds as the stock store writes them: a UTC time taken for a local one, so that stock readers undo it."""
    return int(_moment(microseconds).replace(tzinfo=None).timestamp())
