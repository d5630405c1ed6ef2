"""Serving while the online server is slow or away: a fallback within the time limit, and back again by itself."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from feature_repo.materialize import materialize
from feature_repo.offline import apply
from feature_repo.online_config import OnlineConfig
from feature_repo.store import load_events
from tandem.service.breaker import PAUSE_S
from tandem.service.recommend import Ask, Recommender
from tandem.service.settings import load_settings
from tandem.service.wiring import open_recommender


class Wire:
    """A TCP connection to the real Redis that can go dead: bytes are taken and nothing comes back."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections, self.alive = 0, threading.Event()
        self.alive.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            far = socket.create_connection(self._target)
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self.alive.wait()
                sink.sendall(data)
        except OSError:
            return

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def wire(redis_url: str) -> Iterator[Wire]:
    address = urlsplit(redis_url)
    wire = Wire(address.hostname or "127.0.0.1", address.port or 6379)
    yield wire
    wire.alive.set()
    wire.close()


@pytest.fixture
def served(tmp_path: Path, tiny_workspace: Path, wire: Wire, redis_url: str) -> Iterator[Recommender]:
    """The tiny world's champion, its users in a Redis behind the wire."""
    workspace = Path(shutil.copytree(tiny_workspace, tmp_path / "workspace"))
    apply(workspace, OnlineConfig(f"redis://127.0.0.1:{wire.port}{urlsplit(redis_url).path}"))
    materialize(workspace)
    recommender = open_recommender(load_settings(workspace, {}))
    yield recommender
    recommender.close()


def test_a_store_that_hangs_costs_one_time_limit_and_comes_back(served: Recommender, wire: Wire, tiny_workspace: Path) -> None:
    user = load_events(tiny_workspace / "data")["user_id"][0]
    known = served.recommend(Ask(user_id=user))
    assert (known.degraded, known.cold_start) == ((), False)

    wire.alive.clear()
    hanging = served.recommend(Ask(user_id=user))
    assert hanging.degraded == ("user_features_unavailable",)
    assert len(hanging.items) == 10
    assert hanging.took_ms["user"] < 1000  # the wire never answers: without a limit this would take for ever

    before = wire.connections
    assert served.recommend(Ask(user_id=user)).degraded == ("user_features_unavailable",)
    assert wire.connections == before  # the breaker is open: the store is left alone

    wire.alive.set()
    time.sleep(PAUSE_S)
    again = served.recommend(Ask(user_id=user))
    assert (again.degraded, again.cold_start) == ((), False)


def test_a_store_that_is_gone_is_no_reason_to_fail(served: Recommender, wire: Wire, tiny_workspace: Path) -> None:
    wire.alive.clear()
    wire.close()
    slate = served.recommend(Ask(user_id=load_events(tiny_workspace / "data")["user_id"][0]))
    assert (slate.degraded, len(slate.items)) == (("user_features_unavailable",), 10)
