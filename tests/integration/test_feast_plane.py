"""The feature plane on real Feast: SQL registry, SQLite online store, our offline store and engine, Feast's own commands."""

from __future__ import annotations

import os
import runpy
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pytest
from feast import FeatureStore, RepoConfig
from feast.repo_operations import get_repo_files
from polars.testing import assert_frame_equal

import feature_repo
from feature_repo.materialize import QUARANTINE, ViewCounts, forget, freshness, materialize, push
from feature_repo.offline import LOCK, apply, historical, open_store
from feature_repo.online import Snapshot, UserReader
from feature_repo.views import TIMESTAMP, ViewSchema, read_views, write_views
from tandem.core.errors import BusyError, IncompatibleError, InputError, IntegrityError, NotFoundError
from tandem.core.folders import held
from tandem.core.schema import TIME

FEATURE_REPO = Path(feature_repo.__file__).parent
US = timedelta(microseconds=1)
START = datetime(2026, 1, 1, 12, 0, 0, 250_000, tzinfo=UTC)
USER_VIEWS = ["user_stats", "user_history"]
ALL_VIEWS = [*USER_VIEWS, "item_stats"]


def at(days: float = 0) -> datetime:
    return START + timedelta(days=days)


def frame(columns: dict[str, Any], **types: Any) -> pl.DataFrame:
    return pl.DataFrame(columns, schema_overrides={TIMESTAMP: TIME, **types})


def tables() -> dict[str, pl.DataFrame]:
    return {
        "user_stats": frame(
            {
                "user_id": ["ann", "ann", "bob"],
                TIMESTAMP: [at(0), at(2), at(1)],
                "user_events": [1, 2, 7],
                "user_mean_value": [0.5, None, 3.25],
            }
        ),
        "user_history": frame(
            {
                "user_id": ["ann", "ann"],
                TIMESTAMP: [at(0), at(2)],
                "history_items": [["i1"], ["i1", "film / ü 中 🎬"]],
                "history_times": [[5], [5, 2**52]],
                "history_values": [[0.0], [0.0, 4.5]],
            },
        ),
        "item_stats": frame(
            {"item_id": ["i1", "i2"], TIMESTAMP: [at(0), at(1)], "item_events": [3, 4], "colour": ["red", None]}, colour=pl.String
        ),
    }


def write_tables(workspace: Path, written: dict[str, pl.DataFrame], **ttl_days: float) -> None:
    """What aggregates.py does, by hand."""
    (workspace / "features").mkdir(parents=True, exist_ok=True)
    for name, table in written.items():
        table.write_parquet(workspace / "features" / f"{name}.parquet")
    views = [ViewSchema.of_table(name, name.split("_")[0], table, ttl_days=ttl_days.get(name)) for name, table in written.items()]
    write_views(workspace / "features", tuple(views))


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Applied once; tests work on copies, which a workspace allows."""
    home = tmp_path_factory.mktemp("applied")
    write_tables(home, tables())
    apply(home)
    return home


@pytest.fixture(scope="module")
def materialized(tmp_path_factory: pytest.TempPathFactory, applied: Path) -> Path:
    home = tmp_path_factory.mktemp("materialized") / "home"
    shutil.copytree(applied, home)
    materialize(home)
    return home


@pytest.fixture
def workspace(tmp_path: Path, applied: Path) -> Path:
    """A workspace whose definitions are applied, with nothing online yet."""
    return Path(shutil.copytree(applied, tmp_path / "a workspace"))


@pytest.fixture
def served(tmp_path: Path, materialized: Path) -> Path:
    """A workspace that is applied and materialised."""
    return Path(shutil.copytree(materialized, tmp_path / "a workspace"))


def stats(user: str, when: datetime, events: int) -> pl.DataFrame:
    return frame({"user_id": [user], TIMESTAMP: [when], "user_events": [events], "user_mean_value": [1.0]})


def events_of(workspace: Path, user: str) -> int | None:
    value: int | None = UserReader(workspace).row(user)["user_events"]
    return value


# --- one user's row ---------------------------------------------------------------------------------------------------------


def test_a_users_row_is_the_newest_offline_row_of_every_user_view(served: Path) -> None:
    reader = UserReader(served)
    assert reader.row("ann") == {
        "user_events": 2,
        "user_mean_value": None,
        "history_items": ["i1", "film / ü 中 🎬"],
        "history_times": [5, 2**52],
        "history_values": [0.0, 4.5],
    }
    assert reader.names == ("user_events", "user_mean_value", "history_items", "history_times", "history_values")


def test_unknown_users_and_views_without_the_user_are_missing(served: Path) -> None:
    nobody, bob = UserReader(served).rows(["nobody", "bob"])
    assert nobody == dict.fromkeys(nobody)
    assert (bob["user_events"], bob["user_mean_value"], bob["history_items"]) == (7, 3.25, None)


def test_event_times_are_kept_to_the_microsecond(served: Path) -> None:
    assert UserReader(served).read(["ann"])[0].times == {"user_stats": at(2), "user_history": at(2)}


def test_many_users_come_back_in_the_order_asked(served: Path) -> None:
    asked = ["bob", "nobody", "ann"] * 400
    assert [row["user_events"] for row in UserReader(served).rows(asked)] == [7, None, 2] * 400
    assert UserReader(served).rows([]) == []


def test_a_feature_older_than_its_ttl_counts_as_missing(tmp_path: Path) -> None:
    write_tables(tmp_path, tables(), user_stats=3)
    apply(tmp_path)
    materialize(tmp_path)
    fresh = UserReader(tmp_path, now=lambda: at(5)).row("ann")
    expired = UserReader(tmp_path, now=lambda: at(5) + US).row("ann")
    assert (fresh["user_events"], expired["user_events"]) == (2, None)
    assert expired["history_times"] == [5, 2**52]


def test_reading_goes_on_when_the_registry_is_gone(served: Path) -> None:
    reader = UserReader(served)
    (served / "state" / "registry.db").unlink()
    assert reader.row("ann")["user_events"] == 2


def test_before_apply_a_reader_is_refused_and_before_materialise_all_is_missing(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="features apply"):
        UserReader(tmp_path)
    with pytest.raises(NotFoundError, match="features build"):
        apply(tmp_path)
    write_tables(tmp_path, tables())
    apply(tmp_path)
    assert set(UserReader(tmp_path).row("ann").values()) == {None}


def test_threads_read_whole_rows_while_a_materialisation_writes(served: Path) -> None:
    reader = UserReader(served)
    later = {name: table.with_columns(pl.col(TIMESTAMP) + timedelta(days=1)) for name, table in tables().items()}
    later["user_stats"] = later["user_stats"].with_columns(pl.col("user_events") + 100)
    write_tables(served, later)
    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(reader.row, "ann") for _ in range(200)]
        materialize(served)
        seen = {each.result()["user_events"] for each in reads}
    assert seen <= {2, 102}
    assert reader.row("ann")["user_events"] == 102


# --- point in time ----------------------------------------------------------------------------------------------------------


def test_training_rows_never_see_their_own_event(workspace: Path) -> None:
    asked = frame({"user_id": ["ann"] * 4, TIMESTAMP: [at(2), at(2) + US, at(0), at(2) - US]})
    answer = historical(open_store(workspace), asked, ["user_stats"])
    assert answer["user_events"].to_list() == [1, 2, None, 1]


def test_rows_columns_and_order_are_kept_and_unknown_pairs_are_null(workspace: Path) -> None:
    asked = frame(
        {"item_id": ["i2", "i1", "no"], "label": [1, 0, 1], "user_id": ["bob", "no", "ann"], TIMESTAMP: [at(9), at(9), at(1)]}
    )
    answer = historical(open_store(workspace), asked, ALL_VIEWS)
    assert_frame_equal(answer.select(asked.columns), asked)
    assert answer["user_events"].to_list() == [7, None, 1]
    assert answer["item_events"].to_list() == [4, 3, None]
    assert answer["history_items"].to_list() == [None, None, ["i1"]]
    assert answer.columns[len(asked.columns) :] == [
        name for view in read_views(workspace / "features") for name in view.feature_names
    ]


def test_questions_that_cannot_be_answered_are_refused(workspace: Path) -> None:
    store, asked = open_store(workspace), frame({"user_id": ["ann"], TIMESTAMP: [at(1)]})
    with pytest.raises(InputError, match="item_id"):
        historical(store, asked, ALL_VIEWS)
    with pytest.raises(NotFoundError, match="user_moods"):
        historical(store, asked, ["user_moods"])
    assert historical(store, asked, []).equals(asked)


def test_what_is_served_equals_the_offline_join(served: Path) -> None:
    users = ["ann", "bob", "nobody"]
    asked = frame({"user_id": users, TIMESTAMP: [at(100)] * 3})
    offline = historical(open_store(served), asked, USER_VIEWS).drop("user_id", TIMESTAMP)
    assert UserReader(served).rows(users) == offline.to_dicts()


def test_stock_feast_calls_get_the_same_answers(served: Path) -> None:
    store = open_store(served)
    asked = pd.DataFrame({"user_id": ["ann", "bob"], TIMESTAMP: [at(0.5), at(0.5)]})
    job = store.get_historical_features(entity_df=asked, features=store.get_feature_service("user_v1"))
    assert job.to_df()["user_events"].fillna(-1).tolist() == [1, -1]
    online = store.get_online_features(store.get_feature_service("ranking_v1"), [{"user_id": "ann", "item_id": "i1"}]).to_dict()
    assert (online["user_events"], online["item_events"], online["colour"]) == ([2], [3], ["red"])


# --- newest wins, the future stays out --------------------------------------------------------------------------------------


def test_a_push_reaches_both_stores_and_a_late_one_only_the_offline_store(served: Path) -> None:
    assert push(served, "user_stats", stats("ann", at(3), 30)) == ViewCounts(written=1, late=0, quarantined=0)
    assert push(served, "user_stats", stats("ann", at(1), 10)) == ViewCounts(written=0, late=1, quarantined=0)
    assert events_of(served, "ann") == 30
    asked = frame({"user_id": ["ann"] * 3, TIMESTAMP: [at(1) + US, at(2) + US, at(3) + US]})
    assert historical(open_store(served), asked, ["user_stats"])["user_events"].to_list() == [10, 2, 30]


def test_within_one_second_the_later_event_wins(served: Path) -> None:
    push(served, "user_stats", stats("ann", at(3) + 2 * US, 32))
    push(served, "user_stats", stats("ann", at(3) + US, 31))
    assert events_of(served, "ann") == 32


def test_of_one_push_with_several_rows_of_a_user_the_newest_counts(served: Path) -> None:
    rows = pl.concat([stats("ann", at(5), 5), stats("ann", at(4), 4), stats("cat", at(4), 9)])
    assert push(served, "user_stats", rows).written == 2
    assert (events_of(served, "ann"), events_of(served, "cat")) == (5, 9)


def test_feasts_own_push_cannot_replace_a_newer_event_nor_bring_the_future(served: Path) -> None:
    store = open_store(served)
    for when, events in [(at(1), 10), (datetime.now(UTC) + timedelta(hours=1), 99)]:
        store.push("user_stats_push", stats("ann", when, events).to_pandas())
    assert events_of(served, "ann") == 2
    store.push("user_stats_push", stats("ann", at(4), 40).to_pandas())
    assert events_of(served, "ann") == 40


def test_a_future_push_is_quarantined_and_counted(served: Path) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    assert push(served, "user_stats", stats("ann", tomorrow, 99)) == ViewCounts(written=0, late=0, quarantined=1)
    assert events_of(served, "ann") == 2
    kept = pl.read_parquet(served / QUARANTINE / "user_stats" / "*.parquet")
    assert kept["user_events"].to_list() == [99]
    assert 99 not in pl.read_parquet(served / "features" / "user_stats.parquet")["user_events"]


def test_future_rows_of_an_offline_table_are_quarantined_and_counted(workspace: Path) -> None:
    ahead = pl.concat([tables()["user_stats"], stats("ann", datetime.now(UTC) + timedelta(hours=2), 99)])
    write_tables(workspace, tables() | {"user_stats": ahead})
    counts = materialize(workspace, until=datetime.now(UTC) + timedelta(days=9))
    assert (counts.views["user_stats"], counts.quarantined) == (ViewCounts(written=2, late=0, quarantined=1), 1)
    assert events_of(workspace, "ann") == 2


def test_a_materialisation_of_old_rows_does_not_undo_a_push(served: Path) -> None:
    push(served, "user_stats", stats("ann", at(3), 30))
    write_tables(served, tables())
    assert materialize(served).views["user_stats"] == ViewCounts(written=1, late=1, quarantined=0)
    assert events_of(served, "ann") == 30


def test_pushed_rows_that_do_not_fit_are_refused(served: Path) -> None:
    good = stats("ann", at(3), 30)
    for bad, reason in [
        (good.drop("user_events"), "user_events"),
        (good.with_columns(mood=pl.lit(1)), "mood"),
        (good.with_columns(user_events=pl.lit("many")), "do not fit"),
        (good.with_columns(user_id=pl.lit(None, pl.String)), "nulls"),
    ]:
        with pytest.raises(InputError, match=reason):
            push(served, "user_stats", bad)
    with pytest.raises(NotFoundError, match="user_moods"):
        push(served, "user_moods", good)
    assert events_of(served, "ann") == 2


# --- materialise ------------------------------------------------------------------------------------------------------------


def test_materialise_writes_one_row_per_entity_and_the_snapshot_and_can_be_repeated(workspace: Path) -> None:
    counts = materialize(workspace)
    assert {name: each.written for name, each in counts.views.items()} == {"user_stats": 2, "user_history": 1, "item_stats": 2}
    snapshot = Snapshot.load(workspace / "snapshot")
    assert (snapshot.version, snapshot.column("item_events").tolist()) == (counts.snapshot, [3.0, 4.0])
    assert materialize(workspace).views == counts.views


def test_until_and_since_bound_what_is_read(workspace: Path) -> None:
    counts = materialize(workspace, until=at(0.5))
    assert (events_of(workspace, "ann"), events_of(workspace, "bob")) == (1, None)
    assert Snapshot.load(workspace / "snapshot").item_ids.to_list() == ["i1"]
    assert counts.until == at(0.5)
    assert materialize(workspace, since=at(2) + timedelta(minutes=59)).views["user_stats"].written == 1  # an hour of overlap
    assert materialize(workspace, since=at(2) + timedelta(minutes=61)).views["user_stats"].written == 0


def test_a_store_that_loses_rows_is_noticed_and_the_watermark_stays(workspace: Path) -> None:
    with sqlite3.connect(workspace / "state" / "online.db") as online:
        online.execute(
            "CREATE TRIGGER lossy BEFORE INSERT ON tandem_user_stats "
            "WHEN hex(NEW.entity_key) LIKE '%626F62' BEGIN SELECT RAISE(IGNORE); END"
        )
    with pytest.raises(IntegrityError, match="1 of 2"):
        materialize(workspace)
    assert events_of(workspace, "ann") is None
    assert freshness(workspace).filter(view="user_stats")["materialized_until"].item() is None
    with sqlite3.connect(workspace / "state" / "online.db") as online:
        online.execute("DROP TRIGGER lossy")
    assert materialize(workspace).views["user_stats"].written == 2
    assert freshness(workspace).filter(view="user_stats")["materialized_until"].item() is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.drop("item_events"), r"item_events is missing, not Int64"),
        (lambda rows: rows.rename({"colour": "color"}), r"colour is missing, not String"),
        (lambda rows: rows.with_columns(pl.col("item_events").cast(pl.String)), r"item_events is String, not Int64"),
        (lambda rows: rows.with_columns(pl.col("item_events") + 0.5), r"item_events is Float64, not Int64"),
    ],
)
def test_a_table_that_changed_under_its_view_fails_before_anything_is_stored(
    served: Path, change: Callable[[pl.DataFrame], pl.DataFrame], said: str
) -> None:
    """The last view's table; the first one has news, which must not be stored either."""
    newer = tables()["user_stats"].with_columns(pl.col(TIMESTAMP) + timedelta(days=9), pl.col("user_events") + 100)
    write_tables(served, tables() | {"user_stats": newer})
    change(tables()["item_stats"]).write_parquet(served / "features" / "item_stats.parquet")
    before = freshness(served)["online_newest", "materialized_until"]
    with pytest.raises(IncompatibleError, match=rf"features/item_stats.parquet: {said}; run `tandem features build`"):
        materialize(served)
    assert (events_of(served, "ann"), freshness(served)["online_newest", "materialized_until"].equals(before)) == (2, True)
    assert Snapshot.load(served / "snapshot").column("item_events").tolist() == [3.0, 4.0]


def test_a_second_run_is_told_who_holds_the_lock(workspace: Path) -> None:
    with held(workspace / LOCK, "features materialize"):
        for run in (materialize, apply, forget, lambda home: push(home, "user_stats", stats("ann", at(3), 3))):
            with pytest.raises(BusyError, match="features materialize"):
                run(workspace)


def test_forget_makes_room_for_replaced_data_with_older_times(served: Path) -> None:
    older = {name: table.with_columns(pl.col(TIMESTAMP) - timedelta(days=30)) for name, table in tables().items()}
    write_tables(served, older)
    assert materialize(served).views["user_stats"] == ViewCounts(written=0, late=2, quarantined=0)
    assert forget(served) > 0
    assert events_of(served, "ann") is None
    assert materialize(served).views["user_stats"].written == 2


def test_freshness_shows_both_sides_and_the_watermark(served: Path) -> None:
    push(served, "user_stats", stats("cat", at(7), 1))
    table = freshness(served)
    assert table["view"].to_list() == ALL_VIEWS
    row = table.row(0, named=True)
    assert (row["offline_rows"], row["offline_newest"], row["online_entities"], row["online_newest"]) == (4, at(7), 3, at(7))
    assert row["materialized_until"] > at(7)


def test_nothing_is_printed_where_json_speaks(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apply(workspace)
    materialize(workspace)
    push(workspace, "user_stats", stats("ann", at(3), 3))
    historical(open_store(workspace), frame({"user_id": ["ann"], TIMESTAMP: [at(1)]}), USER_VIEWS)
    assert capsys.readouterr().out == ""


# --- encodings and other stores ---------------------------------------------------------------------------------------------


def awkward() -> pl.DataFrame:
    return frame(
        {
            "user_id": ["full", "null", "edge", "empty"],
            TIMESTAMP: [at(0)] * 4,
            "user_events": [1, None, -(2**63), 0],
            "user_mean_value": [1e-300, None, float("nan"), -0.0],
            "user_word": ["x", None, "", "中 🎬"],
            "user_words": [["a", "b"], None, [], ["", "ü"]],
            "user_times": [[1, 2], None, [], [2**63 - 1]],
            "user_shares": [[0.1, 0.2], None, [], [float("inf")]],
        }
    )


def stock_config(home: Path, **more: Any) -> RepoConfig:
    """The same workspace with Feast's own SQLite online store, in another database."""
    settings = open_store(home).config
    return RepoConfig(
        project=settings.project,
        provider="local",
        registry={"registry_type": "sql", "path": settings.registry.path},
        online_store={"type": "sqlite", "path": str(home / "state" / "stock.db")},
        offline_store={"type": settings.offline_store.type, "root": settings.offline_store.root},
        entity_key_serialization_version=3,
        repo_path=home,
        **more,
    )


def cells(path: Path, table: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(path) as online:
        query = f"SELECT entity_key, feature_name, value, value_text, event_ts FROM {table} ORDER BY entity_key, feature_name"
        return online.execute(query).fetchall()


def test_stored_cells_equal_those_that_stock_feast_writes(tmp_path: Path) -> None:
    write_tables(tmp_path, {"user_odd": awkward()})
    apply(tmp_path)
    materialize(tmp_path)
    stock = FeatureStore(config=stock_config(tmp_path))
    stock.provider.online_store.update(stock.config, [], stock.list_feature_views(), [], [], False)
    stock.write_to_online_store("user_odd", awkward().to_arrow(compat_level=pl.CompatLevel.oldest()).to_pandas())
    ours, theirs = (cells(tmp_path / "state" / name, "tandem_user_odd") for name in ("online.db", "stock.db"))
    assert len(ours) == 4 * 6
    # Stock also keeps numbers as text, which nobody searches.
    numbers = {name for name, dtype in awkward().schema.items() if dtype.is_numeric()}
    assert ours == [(key, name, value, None if name in numbers else text, when) for key, name, value, text, when in theirs]


def test_our_engine_guards_stores_that_are_not_ours(workspace: Path) -> None:
    config = stock_config(workspace, batch_engine={"type": "feature_repo.engine.PolarsComputeEngine"})
    store = FeatureStore(config=config)
    store.provider.online_store.update(config, [], store.list_feature_views(), [], [], False)
    store.write_to_online_store("user_stats", stats("ann", at(5), 50).to_pandas())
    store.materialize(at(-9), at(9))
    rows = UserReader(store).rows(["ann", "bob"])
    assert [row["user_events"] for row in rows] == [50, 7]
    assert rows[0]["history_items"] == ["i1", "film / ü 中 🎬"]


# --- definitions and Feast's own commands -----------------------------------------------------------------------------------


def test_definitions_is_the_only_file_that_feast_imports() -> None:
    assert [path.name for path in get_repo_files(FEATURE_REPO)] == ["definitions.py"]


def test_a_changed_schema_can_be_applied_and_services_follow(served: Path) -> None:
    changed = {name: table for name, table in tables().items() if name != "user_history"}
    changed["user_stats"] = changed["user_stats"].drop("user_mean_value").with_columns(user_new=pl.lit("new"))
    changed["user_moods"] = frame({"user_id": ["ann"], TIMESTAMP: [at(0)], "mood": ["calm"]})
    write_tables(served, changed)
    assert apply(served) == ("user_stats", "item_stats", "user_moods")
    materialize(served)
    assert UserReader(served).row("ann") == {"user_events": 2, "user_new": "new", "mood": "calm"}
    assert {view.name for view in open_store(served).list_feature_views()} == {"user_stats", "item_stats", "user_moods"}


def test_a_feature_may_change_its_type(served: Path) -> None:
    as_text = tables()["user_stats"].with_columns(pl.col("user_events").cast(pl.String))
    write_tables(served, tables() | {"user_stats": as_text})
    apply(served)
    materialize(served)
    assert UserReader(served).row("ann")["user_events"] == "2"


def test_what_was_built_but_not_applied_is_refused(served: Path) -> None:
    grown = tables()["user_stats"].with_columns(user_new=pl.lit(1, pl.Int64))
    write_tables(served, tables() | {"user_stats": grown})
    asked = frame({"user_id": ["ann"], TIMESTAMP: [at(9)]})
    for use in (
        lambda: materialize(served),
        lambda: historical(open_store(served), asked, ["user_stats"]),
        lambda: push(served, "user_stats", grown),
    ):
        with pytest.raises(IncompatibleError, match=r"user_stats.*features apply"):
            use()


def test_a_moved_workspace_goes_on(served: Path) -> None:
    moved = served.parent / "elsewhere"
    shutil.move(served, moved)
    assert events_of(moved, "ann") == 2
    asked = frame({"user_id": ["ann"], TIMESTAMP: [at(9)]})
    assert historical(open_store(moved), asked, ["user_stats"])["user_events"].to_list() == [2]
    apply(moved)
    assert materialize(moved).views["user_stats"].written == 2
    assert not served.exists()


def run(command: list[str], folder: Path, home: Path | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TANDEM_HOME"}
    environment |= {"TANDEM_HOME": str(home)} if home else {}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def described(store: FeatureStore) -> dict[str, dict[str, list[str]]]:
    """Feature services by name: their views, and those views' features."""
    services = store.list_feature_services()
    return {
        each.name: {view.name: [f.name for f in view.features] for view in each.feature_view_projections} for each in services
    }


def test_feast_apply_in_the_packages_folder_makes_what_our_apply_makes(tmp_path: Path, applied: Path) -> None:
    write_tables(tmp_path, tables())
    run([str(Path(sys.executable).with_name("feast")), "apply"], folder=FEATURE_REPO, home=tmp_path)
    theirs, ours = open_store(tmp_path), open_store(applied)
    assert {view.name: view for view in theirs.list_feature_views()} == {view.name: view for view in ours.list_feature_views()}
    assert {each.name: each for each in theirs.list_entities()} == {each.name: each for each in ours.list_entities()}
    assert described(theirs) == described(ours)
    assert set(described(ours)) == {"user_v1", "item_v1", "ranking_v1"}
    assert materialize(tmp_path).views["user_stats"].written == 2


def test_feasts_own_commands_work_in_the_workspace(workspace: Path) -> None:
    apply(workspace)  # a copy gets its own paths
    commands = [["apply"], ["materialize", "2020-01-01T00:00:00", "2026-06-01T00:00:00"]]
    program = f"from feast.cli.cli import cli\nfor command in {commands}: cli(command, standalone_mode=False)"
    run([sys.executable, "-c", program], folder=workspace, home=None)
    assert set(described(open_store(workspace))["ranking_v1"]) == set(ALL_VIEWS)
    assert events_of(workspace, "ann") == 2


def test_without_a_workspace_the_definitions_say_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANDEM_HOME", raising=False)
    with pytest.raises(InputError, match="TANDEM_HOME is not set"):
        runpy.run_path(str(FEATURE_REPO / "definitions.py"), run_name="definitions")
