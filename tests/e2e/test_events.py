"""Events and erasure over HTTP and on the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from feature_repo.store import load_events, load_items
from tandem.service import cli
from tandem.service.app import create_app
from tandem.service.settings import Settings, load_settings

LOCAL = "http://127.0.0.1"


@pytest.fixture(scope="module")
def settings(tiny_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A copy that events may come into."""
    return load_settings(Path(shutil.copytree(tiny_workspace, tmp_path_factory.mktemp("events") / "workspace")), {})


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), LOCAL, raise_server_exceptions=False) as opened:
        yield opened


def slate(client: TestClient, user: str) -> Any:
    return client.post("/v1/recommend", json={"user_id": user, "k": 5}).json()


def event(settings: Settings, **changes: Any) -> dict[str, Any]:
    return {"user_id": "visitor 1", "item_id": load_items(settings.data)["item_id"][3], "action": "click"} | changes


def post(client: TestClient, *events: dict[str, Any]) -> Any:
    return client.post("/v1/events", json={"events": list(events)})


def test_the_next_slate_knows_what_was_just_clicked(client: TestClient, settings: Settings) -> None:
    before = slate(client, "visitor 1")
    clicked = before["items"][0]["item_id"]
    answer = post(client, event(settings, item_id=clicked, event_id="c1"))
    assert (answer.status_code, answer.json()) == (
        200, {"received": 1, "appended": 1, "duplicates": 0, "refused": [], "users": 1, "items": 1, "pending": False},
    )  # fmt: skip
    after = slate(client, "visitor 1")
    assert (before["cold_start"], after["cold_start"]) == (True, False)
    assert clicked not in [item["item_id"] for item in after["items"]]


def test_an_event_that_is_sent_twice_counts_once(client: TestClient, settings: Settings) -> None:
    sent = event(settings, user_id="visitor 2", event_id="twice")
    assert [post(client, sent).json()["appended"] for _ in range(2)] == [1, 0]
    assert load_events(settings.data).filter(pl.col("event_id") == "twice").height == 1


def test_a_bad_event_does_not_hold_up_its_neighbours(client: TestClient, settings: Settings) -> None:
    late = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    answer = post(client, event(settings, item_id="nothing"), event(settings, timestamp=late), event(settings, event_id="good"))
    found = answer.json()
    assert (answer.status_code, found["appended"]) == (200, 1)
    assert found["refused"] == [{"index": 0, "reason": "unknown item"}, {"index": 1, "reason": "timestamp in the future"}]


@pytest.mark.parametrize(
    "changes",
    [
        {"user_id": ""}, {"item_id": "\x00"}, {"action": None}, {"value": "many"}, {"timestamp": "2026-01-01T00:00:00"},
        {"timestamp": "yesterday"}, {"colour": "red"}, {"position": 1.5},
    ],
)  # fmt: skip
def test_what_is_no_event_is_refused_before_anything_is_kept(
    client: TestClient, settings: Settings, changes: dict[str, Any]
) -> None:
    before = load_events(settings.data).height
    answer = post(client, event(settings, event_id="fine"), event(settings) | changes)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert load_events(settings.data).height == before


def test_no_events_and_too_many_are_refused(client: TestClient, settings: Settings) -> None:
    assert post(client).status_code == 422
    many = [{"user_id": "u", "item_id": "i", "action": "a"}] * 1001
    assert post(client, *many).status_code == 422


def test_the_age_of_the_item_features_is_a_gauge(client: TestClient) -> None:
    line = next(line for line in client.get("/metrics").text.splitlines() if line.startswith("tandem_features_age_seconds "))
    assert float(line.split()[1]) > 0


def test_an_erased_user_is_a_stranger(client: TestClient, settings: Settings) -> None:
    post(client, event(settings, user_id="leaver / 中", event_id="l1"))
    assert slate(client, "leaver / 中")["cold_start"] is False
    answer = client.delete("/v1/users/leaver / 中")
    assert (answer.status_code, answer.json()["online"] > 0) == (200, True)
    assert slate(client, "leaver / 中")["cold_start"] is True
    assert post(client, event(settings, user_id="leaver / 中", event_id="l2")).json()["appended"] == 0


def command(settings: Settings, *words: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, ["--workspace", str(settings.workspace), *words, "--json"])
    assert result.exit_code == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def test_events_from_a_file(settings: Settings, tmp_path: Path) -> None:
    rows = [
        event(settings, user_id="filed", timestamp="2026-01-02T03:04:05Z"),
        event(settings, item_id="nothing", timestamp="never"),
    ]
    path = tmp_path / "events.csv"
    pl.DataFrame(rows).write_csv(path)
    answer = command(settings, "features", "push", str(path))
    assert (answer["appended"], answer["users"], answer["refused"]) == (1, 1, {"unknown item": 1})
    assert command(settings, "features", "push", str(path))["appended"] == 0


def test_a_user_is_erased_by_command(settings: Settings) -> None:
    user = load_events(settings.data)["user_id"][0]
    answer = command(settings, "users", "erase", user)
    assert answer["rows"]["data/events.parquet"] > 0
    assert user not in json.dumps(answer)
    assert user not in load_events(settings.data)["user_id"]
