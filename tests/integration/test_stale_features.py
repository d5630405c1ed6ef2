"""Features that got old: a soft limit shows in a metric, a hard one makes them count as missing, and the slate says so."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from feature_repo.checks import FreshnessLimits
from feature_repo.materialize import materialize
from feature_repo.offline import apply
from feature_repo.pins import FEATURES_FILE
from feature_repo.served import ServedLog
from feature_repo.snapshot import Snapshot
from feature_repo.store import load_events
from feature_repo.views import SCHEMA_FILE
from tandem.core.errors import InputError
from tandem.core.folders import read_json, write_json
from tandem.service import recipes
from tandem.service.app import create_app
from tandem.service.settings import CheckSettings, Settings, load_settings
from tandem.service.slate import Ask, Slate
from tandem.service.wiring import open_recommender

US = timedelta(microseconds=1)
LIMIT = timedelta(hours=168)


@pytest.fixture
def settings(tmp_path: Path, tiny_workspace: Path) -> Settings:
    workspace = Path(shutil.copytree(tiny_workspace, tmp_path / "workspace"))
    shutil.rmtree(workspace / "served", ignore_errors=True)
    return load_settings(workspace, {"TANDEM_SERVICE__BUDGET_MS": "60000"})  # on a busy machine, too


def user_of(settings: Settings) -> str:
    user: str = load_events(settings.data)["user_id"][0]
    return user


def as_of(settings: Settings) -> datetime:
    return Snapshot.load(settings.workspace / "snapshot").as_of


def asked(settings: Settings, now: datetime) -> Slate:
    recommender = open_recommender(settings)
    slate = recommender.recommend(Ask(user_id=user_of(settings)), now)
    recommender.close()
    return slate


def test_item_features_beyond_the_hard_limit_count_as_missing_and_the_slate_says_so(settings: Settings) -> None:
    moment = as_of(settings) + LIMIT
    young, old = asked(settings, moment), asked(settings, moment + US)
    assert (young.degraded, old.degraded) == ((), ("stale_features",))
    assert len(old.items) == 10
    assert [item.score for item in young.items] != [item.score for item in old.items]
    kept = [json.loads(text) for text in ServedLog(settings.workspace / "served").read()["features_read"].drop_nulls()]
    assert sorted("item" in read for read in kept) == [False, True]  # what was not read cannot be held against a table


def test_the_hard_limit_is_a_setting_and_can_be_switched_off(settings: Settings) -> None:
    never = replace(settings, checks=CheckSettings(FreshnessLimits(stale_hours=0)))
    soon = replace(settings, checks=CheckSettings(FreshnessLimits(stale_hours=1)))
    assert asked(never, as_of(settings) + 100 * LIMIT).degraded == ()
    assert asked(soon, as_of(settings) + timedelta(hours=2)).degraded == ("stale_features",)
    for hours in ({"fresh_hours": 0}, {"stale_hours": -1}):
        with pytest.raises(InputError, match="limit"):
            FreshnessLimits(**hours)


def test_a_users_row_older_than_its_views_ttl_counts_as_missing_and_the_slate_says_so(settings: Settings) -> None:
    """The release is made anew on such a view: one that was built on it without a ttl would be refused."""
    for path in (settings.feature_tables / SCHEMA_FILE, settings.models / "ranker" / FEATURES_FILE):
        raw = read_json(path)
        views = [view | {"ttl_days": 1.0} if view["name"] == "user_history" else view for view in raw["views"]]
        write_json(path, raw | {"views": views})
    apply(settings.workspace)
    materialize(settings.workspace)
    recipes.release_create(settings, "with-ttl")
    recipes.release_promote(settings, "with-ttl", because="histories expire", force=True)
    slate = asked(settings, as_of(settings))
    newest = load_events(settings.data)["timestamp"].max()
    assert isinstance(newest, datetime)
    assert datetime.now(UTC) - newest > timedelta(days=1)
    assert (slate.degraded, slate.cold_start) == (("stale_features",), True)  # without a history everybody is a stranger


def test_the_soft_limit_is_a_metric(settings: Settings) -> None:
    """The world ended in the past: by today's clock its features are older than two days, and younger than a century."""
    today = replace(settings, service=replace(settings.service, clock="now"))
    for hours, expected in ((48.0, "1.0"), (1e6, "0.0")):
        limits = CheckSettings(FreshnessLimits(fresh_hours=hours, stale_hours=0))
        with TestClient(create_app(replace(today, checks=limits)), "http://127.0.0.1") as client:
            assert client.post("/v1/recommend", json={"user_id": user_of(settings)}).json()["degraded"] == []
            assert f"\ntandem_features_old {expected}\n" in client.get("/v1/metrics").text
