"""What was served against a small table by hand: every kind of verdict has its case."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from feature_repo.checks import CheckResult
from feature_repo.online import UserRow
from feature_repo.replay import ONLINE_LAG, features_read, replay_items, replay_users, shown
from feature_repo.served import SERVED, view_versions
from feature_repo.views import ViewSchema
from tandem.core.schema import TIME

START = datetime(2026, 11, 1, tzinfo=UTC)
NAMES = ("events", "items")


def at(hours: float) -> datetime:
    return START + timedelta(hours=hours)


class Plane:
    """A workspace of one user and one item view; rows (entity, hour, events, items) come in parts written at some hour."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, dict[str, list[tuple[Any, ...]]]()
        self.views = [ViewSchema.of_table(f"{kind}_v", kind, self._table(kind, []), version=2) for kind in ("user", "item")]
        self.add("user", -1, ("ann", 1, 1, ["x"]), ("ann", 5, 2, ["x", "y"]), ("bob", 2, 7, []))
        self.add("item", -1, ("x", 1, 10, ["n"]), ("x", 4, 11, ["n"]), ("x", 6, 12, ["n"]))

    def add(self, kind: str, written: float, *rows: tuple[Any, ...]) -> None:
        self.rows[kind] = self.rows.get(kind, []) + list(rows)
        folder = self.folder / "features" / f"{kind}_v.parquet"
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"part-{len(list(folder.iterdir()))}.parquet"
        self._table(kind, list(rows)).write_parquet(part)
        os.utime(part, (at(written).timestamp(), at(written).timestamp()))

    def as_of(self, asked: pl.DataFrame, view: str) -> pl.DataFrame:
        """By plain loops: the last row before each question."""
        answers = []
        for entity, moment in asked.iter_rows():
            known = sorted(
                (row for row in self.rows[view[:4]] if row[0] == entity and at(row[1]) < moment), key=lambda row: row[1]
            )
            answers.append((entity, moment, *(known[-1][2:] if known else (None, None))))
        return self._table(view[:4], answers)

    def _table(self, kind: str, rows: list[tuple[Any, ...]]) -> pl.DataFrame:
        schema = {f"{kind}_id": pl.String(), "event_timestamp": TIME, "events": pl.Int64(), "items": pl.List(pl.String())}
        moments = [(row[0], row[1] if isinstance(row[1], datetime) else at(row[1]), *row[2:]) for row in rows]
        return pl.DataFrame(moments, schema=schema, orient="row")

    def users(self, *slates: dict[str, Any]) -> CheckResult:
        return replay_users(log(*slates), self.views, self.folder, self.as_of)

    def items(self, *slates: dict[str, Any]) -> CheckResult:
        return replay_items(log(*slates), self.views, self.folder, self.as_of)


@pytest.fixture
def plane(tmp_path: Path) -> Plane:
    return Plane(tmp_path)


def log(*slates: dict[str, Any]) -> pl.DataFrame:
    rows = [{"request_id": f"r{number}", "position": 1, **slate} for number, slate in enumerate(slates)]
    return pl.DataFrame(rows, schema=SERVED)


def slate(
    when: float, user: str | None = "ann", events: float | None = None, items: list[str] | None = None, **other: Any
) -> dict[str, Any]:
    """A slate at hour `when` whose user was read as of hour `read`, and whose item as of `item_as_of` had `item_events`."""
    read, version = other.get("read"), other.get("version", 2)
    row = UserRow({"events": events, "items": items}, {"user_v": None if read is None else at(read)}, {"user_v": NAMES})
    item = None if "item_events" not in other else {"events": float(other["item_events"])}
    return {
        "user_id": user, "item_id": "x", "timestamp": at(when),
        "view_versions": view_versions({"user_v": version, "item_v": version}),
        "features_read": features_read(row if user and "gone" not in other else None, at(other.get("item_as_of", 0)), item),
    }  # fmt: skip


def kinds(result: CheckResult) -> list[tuple[str, ...]]:
    return result.table.select("request_id", "feature", "served", "expected", "kind").rows()


def test_values_are_kept_short() -> None:
    assert [shown(value) for value in (None, float("nan"), 3, 0.25)] == [None, None, 3, 0.25]
    assert shown(["x", "y"]) == shown(["x", "y"]) != shown(["y", "x"])
    assert len(str(shown(["item"] * 100))) == len("100:00000000")


def test_the_row_of_the_moment_passes(plane: Plane) -> None:
    result = plane.users(slate(3, events=1, items=["x"], read=1), slate(5, events=2, items=["x", "y"], read=5), slate(9, "new"))
    assert (result.passed, result.rows, result.skipped) == (True, 3, 0)
    assert result.detail == "3 rows of 3 slates replayed; all equal"


def test_another_value_or_list_than_the_tables_fails(plane: Plane) -> None:
    result = plane.users(slate(3, events=4, items=["x"], read=1), slate(9, events=2, items=["y", "x"], read=5))
    assert not result.passed
    assert [(row[0], row[1], row[4]) for row in kinds(result)] == [("r0", "events", "differs"), ("r1", "items", "differs")]
    assert kinds(result)[0][2:4] == ("4", "1")
    assert "2 differ from the as-of join" in result.detail


def test_a_value_from_the_future_fails(plane: Plane) -> None:
    assert not plane.users(slate(3, events=2, items=["x", "y"], read=5)).passed


def test_a_row_that_clocks_put_a_little_ahead_passes(plane: Plane) -> None:
    assert plane.users(slate(5 - 1 / 60, events=2, items=["x", "y"], read=5)).passed


def test_a_row_that_was_long_replaced_or_missing_online_is_stale(plane: Plane) -> None:
    result = plane.users(slate(9, events=1, items=["x"], read=1), slate(9, "bob"))
    assert not result.passed
    assert "2 were older than what was known for 1 h" in result.detail
    assert {row[4] for row in kinds(result)} == {"stale"}


def test_what_came_into_the_table_after_the_slate_is_no_fault(plane: Plane) -> None:
    """A late event adds a row before the slate, and another one writes the served row itself anew."""
    plane.add("user", 10, ("ann", 8, 3, ["x", "y", "z"]))
    late = plane.users(slate(9, events=2, items=["x", "y"], read=5))
    assert (late.passed, kinds(late)[0][4]) == (True, "later")
    assert "1 cannot be judged, their rows were written after the slate" in late.detail
    assert plane.users(slate(10 + ONLINE_LAG / timedelta(hours=2), events=2, items=["x", "y"], read=5)).passed
    assert not plane.users(slate(12, events=2, items=["x", "y"], read=5)).passed
    plane.add("user", 10, ("bob", 2, 8, []))
    assert plane.users(slate(9, "bob", events=7, items=[], read=2)).passed


def test_what_cannot_be_replayed_is_counted(plane: Plane) -> None:
    """An older version, a store that did not answer, a slate of an older program; nobody's slate is no row."""
    old = slate(3, events=1, items=["x"], read=1, version=1)
    unread = slate(3, events=1, items=["x"], read=1) | {"features_read": None}
    result = plane.users(old, unread, slate(3, gone=True), slate(3, None))
    assert (result.passed, result.rows, result.skipped) == (True, 0, 3)
    for reason in (
        "user_v version 1 is no longer built",
        "no values were kept with the slate",
        "the online store did not answer",
    ):
        assert f"1 skipped: {reason}" in result.detail or f"1 skipped: user_v: {reason}" in result.detail
    assert plane.items(slate(3, version=1, item_events=10)).detail.endswith("1 skipped: item_v version 1 is no longer built")


def test_an_item_may_be_of_any_moment_since_its_snapshot(plane: Plane) -> None:
    """The snapshot's own row, a pushed one over it, the newest: all may have been read. An older or a newer one may not."""
    read = {"item_as_of": 2}
    for events in (10, 11, 12):
        assert plane.items(slate(7, item_events=events, **read)).passed
    newer = plane.items(slate(5, item_events=12, **read))
    assert not newer.passed
    assert kinds(newer) == [("r0", "events", "12.0", "10", "differs")]
    assert not plane.items(slate(7, item_events=10, item_as_of=4)).passed
    assert plane.items(slate(3, user=None)).skipped == 1


def test_an_incident_of_last_week_does_not_fail_for_ever(plane: Plane) -> None:
    wrong, right = slate(3, events=4, items=["x"], read=1), slate(3 + 24 * 8, events=2, items=["x", "y"], read=5)
    assert not plane.users(wrong).passed
    assert plane.users(wrong, right).passed


def test_without_slates_there_is_nothing_to_say(plane: Plane) -> None:
    result = plane.users()
    assert (result.passed, result.rows, result.detail) == (True, 0, "nothing was served yet")
