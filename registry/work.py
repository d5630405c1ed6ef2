"""One transaction on the registry: what may be asked and changed, and by which rules.

In: names, manifests, verdicts, people and their reasons. Out: frozen records. A promotion is one row flipped by compare-and-set:
whoever expects another champion than the live one loses, and is told to whom.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

from sqlalchemy import CursorResult, exists, select, update
from sqlalchemy.orm import Session

from registry.experiments import ExperimentKind, Experiments, Stage, check_said
from registry.places import located, stored
from registry.release import Manifest
from registry.tables import ChampionRow, GateRow, PromotionRow, ReleaseRow
from registry.traffic import Traffic
from tandem.core.errors import ConflictError, GateRefusedError, InputError, NotFoundError

ADD_STEPS: Final = ("added", "committed")
"""Moments in remembering a release that `after` is told of: a crash before `committed` leaves it unknown, its folder whole."""

PROMOTE_STEPS: Final = ("begun", "checked", "flipped", "recorded", "committed")
"""Moments in a promotion that `after` is told of: a crash before `committed` leaves the old champion, a later one the new."""


@dataclass(frozen=True)
class Release:
    """A release that the registry knows. `model_version` is its version in MLflow, once it has one."""

    name: str
    content_hash: str
    folder: Path
    created_at: datetime
    manifest: Manifest
    model_version: str | None = None


@dataclass(frozen=True)
class Champion:
    """The live release. `version` goes up by one at every promotion and rollback; 0 and no name: nothing was ever live."""

    name: str | None
    version: int
    since: datetime | None


@dataclass(frozen=True)
class GateRecord:
    """A verdict as it was stored."""

    number: int
    challenger: str
    champion: str | None
    passed: bool
    verdict: Mapping[str, Any]
    judged_at: datetime


@dataclass(frozen=True)
class Promotion:
    """One line of history: who made which release live, instead of which, when, why, and by which gate.

    `kind`: "promote", "forced" (the gate had refused) or "rollback".
    """

    version: int
    kind: str
    previous: str | None
    name: str
    who: str
    why: str
    at: datetime
    gate: int | None


class Work:
    """One transaction on the registry. Nothing lasts until `commit()`."""

    def __init__(
        self, session: Session, releases: Path | None, clock: Callable[[], datetime], after: Callable[[str], None]
    ) -> None:
        self._session = session
        self._releases = releases
        self._clock = clock
        self._after = after
        self.experiments = Experiments(session, clock)
        self.traffic = Traffic(session)

    def commit(self) -> None:
        """Make everything done so far last, at once."""
        self._session.commit()
        self._after("committed")

    def add(self, manifest: Manifest, folder: Path) -> Release:
        """Remember a release. The same one again is fine; a name used for other content, or deleted, raises ConflictError.

        IncompatibleError for a manifest of another schema: only what this Tandem can load is taken in.
        """
        Manifest.from_dict(manifest.to_dict(), manifest.name)
        row = self._session.get(ReleaseRow, manifest.name)
        if row is None:
            row = ReleaseRow(
                name=manifest.name,
                content_hash=manifest.content_hash,
                folder=stored(folder, self._releases),
                manifest=manifest.to_dict(),
                created_at=self._clock(),
            )
            self._session.add(row)
            self._session.flush()
            self._after("added")
        elif row.deleted_at is not None or row.content_hash != manifest.content_hash:
            raise ConflictError(
                f"the name {manifest.name!r} belongs to another release (content {row.content_hash[:12]}"
                f"{', deleted' if row.deleted_at else ''}); names are never reused: choose another"
            )
        return self._release(row)

    def get(self, name: str) -> Release:
        """The release called `name`, or NotFoundError."""
        return self._release(self._row(name))

    def recall(self, name: str) -> tuple[Release, datetime | None]:
        """The release called `name`, deleted or not, and when it was deleted; NotFoundError where there never was one."""
        row = self._session.get(ReleaseRow, name)
        return (self._release(row), row.deleted_at) if row is not None else (self.get(name), None)

    def list(self) -> tuple[Release, ...]:
        """All releases that were not deleted, oldest first."""
        rows = select(ReleaseRow).where(ReleaseRow.deleted_at.is_(None)).order_by(ReleaseRow.created_at, ReleaseRow.name)
        return tuple(self._release(row) for row in self._session.scalars(rows))

    def registered(self, name: str, model_version: str) -> None:
        """Note under which MLflow model version a release is registered."""
        self._row(name).model_version = model_version
        self._session.flush()

    def delete(self, name: str) -> Release:
        """Forget a release; its history stays. Remove the folder after the commit: `retention.py` does both.

        ConflictError for the live one, for those that a rollback may need (`pinned`), and for one in the open experiment.
        """
        champion = self.champion(held=True)
        if champion.name == name:
            raise ConflictError(f"release {name!r} is live since {_at(champion.since)}; promote or roll back to another first")
        if name in self.pinned():
            raise ConflictError(f"release {name!r} was live just before {champion.name!r}, and a rollback may need it; keep it")
        if (stage := self.experiments.uses(name)) is not None:
            raise ConflictError(f"release {name!r} is in the open experiment {stage.experiment.name!r}; stop that one first")
        row = self._row(name)
        row.deleted_at = self._clock()
        self._session.flush()
        self._after("marked")  # see retention.DELETE_STEPS
        return self._release(row)

    def deleted(self) -> tuple[Release, ...]:
        """All releases that were deleted, oldest first."""
        rows = select(ReleaseRow).where(ReleaseRow.deleted_at.is_not(None)).order_by(ReleaseRow.created_at, ReleaseRow.name)
        return tuple(self._release(row) for row in self._session.scalars(rows))

    def start_experiment(
        self, challenger: str, kind: ExperimentKind, percent: float, *, who: str, why: str, name: str | None = None
    ) -> Stage:
        """Let `challenger` answer beside the champion, for `percent` of the users; the name is made up unless given.

        Raises ConflictError when an experiment is open or the name was used, InputError without a champion or for itself.
        """
        champion = self.champion(held=True)
        if champion.name is None or champion.name == challenger:
            live = "nothing is live" if champion.name is None else f"{challenger!r} is live itself"
            raise InputError(f"an experiment needs a champion and another release, but {live}")
        self._row(challenger)
        return self.experiments.start(challenger, champion.name, kind, percent, name, who, why)

    def champion(self, *, held: bool = False) -> Champion:
        """The live release. `held`: it stays the live one until this transaction ends."""
        row = self._champion_row(lock=held)
        return Champion(row.name, row.version, row.since)

    def challenger(self) -> str | None:
        """The release that last passed a gate against the live one and still waits, or None."""
        live = self._champion_row().name
        went_live = exists().where(PromotionRow.name == GateRow.challenger, PromotionRow.at > GateRow.judged_at)
        passed = (
            select(GateRow.challenger)
            .join(ReleaseRow, ReleaseRow.name == GateRow.challenger)
            .where(GateRow.passed, GateRow.champion.is_not_distinct_from(live), GateRow.challenger.is_distinct_from(live))
            .where(ReleaseRow.deleted_at.is_(None), ~went_live)
        )
        return self._session.scalar(passed.order_by(GateRow.number.desc()).limit(1))

    def judged(self, challenger: str, champion: str | None, passed: bool, verdict: Mapping[str, Any]) -> GateRecord:
        """Store what a gate said of `challenger` against `champion`."""
        self._row(challenger)
        row = GateRow(challenger=challenger, champion=champion, passed=passed, verdict=dict(verdict), judged_at=self._clock())
        self._session.add(row)
        self._session.flush()
        return _gate(row)

    def gate(self, number: int) -> GateRecord:
        """The verdict numbered `number`, or NotFoundError."""
        row = self._session.get(GateRow, number)
        if row is None:
            raise NotFoundError(f"no gate {number}; see `tandem release history`")
        return _gate(row)

    def gates(self, challenger: str) -> tuple[GateRecord, ...]:
        """Every verdict on `challenger`, oldest first."""
        rows = select(GateRow).where(GateRow.challenger == challenger).order_by(GateRow.number)
        return tuple(_gate(row) for row in self._session.scalars(rows))

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
        """Make `name` live instead of `expected` (None: nothing is live yet).

        `gate` is the number of the verdict that allows it; `forced` takes one that refused, and history says so. `version`, where
        given, must be the champion's too, so that a champion that went and came back is noticed. Raises ConflictError naming the
        winner when another champion is live, GateRefusedError when the verdict said no, NotFoundError for an unknown release.
        """
        self._after("begun")
        if gate is not None:
            self._check_gate(gate, name, expected, forced)
        return self._flip("forced" if forced else "promote", name, expected, version, who, why, gate)

    def rollback(
        self, to: str | None = None, *, expected: str | None, who: str, why: str, version: int | None = None
    ) -> Promotion:
        """Go back to `to`, or to the champion before `expected`; twice goes back twice. Needs no gate: it was live before.

        `version`, where given, must be the champion's too: of many that go back from the same promotion, one does.

        Raises ConflictError when `expected` is not live, NotFoundError when there is nothing to go back to, InputError when `to`
        was never live.
        """
        self._after("begun")
        live = self._champion_row(lock=True)
        if version not in (None, live.version):
            raise ConflictError(
                f"the promotion of {expected!r} that was to be undone (change {version}) is over: {live.name!r} is live since "
                f"{_at(live.since)} (change {live.version})"
            )
        if to is None:
            to = self.previous()
        elif to not in {line.name for line in self.history()}:
            raise InputError(f"release {to!r} was never live, so there is no going back to it; use `tandem release promote {to}`")
        return self._flip("rollback", to, expected, version, who, why, None)

    def previous(self) -> str:
        """The release that a rollback would go back to, or NotFoundError. Verify its folder before going there."""
        for name in reversed(_trail(self.history())[:-1]):
            if self._lives(name):
                return name
        raise NotFoundError("no champion before this one is left to go back to; see `tandem release history`")

    def history(self) -> tuple[Promotion, ...]:
        """Every promotion and rollback, oldest first."""
        return tuple(_promotion(row) for row in self._session.scalars(select(PromotionRow).order_by(PromotionRow.version)))

    def change_at(self, moment: datetime) -> Promotion | None:
        """The change that made live what was live at `moment`, or None when nothing was."""
        lines = select(PromotionRow).where(PromotionRow.at <= moment).order_by(PromotionRow.version.desc()).limit(1)
        row = self._session.scalar(lines)
        return None if row is None else _promotion(row)

    def champion_at(self, moment: datetime) -> str | None:
        """Which release was live at `moment`, or None when none was."""
        change = self.change_at(moment)
        return None if change is None else change.name

    def change_after(self, version: int) -> Promotion | None:
        """The change that followed the one numbered `version`, or None while that one lasts."""
        row = self._session.get(PromotionRow, version + 1)
        return None if row is None else _promotion(row)

    def pinned(self, before: int = 2) -> tuple[str, ...]:
        """The champion and the `before` champions ahead of it: their feature views must stay, so that a rollback finds them."""
        kept = [name for name in reversed(_trail(self.history())) if self._lives(name)]
        return tuple(kept[: before + 1])

    def _flip(
        self, kind: str, name: str, expected: str | None, version: int | None, who: str, why: str, gate: int | None
    ) -> Promotion:
        check_said(who, why, f"{kind} of {name!r}")
        before = self._champion_row(lock=True)  # from here on no other flip and no delete comes between
        self._row(name)
        self._after("checked")
        at = self._later_than(before.since)
        if name == before.name or not self._compare_and_set(name, expected, version, at):
            raise self._lost(name, expected)
        self._after("flipped")
        self._session.expire_all()
        row = PromotionRow(
            version=self._champion_row().version, kind=kind, previous=expected, name=name, who=who, why=why, at=at, gate=gate
        )
        self._session.add(row)
        self._session.flush()
        self.experiments.champion_changed(name, who, why)
        self._after("recorded")
        return _promotion(row)

    def _compare_and_set(self, name: str, expected: str | None, version: int | None, at: datetime) -> bool:
        """The one statement that decides: true for exactly one caller per expected champion."""
        flip = update(ChampionRow).where(ChampionRow.id == 1, ChampionRow.name.is_not_distinct_from(expected))
        if version is not None:
            flip = flip.where(ChampionRow.version == version)
        flip = flip.values(name=name, version=ChampionRow.version + 1, since=at)
        result = self._session.execute(flip, execution_options={"synchronize_session": False})
        assert isinstance(result, CursorResult)
        return result.rowcount == 1

    def _lost(self, name: str, expected: str | None) -> ConflictError:
        self._session.expire_all()
        live = self._champion_row()
        last = self._session.get(PromotionRow, live.version)
        by = f" by {last.who}" if last else ""
        if live.name is None:
            return ConflictError(f"{name!r} was to replace {expected!r}, but nothing is live; expect no champion")
        if live.name == name:
            return ConflictError(f"{name!r} is live already, since {_at(live.since)}{by}")
        if live.name == expected:
            return ConflictError(
                f"{name!r} was judged against {expected!r} before it went and came back at {_at(live.since)}{by} "
                f"(change {live.version}); judge it again"
            )
        return ConflictError(
            f"{name!r} was to replace {expected or 'nothing'}, but {live.name!r} is live since {_at(live.since)}{by} "
            f"(change {live.version}); compare with it and try again"
        )

    def _check_gate(self, number: int, name: str, expected: str | None, forced: bool) -> None:
        row = self._session.get(GateRow, number)
        if row is None or row.challenger != name:
            raise NotFoundError(f"no gate {number} on release {name!r}; run `tandem release gate {name}`")
        if not row.passed and not forced:
            raise GateRefusedError(f"gate {number} refused release {name!r}: {'; '.join(row.verdict.get('sentences', []))}")
        if row.champion != expected:
            raise ConflictError(
                f"gate {number} compared {name!r} with {row.champion or 'nothing'}, not with {expected or 'nothing'}; "
                f"run `tandem release gate {name}` again"
            )

    def _lives(self, name: str) -> bool:
        row = self._session.get(ReleaseRow, name)
        return row is not None and row.deleted_at is None

    def _release(self, row: ReleaseRow) -> Release:
        folder, manifest = located(row.folder, self._releases), Manifest.recorded(row.manifest, row.name)
        return Release(row.name, row.content_hash, folder, row.created_at, manifest, row.model_version)

    def _row(self, name: str) -> ReleaseRow:
        row = self._session.get(ReleaseRow, name, populate_existing=True)
        if row is None or row.deleted_at is not None:
            gone = f" (deleted {_at(row.deleted_at)})" if row is not None else ""
            raise NotFoundError(f"no release {name[:80]!r}{gone}; see `tandem release list`")
        return row

    def _champion_row(self, *, lock: bool = False) -> ChampionRow:
        return self._session.get_one(ChampionRow, 1, with_for_update=lock or None, populate_existing=True)

    def _later_than(self, since: datetime | None) -> datetime:
        """Now, but never before the last flip: clocks of two machines differ, the order of history may not."""
        now = self._clock()
        return now if since is None else max(now, since + timedelta(microseconds=1))


def _trail(history: tuple[Promotion, ...]) -> list[str]:
    """The champions one would walk back through, oldest first: a rollback cuts the trail back to where it went."""
    trail: list[str] = []
    for line in history:
        if line.kind == "rollback" and line.name in trail:
            del trail[len(trail) - trail[::-1].index(line.name) :]
        else:
            trail.append(line.name)
    return trail


def _gate(row: GateRow) -> GateRecord:
    return GateRecord(row.number, row.challenger, row.champion, row.passed, row.verdict, row.judged_at)


def _promotion(row: PromotionRow) -> Promotion:
    return Promotion(row.version, row.kind, row.previous, row.name, row.who, row.why, row.at, row.gate)


def _at(moment: datetime | None) -> str:
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC") if moment else "never"
