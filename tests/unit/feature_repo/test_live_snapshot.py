"""A running service's view of the item features: newer versions and pushed rows, without a restart."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from feature_repo.live_snapshot import FRESH, LiveSnapshot, write_fresh
from feature_repo.snapshot import CURRENT, write_snapshot
from feature_repo.views import TIMESTAMP, ViewSchema, write_views
from tandem.core.errors import NotFoundError
from tandem.core.schema import TIME

START = datetime(2026, 1, 1, tzinfo=UTC)
NAN = float("nan")
RELEASE = ["b", "stranger", "a"]


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def write(workspace: Path, as_of: datetime, events: list[int]) -> str:
    table = pl.DataFrame(
        {"item_id": ["a", "b"], TIMESTAMP: [START, START], "events": events, "price": [9.5, None]},
        schema_overrides={TIMESTAMP: TIME},
    )
    (workspace / "features").mkdir(exist_ok=True)
    table.write_parquet(workspace / "features" / "item_stats.parquet")
    write_views(workspace / "features", (ViewSchema.of_table("item_stats", "item", table),))
    return write_snapshot(workspace / "features", workspace / "snapshot", as_of)


def fresh(workspace: Path, items: list[str], events: list[int]) -> None:
    rows = pl.DataFrame({"item_id": items, TIMESTAMP: [START] * len(items), "events": events}, schema_overrides={TIMESTAMP: TIME})
    write_fresh(workspace / "snapshot", ViewSchema.of_table("item_stats", "item", rows), rows)


def everything(live: LiveSnapshot) -> list[list[float]]:
    values: list[list[float]] = np.nan_to_num(live.gather(np.arange(3)), nan=-1).tolist()
    return values


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def live(tmp_path: Path, clock: Clock) -> LiveSnapshot:
    write(tmp_path, START, [1, 2])
    return LiveSnapshot(tmp_path / "snapshot", RELEASE, every_s=1.0, clock=clock)


def test_rows_are_those_of_the_release(live: LiveSnapshot) -> None:
    assert live.names == ("events", "price")
    assert everything(live) == [[2, -1], [-1, -1], [1, 9.5]]
    assert live.gather(np.array([2, 2, 0]))[:, 0].tolist() == [1, 1, 2]


def test_pushed_rows_lie_over_it_the_newest_of_them_on_top(tmp_path: Path, clock: Clock, live: LiveSnapshot) -> None:
    fresh(tmp_path, ["b", "unknown to the release"], [7, 8])
    fresh(tmp_path, ["stranger", "b"], [3, 9])
    assert everything(live)[0] == [2, -1]  # not before the second is over
    clock.now = 1.0
    assert everything(live) == [[9, -1], [3, -1], [1, 9.5]]


def test_a_newer_version_takes_its_place_and_forgets_what_lay_over_the_old(
    tmp_path: Path, clock: Clock, live: LiveSnapshot
) -> None:
    fresh(tmp_path, ["b"], [7])
    version = write(tmp_path, START + timedelta(hours=1), [5, 6])
    clock.now = 1.0
    assert everything(live) == [[6, -1], [-1, -1], [5, 9.5]]
    assert (live.version, live.as_of) == (version, START + timedelta(hours=1))


def test_a_damaged_version_leaves_the_old_one_in_use(tmp_path: Path, clock: Clock, live: LiveSnapshot) -> None:
    version = write(tmp_path, START + timedelta(hours=1), [5, 6])
    path = tmp_path / "snapshot" / version / "features.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    clock.now = 1.0
    assert everything(live) == [[2, -1], [-1, -1], [1, 9.5]]


def test_a_damaged_part_leaves_the_old_view_in_use(tmp_path: Path, clock: Clock, live: LiveSnapshot) -> None:
    fresh(tmp_path, ["b"], [7])
    clock.now = 1.0
    assert everything(live)[0] == [7, -1]
    (tmp_path / "snapshot" / FRESH / live.version / "99999999999999999999-x.parquet").write_bytes(b"no parquet")
    clock.now = 2.0
    assert everything(live)[0] == [7, -1]


def test_without_a_snapshot_there_is_nothing_to_open_and_nothing_to_lie_over(tmp_path: Path) -> None:
    fresh(tmp_path, ["a"], [1])
    assert not (tmp_path / "snapshot").exists()
    with pytest.raises(NotFoundError, match="features materialize"):
        LiveSnapshot(tmp_path / "snapshot", RELEASE)


def test_parts_of_versions_that_are_gone_are_swept(tmp_path: Path) -> None:
    first = write(tmp_path, START, [1, 2])
    fresh(tmp_path, ["a"], [4])
    for hour in range(1, 5):
        write(tmp_path, START + timedelta(hours=hour), [hour, hour])
    assert not (tmp_path / "snapshot" / first).exists()
    fresh(tmp_path, ["a"], [5])
    current = (tmp_path / "snapshot" / CURRENT).read_text()
    assert [path.name for path in (tmp_path / "snapshot" / FRESH).iterdir()] == [current]
