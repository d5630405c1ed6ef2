"""A real `mlflow server` on PostgreSQL: releases as model versions, the alias that follows our tables, batch scoring by alias,
and a server that goes away in the middle and comes back.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import OperationalError
from typer.testing import CliRunner

from registry.release import ReleaseFacts, create_release
from registry.store import ReleaseStore
from registry.tracking import Tracker
from tandem.core.errors import UnavailableError
from tandem.service import cli
from tandem.service.app import create_app
from tandem.service.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]
POSTGRES = os.environ.get("TANDEM_TEST_POSTGRES", "postgresql+psycopg://root@127.0.0.1:5432/test")
LOADER = "tandem_server_test_loader"
LOADER_SOURCE = """
import json
from pathlib import Path

class Model:
    def __init__(self, release):
        self.release = release

    def predict(self, frame, params=None):
        return [f"{self.release}:{user}" for user in frame["user_id"]]

def _load_pyfunc(path):
    return Model(json.loads(Path(path).read_text())["release"])
"""
FACTS = ReleaseFacts(created_at=datetime(2026, 11, 20, tzinfo=UTC), metrics={"recall@100": 0.25})


class Server:
    """`mlflow server` on a port of its own, that can be stopped and started again."""

    def __init__(self, database: str, files: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self.uri = f"http://127.0.0.1:{self.port}"
        options = {"host": "127.0.0.1", "port": self.port, "workers": 1, "backend-store-uri": database}
        options |= {"artifacts-destination": files / "artifacts"}
        self._words = [sys.executable, "-m", "mlflow", "server", *(f"--{name}={value}" for name, value in options.items())]
        self._files = files
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, unless it runs, and wait until it answers; what it says goes to a file."""
        if self._process is not None and self._process.poll() is None:
            return
        with (self._files / "server.log").open("ab") as log:
            own = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # ten more processes, for nothing here
            self._process = subprocess.Popen(
                self._words, cwd=self._files, env=own, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            assert self._process.poll() is None, (self._files / "server.log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            except OSError:
                time.sleep(0.3)
        raise AssertionError((self._files / "server.log").read_text()[-2000:])

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(timeout=60)


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The address of a PostgreSQL database of this module's own, dropped afterwards; MLflow and our tables share it."""
    engine = create_engine(POSTGRES, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 2})
    name = f"tandem_test_{uuid.uuid4().hex[:12]}"
    try:
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
    except OperationalError:
        pytest.skip("no PostgreSQL answers; name one in TANDEM_TEST_POSTGRES")
    yield make_url(POSTGRES).set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture(scope="module")
def server(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(database, tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def store(database: str, tmp_path: Path) -> Iterator[ReleaseStore]:
    """Releases `a` and `b`, in the database that MLflow uses too."""
    store = ReleaseStore(database, tmp_path / "releases")
    for name in ("a", "b"):
        source = tmp_path / f"{name}.json"
        source.write_text(f'["{name}"]')
        store.add(create_release({"popular.json": source}, tmp_path / "releases" / name, FACTS), tmp_path / "releases" / name)
    yield store
    store.close()


def test_the_loop_on_a_server_that_goes_away_and_comes_back(
    server: Server, store: ReleaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.pyfunc

    (tmp_path / f"{LOADER}.py").write_text(LOADER_SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    tracker = Tracker(server.uri)
    asked = pd.DataFrame({"user_id": ["ada"]})
    mlflow.set_tracking_uri(server.uri)

    def scored() -> list[str]:
        return list(mlflow.pyfunc.load_model("models:/tandem@champion").predict(asked))

    for name in ("a", "b"):
        store.registered(name, tracker.register(store.get(name).manifest, store.get(name).folder, loader=LOADER))
    store.promote("a", expected=None, who="ada", why="the first")
    assert tracker.mirror(store, loader=LOADER).changed
    assert scored() == ["a:ada"]

    store.promote("b", expected="a", who="ada", why="better")
    tracker.mirror(store, loader=LOADER)
    assert scored() == ["b:ada"]

    tracker.set_alias("champion", str(store.get("a").model_version))  # by hand, past our tables
    assert tracker.mirror(store, loader=LOADER).sentences == ("alias champion: version 1 -> 2 (b)",)
    assert scored() == ["b:ada"]

    server.stop()
    store.rollback(expected="b", who="ada", why="errors")
    before = time.monotonic()
    with pytest.raises(UnavailableError, match="does not answer"):
        tracker.mirror(store, loader=LOADER)
    assert time.monotonic() - before < 10
    assert store.champion().name == "a"

    server.start()
    assert tracker.mirror(store, loader=LOADER).sentences == ("alias champion: version 2 -> 1 (a)",)
    assert scored() == ["a:ada"]
    assert [line.name for line in store.history()] == ["a", "b", "a"]


def test_the_acceptance_of_the_registry_on_a_small_world(
    server: Server, database: str, tiny_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `make accept-registry` does with RankLens, here in one process: tables in PostgreSQL, MLflow on a server that ends."""
    import mlflow.pyfunc

    spec = importlib.util.spec_from_file_location("accept_registry", ROOT / "tests" / "benchmarks" / "accept_registry.py")
    assert spec is not None
    assert spec.loader is not None
    acceptance = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(acceptance)
    unseen = shutil.ignore_patterns("releases", "tandem.db*", "mlflow.db*", "mlruns", "served")
    workspace = Path(shutil.copytree(tiny_workspace, tmp_path / "workspace", ignore=unseen))
    monkeypatch.setenv("TANDEM_REGISTRY__URL", f"sqlite:///{tmp_path}/spoiled.db")
    monkeypatch.setenv("TANDEM_REGISTRY__MODEL", "acceptance")

    def tandem(*words: str, extra: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
        result = CliRunner().invoke(cli.app, ["--workspace", str(workspace), *words, "--json"], env=extra or {})
        assert result.stdout, result.stderr
        return result.exit_code, json.loads(result.stdout)

    def score() -> dict[str, Any]:
        mlflow.set_tracking_uri(server.uri)
        model = mlflow.pyfunc.load_model("models:/acceptance@champion")
        return dict(model.predict(pd.DataFrame({"user_id": users}), params={"k": 5}).to_dict("list"))

    @contextmanager
    def serve() -> Iterator[Callable[[str], dict[str, Any]]]:
        app = create_app(load_settings(workspace), follow=True)
        with TestClient(app, "http://127.0.0.1") as client:
            yield lambda user: dict(client.post("/v1/recommend", json={"user_id": user, "k": 3}).raise_for_status().json())

    users = pl.read_parquet(workspace / "models" / "evaluation" / "users.parquet")["user_id"].unique().sort().head(3).to_list()
    acceptance.spoil(workspace, tandem)
    server.start()  # the test before may have left it stopped
    monkeypatch.setenv("TANDEM_REGISTRY__URL", f"{database}?options=-csearch_path%3Dacceptance")
    monkeypatch.setenv("TANDEM_REGISTRY__MLFLOW_URI", server.uri)
    engine = create_engine(database)
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA acceptance"))
    engine.dispose()
    said = list(acceptance.loop(workspace, tandem, score, users, server.stop, serve))
    assert len(said) == 5
    assert "not shown to be worse by less than" in said[2]
