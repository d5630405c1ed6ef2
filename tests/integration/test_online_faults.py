"""Serving while the online server is slow or away: a fallback within the time limit, and back again by itself."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from feature_repo.materialize import materialize
from feature_repo.offline import apply
from feature_repo.online_config import OnlineConfig
from feature_repo.store import load_events
from tandem.service.app import create_app
from tandem.service.breaker import PAUSE_S
from tandem.service.recommend import Recommender
from tandem.service.settings import Settings, load_settings
from tandem.service.slate import Ask
from tandem.service.wiring import open_recommender


@pytest.fixture(params=["redis", "postgres"])
def server_url(request: pytest.FixtureRequest) -> str:
    """An online store of its own on a real server."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def wire(server_url: str, wire_to: Callable[[str], Any]) -> Any:
    """The way to that server, which can go dead or slow."""
    return wire_to(server_url)


@pytest.fixture
def settings(tmp_path: Path, tiny_workspace: Path, wire: Any, server_url: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The tiny world, its users on a server behind the wire."""
    monkeypatch.setattr("tandem.service.wiring.USER_READ_MS", LIMIT_MS)
    workspace = Path(shutil.copytree(tiny_workspace, tmp_path / "workspace"))
    apply(workspace, OnlineConfig(wire.url))
    materialize(workspace)
    return load_settings(workspace, {"TANDEM_SERVICE__BUDGET_MS": "60000"})  # on a busy machine, too


@pytest.fixture
def served(settings: Settings) -> Iterator[Recommender]:
    """Its champion."""
    recommender = open_recommender(settings)
    yield recommender
    recommender.close()


@pytest.fixture
def user(tiny_workspace: Path) -> str:
    known: str = load_events(tiny_workspace / "data")["user_id"][0]
    return known


LOST = ("user_features_unavailable",)
LIMIT_MS = 500
"""Instead of 30: a machine that does other work, too, must not call a store that answers lost."""
BUSY_MS = 8000
"""What a call may take there until it gives up."""


def test_a_store_that_hangs_costs_one_time_limit_and_comes_back(served: Recommender, wire: Any, user: str) -> None:
    known = served.recommend(Ask(user_id=user))
    assert (known.degraded, known.cold_start) == ((), False)

    wire.alive.clear()
    hanging = served.recommend(Ask(user_id=user))
    assert hanging.degraded == LOST
    assert len(hanging.items) == 10
    assert hanging.took_ms["user"] < BUSY_MS  # the wire never answers: without a limit this would take for ever

    before = wire.connections
    assert served.recommend(Ask(user_id=user)).degraded == LOST
    assert wire.connections == before  # the breaker is open: the store is left alone

    time.sleep(PAUSE_S)
    assert served.recommend(Ask(user_id=user)).took_ms["user"] < BUSY_MS  # nor does a new connection wait for ever
    wire.alive.set()
    time.sleep(PAUSE_S)
    again = served.recommend(Ask(user_id=user))
    assert (again.degraded, again.cold_start) == ((), False)


def test_a_store_that_became_slow_piles_up_no_threads(served: Recommender, wire: Any, user: str) -> None:
    """Each piece of an answer takes two seconds, while sixteen ask at once."""
    served.recommend(Ask(user_id=user))
    threads = threading.active_count()
    wire.delay_s = 2.0
    with ThreadPoolExecutor(16) as pool:
        slates = [each.result() for each in [pool.submit(served.recommend, Ask(user_id=user)) for _ in range(64)]]
    assert {slate.degraded for slate in slates} == {LOST}
    assert max(slate.took_ms["user"] for slate in slates) < BUSY_MS  # one whole read of four views would take 16 s
    assert wire.connections <= 2 * 16
    carriers = 2 * wire.connections
    assert threading.active_count() <= threads + carriers + 1


def test_a_store_that_is_gone_is_no_reason_to_fail(served: Recommender, wire: Any, user: str) -> None:
    wire.alive.clear()
    wire.close()
    slate = served.recommend(Ask(user_id=user))
    assert (slate.degraded, len(slate.items)) == (LOST, 10)


def test_the_service_stays_ready_and_counts_what_it_lost(settings: Settings, wire: Any, user: str) -> None:
    with TestClient(create_app(settings), "http://127.0.0.1") as client:
        assert client.post("/v1/recommend", json={"user_id": user}).json()["degraded"] == []
        wire.alive.clear()
        answers = [client.post("/v1/recommend", json={"user_id": user}) for _ in range(3)]
        assert [(answer.status_code, answer.json()["degraded"]) for answer in answers] == [(200, list(LOST))] * 3
        assert client.get("/v1/readyz").status_code == 200
        assert 'tandem_degraded_total{reason="user_features_unavailable"} 3.0' in client.get("/v1/metrics").text
        wire.alive.set()
