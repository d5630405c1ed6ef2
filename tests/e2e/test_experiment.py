"""`tandem experiment` from start to end, on a service that really serves, with people whose clicks are known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from registry.assignment import arm_of, digest
from registry.store import ReleaseStore
from tandem.service import recipes
from tandem.service.app import create_app
from tandem.service.cli import app
from tandem.service.settings import Settings, load_settings

PEOPLE = [f"visitor {number}" for number in range(260)]


@pytest.fixture
def settings(tiny_workspace: Path, tmp_path: Path) -> Settings:
    loaded = load_settings(Path(shutil.copytree(tiny_workspace, tmp_path / "workspace")), {})
    shutil.rmtree(loaded.workspace / "served", ignore_errors=True)
    return replace(loaded, service=replace(loaded.service, follow_seconds=0.1))


@pytest.fixture
def challenger(settings: Settings) -> str:
    name: str = recipes.release_create(settings, "second").data["release"]
    return name


def tandem(settings: Settings, *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, answer, and what went to standard error."""
    done = CliRunner().invoke(app, ["--workspace", str(settings.workspace), "experiment", *words, "--json"])
    return done.exit_code, json.loads(done.stdout) if done.stdout else {}, done.stderr


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings, follow=True), "http://127.0.0.1") as opened:
        yield opened


def visit(client: TestClient, name: str, clicks: dict[str, float], people: list[str]) -> None:
    """Everybody asks once; in each arm the given share of the people clicks the first item."""
    events = []
    turn = dict.fromkeys(clicks, 0.0)
    for person in people:
        slate = client.post("/v1/recommend", json={"user_id": person, "k": 2}).json()
        assert slate["experiment"] == name
        turn[slate["arm"]] += clicks[slate["arm"]]
        if turn[slate["arm"]] >= 1:
            turn[slate["arm"]] -= 1
            item = slate["items"][0]["item_id"]
            events.append({"user_id": person, "item_id": item, "action": "click", "request_id": slate["request_id"]})
    taken = client.post("/v1/events", json={"events": events}).json()
    assert taken["refused"] == []


def test_the_commands_tell_what_is_open_and_refuse_a_second(settings: Settings, challenger: str) -> None:
    code, told, _ = tandem(settings, "start", challenger, "--percent", "10", "--because", "new towers")
    assert (code, told["experiment"], told["kind"], told["percent"]) == (0, "second-canary-1", "canary", 10)
    code, _, said = tandem(settings, "start", challenger, "--kind", "shadow", "--because", "again")
    assert code == 1
    assert "experiment 'second-canary-1' (canary of 'second', 10%) is open since" in said
    assert tandem(settings, "set", "--percent", "20", "--because", "it holds")[1]["percent"] == 20
    assert tandem(settings, "set", "--percent", "200", "--because", "typo")[0] == 2
    code, told, _ = tandem(settings, "list")
    assert [(each["open"], [change["kind"] for change in each["changes"]]) for each in told["experiments"]] == [
        (True, ["start", "set"])
    ]
    assert tandem(settings, "report")[1]["split"]["p"] is None
    assert tandem(settings, "check")[0] == 0
    assert tandem(settings, "stop", "--because", "seen enough")[0] == 0
    assert tandem(settings, "stop", "--because", "again")[0] == 1
    assert tandem(settings, "check")[1]["made"].startswith("no experiment is open")


def test_a_release_that_is_damaged_or_unknown_does_not_start(settings: Settings, challenger: str) -> None:
    assert tandem(settings, "start", "nobody", "--because", "x")[0] == 1
    weights = settings.releases / challenger / "towers" / "towers.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + bytes([weights.read_bytes()[-1] ^ 1]))
    code, _, said = tandem(settings, "start", challenger, "--because", "x")
    assert (code, "towers.safetensors" in said) == (1, True)
    assert tandem(settings, "list")[1]["experiments"] == []


def started(settings: Settings, client: TestClient, *words: str) -> str:
    """An experiment that the service takes part in, from the next request on."""
    code, told, said = tandem(settings, "start", *words, "--because", "a test")
    assert code == 0, said
    client.app.state.service._watcher.look()  # type: ignore[attr-defined]
    name: str = told["experiment"]
    return name


def test_a_worse_challenger_is_read_out_and_ended_by_check(settings: Settings, challenger: str, client: TestClient) -> None:
    name = started(settings, client, challenger, "--kind", "ab")
    visit(client, name, {"champion": 0.6, "challenger": 0.05}, PEOPLE)
    _flush(client)
    code, told, _ = tandem(settings, "report")
    found = told["metrics"]["click/slate"]
    in_arm = {arm: [p for p in PEOPLE if arm_of(digest(name, p), 50) == arm] for arm in ("champion", "challenger")}
    assert code == 0
    assert (told["split"]["champion"], told["split"]["challenger"]) == (len(in_arm["champion"]), len(in_arm["challenger"]))
    assert found["mean_a"] == pytest.approx(0.6, abs=0.01)
    assert found["mean_b"] == pytest.approx(0.05, abs=0.01)
    assert found["low"] <= found["difference"] <= found["high"] < 0
    assert told["metrics"]["slates/user"]["difference"] == 0
    assert {row["arm"]: (row["failed"], row["dropped"]) for row in told["arms"]} == {"champion": (0, 0), "challenger": (0, 0)}
    code, told, _ = tandem(settings, "check")
    assert (code, told["ended"], told["metric"]) == (3, True, "click/slate")
    assert "surely worse by more than 0" in told["made"]
    store = ReleaseStore(settings.registry_url, settings.releases)
    with store.look() as work:
        ended = work.experiments.story(name).ended
    store.close()
    assert ended is not None
    assert (ended.outcome, ended.why.startswith("automatic: click/slate: challenger 0.0")) == ("lost", True)
    assert tandem(settings, "check")[0] == 0
    client.app.state.service._watcher.look()  # type: ignore[attr-defined]
    assert client.post("/v1/recommend", json={"user_id": PEOPLE[0], "k": 2}).json()["experiment"] is None
    assert tandem(settings, "report", name)[1]["metrics"]["click/slate"] == found, "what comes after the end does not count"


def test_an_equal_challenger_goes_on(settings: Settings, challenger: str, client: TestClient) -> None:
    name = started(settings, client, challenger, "--kind", "ab")
    visit(client, name, {"champion": 0.3, "challenger": 0.3}, PEOPLE)
    _flush(client)
    code, told, _ = tandem(settings, "check")
    assert (code, told["ended"]) == (0, False)
    assert "not shown to be worse" in told["made"]


def test_a_broken_split_is_not_read_out(settings: Settings, challenger: str, client: TestClient) -> None:
    """Two of three of the challenger's people never come back to be logged: whoever is left is not comparable."""
    name = started(settings, client, challenger, "--kind", "ab")
    of_challenger = [person for person in PEOPLE if arm_of(digest(name, person), 50) == "challenger"]
    lost = set(of_challenger) - set(of_challenger[::3])
    visit(client, name, {"champion": 0.1, "challenger": 0.9}, [person for person in PEOPLE if person not in lost])
    _flush(client)
    code, told, _ = tandem(settings, "report")
    assert (code, told["split"]["broken"], told["metrics"]) == (3, True, {})
    assert "the split is broken" in told["made"]
    code, _, said = tandem(settings, "check")
    assert code == 1
    assert "the split is broken" in said


def test_a_shadow_of_the_same_parts_agrees_with_the_champion(settings: Settings, challenger: str, client: TestClient) -> None:
    started(settings, client, challenger, "--kind", "shadow")
    for person in PEOPLE[:30]:
        assert client.post("/v1/recommend", json={"user_id": person, "k": 10}).json()["experiment"] is None
    service = client.app.state.service  # type: ignore[attr-defined]
    service.rollout._running.shadow.close()
    service.rollout._running.challenger._parts.log.flush()
    _flush(client)
    code, told, _ = tandem(settings, "report")
    assert code == 0
    assert told["shadow"]["requests"] > 0
    assert (told["shadow"]["overlap"], told["shadow"]["agreement"]) == (pytest.approx(1), pytest.approx(1))
    assert {row["arm"]: row["failed"] for row in told["arms"]} == {"champion": 0, "challenger": 0}
    assert tandem(settings, "check")[1]["made"].startswith("second-shadow-1 is a shadow")


def _flush(client: TestClient) -> None:
    """Put on disk and into the registry what the service holds back."""
    service = client.app.state.service  # type: ignore[attr-defined]
    service.recommender._parts.log.flush()
    if service.rollout.challenger is not None:
        service.rollout.challenger._parts.log.flush()
    service._watcher.look()
