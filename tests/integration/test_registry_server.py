"""Feast's registry on a real PostgreSQL, and shared servers: two workspaces in one place are refused, and a registry that is away
stops writes, not answers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import psycopg
import pytest

from feature_repo.erase import erase_user
from feature_repo.live import EventGate
from feature_repo.materialize import forget, materialize, push
from feature_repo.offline import apply, open_store
from feature_repo.online import UserReader
from feature_repo.online_config import OnlineConfig
from feature_repo.store import load_events, load_items
from feature_repo.views import TIMESTAMP, ViewSchema, write_views
from tandem.core.errors import IncompatibleError, InputError, UnavailableError
from tandem.core.schema import TIME
from tandem.service.settings import Settings, load_settings
from tandem.service.slate import Ask
from tandem.service.wiring import open_recommender

AT = datetime(2026, 1, 1, tzinfo=UTC)


def stats(events: int) -> pl.DataFrame:
    schema = {"user_id": pl.String, TIMESTAMP: TIME, "user_events": pl.Int64}
    return pl.DataFrame([("ann", AT, events)], schema=schema, orient="row")


def made(home: Path, events: int = 1) -> Path:
    """A workspace with one view and one row."""
    (home / "features").mkdir(parents=True)
    stats(events).write_parquet(home / "features" / "user_stats.parquet")
    write_views(home / "features", (ViewSchema.of_table("user_stats", "user", stats(events)),))
    return home


def events_of(home: Path) -> Any:
    return UserReader(home).row("ann")["user_events"]


def test_definitions_lie_on_the_server_and_everything_works_from_there(tmp_path: Path, postgres_url: str) -> None:
    home = made(tmp_path / "shop")
    apply(home, OnlineConfig(registry=postgres_url))
    materialize(home)
    assert events_of(home) == 1
    assert not (home / "state" / "registry.db").exists()
    apply(home)  # the choice stays
    assert open_store(home).registry.write_engine.dialect.name == "postgresql"
    apply(home, OnlineConfig())
    assert (home / "state" / "registry.db").exists()


def test_a_user_is_erased_online_too_when_the_registry_is_elsewhere(tmp_path: Path, postgres_url: str) -> None:
    home = made(tmp_path / "shop")
    apply(home, OnlineConfig(registry=postgres_url))
    materialize(home)
    assert erase_user(home, "ann").online == {"user_stats": 1}
    assert events_of(home) is None


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://host/db", "begins with 'mysql'"),
        ("postgresql://host", "lacks a part"),
        ("postgresql://host/db?colour=red", "unknown options"),
        ("postgresql://host/db?schema=a;b", "the schema 'a;b'"),
    ],
)
def test_registry_urls_that_mean_nothing_are_refused(url: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        OnlineConfig(registry=url)


def test_feasts_own_apply_twice_at_once_leaves_one_whole_registry(
    tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The password's place is a variable, which Feast expands, too."""
    home = made(tmp_path / "shop")
    monkeypatch.setenv("SHOP_SCHEMA", postgres_url.rpartition("=")[2])
    apply(home, OnlineConfig(registry=postgres_url))
    text = (home / "feature_store.yaml").read_text()
    (home / "feature_store.yaml").write_text(text.replace(os.environ["SHOP_SCHEMA"], "${SHOP_SCHEMA}"))
    grown = stats(1).with_columns(user_new=pl.lit(5, pl.Int64))
    grown.write_parquet(home / "features" / "user_stats.parquet")
    write_views(home / "features", (ViewSchema.of_table("user_stats", "user", grown),))
    command = [str(Path(sys.executable).with_name("feast")), "apply"]
    both = [subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [each.communicate(timeout=300)[0] for each in both]
    assert 0 in [each.returncode for each in both], said
    (view,) = open_store(home).list_feature_views()
    assert [each.name for each in view.features] == ["user_events", "user_new"]
    assert {each.name for each in open_store(home).list_feature_services()} == {"user_v1", "ranking_v1"}
    materialize(home)
    assert UserReader(home).row("ann") == {"user_events": 1, "user_new": 5}


@pytest.mark.parametrize("kind", ["redis", "postgres", "registry"])
def test_a_second_workspace_in_one_place_is_refused_and_changes_nothing(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("redis_url" if kind == "redis" else "postgres_url")
    config = OnlineConfig(registry=url) if kind == "registry" else OnlineConfig(url)
    first, second = made(tmp_path / "first", 1), made(tmp_path / "second", 2)
    apply(first, config)
    materialize(first)
    named = rf"workspace {first} on .* since .*; this one is {second} on .*online\.{'registry' if kind == 'registry' else 'url'}"
    for write in (
        lambda: apply(second, config),
        lambda: materialize(second),
        lambda: push(second, "user_stats", stats(9)),
        lambda: forget(second),
    ):
        with pytest.raises(IncompatibleError, match=named):
            write()
    assert events_of(first) == 1
    moved = Path(shutil.move(first, tmp_path / "moved"))
    apply(moved)
    assert materialize(moved).written == 1


def test_a_place_that_was_emptied_may_be_taken(tmp_path: Path, postgres_url: str) -> None:
    first, second = made(tmp_path / "first", 1), made(tmp_path / "second", 2)
    apply(first, OnlineConfig(postgres_url))
    address, _, schema = postgres_url.partition("?schema=")
    with psycopg.connect(address, autocommit=True) as conn:
        conn.execute(f"DROP SCHEMA {schema} CASCADE")  # type: ignore[arg-type]
    apply(second, OnlineConfig(postgres_url))
    materialize(second)
    assert events_of(second) == 2


# --- the registry is away ---------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path, tiny_workspace: Path) -> Settings:
    workspace = Path(shutil.copytree(tiny_workspace, tmp_path / "workspace"))
    return load_settings(workspace, {"TANDEM_SERVICE__BUDGET_MS": "60000"})


@pytest.mark.parametrize("how", ["hangs", "is gone"])
def test_without_the_registry_answers_go_on_and_writes_are_refused(
    settings: Settings, postgres_url: str, wire_to: Callable[[str], Any], how: str
) -> None:
    wire = wire_to(postgres_url)
    apply(settings.workspace, OnlineConfig(registry=wire.url))
    materialize(settings.workspace)
    user, item = load_events(settings.data)["user_id"][0], load_items(settings.data)["item_id"][0]
    recommender = open_recommender(settings)

    wire.alive.clear()
    if how == "is gone":
        wire.close()
    assert recommender.recommend(Ask(user_id=user)).degraded == ()
    recommender.close()
    started = time.monotonic()
    with pytest.raises(UnavailableError, match=r"registry \(127\.0\.0\.1\) does not answer"):
        materialize(settings.workspace)
    assert time.monotonic() - started < 30  # five seconds a try, on a busy machine
    click = {"event_id": "e1", "user_id": user, "item_id": item, "action": "click", "timestamp": "2026-02-01T10:00:00Z"}
    done = EventGate(settings.workspace, settings.features).push(pl.DataFrame([click]), datetime.now(UTC))
    assert (done.appended, done.pending) == (1, True)

    again = open_recommender(settings)  # a service that starts now does not fail
    slate = again.recommend(Ask(user_id=user))
    assert (slate.degraded, len(slate.items)) == (("user_features_unavailable",), 10)
    if how == "hangs":
        wire.alive.set()
        until = time.monotonic() + 60
        while again.recommend(Ask(user_id=user)).degraded and time.monotonic() < until:
            time.sleep(0.5)
        assert again.recommend(Ask(user_id=user)).degraded == ()
    again.close()
