"""One contract for our three online stores, on real servers: SQLite, Redis and PostgreSQL through Feast."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import polars as pl
import pytest
from feast import FeatureStore
from feast.infra.online_stores.postgres_online_store.postgres import PostgreSQLOnlineStore
from feast.infra.online_stores.redis import RedisOnlineStore
from feast.infra.online_stores.sqlite import SqliteOnlineStore
from feast.protos.feast.types.Value_pb2 import Value

from feature_repo.materialize import ViewCounts, forget, freshness, materialize, push
from feature_repo.newest import entity_key
from feature_repo.offline import apply, open_store
from feature_repo.online import UserReader
from feature_repo.online_config import OnlineConfig
from feature_repo.views import TIMESTAMP, ViewSchema, write_views
from tandem.core.schema import TIME

START = datetime(2026, 1, 1, 12, 0, 0, 250_001, tzinfo=UTC)
STOCK = {"sqlite": SqliteOnlineStore, "redis": RedisOnlineStore, "postgres": PostgreSQLOnlineStore}


def at(days: float) -> datetime:
    return START + timedelta(days=days)


@pytest.fixture(params=["sqlite", "redis", "postgres"])
def online(request: pytest.FixtureRequest) -> OnlineConfig:
    """An empty online store of its own."""
    return OnlineConfig("" if request.param == "sqlite" else request.getfixturevalue(f"{request.param}_url"))


def stats(rows: list[tuple[str, datetime, int | None, float | None]]) -> pl.DataFrame:
    schema = {"user_id": pl.String, TIMESTAMP: TIME, "user_events": pl.Int64, "user_mean_value": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def history(rows: list[tuple[str, datetime, list[str], list[int]]]) -> pl.DataFrame:
    lists = {"history_items": pl.List(pl.String), "history_times": pl.List(pl.Int64)}
    return pl.DataFrame(rows, schema={"user_id": pl.String, TIMESTAMP: TIME} | lists, orient="row")


STATS = stats([("ann", at(0), 1, 0.5), ("ann", at(2), 2, None), ("bob", at(1), 7, 3.25), ("Żoë / 中", at(1), None, -1.0)])
HISTORY = history(
    [("ann", at(0), ["i1"], [5]), ("ann", at(2), ["i1", "film / ü 中 🎬", ""], [5, 2**52, -1]), ("bob", at(1), [], [])]
)


@pytest.fixture
def workspace(tmp_path: Path, online: OnlineConfig) -> Path:
    """Two user views, applied with the online store."""
    write(tmp_path, STATS, HISTORY)
    apply(tmp_path, online)
    return tmp_path


def write(workspace: Path, stats_table: pl.DataFrame, history_table: pl.DataFrame) -> None:
    tables = {"user_stats": stats_table, "user_history": history_table}
    (workspace / "features").mkdir(exist_ok=True)
    for name, table in tables.items():
        table.write_parquet(workspace / "features" / f"{name}.parquet")
    write_views(workspace / "features", tuple(ViewSchema.of_table(name, "user", table) for name, table in tables.items()))


def row(workspace: Path, user: str) -> dict[str, Any]:
    return UserReader(workspace).row(user)


def test_what_is_stored_is_the_newest_row_of_every_entity(workspace: Path) -> None:
    counts = materialize(workspace)
    assert counts.views == {"user_stats": ViewCounts(3, 0, 0), "user_history": ViewCounts(2, 0, 0)}
    assert row(workspace, "ann") == {
        "user_events": 2,
        "user_mean_value": None,
        "history_items": ["i1", "film / ü 中 🎬", ""],
        "history_times": [5, 2**52, -1],
    }
    assert row(workspace, "Żoë / 中")["user_mean_value"] == -1.0
    assert row(workspace, "bob")["history_items"] == []
    assert row(workspace, "nobody") == dict.fromkeys(row(workspace, "nobody"))


def test_event_times_are_kept_to_the_microsecond(workspace: Path) -> None:
    materialize(workspace)
    assert UserReader(workspace).read(["ann"])[0].times == {"user_stats": at(2), "user_history": at(2)}


def test_a_late_row_is_counted_and_kept_out(workspace: Path) -> None:
    materialize(workspace)
    late, newer = at(2) - timedelta(microseconds=1), at(2) + timedelta(microseconds=1)
    assert push(workspace, "user_stats", stats([("ann", late, 99, 9.0)])) == ViewCounts(0, 1, 0)
    assert row(workspace, "ann")["user_events"] == 2
    assert push(workspace, "user_stats", stats([("ann", newer, 3, 9.0)])) == ViewCounts(1, 0, 0)
    assert row(workspace, "ann")["user_events"] == 3


def test_an_equally_new_row_replaces_what_is_stored(workspace: Path) -> None:
    materialize(workspace)
    assert push(workspace, "user_stats", stats([("ann", at(2), 5, 1.0), ("ann", at(1), 4, 1.0)])) == ViewCounts(1, 0, 0)
    assert row(workspace, "ann")["user_events"] == 5


def test_a_row_from_the_future_freezes_nobody(workspace: Path) -> None:
    materialize(workspace)
    ahead = datetime.now(UTC) + timedelta(days=400)
    assert push(workspace, "user_stats", stats([("ann", ahead, 99, 1.0)])) == ViewCounts(0, 0, 1)
    assert push(workspace, "user_stats", stats([("ann", at(3), 6, 1.0)])) == ViewCounts(1, 0, 0)
    assert row(workspace, "ann")["user_events"] == 6


def test_feasts_own_row_wise_write_keeps_the_rules_and_what_it_does_not_name(workspace: Path) -> None:
    materialize(workspace)
    store = open_store(workspace)
    rows = [
        (entity_key("user_id", "ann"), {"user_events": Value(int64_val=50)}, at(3), None),
        (entity_key("user_id", "bob"), {"user_events": Value(int64_val=51)}, at(0), None),
        (entity_key("user_id", "cy"), {"user_mean_value": Value(double_val=1.5)}, at(0), None),
        (entity_key("user_id", "dee"), {"user_events": Value(int64_val=52)}, datetime.now(UTC) + timedelta(days=9), None),
    ]
    store.provider.online_write_batch(store.config, store.get_feature_view("user_stats"), rows, None)
    reader = UserReader(workspace)
    ann, bob, cy, dee = reader.rows(["ann", "bob", "cy", "dee"])
    assert (ann["user_events"], bob["user_events"], cy["user_mean_value"], dee["user_events"]) == (50, 7, 1.5, None)
    assert UserReader(workspace).read(["ann"])[0].times["user_stats"] == at(3)


def test_a_second_materialisation_changes_nothing(workspace: Path) -> None:
    materialize(workspace)
    before = UserReader(workspace).read(["ann", "bob"])
    assert materialize(workspace).written == 5
    assert UserReader(workspace).read(["ann", "bob"]) == before


def test_a_stock_reader_understands_what_we_wrote(workspace: Path) -> None:
    materialize(workspace)
    store = open_store(workspace)
    kind = next(name for name, stock in STOCK.items() if isinstance(store.provider.online_store, stock))
    view, keys = store.get_feature_view("user_stats"), [entity_key("user_id", "bob")]
    ((when, values),) = _stock(kind, store).online_read(store.config, view, keys, ["user_events", "user_mean_value"])
    assert (values["user_events"].int64_val, values["user_mean_value"].double_val) == (7, 3.25)
    assert abs((when if when.tzinfo else when.replace(tzinfo=UTC)) - at(1)) < timedelta(seconds=1)


def _stock(kind: str, store: FeatureStore) -> Any:
    stock = STOCK[kind]()
    if kind == "postgres":  # the stock store insists on its own name in the settings
        object.__setattr__(store.config.online_store, "type", "postgres")
    return stock


def test_forget_empties_every_view_and_freshness_counts(workspace: Path) -> None:
    materialize(workspace)
    table = {name: (entities, newest) for name, entities, newest in freshness(workspace).select(
        "view", "online_entities", "online_newest").iter_rows()}  # fmt: skip
    assert table == {"user_stats": (3, at(2)), "user_history": (2, at(2))}
    assert forget(workspace) == 5
    assert freshness(workspace)["online_entities"].to_list() == [0, 0]
    assert row(workspace, "ann")["user_events"] is None


def test_erase_removes_some_entities_of_one_view(workspace: Path) -> None:
    materialize(workspace)
    store = open_store(workspace)
    view = store.get_feature_view("user_stats")
    assert store.provider.online_store.erase(store.config, view, ["ann", "nobody"]) == 1
    assert (row(workspace, "ann")["user_events"], row(workspace, "ann")["history_times"]) == (None, [5, 2**52, -1])
    assert row(workspace, "bob")["user_events"] == 7


def test_many_entities_come_through_in_ranges(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than one range and one write hold; ids of many lengths, every one of them with two rows."""
    monkeypatch.setattr("feature_repo.engine._ROWS_PER_RANGE", 700)
    monkeypatch.setattr("feature_repo.engine._ROWS_PER_WRITE", 300)
    ids = [f"{'u' * (number % 17)}{number}" for number in range(2500)]
    rows = [(each, at(day), number * 10 + day, float(number)) for day in (1, 2) for number, each in enumerate(ids)]
    write(workspace, stats(rows), HISTORY)
    assert materialize(workspace).views["user_stats"] == ViewCounts(2500, 0, 0)
    assert freshness(workspace)["online_entities"][0] == 2500
    sample = list(range(0, 2500, 7))
    found = UserReader(workspace).rows([ids[number] for number in sample])
    assert [each["user_events"] for each in found] == [number * 10 + 2 for number in sample]


def test_a_view_of_three_hundred_features(workspace: Path) -> None:
    """More than one command of Redis's scripts takes; the newest row stays whole."""
    values = {f"wide_{number}": [float(number), float(number) + 0.5] for number in range(300)}
    write(
        workspace, pl.DataFrame({"user_id": ["ann", "ann"], TIMESTAMP: pl.Series([at(2), at(1)], dtype=TIME)} | values), HISTORY
    )
    apply(workspace)
    assert materialize(workspace).views["user_stats"] == ViewCounts(1, 0, 0)
    found = row(workspace, "ann")
    assert {name: found[name] for name in values} == {name: column[0] for name, column in values.items()}


def test_the_choice_of_store_stays_until_another_is_applied(workspace: Path, online: OnlineConfig) -> None:
    apply(workspace)
    assert isinstance(open_store(workspace).provider.online_store, STOCK[_name(online)])


def _name(online: OnlineConfig) -> str:
    return {"": "sqlite", "redis": "redis"}.get(urlsplit(online.url).scheme, "postgres")
