"""The registry's database: an engine for its address, and tables of the version that this code knows.

In: SQLAlchemy's address (SQLite or PostgreSQL). Out: an `Engine`. Opening creates the tables or upgrades older ones in place, in
one transaction, once however many come at the same time; newer or foreign ones are refused with the way out.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Engine, create_engine, event, func, inspect, make_url, select
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import ArgumentError

from registry.tables import TABLES_VERSION, ReleaseRow, TablesRow
from tandem.core.errors import IncompatibleError, InputError

BUSY_MILLISECONDS: Final = 10_000
UPGRADE_STEPS: Final = ("locked", "migrated", "upgraded")
"""Moments in creating or upgrading the tables that `after` is told of: before `upgraded` nothing has changed."""

_FIRST_VERSION: Final = 1
_LOCK: Final = 0x7A4D_E401  # any number that only Tandem uses: PostgreSQL's advisory lock around changing tables


def open_engine(url: str) -> Engine:
    """An engine whose writers are begun with `execution_options(writes=True)`. InputError for an address that is none of ours."""
    try:
        address = make_url(url)
    except ArgumentError:
        raise InputError(
            "the registry's address is not one that SQLAlchemy knows; use sqlite:///<file> or postgresql+psycopg://…"
        ) from None
    match address.get_backend_name():
        case "sqlite":
            return _sqlite(address)
        case "postgresql":
            return create_engine(address, connect_args={"connect_timeout": 5}, pool_pre_ping=True)
        case other:
            raise InputError(f"the registry lives in SQLite or PostgreSQL, not in {other}")


def _sqlite(address: URL) -> Engine:
    """SQLite that tells writers from readers: writers queue at BEGIN, so that none fails at the end of its work."""
    if address.database and address.database != ":memory:":
        Path(address.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(address)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        del record
        connection.isolation_level = None  # we say BEGIN ourselves
        connection.execute(f"PRAGMA busy_timeout = {BUSY_MILLISECONDS}")
        _write_ahead(connection)
        for pragma in ("synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")

    return engine


def _write_ahead(connection: Any) -> None:
    """Switch the journal. SQLite does not wait by itself when another process is switching the same new file."""
    until = time.monotonic() + BUSY_MILLISECONDS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def open_tables(engine: Engine, releases: Path | None, after: Callable[[str], None]) -> None:
    """Leave the database with tables of TABLES_VERSION, or raise IncompatibleError with the way out and change nothing."""
    with engine.begin() as connection:
        found = _version(connection)
    if found == TABLES_VERSION:
        return
    with engine.execution_options(writes=True).begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
        after("locked")
        _upgrade(connection, releases)
        after("migrated")
    after("upgraded")


def _upgrade(connection: Connection, releases: Path | None) -> None:
    from registry.migrations import migrate

    found = _version(connection)
    if found == TABLES_VERSION:  # somebody else was faster
        return
    _check_known(connection, found)
    migrate(connection, found, releases)


def _version(connection: Connection) -> int | None:
    if not inspect(connection).has_table(TablesRow.__tablename__):
        return None
    return connection.scalar(select(TablesRow.version))


def _check_known(connection: Connection, found: int | None) -> None:
    """Raise IncompatibleError unless `found` is a version, or an emptiness, that the migrations start from."""
    if found is None:
        if inspect(connection).has_table(ReleaseRow.__tablename__):
            raise IncompatibleError(
                f"{connection.engine.url.render_as_string()} has a table {ReleaseRow.__tablename__!r} that is not Tandem's; "
                "name an empty database: TANDEM_REGISTRY__URL=sqlite:///<file> or postgresql+psycopg://…"
            )
        return
    if found > TABLES_VERSION:
        way_out = "run `pip install --upgrade tandem-recommender`"
    elif found < _FIRST_VERSION:
        way_out = "upgrade them with an older Tandem first: `pip install 'tandem-recommender<0.2'`, then `tandem release list`"
    else:
        return
    raise IncompatibleError(f"the registry's tables have version {found}, this Tandem needs {TABLES_VERSION}; {way_out}")
