"""Events that should not be, and places that do not take them: poison, floods, a full disk, a locked store."""

from __future__ import annotations

import resource
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fastapi.testclient import TestClient

from feature_repo.erase import erase_user
from feature_repo.live import EventGate, EventLimits, Pushed
from feature_repo.online import UserReader
from feature_repo.sources.clean import LARGEST_VALUE
from feature_repo.store import OVER_A_DAY, load_events, load_items, load_rejected, load_users, pending_parts
from tandem.core.errors import InputError
from tandem.service import recipes
from tandem.service.app import create_app
from tandem.service.settings import Settings, load_settings


@pytest.fixture
def settings(tmp_path: Path, tiny_workspace: Path) -> Settings:
    """A copy of the tiny world to break."""
    workspace = Path(shutil.copytree(tiny_workspace, tmp_path / "a workspace"))
    shutil.rmtree(workspace / "served", ignore_errors=True)
    return load_settings(workspace, {"TANDEM_SERVICE__BUDGET_MS": "60000"})  # on a busy machine, too


@pytest.fixture
def gate(settings: Settings) -> EventGate:
    return EventGate(settings.workspace, settings.features)


@pytest.fixture
def user(settings: Settings) -> str:
    known: str = load_users(settings.data)["user_id"][0]
    return known


def event(settings: Settings, **changes: Any) -> dict[str, Any]:
    base = {"event_id": "e1", "user_id": "somebody", "item_id": load_items(settings.data)["item_id"][5], "action": "click"}
    return base | {"timestamp": "2026-02-01T10:00:00Z"} | changes


def push(gate: EventGate, *events: dict[str, Any]) -> Pushed:
    return gate.push(pl.DataFrame(list(events)), datetime.now(UTC))


def events_of(settings: Settings, user: str) -> int | None:
    count: int | None = UserReader(settings.workspace).row(user)["user_events"]
    return count


# --- poison -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("poison", "reason"),
    [
        ({"timestamp": "0001-01-01T00:00:00Z"}, "timestamp before 1900"),  # once the item snapshot could not hold it, ever
        ({"timestamp": "1899-12-31T23:59:59Z"}, "timestamp before 1900"),
        ({"value": 1e308}, "value beyond 1e+12"),  # two of them would make an infinite mean
        ({"value": -2 * LARGEST_VALUE}, "value beyond 1e+12"),
    ],
)
def test_an_event_that_would_spoil_features_goes_aside_and_the_batch_goes_on(
    settings: Settings, gate: EventGate, poison: dict[str, Any], reason: str
) -> None:
    rows = [
        event(settings, value=1.0),
        event(settings, event_id="e2", value=1.0) | poison,
        event(settings, event_id="e3", value=2.0),
    ]
    done = push(gate, *rows)
    assert (done.appended, done.refused.rows(), done.pending) == (2, [(1, reason)], False)
    assert load_rejected(settings.data)["reason"].to_list()[-1:] == [reason]
    assert events_of(settings, "somebody") == 2
    recipes.features_build(settings)
    recipes.features_materialize(settings)


def test_a_part_that_cannot_be_read_is_set_aside_and_holds_nobody_up(settings: Settings, gate: EventGate) -> None:
    """A disk has torn a file of kept events: the next push, and everything that reads events, would fail on it for ever."""
    (settings.data / "new").mkdir(exist_ok=True)
    torn = settings.data / "new" / "00000000000000000001-torn.pending.parquet"
    torn.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(pl.exceptions.PolarsError):
        load_events(settings.data)
    assert [push(gate, event(settings, event_id=name)).users for name in ("e1", "e2")] == [1, 1]
    assert load_rejected(settings.data).filter(pl.col("content").str.contains("torn"))["reason"].item().startswith("no features")
    assert [path.name for path in (settings.data / "new").glob("*torn*")] == [f"{torn.name}.unreadable"]
    assert load_events(settings.data).filter(pl.col("user_id") == "somebody").height == 2
    erase_user(settings.workspace, "somebody")  # the torn file may name them
    assert not list((settings.data / "new").glob("*torn*"))


def test_kept_events_of_which_nothing_can_be_made_become_refused_ones(settings: Settings, gate: EventGate) -> None:
    """A part without its times, as another version might have left it: three tries, then it is aside; its neighbour counts."""
    folder = settings.data / "new"
    folder.mkdir(exist_ok=True)
    good = (
        load_events(settings.data)
        .head(1)
        .with_columns(event_id=pl.lit("good"), user_id=pl.lit("neighbour"), action=pl.lit("click"))
    )
    good.write_parquet(folder / "00000000000000000002-good.pending.parquet")
    lame = good.with_columns(event_id=pl.lit("lame"), user_id=pl.lit("poisoner")).drop("timestamp")
    lame.write_parquet(folder / "00000000000000000001-lame.pending.parquet")
    assert gate.apply_pending(datetime.now(UTC)) == (1, 1)
    (refused,) = load_rejected(settings.data).filter(pl.col("content").str.contains("poisoner")).rows(named=True)
    assert refused["reason"].startswith("no features can be made: ")
    assert not pending_parts(settings.data)
    assert (events_of(settings, "neighbour"), events_of(settings, "poisoner")) == (1, None)


# --- floods -----------------------------------------------------------------------------------------------------------------


def test_of_a_flood_of_one_user_only_the_first_events_of_a_day_count(settings: Settings) -> None:
    gate = EventGate(settings.workspace, settings.features, EventLimits(per_user_per_day=5))
    items = load_items(settings.data)["item_id"]
    flood = [event(settings, event_id=f"bot {number}", item_id=items[0]) for number in range(40)]
    human = [event(settings, event_id=f"h {number}", user_id="human") for number in range(3)]
    done = push(gate, *flood[:20], *human)
    assert (done.received, done.appended, done.duplicates) == (23, 8, 0)
    assert done.refused.rows() == [(row, OVER_A_DAY) for row in range(5, 20)]
    more = push(gate, *flood)  # among them five that are there
    assert (more.appended, more.duplicates, more.refused.height) == (0, 5, 35)
    tomorrow = event(settings, event_id="bot tomorrow", timestamp="2026-02-02T00:00:00Z")
    assert push(gate, tomorrow).appended == 1
    assert (events_of(settings, "somebody"), events_of(settings, "human")) == (6, 3)
    assert load_rejected(settings.data).filter(reason=OVER_A_DAY).height == 50 - 15  # the same row sent twice is one row
    with pytest.raises(InputError, match="per_user_per_day = -1"):
        EventLimits(per_user_per_day=-1)


def test_the_limit_is_a_setting(settings: Settings) -> None:
    (settings.workspace / "tandem.toml").write_text("[events]\nper_user_per_day = 2\n")
    with TestClient(create_app(load_settings(settings.workspace, {})), "http://127.0.0.1") as client:
        sent = [event(settings, event_id=str(number)) for number in range(4)]
        answer = client.post("/v1/events", json={"events": sent}).json()
    assert (answer["appended"], answer["refused"]) == (2, [{"index": at, "reason": OVER_A_DAY} for at in (2, 3)])


# --- no room, and a store that is held --------------------------------------------------------------------------------------


@contextmanager
def full_disk() -> Iterator[None]:
    """Not one byte more can be written to any file of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_on_a_full_disk_serving_goes_on_and_lost_log_rows_are_counted(settings: Settings, user: str) -> None:
    with TestClient(create_app(settings), "http://127.0.0.1") as client:
        before = client.post("/v1/recommend", json={"user_id": user, "k": 5}).json()
        recommender = client.app.state.service.recommender  # type: ignore[attr-defined]
        with full_disk():
            answers = [client.post("/v1/recommend", json={"user_id": user, "k": 5}) for _ in range(3)]
            recommender._parts.log.flush()
            refused = client.post("/v1/events", json={"events": [event(settings)]})
        assert [(each.status_code, each.json()["degraded"]) for each in answers] == [(200, [])] * 3
        assert [item["item_id"] for item in answers[0].json()["items"]] == [item["item_id"] for item in before["items"]]
        assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
        assert "\ntandem_served_rows_dropped_total 20.0\n" in client.get("/v1/metrics").text  # four slates of five
        assert client.post("/v1/events", json={"events": [event(settings)]}).json()["appended"] == 1
    assert not list(settings.workspace.rglob(".partial-*"))


def test_while_somebody_holds_the_sqlite_store_reads_go_on_and_events_wait(
    settings: Settings, gate: EventGate, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program has begun to write: ours waits its time, keeps the events, and brings their features later."""
    push(gate, event(settings))
    online = gate._store.provider.online_store  # type: ignore[union-attr]
    online._get_conn(gate._store.config).execute("PRAGMA busy_timeout = 300")  # type: ignore[union-attr]
    with sqlite3.connect(settings.state / "online.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        assert events_of(settings, user) is not None
        done = push(gate, event(settings, event_id="e2"))
        assert (done.appended, done.pending) == (1, True)
        assert events_of(settings, "somebody") == 1
        other.execute("ROLLBACK")
    assert gate.apply_pending(datetime.now(UTC) + timedelta(seconds=1)) == (1, 1)
    assert events_of(settings, "somebody") == 2
