"""What a process counts reaches the registry exactly once, whatever fails in between."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from registry.store import ReleaseStore
from registry.traffic import TOTAL, Counts
from tandem.core.errors import BusyError
from tandem.service.live_traffic import LiveTraffic


class Clock:
    """Seconds since 1970, as a test says."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ReleaseStore]:
    monkeypatch.setattr("registry.database.BUSY_MILLISECONDS", 50)
    store = ReleaseStore(f"sqlite:///{tmp_path}/tandem.db")
    yield store
    store.close()


def counted(store: ReleaseStore, experiment: int = 7, since: int = TOTAL) -> dict[str, int]:
    with store.look() as work:
        return {arm: counts.requests for arm, counts in work.traffic.of_experiment(experiment, since).items()}


def test_notes_of_many_threads_all_arrive(store: ReleaseStore, clock: Clock) -> None:
    traffic = LiveTraffic(clock)

    def note(number: int) -> None:
        for _ in range(200):
            traffic.note(7, "champion" if number % 2 else "challenger", Counts.one(3.0))

    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(note, number) for number in range(8)]
        while not all(job.done() for job in jobs):
            traffic.flush(store, 1, 3600)
    traffic.flush(store, 1, 3600)
    assert counted(store) == {"champion": 800, "challenger": 800}
    assert counted(store, since=1) == {"champion": 800, "challenger": 800}


def test_what_cannot_be_written_is_written_later_and_once(store: ReleaseStore, clock: Clock, tmp_path: Path) -> None:
    traffic = LiveTraffic(clock)
    traffic.note(7, "champion", Counts.one(3.0))
    writer = sqlite3.connect(tmp_path / "tandem.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    for _ in range(2):
        traffic.note(7, "champion", Counts.one(3.0))
        with pytest.raises(BusyError):
            traffic.flush(store, 1, 3600)
    assert traffic.of_experiment(7, 1)["champion"].requests == 3
    writer.execute("ROLLBACK")
    writer.close()
    traffic.flush(store, 1, 3600)
    traffic.flush(store, 1, 3600)
    assert counted(store) == {"champion": 3}


def test_slots_go_and_totals_stay(store: ReleaseStore, clock: Clock) -> None:
    traffic = LiveTraffic(clock)
    for _ in range(5):
        traffic.note(7, "champion", Counts.one(3.0))
        traffic.note(0, "champion", Counts.one(3.0))
        traffic.flush(store, 1, 60)
        clock.now += 60
    assert counted(store) == {"champion": 5}
    assert counted(store, since=1) == {"champion": 2}
    assert counted(store, experiment=0) == {}
    assert len(traffic._known) < 8


def test_requests_belong_to_the_promotion_under_which_they_were_answered(store: ReleaseStore, clock: Clock) -> None:
    traffic = LiveTraffic(clock)
    traffic.note(0, "champion", Counts.one(3.0))
    traffic.flush(store, 1, 3600)
    traffic.note(0, "champion", Counts.one(3.0, failed=True))
    traffic.flush(store, 2, 3600)
    with store.look() as work:
        told = [(each.requests, each.failed) for each in (work.traffic.of_champion(1), work.traffic.of_champion(2))]
    assert told == [(1, 0), (1, 1)]
