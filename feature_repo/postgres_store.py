"""Feast's PostgreSQL online store, with our two rules, and whole columns at once.

In: rows from Feast's own commands (`online_write_batch`) and columns from our engine (`write_newest`). Out: tables in the stock
layout, one row per (entity, feature); `event_ts` keeps microseconds there. A write is one transaction: rows are copied into a
temporary table, one row per entity; what is late leaves it; the rest is upserted by one statement and counted.
"""

from __future__ import annotations

import math
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar, cast

import polars as pl
from feast.feature_view import FeatureView
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.helpers import compute_table_id
from feast.infra.online_stores.postgres_online_store.postgres import PostgreSQLOnlineStore, PostgreSQLOnlineStoreConfig
from feast.infra.utils.postgres.connection_utils import _get_conn, _get_conn_kwargs, _get_conninfo
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.repo_config import RepoConfig
from psycopg import Connection, Cursor, OperationalError
from psycopg.abc import PQGen
from psycopg.sql import SQL, Composed, Identifier
from psycopg.sql import Literal as Text
from psycopg.waiting import Ready

from feature_repo.newest import (
    CONNECT_TIMEOUT_S,
    KEY_VERSION,
    Answer,
    NewestOnlineStore,
    NewestRows,
    Written,
    answers,
    keys_of,
    microseconds,
)
from feature_repo.owner import CREATE, TABLE
from tandem.core.errors import IntegrityError, UnavailableError

_Result = TypeVar("_Result")


class NewestPostgresOnlineStoreConfig(PostgreSQLOnlineStoreConfig):  # type: ignore[misc]
    """`online_store` in `feature_store.yaml`: host, port, database, db_schema, user, password, sslmode as Feast has them."""

    type: Literal["feature_repo.postgres_store.NewestPostgresOnlineStore"] = (  # type: ignore[assignment]
        "feature_repo.postgres_store.NewestPostgresOnlineStore"
    )
    read_timeout_ms: int | None = None
    """For serving: how long one statement may take, and the wait for its answer."""


class NewestPostgresOnlineStore(NewestOnlineStore, PostgreSQLOnlineStore):  # type: ignore[misc]
    """PostgreSQL online store in which a late event never replaces a newer one, and none from the future stays."""

    def __init__(self) -> None:
        super().__init__()
        self._using = threading.RLock()

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: Sequence[EntityKey],
        requested_features: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Per entity its event time (µs, UTC) and values by feature; (None, None) where it is unknown."""
        keys = [serialize_entity_key(key, KEY_VERSION) for key in entity_keys]
        query, wanted = _SELECT.format(_table(config, table)), list(requested_features or ()) or None
        with self._get_conn(config, autocommit=True) as conn:
            rows = conn.execute(query, {"keys": keys, "wanted": wanted}).fetchall()
        return answers(keys, ((bytes(key), name, bytes(value), microseconds(when)) for key, name, value, when in rows))

    def clear(self, config: RepoConfig, view: FeatureView) -> int:
        """Forget every entity of a view; returns how many there were."""
        entities, _ = self.extent(config, view)
        with self._transaction(config) as cursor:
            cursor.execute(SQL("DELETE FROM {}").format(_table(config, view)))
        return entities

    def erase(self, config: RepoConfig, view: FeatureView, ids: Sequence[str]) -> int:
        """Forget these entities of a view; returns how many there were."""
        delete = SQL("WITH gone AS (DELETE FROM {} WHERE entity_key = ANY(%s) RETURNING entity_key) {}")
        count = SQL("SELECT COUNT(DISTINCT entity_key) FROM gone")
        with self._transaction(config) as cursor:
            cursor.execute(delete.format(_table(config, view), count), [keys_of(view, ids)])
            return _number(cursor)

    def extent(self, config: RepoConfig, view: FeatureView) -> tuple[int, datetime | None]:
        """How many entities a view holds, and the newest event time among them."""
        query = SQL("SELECT COUNT(DISTINCT entity_key), MAX(event_ts) FROM {}").format(_table(config, view))
        with self._transaction(config) as cursor:
            entities, newest = cast(tuple[int, datetime | None], cursor.execute(query).fetchone())
        return entities, None if newest is None else newest.astimezone(UTC)

    def claim(self, config: RepoConfig, owner: str) -> str | None:
        """The mark is a row of a table in the schema, for one schema holds one workspace."""
        insert = "INSERT INTO {} (project, owner) VALUES (%s, %s) ON CONFLICT DO NOTHING"
        with self._transaction(config) as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", [TABLE])  # two may create it at once
            cursor.execute(SQL("CREATE SCHEMA IF NOT EXISTS {}").format(Identifier(config.online_store.db_schema)))
            cursor.execute(SQL(CREATE))
            cursor.execute(SQL(insert).format(Identifier(TABLE)), [config.project, owner])
            query = SQL("SELECT owner FROM {} WHERE project = %s").format(Identifier(TABLE))
            return str(cast(tuple[str], cursor.execute(query, [config.project]).fetchone())[0])

    def store_newest(self, config: RepoConfig, view: FeatureView, rows: NewestRows) -> Written:
        """In one transaction: an error leaves nothing changed."""
        table = _table(config, view)
        if not len(rows):
            return Written(ahead=rows.ahead)
        with self._transaction(config) as cursor:
            cursor.execute(SQL("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE").format(table))  # one writer; readers go on
            _bring(cursor, rows)
            late = cursor.execute(_DROP_LATE.format(table)).rowcount
            cursor.execute(_upsert(table, rows))
            _check_stored(cursor, table, view.name, len(rows) - late)
        return Written(written=len(rows) - late, late=late, ahead=rows.ahead)

    @contextmanager
    def _transaction(self, config: RepoConfig) -> Iterator[Cursor[Any]]:
        with self._get_conn(config) as conn, conn.transaction(), conn.cursor() as cursor:
            yield cursor

    _conn: Connection[Any] | None

    @contextmanager
    def _alone(self, config: RepoConfig) -> Iterator[None]:
        """The connection for one thread; whoever serves does not wait longer for it than for an answer."""
        limit = config.online_store.read_timeout_ms
        if not self._using.acquire(timeout=-1 if limit is None else limit / 1000):
            raise UnavailableError(f"PostgreSQL at {_where(config)} is still busy with another read after {limit} ms")
        try:
            yield
        finally:
            self._using.release()

    @contextmanager
    def _get_conn(self, config: RepoConfig, autocommit: bool = False) -> Iterator[Connection[Any]]:
        """One connection, used by one thread at a time, and opened anew where the server has closed it."""
        with self._alone(config):
            if self._conn is None or self._conn.closed:
                self._conn = _connected(config.online_store)
            if self._conn.autocommit != autocommit:
                self._conn.set_autocommit(autocommit)
            try:
                yield self._conn
            except BaseException:
                if not self._conn.closed:
                    self._conn.rollback()
                raise


class _TimedConnection(Connection[Any]):
    """A connection that does not wait longer than `limit_s` for the server to say something, and is closed if it does.

    A server's own `statement_timeout` helps nobody when its answers no longer arrive.
    """

    limit_s = math.inf

    def wait(self, gen: PQGen[_Result], interval: float = 0.0, timeout: float | None = None) -> _Result:
        until = time.monotonic() + min(self.limit_s, timeout or math.inf)
        with selectors.DefaultSelector() as selector:
            try:
                wanted = next(gen)
                while True:
                    selector.register(self.pgconn.socket, wanted)
                    ready = selector.select(None if until == math.inf else max(0.0, until - time.monotonic()))
                    selector.unregister(self.pgconn.socket)
                    if not ready:
                        self.pgconn.finish()
                        raise OperationalError(f"PostgreSQL did not answer within {self.limit_s * 1000:.0f} ms")
                    wanted = gen.send(Ready(ready[0][1]))
            except StopIteration as done:
                return cast(_Result, done.value)


def _connected(settings: NewestPostgresOnlineStoreConfig) -> Connection[Any]:
    """A connection; for serving, one to a server that answers at once, and whose every answer has a time limit."""
    if settings.read_timeout_ms is None:
        return cast(Connection[Any], _get_conn(settings))
    _greet(settings.host, settings.port)
    conn = _TimedConnection.connect(_get_conninfo(settings), connect_timeout=2, **_get_conn_kwargs(settings))
    conn.limit_s = settings.read_timeout_ms / 1000
    conn.execute(SQL("SET statement_timeout = {}").format(Text(settings.read_timeout_ms)))
    conn.commit()
    return conn


def _greet(host: str, port: int) -> None:
    """Ask whether the server speaks TLS, for the sake of an answer: libpq's own limit for connecting is 2 s at least.

    https://www.postgresql.org/docs/current/protocol-message-formats.html, SSLRequest
    """
    with socket.create_connection((host, port), CONNECT_TIMEOUT_S) as line:
        line.sendall(struct.pack("!ii", 8, 80877103))
        if not line.recv(1):
            raise OperationalError(f"PostgreSQL at {host}:{port} closed the connection")


def _where(config: RepoConfig) -> str:
    return f"{config.online_store.host}:{config.online_store.port}"


def _table(config: RepoConfig, view: FeatureView) -> Identifier:
    return Identifier(compute_table_id(config.project, view, config.registry.enable_online_feature_view_versioning))


# --- one write --------------------------------------------------------------------------------------------------------------


def _bring(cursor: Cursor[Any], rows: NewestRows) -> None:
    """Copy the rows into the temporary table `incoming`: key, time, each feature's value, and the texts there are."""
    cells = [(_column("value", name), "bytea", column) for name, column in rows.values.items()]
    cells += [(_column("text", name), "text", column) for name, column in rows.texts.items()]
    columns = SQL(", ").join(SQL("{} {}").format(name, SQL(dtype)) for name, dtype, _ in cells)
    create = SQL("CREATE TEMP TABLE incoming (entity_key bytea, event_ts timestamptz, {}) ON COMMIT DROP")
    cursor.execute(create.format(columns))
    times = rows.times.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    with cursor.copy("COPY incoming FROM STDIN (FORMAT BINARY)") as copy:
        copy.set_types(["bytea", "timestamptz", *(dtype for _, dtype, _ in cells)])
        for row in zip(rows.keys, times, *(column for *_, column in cells), strict=True):
            copy.write_row(row)


def _column(kind: str, feature: str) -> Identifier:
    return Identifier(f"{kind} {feature}")


_SELECT = SQL(
    "SELECT entity_key, feature_name, value, event_ts FROM {} "
    "WHERE entity_key = ANY(%(keys)s) AND (%(wanted)s::text[] IS NULL OR feature_name = ANY(%(wanted)s))"
)

_DROP_LATE = SQL(
    "DELETE FROM incoming WHERE EXISTS (SELECT 1 FROM {} AS stored "
    "WHERE stored.entity_key = incoming.entity_key AND stored.event_ts > incoming.event_ts)"
)


def _upsert(table: Identifier, rows: NewestRows) -> Composed:
    """One statement for all features; what did not change is not written."""
    cell, nothing = SQL("({}, {}, {}::text)"), SQL("NULL")
    texts = {name: _column("text", name) if name in rows.texts else nothing for name in rows.values}
    cells = SQL(", ").join(cell.format(Text(name), _column("value", name), text) for name, text in texts.items())
    return SQL(
        "INSERT INTO {table} AS stored (entity_key, feature_name, value, value_text, event_ts) "
        "SELECT entity_key, cell.name, cell.value, cell.text, event_ts "
        "FROM incoming CROSS JOIN LATERAL (VALUES {cells}) AS cell (name, value, text) WHERE cell.value IS NOT NULL "
        "ON CONFLICT (entity_key, feature_name) DO UPDATE SET value = excluded.value, value_text = excluded.value_text, "
        "event_ts = excluded.event_ts "
        "WHERE (stored.event_ts, stored.value) IS DISTINCT FROM (excluded.event_ts, excluded.value)"
    ).format(table=table, cells=cells)


def _check_stored(cursor: Cursor[Any], table: Identifier, view: str, wanted: int) -> None:
    """Are all entities there, at least one feature of each with the time that was written?"""
    query = SQL(
        "SELECT COUNT(*) FROM incoming WHERE EXISTS (SELECT 1 FROM {} AS stored "
        "WHERE stored.entity_key = incoming.entity_key AND stored.event_ts = incoming.event_ts)"
    )
    cursor.execute(query.format(table))
    stored = _number(cursor)
    if stored != wanted:
        raise IntegrityError(
            f"PostgreSQL, view {view}: {wanted - stored} of {wanted} entities were not stored; nothing was changed, run it again"
        )


def _number(cursor: Cursor[Any]) -> int:
    return int(cast(tuple[int], cursor.fetchone())[0])
