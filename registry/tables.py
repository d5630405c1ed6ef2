"""The tables in which the registry remembers: releases, gates, promotions, experiments, the one champion, the open experiment.

`champion` has a single row: flipping it is the promotion. `rollout` has a single row: the experiment that is open. `traffic`
counts what running services answered lately. All else is history, and is only ever added to. A change here needs a step in
`migrations/versions/`; a test compares the two.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import JSON, CheckConstraint, DateTime, Dialect, ForeignKey, String, Text, TypeDecorator
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

TABLES_VERSION: Final = 3
"""Version of these tables: the newest step in `migrations/versions/`."""


class UtcTime(TypeDecorator[datetime]):
    """A moment with its zone, kept in UTC. SQLite forgets zones, so they are put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError(f"{value} has no time zone; pass one in UTC")
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Parent of all tables of the registry."""

    type_annotation_map = {datetime: UtcTime(), dict[str, Any]: JSON()}  # noqa: RUF012


class TablesRow(Base):
    """One row: which version of the tables this database has. Every Tandem reads it first, whatever else has changed."""

    __tablename__ = "tandem_tables"
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class ReleaseRow(Base):
    """A release that exists, or existed: a deleted one keeps its row, so that history stays whole and its name is not reused.

    `folder` is relative to the workspace's releases folder where it lies inside, see `places.py`.
    """

    __tablename__ = "releases"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    content_hash: Mapped[str] = mapped_column(String(64))
    folder: Mapped[str] = mapped_column(Text)
    manifest: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
    model_version: Mapped[str | None] = mapped_column(String(64))
    deleted_at: Mapped[datetime | None]


class GateRow(Base):
    """What a gate said of a challenger, against which champion."""

    __tablename__ = "gates"
    number: Mapped[int] = mapped_column(primary_key=True)
    challenger: Mapped[str] = mapped_column(ForeignKey("releases.name"), index=True)
    champion: Mapped[str | None] = mapped_column(ForeignKey("releases.name"))
    passed: Mapped[bool]
    verdict: Mapped[dict[str, Any]]
    judged_at: Mapped[datetime]


class PromotionRow(Base):
    """One flip of the champion. `version` is the champion's counter after it, so no flip can be missing or told twice."""

    __tablename__ = "promotions"
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(16))
    previous: Mapped[str | None] = mapped_column(ForeignKey("releases.name"))
    name: Mapped[str] = mapped_column(ForeignKey("releases.name"))
    who: Mapped[str] = mapped_column(String(256))
    why: Mapped[str] = mapped_column(Text)
    at: Mapped[datetime]
    gate: Mapped[int | None] = mapped_column(ForeignKey("gates.number"))


class ChampionRow(Base):
    """The single row that says which release is live."""

    __tablename__ = "champion"
    __table_args__ = (CheckConstraint("id = 1", name="champion_is_one_row"),)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str | None] = mapped_column(ForeignKey("releases.name"))
    version: Mapped[int]
    since: Mapped[datetime | None]


class ExperimentRow(Base):
    """An experiment that is open, or was. Its name salts who is in which arm, so it is never used twice."""

    __tablename__ = "rollout_experiments"
    number: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    kind: Mapped[str] = mapped_column(String(16))
    challenger: Mapped[str] = mapped_column(ForeignKey("releases.name"))
    champion: Mapped[str] = mapped_column(ForeignKey("releases.name"))


class ExperimentChangeRow(Base):
    """A start, another percentage, or an end. `version` is the rollout's counter after it, so none is missing or told twice."""

    __tablename__ = "experiment_changes"
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    experiment: Mapped[int] = mapped_column(ForeignKey("rollout_experiments.number"), index=True)
    kind: Mapped[str] = mapped_column(String(16))
    percent: Mapped[float]
    outcome: Mapped[str | None] = mapped_column(String(16))
    who: Mapped[str] = mapped_column(String(256))
    why: Mapped[str] = mapped_column(Text)
    at: Mapped[datetime]


class RolloutRow(Base):
    """The single row that says which experiment is open, and for which share of the users."""

    __tablename__ = "rollout"
    __table_args__ = (CheckConstraint("id = 1", name="rollout_is_one_row"),)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    experiment: Mapped[int | None] = mapped_column(ForeignKey("rollout_experiments.number"))
    percent: Mapped[float]
    version: Mapped[int]


class TrafficRow(Base):
    """What one process answered in ten seconds (`slot`; 0: all of an experiment), under which change of champion, in which arm.

    `experiment` 0: outside of any. `latency`: requests by bin of their time, see `traffic.py`. Old slots are deleted.
    """

    __tablename__ = "traffic"
    process: Mapped[str] = mapped_column(String(32), primary_key=True)
    slot: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    champion: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    experiment: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    arm: Mapped[str] = mapped_column(String(16), primary_key=True)
    requests: Mapped[int]
    failed: Mapped[int]
    degraded: Mapped[int]
    dropped: Mapped[int]
    latency: Mapped[dict[str, Any]]
