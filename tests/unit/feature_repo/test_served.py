"""The served-log: nothing lost, nothing raised into a request, and each event credited once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from feature_repo.served import SERVED, ServedLog, ServedLogConfig, join_events, view_versions
from tandem.core.errors import BusyError, IntegrityError
from tandem.core.folders import held
from tandem.core.schema import EVENTS

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
LATER = ServedLogConfig(flush_seconds=3600)
"""No part is written unless a test asks for it."""


def slate(request: str, items: list[str], user: str = "ann", at: datetime = NOON) -> list[dict[str, Any]]:
    return [
        {
            "request_id": request,
            "user_id": user,
            "item_id": item,
            "position": place,
            "score": 1.0 / (place + 1),
            "propensity": 1.0,
            "timestamp": at,
            "release": "r-1",
            "view_versions": view_versions({"user_stats": 1}),
        }
        for place, item in enumerate(items)
    ]


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def eventually(true: Callable[[], bool], seconds: float = 30) -> bool:
    """Wait for the background thread, however busy the machine is."""
    waiting = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if true():
            return True
        waiting.wait(0.02)
    return False


def test_what_is_written_is_read_back_in_order(tmp_path: Path) -> None:
    with ServedLog(tmp_path / "served", LATER) as log:
        log.write(slate("q2", ["猫", "a b/c"], at=NOON + timedelta(seconds=1)))
        log.write(pl.DataFrame(slate("q1", ["z"])))
    rows = ServedLog(tmp_path / "served").read()
    assert rows.schema == pl.Schema(SERVED)
    assert rows.select("request_id", "item_id", "position").rows() == [("q1", "z", 0), ("q2", "猫", 0), ("q2", "a b/c", 1)]
    assert rows["view_versions"].unique().to_list() == ['{"user_stats":1}']
    assert log.written == 3
    assert log.dropped == 0


def test_an_empty_log_reads_as_an_empty_frame(tmp_path: Path) -> None:
    log = ServedLog(tmp_path / "absent")
    log.write([])
    assert log.read().schema == pl.Schema(SERVED)
    assert log.read().is_empty()


def test_reading_sees_what_is_still_buffered(tmp_path: Path) -> None:
    with ServedLog(tmp_path, LATER) as log:
        log.write(slate("q", ["a"]))
        assert not parts(tmp_path)
        assert len(log.read()) == 1


def test_a_full_buffer_is_written_in_the_background(tmp_path: Path) -> None:
    with ServedLog(tmp_path, ServedLogConfig(flush_rows=3, flush_seconds=3600)) as log:
        log.write(slate("q1", ["a", "b"]))
        log.write(slate("q2", ["a", "b"]))
        assert eventually(lambda: log.written == 4)
        assert len(parts(tmp_path)) == 1


def test_an_old_buffer_is_written_in_the_background(tmp_path: Path) -> None:
    with ServedLog(tmp_path, ServedLogConfig(flush_seconds=0.05)) as log:
        log.write(slate("q1", ["a", "b"]))
        assert eventually(lambda: log.written == 2)


def test_many_threads_lose_nothing(tmp_path: Path) -> None:
    with ServedLog(tmp_path, ServedLogConfig(flush_rows=50, flush_seconds=0.01)) as log:

        def serve(thread: int) -> None:
            for request in range(40):
                log.write(slate(f"{thread}-{request}", ["a", "b", "c"]))

        threads = [threading.Thread(target=serve, args=(thread,)) for thread in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(log.read()) == log.written == 6 * 40 * 3
    assert log.dropped == 0
    assert not list(tmp_path.glob(".partial-*"))


def test_two_writers_share_a_folder(tmp_path: Path) -> None:
    with ServedLog(tmp_path, LATER) as one, ServedLog(tmp_path, LATER) as other:
        one.write(slate("q1", ["a"]))
        other.write(slate("q2", ["a"]))
    assert ServedLog(tmp_path).read()["request_id"].to_list() == ["q1", "q2"]


def test_a_disk_that_fails_drops_and_counts_and_the_log_goes_on(tmp_path: Path) -> None:
    """A file in the folder's place refuses every write, as a full disk does."""
    folder = tmp_path / "served"
    folder.write_text("not a folder")
    with ServedLog(folder, LATER) as log:
        log.write(slate("q1", ["a", "b"]))
        log.flush()
        assert (log.written, log.dropped) == (0, 2)
        folder.unlink()
        log.write(slate("q2", ["a"]))
        log.flush()
        assert (log.written, log.dropped) == (1, 2)


def test_a_full_device_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with ServedLog(tmp_path, LATER) as log:
        monkeypatch.setattr("feature_repo.served._sync", full)
        log.write(slate("q1", ["a"]))
        log.flush()
        assert log.dropped == 1
    assert list(tmp_path.iterdir()) == []


def test_a_malformed_slate_does_not_take_its_neighbours_along(tmp_path: Path) -> None:
    with ServedLog(tmp_path, LATER) as log:
        log.write(slate("q1", ["a"]))
        log.write([{"request_id": "q2", "position": "first"}])
        log.write([{**slate("q3", ["a"])[0], "item_id": None}])
        log.write(slate("q4", ["a"]))
        assert log.read()["request_id"].to_list() == ["q1", "q4"]
        assert log.dropped == 2


def test_columns_may_be_added_and_left_out(tmp_path: Path) -> None:
    with ServedLog(tmp_path, LATER) as log:
        log.write([{**row, "p_click": 0.5} for row in slate("q1", ["a"])])
        log.flush()
        log.write([{name: value for name, value in row.items() if name != "propensity"} for row in slate("q2", ["a"])])
        rows = log.read()
    assert rows["p_click"].to_list() == [0.5, None]
    assert rows["propensity"].to_list() == [1.0, None]


def test_a_buffer_that_nobody_empties_has_an_end(tmp_path: Path) -> None:
    with ServedLog(tmp_path, ServedLogConfig(flush_rows=10**6, flush_seconds=3600, buffer_rows=3)) as log:
        log.write(slate("q1", ["a", "b"]))
        log.write(slate("q2", ["a", "b"]))
        assert log.dropped == 2
        assert log.read()["request_id"].unique().to_list() == ["q1"]


def test_writing_after_close_is_counted_not_raised(tmp_path: Path) -> None:
    log = ServedLog(tmp_path, LATER)
    log.close()
    log.write(slate("q1", ["a"]))
    assert log.dropped == 1
    assert log.read().is_empty()


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    with ServedLog(tmp_path, LATER) as log:
        log.write(slate("q1", ["a"]))
    part = parts(tmp_path)[0]
    part.write_bytes(part.read_bytes()[:40])
    with pytest.raises(IntegrityError, match=part.name):
        log.read()


def test_compaction_keeps_every_row_once_even_after_a_crash(tmp_path: Path) -> None:
    with ServedLog(tmp_path, LATER) as log:
        for request in ("q1", "q2", "q3"):
            log.write(slate(request, ["a", "b"]))
            log.flush()
    before = log.read()
    crashed = parts(tmp_path)[0]
    kept = crashed.read_bytes()
    assert log.compact() == 3
    assert len(parts(tmp_path)) == 1
    crashed.write_bytes(kept)
    assert log.read().equals(before)


def test_two_compactions_at_once_are_refused(tmp_path: Path) -> None:
    with held(tmp_path / "compact.lock", "another"), pytest.raises(BusyError, match="another"):
        ServedLog(tmp_path).compact()


def event(item: str, minutes: float, request: str | None = None, user: str = "ann", action: str = "click") -> dict[str, Any]:
    row = dict.fromkeys(EVENTS) | {"user_id": user, "item_id": item, "action": action, "request_id": request, "value": 2.0}
    return row | {"event_id": f"{action}-{item}-{minutes}", "timestamp": NOON + timedelta(minutes=minutes)}


def joined(events: list[dict[str, Any]], served: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    rows = join_events(pl.DataFrame(served, schema_overrides=SERVED), pl.DataFrame(events, schema=EVENTS))
    return rows.select("request_id", "item_id", "action", "matched_by").rows()


SERVED_TWICE = [*slate("q1", ["a", "b"]), *slate("q2", ["a"], at=NOON + timedelta(hours=1))]


def test_an_event_belongs_to_the_request_it_names() -> None:
    """Even though q2 showed the item later, and even after days."""
    events = [event("a", 90, "q1"), event("a", 60 * 72, "q1", action="purchase")]
    assert joined(events, SERVED_TWICE) == [
        ("q1", "a", "click", "request"),
        ("q1", "a", "purchase", "request"),
        ("q1", "b", None, None),
        ("q2", "a", None, None),
    ]


def test_an_event_without_a_request_belongs_to_the_newest_showing_before_it() -> None:
    assert joined([event("a", 61)], SERVED_TWICE) == [
        ("q1", "a", None, None),
        ("q1", "b", None, None),
        ("q2", "a", "click", "time"),
    ]
    assert joined([event("a", 59)], SERVED_TWICE)[0] == ("q1", "a", "click", "time")


@pytest.mark.parametrize(
    "stray",
    [
        event("a", -1),
        event("a", 60 * 25 + 1),
        event("a", 5, user="bob"),
        event("c", 5),
        event("a", 5, request="from another system"),
        event("c", 5, request="q1"),
    ],
    ids=["before", "too late", "another user", "not shown", "another request", "not in that slate"],
)
def test_an_event_that_nothing_shown_led_to_is_not_credited(stray: dict[str, Any]) -> None:
    assert [row[2] for row in joined([stray], SERVED_TWICE)] == [None, None, None]


def test_a_day_after_is_just_in_time() -> None:
    assert joined([event("b", 60 * 24)], SERVED_TWICE)[1] == ("q1", "b", "click", "time")


def test_joining_through_the_log_carries_value_and_time(tmp_path: Path) -> None:
    with ServedLog(tmp_path, LATER) as log:
        log.write(slate("q1", ["a"]))
        rows = log.join_events(pl.DataFrame([event("a", 3)], schema=EVENTS))
    assert rows.select("value", "event_timestamp", "event_id").row(0) == (2.0, NOON + timedelta(minutes=3), "click-a-3")
