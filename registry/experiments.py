"""The open experiment, and all that were: which challenger runs beside the champion, for which share of the users, how it ended.

In: names of releases and people, and reasons. Out: frozen records. One experiment is open at a time: the single row of `rollout`
says which, and only a compare-and-set changes it, so of many that end an experiment exactly one does.

    with store.work() as work:
        stage = work.start_experiment("b", "canary", 5, who="ada", why="new towers")
        work.commit()
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, get_args

from sqlalchemy import CursorResult, func, select, update
from sqlalchemy.orm import Session

from registry.tables import ExperimentChangeRow, ExperimentRow, RolloutRow
from tandem.core.errors import ConflictError, InputError, NotFoundError

ExperimentKind = Literal["shadow", "canary", "ab"]
"""shadow: nobody sees the challenger. canary: some do, and more when it holds. ab: fixed shares, to be compared."""

Outcome = Literal["won", "stopped", "guardrail", "lost", "overtaken"]
"""won: promoted. stopped: by a person. guardrail: by a service. lost: its outcome fell. overtaken: another champion came."""

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Experiment:
    """`challenger` beside `champion`, the one that was live at the start. `name` salts who is in which arm."""

    number: int
    name: str
    kind: ExperimentKind
    challenger: str
    champion: str


@dataclass(frozen=True)
class Stage:
    """The open experiment since its last change, which is change `number` of all experiments; `percent` is in (0, 100]."""

    experiment: Experiment
    percent: float
    number: int


@dataclass(frozen=True)
class ExperimentChange:
    """One line of an experiment's history; `outcome` stands in the last one, the end."""

    version: int
    kind: Literal["start", "set", "end"]
    percent: float
    outcome: Outcome | None
    who: str
    why: str
    at: datetime


@dataclass(frozen=True)
class ExperimentStory:
    """An experiment with all its changes, oldest first."""

    experiment: Experiment
    changes: tuple[ExperimentChange, ...]

    @property
    def ended(self) -> ExperimentChange | None:
        """Its end, or None while it is open."""
        return self.changes[-1] if self.changes[-1].kind == "end" else None

    @property
    def last_stage(self) -> ExperimentChange:
        """The start, or the last change of the percentage: what is compared is what was served since then."""
        return next(change for change in reversed(self.changes) if change.kind != "end")


class Experiments:
    """The experiments' part of a unit of work: nothing lasts until `Work.commit()`."""

    def __init__(self, session: Session, clock: Callable[[], datetime]) -> None:
        self._session, self._clock = session, clock

    def open(self, *, held: bool = False) -> Stage | None:
        """The experiment that is open, or None. `held`: it stays so until this transaction ends."""
        row = self._rollout(lock=held)
        return None if row.experiment is None else Stage(self._experiment(row.experiment), row.percent, row.version)

    def stories(self) -> tuple[ExperimentStory, ...]:
        """All experiments, oldest first."""
        return tuple(self._story(row) for row in self._session.scalars(select(ExperimentRow).order_by(ExperimentRow.number)))

    def story(self, name: str | None = None) -> ExperimentStory:
        """The experiment called `name`, else the newest one. NotFoundError where there is none."""
        wanted = select(ExperimentRow).order_by(ExperimentRow.number.desc()).limit(1)
        row = self._session.scalar(wanted if name is None else wanted.where(ExperimentRow.name == name))
        if row is None:
            which = "no experiment yet" if name is None else f"no experiment {name[:80]!r}; see `tandem experiment list`"
            raise NotFoundError(f"{which}; start one: tandem experiment start RELEASE")
        return self._story(row)

    def start(
        self, challenger: str, champion: str, kind: ExperimentKind, percent: float, name: str | None, who: str, why: str
    ) -> Stage:
        """Open one; for `Work.start_experiment`, which holds the champion meanwhile. ConflictError names one that is open."""
        check_said(who, why, "an experiment")
        running = self.open(held=True)
        if running is not None:
            raise ConflictError(f"{self._told(running)}; end it first: tandem experiment stop, or promote its challenger")
        number = (self._session.scalar(select(func.max(ExperimentRow.number))) or 0) + 1
        called = self._checked_name(name or f"{challenger[:52]}-{kind}-{number}")
        self._session.add(ExperimentRow(number=number, name=called, kind=kind, challenger=challenger, champion=champion))
        self._session.flush()
        version = self._compare_and_set(None, number, _checked_percent(percent))
        self._note(number, version, "start", percent, None, who, why)
        return Stage(self._experiment(number), percent, version)

    def set_percent(self, percent: float, who: str, why: str) -> Stage:
        """Give the open experiment's challenger another share; who is in it stays in when the share grows.

        Raises NotFoundError where none is open, InputError for an A/B test: its arms are compared from its start.
        """
        check_said(who, why, "another percentage")
        running = self.open(held=True)
        if running is None:
            raise NotFoundError("no experiment is open; start one: tandem experiment start RELEASE")
        if running.experiment.kind == "ab":
            raise InputError(
                f"{running.experiment.name!r} is an A/B test, whose shares stay as they are; stop it and start another one"
            )
        number = running.experiment.number
        version = self._compare_and_set(number, number, _checked_percent(percent))
        self._note(number, version, "set", percent, None, who, why)
        return Stage(running.experiment, percent, version)

    def end(self, number: int, outcome: Outcome, who: str, why: str) -> ExperimentChange:
        """End experiment `number`, which must be the open one; ConflictError says who was faster."""
        check_said(who, why, "the end of an experiment")
        percent = self._rollout(lock=True).percent
        version = self._compare_and_set(number, None, 0.0)
        return _change(self._note(number, version, "end", percent, outcome, who, why))

    def champion_changed(self, name: str, who: str, why: str) -> None:
        """End what is open, since another release is live now: won where that is the challenger, else overtaken."""
        running = self.open(held=True)
        if running is not None:
            won = running.experiment.challenger == name
            self.end(running.experiment.number, "won" if won else "overtaken", who, why)

    def uses(self, release: str) -> Stage | None:
        """The open experiment if `release` is in it: then it must stay."""
        running = self.open(held=True)
        return running if running and release in (running.experiment.challenger, running.experiment.champion) else None

    def _compare_and_set(self, expected: int | None, experiment: int | None, percent: float) -> int:
        """The one statement that decides; gives the new version, or raises ConflictError naming what came before."""
        change = update(RolloutRow).where(RolloutRow.id == 1, RolloutRow.experiment.is_not_distinct_from(expected))
        change = change.values(experiment=experiment, percent=percent, version=RolloutRow.version + 1)
        result = self._session.execute(change, execution_options={"synchronize_session": False})
        assert isinstance(result, CursorResult)
        if result.rowcount != 1:
            raise self._lost(expected)
        return self._rollout().version

    def _lost(self, expected: int | None) -> ConflictError:
        last = self._session.get(ExperimentChangeRow, self._rollout().version)
        before = f"{last.kind} by {last.who} at {_at(last.at)}: {last.why}" if last else "nothing was ever open"
        return ConflictError(f"experiment {expected} is not open (any more); last change: {before}")

    def _note(
        self, number: int, version: int, kind: str, percent: float, outcome: str | None, who: str, why: str
    ) -> ExperimentChangeRow:
        last = self._session.get(ExperimentChangeRow, version - 1)
        now = self._clock()
        at = now if last is None else max(now, last.at + timedelta(microseconds=1))  # clocks of two machines differ
        row = ExperimentChangeRow(
            version=version, experiment=number, kind=kind, percent=percent, outcome=outcome, who=who[:256], why=why, at=at
        )
        self._session.add(row)
        self._session.flush()
        return row

    def _checked_name(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise InputError(f"experiment name {name[:80]!r} must be 1-64 of a-z 0-9 . _ -, and begin with a letter or digit")
        if self._session.scalar(select(ExperimentRow.number).where(ExperimentRow.name == name)):
            raise ConflictError(f"there was an experiment {name!r} already, and its name placed its users; choose another name")
        return name

    def _told(self, stage: Stage) -> str:
        own, first = stage.experiment, self._story(self._session.get_one(ExperimentRow, stage.experiment.number)).changes[0]
        return (
            f"experiment {own.name!r} ({own.kind} of {own.challenger!r}, {stage.percent:g}%) is open "
            f"since {_at(first.at)} by {first.who}"
        )

    def _story(self, row: ExperimentRow) -> ExperimentStory:
        changes = select(ExperimentChangeRow).where(ExperimentChangeRow.experiment == row.number)
        lines = self._session.scalars(changes.order_by(ExperimentChangeRow.version))
        return ExperimentStory(self._experiment(row.number), tuple(_change(line) for line in lines))

    def _experiment(self, number: int) -> Experiment:
        row = self._session.get_one(ExperimentRow, number)
        return Experiment(row.number, row.name, check_kind(row.kind), row.challenger, row.champion)

    def _rollout(self, *, lock: bool = False) -> RolloutRow:
        return self._session.get_one(RolloutRow, 1, with_for_update=lock or None, populate_existing=True)


def check_kind(kind: str) -> ExperimentKind:
    """`kind`, or InputError with those that there are."""
    for known in get_args(ExperimentKind):
        if kind == known:
            return known  # type: ignore[no-any-return]
    raise InputError(f"no kind of experiment {kind[:40]!r}; there are {list(get_args(ExperimentKind))}")


def check_said(who: str, why: str, what: str) -> None:
    """Raise InputError unless history can say who did it, and why."""
    for value, name in ((who, "who"), (why, "why")):
        if not value.strip():
            raise InputError(f"{what} needs {name}: the history must say it{' (--because)' if name == 'why' else ''}")


def _checked_percent(percent: float) -> float:
    if not (math.isfinite(percent) and 0 < percent <= 100):
        raise InputError(f"percent = {percent}; it must be above 0 and at most 100 (to end it: tandem experiment stop)")
    return float(percent)


def _change(row: ExperimentChangeRow) -> ExperimentChange:
    values: dict[str, Any] = {name: getattr(row, name) for name in ("version", "kind", "percent", "outcome", "who", "why", "at")}
    return ExperimentChange(**values)


def _at(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
