"""Single events: on disk at once, in the features of their user and item within the call, and once each."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import polars.selectors as cs
import pytest
from polars.testing import assert_frame_equal

from feature_repo.erase import erase_user
from feature_repo.live import EventGate, Pushed
from feature_repo.live_snapshot import LiveSnapshot
from feature_repo.materialize import materialize
from feature_repo.offline import LOCK
from feature_repo.online import UserReader
from feature_repo.sources.raw import Raw, no_rejections
from feature_repo.store import load_events, load_items, load_rejected, load_source, load_users, pending_parts, save_raw
from feature_repo.views import TIMESTAMP
from tandem.core.errors import InputError
from tandem.core.folders import held, read_json
from tandem.service import recipes
from tandem.service.settings import Settings, load_settings
from tandem.service.slate import Ask
from tandem.service.wiring import open_recommender


@pytest.fixture
def settings(tmp_path: Path, tiny_workspace: Path) -> Settings:
    """A copy of the tiny world to push into."""
    return load_settings(Path(shutil.copytree(tiny_workspace, tmp_path / "a workspace")), {})


@pytest.fixture
def gate(settings: Settings) -> EventGate:
    return EventGate(settings.workspace, settings.features)


def after(settings: Settings, minutes: float = 1) -> datetime:
    """Some minutes after the world's last event."""
    last = load_events(settings.data)["timestamp"].max()
    assert isinstance(last, datetime)
    return last + timedelta(minutes=minutes)


def draft(settings: Settings, **columns: Any) -> pl.DataFrame:
    """One purchase by one user, changed by `columns`."""
    base = {
        "event_id": "e1",
        "user_id": user_of(settings),
        "item_id": item_of(settings),
        "action": "purchase",
        "timestamp": after(settings),
    }
    rows = len(columns.get("event_id", "x"))
    return pl.DataFrame({name: value if isinstance(value, list) else [value] * rows for name, value in (base | columns).items()})


def user_of(settings: Settings) -> str:
    user: str = load_users(settings.data)["user_id"][0]
    return user


def item_of(settings: Settings) -> str:
    item: str = load_items(settings.data)["item_id"][5]
    return item


def push(gate: EventGate, frame: pl.DataFrame) -> Pushed:
    return gate.push(frame, datetime.now(UTC))


def newest(settings: Settings, view: str, key: str, value: str) -> pl.DataFrame:
    table = pl.read_parquet(settings.feature_tables / view / "*.parquet").filter(pl.col(key) == value)
    return table.sort(TIMESTAMP, maintain_order=True).tail(1)


def test_an_event_is_in_the_users_row_the_offline_tables_and_the_items_features(settings: Settings, gate: EventGate) -> None:
    user, item = user_of(settings), item_of(settings)
    before = UserReader(settings.workspace).row(user)
    live = LiveSnapshot(settings.workspace / "snapshot", [item], every_s=0.0)
    events_before = live.gather(pl.Series([0]).to_numpy())[0][live.names.index("item_events")]

    done = push(gate, draft(settings, action="click"))
    assert (done.received, done.appended, done.duplicates, done.users, done.items, done.pending) == (1, 1, 0, 1, 1, False)

    row = UserReader(settings.workspace).row(user)
    assert row["history_items"][-1] == item
    assert row["user_events"] == (before["user_events"] or 0) + 1
    assert newest(settings, "user_stats", "user_id", user)["user_events"][0] == row["user_events"]
    assert newest(settings, "item_stats", "item_id", item)[TIMESTAMP][0] >= after(settings, 0)
    assert live.gather(pl.Series([0]).to_numpy())[0][live.names.index("item_events")] == events_before + 1


def test_pushed_features_are_what_a_build_of_everything_gives(settings: Settings, gate: EventGate) -> None:
    """All views, every row from the oldest new event on: an event in the past of its user is among them."""
    users, items = load_users(settings.data)["user_id"][:3].to_list(), load_items(settings.data)["item_id"][:4].to_list()
    times = [after(settings, 1), after(settings, -3 * 24 * 60), after(settings, 5), after(settings, 5)]
    rows = draft(settings, event_id=["a", "b", "c", "d"], user_id=[users[0], users[1], users[2], users[0]], item_id=items,
                 action=["click", "click", "purchase", "like"], timestamp=times)  # fmt: skip
    push(gate, rows)
    pushed = {view: pl.read_parquet(settings.feature_tables / view / "*.parquet") for view in VIEWS}
    online = UserReader(settings.workspace).rows(users)
    recipes.features_build(settings)
    for view, key in VIEWS.items():
        since = rows.group_by(key).agg(pl.col("timestamp").min().alias("since"))
        ours, theirs = (
            table.unique([key, TIMESTAMP], keep="last", maintain_order=True).join(since, on=key).sort(key, TIMESTAMP)
            for table in (pushed[view], pl.read_parquet(settings.feature_tables / view / "*.parquet"))
        )
        ours = ours.join(theirs, on=[key, TIMESTAMP], how="semi", maintain_order="left")  # a build stops at its own "now"
        new = pl.col(TIMESTAMP) >= pl.col("since")
        assert_frame_equal(ours.filter(new), theirs.filter(new), abs_tol=1e-12)
        # A late event moves the mean that all later rates lean on, other people's too: those wait for the next build.
        rest = ~cs.ends_with("_rate")
        assert_frame_equal(ours.filter(~new).select(rest), theirs.filter(~new).select(rest))
    materialize(settings.workspace)
    assert UserReader(settings.workspace).rows(users) == online


VIEWS = {"user_stats": "user_id", "user_history": "user_id", "user_categories": "user_id", "item_stats": "item_id"}


def test_an_event_counts_once_by_its_id_or_else_by_its_content(settings: Settings, gate: EventGate) -> None:
    first = push(gate, draft(settings, action="click"))
    row = UserReader(settings.workspace).row(user_of(settings))
    again = push(gate, draft(settings, action="click", timestamp=after(settings, 9)))
    assert (first.appended, again.appended, again.duplicates) == (1, 0, 1)
    nameless = draft(settings, action="click", timestamp=datetime(2026, 1, 1, tzinfo=UTC)).drop("event_id")
    assert [push(gate, nameless).appended for _ in range(2)] == [1, 0]
    assert UserReader(settings.workspace).row(user_of(settings))["user_events"] == row["user_events"] + 1


def test_bad_events_are_kept_aside_with_their_reason_and_hold_nobody_up(settings: Settings, gate: EventGate) -> None:
    rows = draft(settings, event_id=["a", "b", "c", "d"], user_id=[user_of(settings), "", "u", "new person"],
                 item_id=["no such item", item_of(settings), item_of(settings), item_of(settings)], action="click",
                 timestamp=[*[after(settings)] * 2, datetime.now(UTC) + timedelta(hours=1), after(settings)])  # fmt: skip
    done = push(gate, rows)
    assert done.refused.rows() == [(0, "unknown item"), (1, "no user id"), (2, "timestamp in the future")]
    assert (done.appended, done.users) == (1, 1)
    assert UserReader(settings.workspace).row("new person")["user_events"] == 1
    assert load_rejected(settings.data)["reason"].to_list()[-3:] == ["unknown item", "no user id", "timestamp in the future"]
    with pytest.raises(InputError, match=r"lack the columns \['action'\]"):
        push(gate, rows.drop("action"))


def test_while_features_are_rebuilt_events_are_kept_and_follow(settings: Settings, gate: EventGate) -> None:
    before = UserReader(settings.workspace).row(user_of(settings))["user_events"]
    with held(settings.workspace / LOCK, "somebody"):
        assert push(gate, draft(settings, action="click")).pending
        assert UserReader(settings.workspace).row(user_of(settings))["user_events"] == before
        assert "e1" in load_events(settings.data)["event_id"]
    recipes.features_materialize(settings)
    assert UserReader(settings.workspace).row(user_of(settings))["user_events"] == before + 1
    assert not pending_parts(settings.data)


def test_an_update_that_fails_half_way_is_finished_by_the_next(
    settings: Settings, gate: EventGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = UserReader(settings.workspace).row(user_of(settings))["user_events"]
    with monkeypatch.context() as broken:
        broken.setattr("feature_repo.live.write_fresh", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        done = push(gate, draft(settings, action="click"))
        assert (done.appended, done.pending) == (1, True)
    assert gate.apply_pending(datetime.now(UTC)) == (1, 1)
    assert UserReader(settings.workspace).row(user_of(settings))["user_events"] == before + 1
    assert gate.apply_pending(datetime.now(UTC)) == (0, 0)


def test_new_events_join_the_others_at_the_next_build(settings: Settings, gate: EventGate) -> None:
    events = load_events(settings.data)
    push(gate, draft(settings, user_id="new person", action="click"))
    recipes.features_build(settings)
    assert not list((settings.data / "new").glob("*"))
    assert load_events(settings.data).height == events.height + 1
    assert "new person" in load_users(settings.data)["user_id"]


def test_the_next_slate_knows_what_was_just_bought(settings: Settings, gate: EventGate) -> None:
    recommender = open_recommender(settings)
    shown = recommender.recommend(Ask(user_id="new person", k=5)).items[0].item_id
    push(gate, draft(settings, user_id="new person", item_id=shown, action="click"))
    slate = recommender.recommend(Ask(user_id="new person", k=5))
    recommender.close()
    assert not slate.cold_start
    assert shown not in [item.item_id for item in slate.items]


def test_a_run_of_everything_takes_new_events_in(settings: Settings, gate: EventGate) -> None:
    marks = settings.state / "run_all.json"
    before = read_json(marks)["build"]
    push(gate, draft(settings, action="click"))
    with pytest.MonkeyPatch.context() as stopped:
        stopped.setattr(recipes, "features_apply", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
        with pytest.raises(OSError, match="power cut"):
            recipes.run_all(settings)
    assert read_json(marks)["build"] != before
    assert not pending_parts(settings.data)


def test_an_item_that_was_imported_meanwhile_is_known(settings: Settings, gate: EventGate) -> None:
    push(gate, draft(settings, action="click"))
    newcomer = load_items(settings.data).head(1).with_columns(item_id=pl.lit("newcomer"))
    nothing = load_events(settings.data).clear()
    save_raw(Raw(nothing, newcomer, load_users(settings.data), load_source(settings.data), no_rejections()), settings.data, False)
    assert push(gate, draft(settings, event_id="e2", item_id="newcomer", action="click")).appended == 1


def test_a_kept_event_of_somebody_erased_meanwhile_holds_nobody_up(settings: Settings, gate: EventGate) -> None:
    with held(settings.workspace / LOCK, "somebody"):
        assert push(gate, draft(settings, user_id="leaver", action="click")).pending
    erase_user(settings.workspace, "leaver")
    assert gate.apply_pending(datetime.now(UTC)) == (0, 0)
    assert not pending_parts(settings.data)
    assert push(gate, draft(settings, event_id="e2", action="click")).users == 1
