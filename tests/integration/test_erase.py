"""The right to be forgotten: nothing that can be changed names the user afterwards, and nothing brings them back."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from feature_repo.erase import PROOF_FILE, ErasedUsers, erase_user, user_hash
from feature_repo.live import EventGate
from feature_repo.offline import apply
from feature_repo.online import UserReader
from feature_repo.online_config import OnlineConfig
from feature_repo.sources.raw import Raw, no_rejections
from feature_repo.store import load_events, load_items, load_rejected, load_source, load_users, save_raw
from tandem.core.errors import InputError, IntegrityError
from tandem.service import recipes
from tandem.service.settings import Settings, load_settings
from tandem.service.slate import Ask
from tandem.service.wiring import open_recommender


@pytest.fixture
def settings(tmp_path: Path, tiny_workspace: Path) -> Settings:
    return load_settings(Path(shutil.copytree(tiny_workspace, tmp_path / "workspace")), {})


@pytest.fixture
def user(settings: Settings) -> str:
    """Somebody with events, features and a served slate, a refused event and a pushed one."""
    user: str = load_events(settings.data).filter(load_source(settings.data).is_history())["user_id"][0]
    recommender = open_recommender(settings)
    recommender.recommend(Ask(user_id=user))
    recommender.close()
    item = load_items(settings.data)["item_id"]
    rows = {
        "user_id": user,
        "item_id": ["no such item", item[0]],
        "action": "click",
        "timestamp": datetime(2026, 1, 1, tzinfo=UTC),
    }
    EventGate(settings.workspace, settings.features).push(pl.DataFrame(rows), datetime.now(UTC))
    return user


def files_naming(workspace: Path, user: str) -> set[str]:
    """Files below data, features, served and state whose bytes or rows hold the id; the world's truth is no person's."""
    named = set()
    for part in ("data", "features", "served", "state"):
        for path in (workspace / part).rglob("*"):
            if not path.is_file() or "truth" in path.parts:
                continue
            if path.suffix == ".parquet":
                table = pl.read_parquet(path)
                found = any(user in json.dumps(row, default=str, ensure_ascii=False) for row in table.iter_rows())
            else:
                found = user.encode() in path.read_bytes()
            if found:
                named.add(str(path.relative_to(workspace)))
    return named


def test_nothing_names_the_user_afterwards_and_everybody_else_is_as_before(settings: Settings, user: str) -> None:
    events, users = load_events(settings.data), load_users(settings.data)
    assert any(name.startswith("served/") for name in files_naming(settings.workspace, user))
    done = erase_user(settings.workspace, user)
    assert files_naming(settings.workspace, user) == set()
    assert load_events(settings.data).equals(events.filter(pl.col("user_id") != user))
    assert load_users(settings.data).equals(users.filter(pl.col("user_id") != user))
    assert done.online == {"user_stats": 1, "user_history": 1, "user_categories": 1, "user_attributes": 1}
    assert {"data/events.parquet", "data/users.parquet", "data/rejected.parquet"} <= set(done.rows)
    assert set(UserReader(settings.workspace).row(user).values()) == {None}


def test_the_proof_is_written_down_without_saying_who(settings: Settings, user: str) -> None:
    done = erase_user(settings.workspace, user)
    text = (settings.workspace / PROOF_FILE).read_text()
    assert user not in text
    assert json.loads(text)["erasures"][-1] == {
        "user_hash": user_hash(user), "at": done.at.isoformat(), "rows": done.rows, "online": done.online, "kept": [],
    }  # fmt: skip


def test_neither_an_import_nor_a_push_nor_a_build_brings_them_back(settings: Settings, user: str) -> None:
    old = load_events(settings.data)
    erase_user(settings.workspace, user)
    again = Raw(old, load_items(settings.data), load_users(settings.data), load_source(settings.data), no_rejections())
    save_raw(again, settings.data, replace=True)
    click = {
        "user_id": user,
        "item_id": load_items(settings.data)["item_id"][:1],
        "action": "click",
        "timestamp": datetime.now(UTC),
    }
    assert EventGate(settings.workspace, settings.features).push(pl.DataFrame(click), datetime.now(UTC)).appended == 0
    recipes.features_build(settings)
    recipes.features_materialize(settings)
    assert files_naming(settings.workspace, user) == set()
    assert load_events(settings.data).height > 0


def test_a_running_service_forgets_them_at_once(settings: Settings, user: str) -> None:
    recommender = open_recommender(settings)
    known = recommender.recommend(Ask(user_id=user))
    erase_user(settings.workspace, user)
    slate = recommender.recommend(Ask(user_id=user))
    recommender.close()  # what waited for the served-log is written now, without them
    assert (known.cold_start, slate.cold_start) == (False, True)
    assert files_naming(settings.workspace, user) == set()


def test_evaluation_rows_that_keep_the_id_are_named(settings: Settings) -> None:
    users = pl.read_parquet(settings.models / "evaluation" / "users.parquet")["user_id"]
    done = erase_user(settings.workspace, users[0])
    assert done.kept[0] == "models/evaluation/users.parquet"
    assert done.kept[1].startswith("releases/")


def test_an_erasure_that_was_cut_short_is_finished_by_the_next(
    settings: Settings, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr("feature_repo.erase._strike_online", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
        with pytest.raises(OSError, match="power cut"):
            erase_user(settings.workspace, user)
    assert user in ErasedUsers(settings.data)
    assert sum(erase_user(settings.workspace, user).online.values()) == 4


def test_a_writer_that_does_not_stop_is_told(settings: Settings, user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    events = settings.data / "events.parquet"
    before = pl.read_parquet(events)
    from feature_repo import erase

    strike = erase._strike_online

    def meanwhile(workspace: Path, user_id: str) -> dict[str, int]:
        before.write_parquet(events)
        return strike(workspace, user_id)

    monkeypatch.setattr(erase, "_strike_online", meanwhile)
    with pytest.raises(IntegrityError, match=r"data/events\.parquet got new rows"):
        erase_user(settings.workspace, user)


def test_someone_unknown_is_erased_too_and_nonsense_is_refused(settings: Settings) -> None:
    done = erase_user(settings.workspace, "never seen / 中")
    assert (done.rows, sum(done.online.values())) == ({}, 0)
    assert "never seen / 中" in ErasedUsers(settings.data)
    with pytest.raises(InputError, match="user_id"):
        erase_user(settings.workspace, "")


def test_refused_rows_keep_the_rest(settings: Settings, user: str) -> None:
    before = load_rejected(settings.data)
    erase_user(settings.workspace, user)
    after = load_rejected(settings.data)
    assert before.height == after.height + 1
    assert not after["content"].str.contains(user, literal=True).any()


def test_redis_forgets_too(settings: Settings, redis_url: str) -> None:
    user: str = load_users(settings.data)["user_id"][0]
    apply(settings.workspace, OnlineConfig(redis_url))
    recipes.features_materialize(settings)
    assert UserReader(settings.workspace).row(user)["user_events"] is not None
    assert sum(erase_user(settings.workspace, user).online.values()) == 4
    assert set(UserReader(settings.workspace).row(user).values()) == {None}
