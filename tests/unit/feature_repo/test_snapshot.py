"""The snapshot holds the newest numeric item features of one moment, whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from feature_repo.snapshot import Snapshot, write_snapshot
from feature_repo.views import TIMESTAMP, ViewSchema, write_views
from tandem.core.errors import InputError, IntegrityError, NotFoundError
from tandem.core.schema import TIME

DAY = timedelta(days=1)
START = datetime(2026, 1, 1, tzinfo=UTC)


class Workspace:
    """A features folder with item views made by hand, and the snapshot folder beside it."""

    def __init__(self, folder: Path) -> None:
        self.features, self.snapshots = folder / "features", folder / "snapshot"
        self.features.mkdir()
        self.views: list[ViewSchema] = []

    def add(self, name: str, columns: dict[str, list[object]], entity: str = "item", ttl_days: float | None = None) -> None:
        table = pl.DataFrame(columns, schema_overrides={TIMESTAMP: TIME})
        table.write_parquet(self.features / f"{name}.parquet")
        self.views.append(ViewSchema.of_table(name, entity, table, ttl_days=ttl_days))
        write_views(self.features, tuple(self.views))

    def write(self, as_of: datetime) -> str:
        return write_snapshot(self.features, self.snapshots, as_of)

    def load(self, version: str | None = None) -> Snapshot:
        return Snapshot.load(self.snapshots, version)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path)
    rows = {"item_id": ["b", "a", "a", "a"], TIMESTAMP: [START, START, START + 2 * DAY, START + DAY]}
    made.add("item_stats", rows | {"item_events": [5, 1, 3, 2], "item_rate": [0.5, 0.1, None, 0.2]})
    attributes = {"item_id": ["a", "c"], TIMESTAMP: [START, START]}
    made.add("item_attributes", attributes | {"price": [9.5, 1.0], "colour": ["red", "blue"], "sizes": [["S"], ["M", "L"]]})
    return made


def test_columns_hold_the_newest_row_known_at_that_moment(workspace: Workspace) -> None:
    version = workspace.write(START + DAY)
    snapshot = workspace.load()
    assert (snapshot.version, snapshot.as_of) == (version, START + DAY)
    assert snapshot.item_ids.to_list() == ["a", "b", "c"]
    assert snapshot.names == ("item_events", "item_rate", "price")
    np.testing.assert_array_equal(snapshot.column("item_events"), [2.0, 5.0, np.nan])
    np.testing.assert_array_equal(snapshot.column("item_rate"), [0.2, 0.5, np.nan])
    np.testing.assert_array_equal(snapshot.column("price"), [9.5, np.nan, 1.0])
    assert {snapshot.column(name).dtype for name in snapshot.names} == {np.dtype(np.float64)}
    assert isinstance(snapshot.column("price"), np.memmap)


def test_a_null_in_the_newest_row_is_missing_not_the_value_before(workspace: Workspace) -> None:
    workspace.write(START + 2 * DAY)
    np.testing.assert_array_equal(workspace.load().column("item_rate"), [np.nan, 0.5, np.nan])


def test_rows_are_found_by_id_and_unknown_ids_are_minus_one(workspace: Workspace) -> None:
    workspace.write(START)
    assert workspace.load().rows_of(["c", "nobody", "a", "c"]).tolist() == [2, -1, 0, 2]
    assert workspace.load().rows_of([]).tolist() == []


def test_rows_are_gathered_whole_and_unknown_items_are_missing(workspace: Workspace) -> None:
    workspace.write(START + DAY)
    gathered = workspace.load().gather(np.array([2, -1, 0]))
    np.testing.assert_array_equal(gathered, [[np.nan, np.nan, 1.0], [np.nan] * 3, [2.0, 0.2, 9.5]])


def test_a_feature_older_than_its_ttl_is_missing(workspace: Workspace) -> None:
    workspace.add("item_hot", {"item_id": ["a", "b"], TIMESTAMP: [START, START + 3 * DAY], "hot": [1, 1]}, ttl_days=2)
    workspace.write(START + 3 * DAY)
    np.testing.assert_array_equal(workspace.load().column("hot"), [np.nan, 1.0, np.nan])


def test_user_views_stay_out(workspace: Workspace) -> None:
    workspace.add("user_stats", {"user_id": ["u"], TIMESTAMP: [START], "user_events": [1]}, entity="user")
    workspace.write(START)
    assert "user_events" not in workspace.load().names


def test_a_workspace_without_item_views_has_an_empty_snapshot(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.add("user_stats", {"user_id": ["u"], TIMESTAMP: [START], "user_events": [1]}, entity="user")
    workspace.write(START)
    assert (workspace.load().item_ids.to_list(), workspace.load().names) == ([], ())


def test_equal_content_is_an_equal_version_whatever_the_order_of_rows(workspace: Workspace) -> None:
    first = workspace.write(START)
    path = workspace.features / "item_stats.parquet"
    pl.read_parquet(path).reverse().write_parquet(path)
    assert workspace.write(START) == first


def test_a_damaged_file_is_refused(workspace: Workspace) -> None:
    version = workspace.write(START)
    path = workspace.snapshots / version / "features.npy"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"features\.npy"):
        workspace.load()


def test_three_versions_are_kept_and_a_reader_of_an_older_one_goes_on(workspace: Workspace) -> None:
    versions = [workspace.write(START)]
    prices = workspace.load().column("price")
    versions += [workspace.write(START + day * DAY) for day in range(1, 5)]
    assert sorted(path.name for path in workspace.snapshots.iterdir() if path.is_dir()) == versions[-3:]
    assert workspace.load().version == versions[-1]
    assert workspace.load(versions[-2]).version == versions[-2]
    np.testing.assert_array_equal(prices, [9.5, np.nan, 1.0])


def test_an_older_moment_written_again_becomes_current(workspace: Workspace) -> None:
    first = workspace.write(START)
    workspace.write(START + DAY)
    assert workspace.write(START) == first
    assert workspace.load().version == first


def test_what_cannot_be_a_column_is_refused(workspace: Workspace) -> None:
    workspace.add("item_more", {"item_id": ["a"], TIMESTAMP: [START], "price": [1]})
    with pytest.raises(InputError, match="price"):
        workspace.write(START)


def test_integers_that_would_lose_digits_are_refused(workspace: Workspace) -> None:
    workspace.add("item_big", {"item_id": ["a"], TIMESTAMP: [START], "big": [2**53 + 1]})
    with pytest.raises(IntegrityError, match="big"):
        workspace.write(START)
    assert not list(workspace.snapshots.glob("*"))


def test_what_is_not_there_is_named(workspace: Workspace) -> None:
    with pytest.raises(NotFoundError, match="materialize"):
        workspace.load()
    workspace.write(START)
    with pytest.raises(NotFoundError, match="'never'"):
        workspace.load("never")
    with pytest.raises(NotFoundError, match="weight"):
        workspace.load().column("weight")


def test_reading_it_does_not_load_feast() -> None:
    program = "import sys, feature_repo.online, feature_repo.materialize, feature_repo.offline; sys.exit('feast' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
