"""Two machines with one registry: what one of them makes and promotes, the other one serves, from a copy of its own."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from fastapi.testclient import TestClient

from registry.release import verify_release
from tandem.core.errors import NotFoundError, UnavailableError
from tandem.service import recipes
from tandem.service.app import create_app
from tandem.service.batch import _load_pyfunc
from tandem.service.recipes.workspace import open_releases
from tandem.service.settings import Settings, load_settings

NO_MLFLOW = "http://127.0.0.1:9"


def machine(tiny_workspace: Path, home: Path, name: str, artifacts: str) -> Settings:
    """A workspace with data, features and models but no release of its own; tables and artifacts are shared."""
    left_out = shutil.ignore_patterns("releases", "tandem.db*", "mlflow.db", "mlruns", "run_all.json")
    loaded = load_settings(Path(shutil.copytree(tiny_workspace, home / name, ignore=left_out)), {})
    registry = replace(loaded.registry, url=f"sqlite:///{home}/shared.db", artifacts=artifacts, mlflow_uri=NO_MLFLOW)
    return replace(loaded, registry=registry, service=replace(loaded.service, follow_seconds=0.05))


@pytest.fixture
def maker(tiny_workspace: Path, tmp_path: Path) -> Settings:
    return machine(tiny_workspace, tmp_path, "maker", f"file://{tmp_path}/share")


@pytest.fixture
def server(tiny_workspace: Path, tmp_path: Path) -> Settings:
    return machine(tiny_workspace, tmp_path, "server", f"file://{tmp_path}/share")


def within(seconds: float, is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if is_so():
            return True
        time.sleep(0.05)
    return False


def test_a_service_elsewhere_follows_promotions_and_rolls_back_itself(maker: Settings, server: Settings, tmp_path: Path) -> None:
    recipes.release_create(maker, "first")
    recipes.release_promote(maker, "first", because="the first")
    with TestClient(create_app(server, follow=True), "http://127.0.0.1") as client:
        assert client.get("/readyz").json()["release"] == "first"
        recipes.release_create(maker, "second")
        recipes.release_promote(maker, "second", because="newer")
        assert within(60, lambda: client.get("/readyz").json()["release"] == "second")
        answer = client.post("/v1/recommend", json={"user_id": "u001", "k": 3})
        assert (answer.status_code, answer.json()["release"], answer.json()["degraded"]) == (200, "second", [])
        recipes.release_rollback(server, because="seen here")
        assert within(60, lambda: client.get("/readyz").json()["release"] == "first")
    assert verify_release(server.releases / "second").name == "second"

    recipes.release_create(maker, "third")
    assert recipes.release_gate(server, "third").data["passed"], "commands fetch what they need, too"
    assert recipes.release_show(server, "third").data["name"] == "third"
    recipes.release_delete(server, "third")
    assert {path.name for path in (tmp_path / "share").iterdir()} == {"first", "second"}
    assert not (server.releases / "third").exists()
    assert (maker.releases / "third").exists()
    recipes.release_prune(maker, keep=0)
    assert not (maker.releases / "third").exists()


def test_a_release_whose_copy_failed_is_unknown_until_it_is_whole(maker: Settings, server: Settings, tmp_path: Path) -> None:
    (tmp_path / "share").write_text("a file where the folder should be")
    with pytest.raises(UnavailableError, match="share failed"):
        recipes.release_create(maker, "first")
    with open_releases(server) as store, pytest.raises(NotFoundError):
        store.get("first")
    (tmp_path / "share").unlink()
    assert recipes.release_create(maker, "first").data["release"] == "first"
    assert recipes.release_show(server, "first").data["name"] == "first"


def test_batch_scoring_on_a_machine_without_the_release_fetches_it(
    maker: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipes.release_create(maker, "first").data
    pointer = {"release": "first", "content_hash": made["content_hash"], "folder": str(tmp_path / "gone" / "releases" / "first")}
    (tmp_path / "release.json").write_text(json.dumps(pointer | {"artifacts": maker.registry.artifacts}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    slates = _load_pyfunc(str(tmp_path / "release.json")).predict(pd.DataFrame({"user_id": ["u001", "u002"]}), {"k": 3})
    assert slates["user_id"].to_list() == ["u001"] * 3 + ["u002"] * 3
    assert verify_release(tmp_path / "cache" / "tandem" / "releases" / "first").name == "first"
