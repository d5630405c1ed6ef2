"""Folders of parts, Hive partitions and URLs: what is read, in which order, and where new rows go."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pyarrow as pa
import pytest
from feast import Entity, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.feature_logging import LoggingConfig
from feast.infra.offline_stores.file_source import FileLoggingDestination, SavedDatasetFileStorage
from feast.types import Int64, String

from feature_repo import parquet
from feature_repo.polars_store import PolarsOfflineStore
from tandem.core.errors import InputError, NotFoundError
from tandem.core.schema import TIME

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
USER = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)


def at(hours: float) -> datetime:
    return NOON + timedelta(hours=hours)


def features(*rows: tuple[str, datetime, int]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema={"user_id": pl.String, "event_timestamp": TIME, "clicks": pl.Int64}, orient="row")


def config(folder: Path) -> RepoConfig:
    offline = {"type": "feature_repo.polars_store.PolarsOfflineStore", "root": str(folder)}
    return RepoConfig(
        project="test",
        provider="local",
        registry=str(folder / "r.db"),
        offline_store=offline,
        online_store=None,
        repo_path=folder,
    )


def view(path: str) -> FeatureView:
    source = FileSource(name="stats", path=path, timestamp_field="event_timestamp")
    schema = [Field(name="user_id", dtype=String), Field(name="clicks", dtype=Int64)]
    made = FeatureView(name="stats", entities=[USER], schema=schema, source=source)
    made.entity_columns = [schema[0]]
    return made


def clicks(folder: Path, path: str, *asked: tuple[str, datetime]) -> list[int | None]:
    frame = pl.DataFrame(list(asked), schema={"user_id": pl.String, "event_timestamp": TIME}, orient="row")
    ask = PolarsOfflineStore.get_historical_features
    answer: list[int | None] = (
        ask(config(folder), [view(path)], ["stats:clicks"], frame, None, "test").to_polars()["clicks"].to_list()
    )
    return answer


def push(folder: Path, path: str, rows: pl.DataFrame) -> None:
    PolarsOfflineStore.offline_write_batch(config(folder), view(path), rows.to_arrow(), None)


def latest(folder: Path, path: str) -> list[Any]:
    source = view(path).batch_source
    job = PolarsOfflineStore.pull_latest_from_table_or_query(
        config(folder), source, ["user_id"], ["clicks"], "event_timestamp", None, at(-999), at(999)
    )
    return job.to_polars().select("user_id", "clicks").rows()


# --- order of parts ---------------------------------------------------------------------------------------------------------


def test_of_rows_with_one_key_and_one_time_the_last_pushed_wins_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stats").mkdir()
    features(("a", at(0), 0)).write_parquet(tmp_path / "stats" / "part-0.parquet")
    now = time.time_ns()
    for number, backwards in enumerate([0, 10**9, 10**18, 5, 10**12], 1):
        monkeypatch.setattr(parquet.time, "time_ns", lambda backwards=backwards: now - backwards)
        push(tmp_path, "stats", features(("a", at(0), number)))
        assert clicks(tmp_path, "stats", ("a", at(1))) == [number]
        assert latest(tmp_path, "stats") == [("a", number)]


@pytest.mark.parametrize("names", [["part-0", "pushed-1", "pushed-2"], ["2026-01", "2026-02", "a/0", "b"]])
def test_parts_are_read_in_the_order_of_their_names(tmp_path: Path, names: list[str]) -> None:
    for number, name in reversed(list(enumerate(names))):
        path = tmp_path / "stats" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        features(("a", at(0), number)).write_parquet(path)
    assert clicks(tmp_path, "stats", ("a", at(0))) == [len(names) - 1]


def test_a_part_in_the_making_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "stats" / ".partial-x").mkdir(parents=True)
    features(("a", at(0), 1)).write_parquet(tmp_path / "stats" / "part-0.parquet")
    features(("a", at(0), 2)).write_parquet(tmp_path / "stats" / ".partial-x" / "part-1.parquet")
    (tmp_path / "stats" / "notes.txt").write_text("no table")
    assert clicks(tmp_path, "stats", ("a", at(0))) == [1]


def test_an_empty_folder_is_told_apart_from_an_answer(tmp_path: Path) -> None:
    (tmp_path / "stats").mkdir()
    with pytest.raises(NotFoundError, match=r"holds no \.parquet"):
        clicks(tmp_path, "stats", ("a", at(0)))


# --- partitions -------------------------------------------------------------------------------------------------------------


def by_date(folder: Path) -> None:
    for day in (1, 2):
        part = folder / f"date=2026-03-0{day}" / "part-0.parquet"
        part.parent.mkdir(parents=True)
        features(("a", datetime(2026, 3, day, 9, tzinfo=UTC), day)).write_parquet(part)


def test_a_folder_partitioned_by_date_is_one_source_wherever_it_lies(tmp_path: Path) -> None:
    home = tmp_path / "country=de"
    by_date(home / "stats")
    assert clicks(home, "stats", ("a", at(0)), ("a", at(24))) == [1, 2]
    columns = PolarsOfflineStore().get_table_column_names_and_types_from_data_source(config(home), view("stats").batch_source)
    assert dict(columns) == {
        "user_id": "string", "event_timestamp": "timestamp[us, tz=UTC]", "clicks": "int64", "date": "date32[day]",
    }  # fmt: skip


def test_pushed_rows_go_into_their_own_partitions(tmp_path: Path) -> None:
    by_date(tmp_path / "stats")
    rows = features(("a", datetime(2026, 3, 2, 9, tzinfo=UTC), 22), ("b", datetime(2026, 3, 3, 9, tzinfo=UTC), 3))
    push(tmp_path, "stats", rows.with_columns(date=pl.col("event_timestamp").dt.date()))
    assert clicks(tmp_path, "stats", ("a", at(24)), ("b", at(48))) == [22, 3]
    pushed = sorted(path.parent.name for path in (tmp_path / "stats").glob("*/pushed-*.parquet"))
    assert pushed == ["date=2026-03-02", "date=2026-03-03"]
    assert "date" not in pl.read_parquet_schema(next((tmp_path / "stats").glob("*/pushed-*.parquet")))
    with pytest.raises(InputError, match="no partition"):
        push(tmp_path, "stats", rows.with_columns(date=pl.lit(None, pl.Date)))


# --- URLs -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder in fsspec's file system in memory."""
    files, folder = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    files.mkdir(folder)
    yield f"memory:/{folder}"
    files.rm(folder, recursive=True)


def put(url: str, rows: pl.DataFrame) -> None:
    with fsspec.open(url, "wb") as handle:
        rows.write_parquet(handle)


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    features(("a", at(0), 1)).write_parquet(tmp_path / "stats.parquet")
    url = (tmp_path / "stats.parquet").as_uri()
    push(tmp_path, url, features(("a", at(1), 2)))
    assert clicks(tmp_path, url, ("a", at(0)), ("a", at(1))) == [1, 2]


@pytest.mark.parametrize("name", ["stats.parquet", "stats/part-0.parquet", "stats/date=2026-03-01/part-0.parquet"])
def test_another_url_is_read_through_fsspec(tmp_path: Path, memory: str, name: str) -> None:
    put(f"{memory}/{name}", features(("a", at(0), 1), ("b", at(0), 5)))
    path = f"{memory}/{name.split('/')[0]}"
    assert clicks(tmp_path, path, ("a", at(1)), ("b", at(-1)), ("b", at(0))) == [1, None, 5]
    assert latest(tmp_path, path) == [("a", 1), ("b", 5)]


def test_rows_are_added_to_a_folder_elsewhere_and_the_later_wins(tmp_path: Path, memory: str) -> None:
    put(f"{memory}/stats/date=2026-03-01/part-0.parquet", features(("a", at(0), 0)))
    for number in (1, 2):
        push(tmp_path, f"{memory}/stats", features(("a", at(0), number)).with_columns(date=pl.lit(date(2026, 3, 1))))
        assert clicks(tmp_path, f"{memory}/stats", ("a", at(0))) == [number]


def test_one_file_elsewhere_is_not_rewritten(tmp_path: Path, memory: str) -> None:
    put(f"{memory}/stats.parquet", features(("a", at(0), 0)))
    with pytest.raises(InputError, match="use a folder of parts"):
        push(tmp_path, f"{memory}/stats.parquet", features(("a", at(1), 1)))
    with pytest.raises(NotFoundError, match="rights to read it"):
        clicks(tmp_path, f"{memory}/absent", ("a", at(0)))


@pytest.mark.parametrize("name", ["saved", "saved.parquet"], ids=["folder", "file"])
@pytest.mark.parametrize("remote", [False, True], ids=["here", "elsewhere"])
def test_a_result_is_kept_as_a_file_or_a_folder_here_or_elsewhere(tmp_path: Path, memory: str, name: str, remote: bool) -> None:
    features(("a", at(0), 7)).write_parquet(tmp_path / "stats.parquet")
    source = view("stats.parquet").batch_source
    job = PolarsOfflineStore.pull_all_from_table_or_query(config(tmp_path), source, ["user_id"], ["clicks"], "event_timestamp")
    where = f"{memory}/{name}" if remote else name
    storage = SavedDatasetFileStorage(path=where)
    job.persist(storage)
    with pytest.raises(SavedDatasetLocationAlreadyExists):
        job.persist(storage)
    job.persist(storage, allow_overwrite=True)
    back = PolarsOfflineStore.pull_all_from_table_or_query(
        config(tmp_path), storage.to_data_source(), ["user_id"], ["clicks"], "event_timestamp"
    )
    assert back.to_polars().select("user_id", "clicks").rows() == [("a", 7)]


# --- logged features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partition_by", [None, ["day"], ["day", "n"]], ids=["plain", "partitioned", "twice"])
@pytest.mark.parametrize("as_path", [False, True], ids=["table", "path"])
def test_logged_features_add_up_and_are_pulled_back(tmp_path: Path, partition_by: list[str] | None, as_path: bool) -> None:
    logging = LoggingConfig(destination=FileLoggingDestination(path="logs", partition_by=partition_by))
    for number in (1, 2):
        rows = pa.table({"n": [number], "when": pa.array([at(number)], pa.timestamp("us", "UTC")), "day": [f"d {number}/%ü"]})
        pl.from_arrow(rows).write_parquet(tmp_path / "flush.parquet")
        data = tmp_path / "flush.parquet" if as_path else rows
        PolarsOfflineStore.write_logged_features(config(tmp_path), data, None, logging, None)
    source = logging.destination.to_data_source()
    logs = PolarsOfflineStore.pull_all_from_table_or_query(config(tmp_path), source, [], ["n", "day"], "when", None, at(0), at(9))
    assert logs.to_polars().select("n", "day").rows() == [(1, "d 1/%ü"), (2, "d 2/%ü")]
