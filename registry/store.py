"""Which release is live, and why: the registry's tables behind a unit of work.

In: a database address (SQLite or PostgreSQL), manifests, verdicts, names of people and their reasons. Out: frozen records. A
promotion is one row flipped with compare-and-set: whoever expects another champion than the live one loses, and is told to whom.

    with store.work() as work:          # leaving the block without commit() changes nothing
        work.promote("b", expected="a", who="ada", why="ndcg@10 +0.01")
        work.commit()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

from registry.database import BUSY_MILLISECONDS, open_engine, open_tables
from registry.release import Manifest
from registry.work import Champion, GateRecord, Promotion, Release, Work
from tandem.core.errors import BusyError, UnavailableError


def _now() -> datetime:
    return datetime.now(UTC)


def _nothing(step: str) -> None:
    del step


class ReleaseStore:
    """The registry's database. Opening creates the tables where there are none, upgrades older ones, and refuses newer ones.

    `url` is SQLAlchemy's ("sqlite:////…/tandem.db", "postgresql+psycopg://…"); folders inside of `releases` are kept relative to
    it; `after` is told of UPGRADE_STEPS, ADD_STEPS and PROMOTE_STEPS. Every method may raise UnavailableError (no database there)
    or BusyError (SQLite locked for 10 s).
    """

    def __init__(
        self,
        url: str,
        releases: Path | None = None,
        *,
        clock: Callable[[], datetime] = _now,
        after: Callable[[str], None] = _nothing,
    ) -> None:
        self._engine = open_engine(url)
        self._releases = releases
        self._clock = clock
        self._after = after
        with self._translated():
            open_tables(self._engine, releases, after)

    def close(self) -> None:
        """Give the database connections back."""
        self._engine.dispose()

    @contextmanager
    def work(self) -> Iterator[Work]:
        """A transaction that may change things; leaving it without `commit()` undoes all."""
        with self._session(writes=True) as session:
            yield Work(session, self._releases, self._clock, self._after)

    @contextmanager
    def look(self) -> Iterator[Work]:
        """A consistent view for reading; it never waits for a writer."""
        with self._session(writes=False) as session:
            yield Work(session, self._releases, self._clock, self._after)

    def add(self, manifest: Manifest, folder: Path) -> Release:
        """`Work.add` in a transaction of its own."""
        with self.work() as work:
            release = work.add(manifest, folder)
            work.commit()
        return release

    def get(self, name: str) -> Release:
        """The release called `name`, or NotFoundError."""
        with self.look() as work:
            return work.get(name)

    def list(self) -> tuple[Release, ...]:
        """All releases that were not deleted, oldest first."""
        with self.look() as work:
            return work.list()

    def registered(self, name: str, model_version: str) -> None:
        """`Work.registered` in a transaction of its own."""
        with self.work() as work:
            work.registered(name, model_version)
            work.commit()

    def delete(self, name: str) -> Release:
        """`Work.delete` in a transaction of its own."""
        with self.work() as work:
            release = work.delete(name)
            work.commit()
        return release

    def champion(self) -> Champion:
        """The live release."""
        with self.look() as work:
            return work.champion()

    def challenger(self) -> str | None:
        """`Work.challenger`."""
        with self.look() as work:
            return work.challenger()

    def judged(self, challenger: str, champion: str | None, passed: bool, verdict: Mapping[str, Any]) -> GateRecord:
        """`Work.judged` in a transaction of its own."""
        with self.work() as work:
            gate = work.judged(challenger, champion, passed, verdict)
            work.commit()
        return gate

    def gates(self, challenger: str) -> tuple[GateRecord, ...]:
        """Every verdict on `challenger`, oldest first."""
        with self.look() as work:
            return work.gates(challenger)

    def promote(
        self,
        name: str,
        *,
        expected: str | None,
        who: str,
        why: str,
        gate: int | None = None,
        version: int | None = None,
        forced: bool = False,
    ) -> Promotion:
        """`Work.promote` in a transaction of its own."""
        with self.work() as work:
            promotion = work.promote(name, expected=expected, who=who, why=why, gate=gate, version=version, forced=forced)
            work.commit()
        return promotion

    def rollback(
        self, to: str | None = None, *, expected: str | None, who: str, why: str, version: int | None = None
    ) -> Promotion:
        """`Work.rollback` in a transaction of its own."""
        with self.work() as work:
            promotion = work.rollback(to, expected=expected, who=who, why=why, version=version)
            work.commit()
        return promotion

    def previous(self) -> str:
        """The release that a rollback would go back to, or NotFoundError."""
        with self.look() as work:
            return work.previous()

    def history(self) -> tuple[Promotion, ...]:
        """Every promotion and rollback, oldest first."""
        with self.look() as work:
            return work.history()

    def champion_at(self, moment: datetime) -> str | None:
        """Which release was live at `moment`, or None when none was."""
        with self.look() as work:
            return work.champion_at(moment)

    def pinned(self, before: int = 2) -> tuple[str, ...]:
        """The champion and the `before` champions ahead of it."""
        with self.look() as work:
            return work.pinned(before)

    @contextmanager
    def _session(self, *, writes: bool) -> Iterator[Session]:
        bind = self._engine.execution_options(writes=writes)
        with self._translated(), Session(bind, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """The database's own troubles in our words, without its password."""
        where = self._engine.url.render_as_string(hide_password=True)
        try:
            yield
        except OperationalError as error:
            if "locked" in str(error.orig):
                raise BusyError(f"{where} is locked by another writer for {BUSY_MILLISECONDS // 1000} s; try again") from error
            raise UnavailableError(f"{where} does not answer ({_first_line(error)}); start it, or correct its address") from error


def _first_line(error: DBAPIError) -> str:
    return (str(error.orig).strip() or type(error.orig).__name__).splitlines()[0]
