"""A running service follows promotions and rollbacks, drops no request over it, and keeps what works when the new one fails."""

from __future__ import annotations

import gc
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from registry.store import ReleaseStore
from tandem.service import recipes
from tandem.service.app import create_app
from tandem.service.follow import check_room
from tandem.service.settings import Settings, load_settings


@pytest.fixture
def settings(tiny_workspace: Path, tmp_path: Path) -> Settings:
    loaded = load_settings(Path(shutil.copytree(tiny_workspace, tmp_path / "workspace")), {})
    return replace(loaded, service=replace(loaded.service, follow_seconds=0.05))


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings, follow=True), "http://127.0.0.1", raise_server_exceptions=False) as opened:
        yield opened


def serving(client: TestClient) -> str:
    name: str = client.get("/readyz").json()["release"]
    return name


def within(seconds: float, is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if is_so():
            return True
        time.sleep(0.05)
    return False


def test_promotion_and_rollback_reach_a_busy_service_without_a_failed_request(client: TestClient, settings: Settings) -> None:
    first = serving(client)
    recipes.release_create(settings, "second")
    answers: list[tuple[int, str]] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answer = client.post("/v1/recommend", json={"user_id": "anybody", "k": 3})
            answers.append((answer.status_code, answer.json().get("release", "")))

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    recipes.release_promote(settings, "second", because="newer")
    followed = within(60, lambda: serving(client) == "second")
    recipes.release_rollback(settings)
    returned = within(60, lambda: serving(client) == first)
    stop.set()
    for asker in askers:
        asker.join()
    assert (followed, returned) == (True, True)
    assert {status for status, _ in answers} == {200}
    assert {release for _, release in answers} == {first, "second"}
    assert f'tandem_release_info{{release="{first}"}} 1.0' in client.get("/metrics").text
    told = client.get("/v1/releases").json()["history"]
    assert [(change["kind"], change["name"]) for change in told] == [
        ("promote", first), ("promote", "second"), ("rollback", first),
    ]  # fmt: skip
    assert told[0]["until"] == told[1]["at"]
    assert told[-1]["until"] is None
    assert (told[1]["why"], told[1]["previous"]) == ("newer", first)
    assert any("ndcg@10" in sentence for sentence in told[1]["gate"])
    assert told[1]["figures"]["ndcg@10"] > 0
    assert told[1]["window"]


def test_a_release_that_answered_before_gives_its_memory_back(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.service.app._LAST_REQUEST_S", 0.1)
    with TestClient(create_app(settings, follow=True), "http://127.0.0.1") as client:
        service = client.app.state.service  # type: ignore[attr-defined]
        old = weakref.ref(service.recommender)
        recipes.release_create(settings, "second")
        recipes.release_promote(settings, "second", because="newer")
        assert within(60, lambda: serving(client) == "second")
        assert within(30, lambda: gc.collect() >= 0 and old() is None)


def test_a_damaged_champion_leaves_the_old_release_answering(
    client: TestClient, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    first = serving(client)
    recipes.release_create(settings, "broken")
    weights = settings.releases / "broken" / "towers" / "towers.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + bytes([weights.read_bytes()[-1] ^ 1]))
    store = ReleaseStore(settings.registry_url, settings.releases)
    with caplog.at_level("INFO", "tandem.service"):
        store.promote("broken", expected=first, who="a test", why="its hash was not looked at")
        assert within(30, lambda: "release_refused" in caplog.text)
    answer = client.post("/v1/recommend", json={"user_id": "anybody"})
    assert (answer.status_code, answer.json()["release"], serving(client)) == (200, first, first)
    recipes.release_create(settings, "third")
    store.promote("third", expected="broken", who="a test", why="whole")
    store.close()
    assert within(60, lambda: serving(client) == "third")


def test_without_memory_for_two_the_old_release_stays(tmp_path: Path) -> None:
    folder, meminfo = tmp_path / "a release", tmp_path / "meminfo"
    folder.mkdir()
    (folder / "index").write_bytes(bytes(3 << 20))
    meminfo.write_text("MemTotal: 99999 kB\nMemAvailable: 12288 kB\n")
    check_room(folder, meminfo)
    meminfo.write_text("MemAvailable: 12287 kB\n")
    with pytest.raises(RuntimeError, match="needs some 12 MiB beside the release that answers, 11 are free"):
        check_room(folder, meminfo)
    check_room(folder, tmp_path / "no such file")
