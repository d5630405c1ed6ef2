"""Roll-out in a running service: arms, shadows, and challengers that break under load while every request is answered.

What breaks is broken for real: releases whose files are whole by their hashes, and fail or slow down when they answer.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import psycopg
import pytest
from fastapi.testclient import TestClient

from registry.assignment import arm_of, digest
from registry.experiments import ExperimentChange
from registry.release import create_release, verify_release
from registry.store import ReleaseStore
from registry.traffic import TOTAL
from registry.watch import LatencyLimit, RolloutConfig, ShareLimit
from retrieval.baselines import ItemKNN
from tandem.service import recipes
from tandem.service.app import Service, create_app
from tandem.service.recipes.releases import _release_facts, _release_parts, release_rollback
from tandem.service.recommend import Recommender
from tandem.service.settings import Settings, load_settings
from tandem.service.wiring import users_with_history

POSTGRES = os.environ.get("TANDEM_TEST_POSTGRES", "postgresql+psycopg://root@127.0.0.1:5432/test")
LOCAL = "http://127.0.0.1"
QUICK = RolloutConfig(
    failed=ShareLimit(0.02, 20),
    degraded=ShareLimit(0.02, 20),
    p95=LatencyLimit(may_rise=100.0, floor_ms=5000.0),  # nothing is slow on a busy machine, unless a test says so
)


@pytest.fixture
def settings(request: pytest.FixtureRequest, tiny_workspace: Path, tmp_path: Path) -> Iterator[Settings]:
    """A workspace with a champion, its registry in SQLite unless a test asks for PostgreSQL."""
    loaded = load_settings(Path(shutil.copytree(tiny_workspace, tmp_path / "workspace")), {})
    loaded = replace(loaded, service=replace(loaded.service, follow_seconds=0.1), rollout=QUICK)
    if getattr(request, "param", "sqlite") == "sqlite":
        yield loaded
        return
    with a_schema() as url:
        yield moved_to(url, loaded)


@contextmanager
def a_schema() -> Iterator[str]:
    """The address of an empty PostgreSQL schema."""
    try:
        connection = psycopg.connect(POSTGRES.replace("+psycopg", ""), connect_timeout=2, autocommit=True)
    except psycopg.OperationalError:
        pytest.skip("no PostgreSQL answers; name one in TANDEM_TEST_POSTGRES")
    name = f"tandem_test_{uuid.uuid4().hex[:12]}"
    with connection:
        connection.execute(f"CREATE SCHEMA {name}")
        yield f"{POSTGRES}?options=-csearch_path%3D{name}"
        connection.execute(f"DROP SCHEMA {name} CASCADE")


def moved_to(url: str, settings: Settings) -> Settings:
    """The same workspace with its champion in another registry."""
    old, new = ReleaseStore(settings.registry_url, settings.releases), ReleaseStore(url, settings.releases)
    champion = old.get(str(old.champion().name))
    new.add(champion.manifest, champion.folder)
    new.promote(champion.name, expected=None, who="a test", why="moved")
    old.close()
    new.close()
    return replace(settings, registry=replace(settings.registry, url=url))


@pytest.fixture
def store(settings: Settings) -> Iterator[ReleaseStore]:
    store = ReleaseStore(settings.registry_url, settings.releases)
    yield store
    store.close()


@pytest.fixture
def users(settings: Settings) -> list[str]:
    return users_with_history(settings.data, 5, 60)


@contextmanager
def running(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings, follow=True), LOCAL, raise_server_exceptions=False) as client:
        yield client


def service_of(client: TestClient) -> Service:
    service: Service = client.app.state.service  # type: ignore[attr-defined]
    return service


def within(seconds: float, is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if is_so():
            return True
        time.sleep(0.05)
    return False


def whole(settings: Settings, store: ReleaseStore, name: str) -> None:
    """A release that is as good as the champion: the same parts under another name."""
    _added(settings, store, name, _release_parts(settings))


def failing(settings: Settings, store: ReleaseStore, name: str) -> None:
    """A release that fails at every user with a history: its co-visits name items of a larger catalogue."""
    parts = _release_parts(settings)
    neighbours = ItemKNN.load(parts["covisit.safetensors"])
    path = settings.models / "broken.safetensors"
    ItemKNN(np.where(neighbours.indices >= 0, neighbours.indices + 100_000, -1).astype(np.int32), neighbours.values).save(path)
    _added(settings, store, name, {**parts, "covisit.safetensors": path})


def degrading(settings: Settings, store: ReleaseStore, name: str) -> None:
    """A release whose ranker asks for a feature that nobody has."""
    parts = _release_parts(settings)
    folder = Path(shutil.copytree(parts["ranker"], settings.models / "broken-ranker"))
    path = folder / "ranker.json"
    path.write_text(path.read_text().replace('"item_', '"itam_'))
    _added(settings, store, name, {**parts, "ranker": folder})


def _added(settings: Settings, store: ReleaseStore, name: str, parts: dict[str, Path]) -> None:
    create_release(parts, settings.releases / name, _release_facts(settings))
    store.add(verify_release(settings.releases / name), settings.releases / name)


def start(store: ReleaseStore, challenger: str, kind: str, percent: float) -> str:
    with store.work() as work:
        stage = work.start_experiment(challenger, kind, percent, who="a test", why="to see")  # type: ignore[arg-type]
        work.commit()
    return stage.experiment.name


def is_open(client: TestClient) -> bool:
    return service_of(client).rollout.stage is not None


@dataclass
class Load:
    """Callers that ask for users in turn until they are told to stop, and what they were answered."""

    client: TestClient | httpx.Client
    users: list[str]
    callers: int = 3
    answers: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(self.callers)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        while not self._stop.is_set():
            number += self.callers
            answer = self.client.post("/v1/recommend", json={"user_id": self.users[number % len(self.users)], "k": 5})
            self.answers.append((answer.status_code, answer.json()))

    @property
    def statuses(self) -> set[int]:
        return {status for status, _ in self.answers}


def served(client: TestClient, folder: Path) -> pl.DataFrame:
    """What stands in a log, once its writers have written it."""
    time.sleep(0.1)
    parts = sorted(folder.glob("part-*.parquet"))
    return pl.concat([pl.read_parquet(part) for part in parts], how="diagonal_relaxed") if parts else pl.DataFrame()


def test_a_canary_answers_its_share_and_everybody_keeps_their_arm_when_it_grows(
    settings: Settings, store: ReleaseStore, users: list[str]
) -> None:
    whole(settings, store, "second")
    name = start(store, "second", "canary", 30)
    with running(settings) as client:
        assert within(60, lambda: is_open(client))
        champion = service_of(client).release
        before = {user: client.post("/v1/recommend", json={"user_id": user, "k": 3}).json() for user in users}
        with store.work() as work:
            work.experiments.set_percent(70, "a test", "it holds")
            work.commit()
        assert within(30, lambda: getattr(service_of(client).rollout.stage, "percent", 0) == 70)
        after = {user: client.post("/v1/recommend", json={"user_id": user, "k": 3}).json() for user in users}
        why = client.get("/v1/why", params={"user_id": users[0], "item_id": after[users[0]]["items"][0]["item_id"]})
        shown = client.get("/metrics").text
    assert why.json()["verdict"] == "shown at position 1"
    for percent, answers in ((30, before), (70, after)):
        for user, answer in answers.items():
            arm = arm_of(digest(name, user), percent)
            assert (answer["experiment"], answer["arm"]) == (name, arm)
            assert answer["release"] == ("second" if arm == "challenger" else champion)
    assert {user for user in users if before[user]["arm"] == "challenger"} < {
        user for user in users if after[user]["arm"] == "challenger"
    }
    log = served(client, settings.workspace / "served")
    kept = log.unique("request_id").select("request_id", "experiment", "arm", "stage", "unit", "user_id")
    told = {row["request_id"]: row for row in kept.to_dicts()}
    for stage, answers in ((1, before), (2, after)):
        for user, answer in answers.items():
            row = told[answer["request_id"]]
            assert (row["experiment"], row["arm"], row["stage"], row["user_id"]) == (name, answer["arm"], stage, user)
            assert row["unit"] == digest(name, user).hex()[:32]
    count = sum(answer["arm"] == "challenger" for answer in before.values())
    count += sum(answer["arm"] == "challenger" for answer in after.values())
    assert f'tandem_arm_requests_total{{arm="challenger",experiment="{name}",outcome="answered"}} {float(count)}' in shown


def test_somebody_without_an_id_keeps_the_arm_of_their_session(settings: Settings, store: ReleaseStore) -> None:
    whole(settings, store, "second")
    start(store, "second", "ab", 50)
    with running(settings) as client:
        assert within(60, lambda: is_open(client))
        for session in ("s1", "s2", "s3", "s4", "s5", "s6"):
            asked = [client.post("/v1/recommend", json={"context": {"session_id": session}, "k": 2}).json() for _ in range(3)]
            assert len({answer["arm"] for answer in asked}) == 1
        strangers = [client.post("/v1/recommend", json={"k": 2}).json()["arm"] for _ in range(30)]
    assert set(strangers) == {"champion", "challenger"}


@pytest.mark.parametrize("settings", ["sqlite", "postgresql"], indirect=True)
def test_a_failing_challenger_is_ended_under_load_and_no_request_fails(
    settings: Settings, store: ReleaseStore, users: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Fault 35: two processes serve; within ten seconds of breaking the canary is over in both, ended by exactly one of them."""
    failing(settings, store, "broken")
    with running(settings) as one, running(settings) as two, caplog.at_level("INFO", "tandem.service"):
        champion = service_of(one).release
        with Load(one, users) as first, Load(two, users) as second:
            name = start(store, "broken", "canary", 40)
            assert within(60, lambda: is_open(one) and is_open(two))
            opened = time.monotonic()
            assert within(60, lambda: not is_open(one) and not is_open(two))
            took = time.monotonic() - opened
            before = len(first.answers)
            assert within(30, lambda: len(first.answers) > before + 20)
    answers = first.answers + second.answers
    assert first.statuses | second.statuses == {200}
    assert all(len(answer["items"]) == 5 for _, answer in answers)
    assert {answer["release"] for _, answer in answers} == {champion}
    fell_back = [answer for _, answer in answers if "challenger_failed" in answer["degraded"]]
    assert fell_back
    assert {(answer["experiment"], answer["arm"]) for answer in fell_back} == {(name, "challenger")}
    assert {answer["experiment"] for _, answer in first.answers[before + 5 :]} == {None}
    with store.look() as work:
        story = work.experiments.story(name)
        total = work.traffic.of_experiment(story.experiment.number, TOTAL)["challenger"]
    assert story.ended is not None
    assert (story.ended.outcome, [change.kind for change in story.changes]) == ("guardrail", ["start", "end"])
    assert story.ended.why.startswith("automatic: ")
    assert "requests failed (100.0%)" in story.ended.why
    assert story.ended.who.startswith("tandem serve, process ")
    assert total.failed == total.requests <= len(fell_back)
    assert took < 10


def test_while_nobody_can_write_to_the_registry_each_process_guards_itself(
    settings: Settings, store: ReleaseStore, users: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer holds the tables: the challenger goes here at once, and in the registry as soon as it may be written."""
    monkeypatch.setattr("registry.database.BUSY_MILLISECONDS", 300)
    failing(settings, store, "broken")
    name = start(store, "broken", "canary", 50)
    with running(settings) as client, sqlite3.connect(settings.state / "tandem.db", isolation_level=None) as writer:
        assert within(60, lambda: is_open(client))
        writer.execute("BEGIN IMMEDIATE")
        with Load(client, users) as load:
            assert within(60, lambda: not is_open(client))
            assert ended(store, name) is None
            writer.execute("ROLLBACK")
            assert within(30, lambda: ended(store, name) is not None)
            assert not is_open(client)
    writer.close()
    assert load.statuses == {200}
    assert getattr(ended(store, name), "outcome", None) == "guardrail"


def test_a_challenger_that_only_degrades_is_ended(settings: Settings, store: ReleaseStore, users: list[str]) -> None:
    degrading(settings, store, "worse")
    name = start(store, "worse", "canary", 50)
    with running(settings) as client:
        assert within(60, lambda: is_open(client))
        with Load(client, users) as load:
            assert within(60, lambda: not is_open(client))
    with store.look() as work:
        ended = work.experiments.story(name).ended
    assert load.statuses == {200}
    assert ended is not None
    assert "requests degraded" in ended.why


def test_a_slow_challenger_is_ended(
    settings: Settings, store: ReleaseStore, users: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(settings, store, "second")
    name = start(store, "second", "ab", 50)
    settings = replace(settings, rollout=replace(QUICK, p95=LatencyLimit(may_rise=0.5, floor_ms=10, minimum_requests=60)))
    with running(settings) as client:
        assert within(60, lambda: is_open(client))
        answer = Recommender.recommend

        def slowly(self: Recommender, *arguments: Any) -> Any:
            if self.release == "second":
                time.sleep(1.0)
            return answer(self, *arguments)

        monkeypatch.setattr(Recommender, "recommend", slowly)
        with Load(client, users, callers=6) as load:
            assert within(120, lambda: not is_open(client))
    with store.look() as work:
        ended = work.experiments.story(name).ended
    assert load.statuses == {200}
    assert ended is not None
    assert "p95 is" in ended.why


def test_a_shadow_is_unseen_logged_and_never_waited_for(
    settings: Settings, store: ReleaseStore, users: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The challenger stands still for a while: users are answered all the same, and what does not fit the queue is counted."""
    whole(settings, store, "second")
    name = start(store, "second", "shadow", 100)
    settings = replace(settings, rollout=replace(QUICK, shadow_queue=5))
    go_on = threading.Event()
    answer = Recommender.recommend

    def held(self: Recommender, *arguments: Any) -> Any:
        if self.release == "second":
            go_on.wait(120)
        return answer(self, *arguments)

    with running(settings) as client:
        assert within(60, lambda: is_open(client))
        champion = service_of(client).release
        monkeypatch.setattr(Recommender, "recommend", held)
        answers = [client.post("/v1/recommend", json={"user_id": user, "k": 5}) for user in users[:20]]
        assert [each.status_code for each in answers] == [200] * 20
        assert {(each.json()["release"], each.json()["experiment"], each.json()["arm"]) for each in answers} == {
            (champion, None, None)
        }
        go_on.set()

        def counted() -> tuple[int, int]:
            with store.look() as work:
                own = work.traffic.of_experiment(1, TOTAL)
            return own["challenger"].requests if "challenger" in own else 0, own["challenger"].dropped if own else 0

        assert within(60, lambda: sum(counted()) == 20)
        assert counted()[1] >= 20 - 6
        assert (
            f'tandem_arm_requests_total{{arm="challenger",experiment="{name}",outcome="dropped"}}' in client.get("/metrics").text
        )
    shadow = served(client, settings.workspace / "shadow")
    seen = served(client, settings.workspace / "served")
    assert shadow["request_id"].n_unique() == counted()[0] > 0
    assert set(shadow["release"]) == {"second"}
    assert set(seen.filter(pl.col("experiment") == name)["arm"]) == {"champion"}
    assert set(shadow["request_id"]) <= set(seen["request_id"])
    recipes.users_erase(settings, shadow["user_id"][0])
    assert shadow["user_id"][0] not in set(served(client, settings.workspace / "shadow")["user_id"])


@pytest.mark.parametrize("settings", ["sqlite", "postgresql"], indirect=True)
def test_a_bad_promotion_is_rolled_back_once_by_one_of_two_processes(
    settings: Settings, store: ReleaseStore, users: list[str]
) -> None:
    degrading(settings, store, "worse")
    with running(settings) as one, running(settings) as two:
        champion = service_of(one).release
        with Load(one, users) as first, Load(two, users) as second:
            assert within(60, lambda: len(first.answers) > 60 and len(second.answers) > 60)
            assert within(30, lambda: _counted(store, 1) > 40)
            store.promote("worse", expected=champion, who="a test", why="the gate was not asked")
            assert within(90, lambda: store.champion().name == champion)
            assert within(60, lambda: service_of(one).release == service_of(two).release == champion)
            time.sleep(1)
    history = store.history()
    assert [(line.kind, line.name) for line in history[1:]] == [("promote", "worse"), ("rollback", champion)]
    assert history[-1].why.startswith("automatic: ")
    assert "requests degraded" in history[-1].why
    assert first.statuses | second.statuses == {200}


def _counted(store: ReleaseStore, version: int) -> int:
    with store.look() as work:
        return work.traffic.of_champion(version).requests


def test_a_promotion_that_was_rolled_back_by_hand_and_came_again_is_a_new_one(settings: Settings, store: ReleaseStore) -> None:
    """An automatic rollback that comes late hits the promotion that it saw, and no other."""
    whole(settings, store, "second")
    champion = store.champion().name
    store.promote("second", expected=champion, who="a test", why="newer")
    seen = store.champion()
    store.rollback(expected="second", who="a test", why="by hand")
    store.promote("second", expected=champion, who="a test", why="mended")
    with pytest.raises(Exception, match=r"change 2\) is over: 'second' is live since .* \(change 4\)"):
        release_rollback(settings, None, "automatic: late", who="a process", expected=seen)
    assert store.champion().name == "second"


def test_a_challenger_that_wins_goes_on_as_it_is_loaded(settings: Settings, store: ReleaseStore, users: list[str]) -> None:
    """No third copy in memory, and nobody is sent back to the old champion in between."""
    whole(settings, store, "second")
    name = start(store, "second", "canary", 50)
    with running(settings) as client:
        service = service_of(client)
        champion = service.release
        assert within(60, lambda: is_open(client))
        challenger = service.rollout.challenger
        with Load(client, users) as load:
            assert within(60, lambda: len(load.answers) > 30)
            store.promote("second", expected=champion, who="a test", why="it won")
            assert within(30, lambda: service.release == "second")
            before = len(load.answers)
            assert within(60, lambda: len(load.answers) > before + 30)
        assert service.recommender is challenger
        assert not is_open(client)
    assert load.statuses == {200}
    told = [answer for _, answer in load.answers]
    assert {answer["release"] for answer in told if answer["arm"] == "challenger"} == {"second"}
    assert {(answer["release"], answer["experiment"]) for answer in told[before + 4 :]} == {("second", None)}
    assert getattr(ended(store, name), "outcome", None) == "won"


def test_a_challenger_that_left_gives_its_memory_back(
    settings: Settings, store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.service.app._LAST_REQUEST_S", 0.1)
    whole(settings, store, "second")
    start(store, "second", "canary", 50)
    with running(settings) as client:
        assert within(60, lambda: is_open(client))
        running_here = service_of(client).rollout._running
        assert running_here is not None
        challenger = weakref.ref(running_here.challenger)
        del running_here
        with store.work() as work:
            work.experiments.end(1, "stopped", "a test", "seen enough")
            work.commit()
        assert within(30, lambda: not is_open(client))
        assert within(30, lambda: gc.collect() >= 0 and challenger() is None)


def test_a_damaged_challenger_is_said_once_and_the_champion_answers(
    settings: Settings, store: ReleaseStore, caplog: pytest.LogCaptureFixture
) -> None:
    whole(settings, store, "second")
    weights = settings.releases / "second" / "towers" / "towers.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + bytes([weights.read_bytes()[-1] ^ 1]))
    with running(settings) as client, caplog.at_level("INFO", "tandem.service"):
        start(store, "second", "canary", 100)
        assert within(30, lambda: "challenger_refused" in caplog.text)
        time.sleep(0.5)
        answer = client.post("/v1/recommend", json={"user_id": "anybody"})
        assert (answer.status_code, answer.json()["release"]) == (200, service_of(client).release)
    assert caplog.text.count("challenger_refused") == 1


def test_processes_of_one_service_end_a_canary_together(settings: Settings, store: ReleaseStore, users: list[str]) -> None:
    """`tandem serve --workers 2` as it is run: real processes, a real port, callers that never stop."""
    failing(settings, store, "broken")
    with (settings.workspace / "tandem.toml").open("a") as file:
        file.write("follow_seconds = 0.2\n[rollout.failed]\nminimum_requests = 20\n[rollout.p95]\nfloor_ms = 5000.0\n")
    with serving(settings) as client, Load(client, users, callers=4) as load:
        name = start(store, "broken", "canary", 50)
        fell_back = lambda: sum("challenger_failed" in answer["degraded"] for _, answer in load.answers)  # noqa: E731
        assert within(120, lambda: fell_back() > 0)
        assert within(60, lambda: ended(store, name) is not None)
        assert within(30, lambda: all(answer["experiment"] is None for _, answer in load.answers[-40:]))
        before = len(load.answers)
        assert within(60, lambda: len(load.answers) > before + 60)
    assert load.statuses == {200}
    assert {answer["experiment"] for _, answer in load.answers[before + 4 :]} == {None}
    assert all(len(answer["items"]) == 5 for _, answer in load.answers)
    with store.look() as work:
        assert [change.kind for change in work.experiments.story(name).changes] == ["start", "end"]


def ended(store: ReleaseStore, name: str) -> ExperimentChange | None:
    with store.look() as work:
        return work.experiments.story(name).ended


@contextmanager
def serving(settings: Settings) -> Iterator[httpx.Client]:
    """Two processes on a free port of this machine, until the end of the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from tandem.service.cli import main; main()", "--workspace", str(settings.workspace)]
    process = subprocess.Popen(
        [*command, "serve", "--workers", "2", "--port", str(port), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["workers"] == 2
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            assert within(120, lambda: answers(client))
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False
