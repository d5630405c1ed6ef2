"""Feast's SQLite online store, with the two rules that the stock one lacks: the newest event wins, and the future stays out.

In: rows from Feast's own commands (`online_write_batch`) and whole columns from our engine (`write_newest`). Out: tables in
the stock layout, one row per (entity, feature), plus the column `event_us`: the stock `event_ts` keeps whole seconds only.
A write is one transaction: rows go to a temporary table, one row per entity; what is late leaves it; the rest is upserted
by one statement, in the order of the primary key, and counted.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Literal

import polars as pl
from feast.entity import Entity
from feast.feature_view import FeatureView
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.helpers import compute_table_id
from feast.infra.online_stores.sqlite import SqliteOnlineStore, SqliteOnlineStoreConfig
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.repo_config import RepoConfig

from feature_repo.newest import (
    KEY_VERSION,
    Answer,
    NewestOnlineStore,
    NewestRows,
    Written,
    answers,
    keys_of,
    moment_of,
)
from tandem.core.errors import IntegrityError

_KEYS_PER_QUERY = 500
_SECOND = 1_000_000
_HOUR = 3600 * _SECOND
_TIME = f"COALESCE(event_us, event_ts * {_SECOND})"


class NewestSqliteOnlineStoreConfig(SqliteOnlineStoreConfig):  # type: ignore[misc]
    """`online_store` in `feature_store.yaml`."""

    type: Literal["feature_repo.sqlite_store.NewestSqliteOnlineStore"] = "feature_repo.sqlite_store.NewestSqliteOnlineStore"


class NewestSqliteOnlineStore(NewestOnlineStore, SqliteOnlineStore):  # type: ignore[misc]
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

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: Sequence[EntityKey],
        requested_features: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Per entity its event time (µs, UTC) and values by feature; (None, None) where it is unknown."""
        keys, wanted = [serialize_entity_key(key, KEY_VERSION) for key in entity_keys], set(requested_features or ())
        cells = _select(self._get_conn(config), table_of(config, table), keys)
        return answers(keys, (cell for cell in cells if not wanted or cell[1] in wanted))

    def clear(self, config: RepoConfig, view: FeatureView) -> int:
        """Forget every entity of a view; returns how many there were."""
        entities, _ = self.extent(config, view)
        with self._transaction(config) as conn:
            conn.execute(f"DELETE FROM {_quoted(table_of(config, view))}")
        return entities

    def erase(self, config: RepoConfig, view: FeatureView, ids: Sequence[str]) -> int:
        """Forget these entities of a view; returns how many there were."""
        keys = keys_of(view, ids)
        with self._transaction(config) as conn:
            there = {key for key, *_ in _select(conn, table_of(config, view), keys)}
            delete = f"DELETE FROM {_quoted(table_of(config, view))} WHERE entity_key = ?"
            conn.executemany(delete, ((key,) for key in there))
        return len(there)

    def scrub(self, config: RepoConfig) -> None:
        """Write the file anew and empty the log beside it: SQLite leaves deleted rows in both."""
        conn = self._get_conn(config)
        with self._writing:
            conn.execute("VACUUM")
            conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def extent(self, config: RepoConfig, view: FeatureView) -> tuple[int, datetime | None]:
        """How many entities a view holds, and the newest event time among them."""
        query = f"SELECT COUNT(DISTINCT entity_key), MAX({_TIME}) FROM {_quoted(table_of(config, view))}"
        entities, newest = self._get_conn(config).execute(query).fetchone()
        return entities, None if newest is None else moment_of(newest)

    def store_newest(self, config: RepoConfig, view: FeatureView, rows: NewestRows) -> Written:
        """In one transaction: an error leaves nothing changed."""
        table = _quoted(table_of(config, view))
        if not len(rows):
            return Written(ahead=rows.ahead)
        with self._transaction(config) as conn:
            _ensure_column(conn, table_of(config, view))
            _bring(conn, rows)
            late = conn.execute(_DROP_LATE.format(table=table)).rowcount
            conn.execute(_upsert(table, rows))
            _check_stored(conn, table, len(rows) - late)
            conn.execute("DROP TABLE temp.incoming")
        return Written(written=len(rows) - late, late=late, ahead=rows.ahead)

    def _transaction(self, config: RepoConfig) -> _Transaction:
        return _Transaction(self._get_conn(config), self._writing)

    _conn: sqlite3.Connection | None

    def _get_conn(self, config: RepoConfig) -> sqlite3.Connection:
        if self._conn is None:
            conn: sqlite3.Connection = super()._get_conn(config)
            conn.execute("PRAGMA busy_timeout = 10000")
            conn.execute("PRAGMA journal_mode = WAL")  # readers go on while a materialisation writes
            conn.execute("PRAGMA synchronous = NORMAL")
            conn.execute("PRAGMA wal_autocheckpoint = 20000")  # 80 MiB: a page that is written often is moved once
            conn.execute("PRAGMA temp_store = MEMORY")
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


def table_of(config: RepoConfig, view: FeatureView) -> str:
    """Feast's name for the view's table."""
    name: str = compute_table_id(config.project, view, config.registry.enable_online_feature_view_versioning)
    return name


# --- one write --------------------------------------------------------------------------------------------------------------


def _bring(conn: sqlite3.Connection, rows: NewestRows) -> None:
    """Put the rows into the temporary table `incoming`: key, µs, seconds, each feature's value, and the texts there are."""
    places = {name: at for at, name in enumerate(rows.values)}
    names = [
        "entity_key",
        "us",
        "seconds",
        *(f"value{at}" for at in places.values()),
        *(f"text{places[name]}" for name in rows.texts),
    ]
    cells = [column.to_list() for column in (*rows.values.values(), *rows.texts.values())]
    columns = [rows.keys.to_list(), rows.times.to_list(), _stock_seconds(rows.times).to_list(), *cells]
    conn.execute("DROP TABLE IF EXISTS temp.incoming")
    conn.execute(f"CREATE TEMP TABLE incoming ({', '.join(names)})")
    conn.executemany(f"INSERT INTO temp.incoming VALUES ({_marks(names)})", zip(*columns, strict=True))


_DROP_LATE = (
    "DELETE FROM temp.incoming WHERE EXISTS (SELECT 1 FROM {table} AS stored "
    f"WHERE stored.entity_key = incoming.entity_key AND {_TIME} > incoming.us)"
)


def _upsert(table: str, rows: NewestRows) -> str:
    """One statement for all features; rows come in the order of the primary key, in which SQLite writes fastest."""
    places = {name: at for at, name in enumerate(rows.values)}
    names = ", ".join(f"({at}, {_text_literal(name)})" for name, at in sorted(places.items()))
    value, text = _case("value", places.values()), _case("text", [places[name] for name in rows.texts])
    return (
        f"WITH feature(at, name) AS (VALUES {names}) "
        f"INSERT INTO {table} (entity_key, feature_name, value, value_text, event_ts, event_us) "
        f"SELECT entity_key, name, {value}, {text}, seconds, us "
        f"FROM temp.incoming CROSS JOIN feature WHERE {value} IS NOT NULL "
        "ON CONFLICT (entity_key, feature_name) DO UPDATE SET value = excluded.value, value_text = excluded.value_text, "
        "event_ts = excluded.event_ts, event_us = excluded.event_us "
        "WHERE event_us IS NOT excluded.event_us OR value IS NOT excluded.value"  # what did not change costs no write
    )


def _case(kind: str, places: Iterable[int]) -> str:
    return f"CASE at {' '.join(f'WHEN {at} THEN {kind}{at}' for at in places)} END" if places else "NULL"


def _check_stored(conn: sqlite3.Connection, table: str, wanted: int) -> None:
    """Are all entities there, at least one feature of each with the time that was written?"""
    query = (
        f"SELECT COUNT(*) FROM temp.incoming WHERE EXISTS (SELECT 1 FROM {table} AS stored "
        f"WHERE stored.entity_key = incoming.entity_key AND {_TIME} = incoming.us)"
    )
    stored = conn.execute(query).fetchone()[0]
    if stored != wanted:
        lost = wanted - stored
        raise IntegrityError(f"{table}: {lost} of {wanted} entities were not stored; nothing was changed, run it again")


def _select(conn: sqlite3.Connection, table: str, keys: Sequence[bytes]) -> Iterator[tuple[bytes, str, bytes, int]]:
    for start in range(0, len(keys), _KEYS_PER_QUERY):
        chunk = keys[start : start + _KEYS_PER_QUERY]
        query = f"SELECT entity_key, feature_name, value, {_TIME} FROM {_quoted(table)} WHERE entity_key IN ({_marks(chunk)})"
        yield from conn.execute(query, chunk)


def _ensure_column(conn: sqlite3.Connection, table: str) -> None:
    columns = {row[1] for row in conn.execute(f"PRAGMA table_info({_quoted(table)})")}
    if columns and "event_us" not in columns:
        conn.execute(f"ALTER TABLE {_quoted(table)} ADD COLUMN event_us INTEGER")


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text_literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _stock_seconds(times: pl.Series) -> pl.Series:
    """Whole seconds as the stock store writes them: a UTC time taken for a local one, so that stock readers undo it."""
    hours = times // _HOUR
    known = hours.unique()
    shift = [int(moment_of(hour * _HOUR).replace(tzinfo=None).timestamp()) - hour * 3600 for hour in known]
    return times // _SECOND + hours.replace_strict(known, pl.Series(shift, dtype=pl.Int64))
