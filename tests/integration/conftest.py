"""Real servers for tests: TANDEM_TEST_REDIS and TANDEM_TEST_POSTGRES, else the local defaults; without one a test is skipped."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import psycopg
import pytest
import redis

REDIS = os.environ.get("TANDEM_TEST_REDIS", "redis://127.0.0.1:6379/0").rsplit("/", 1)[0]
POSTGRES = os.environ.get("TANDEM_TEST_POSTGRES", "postgresql://root@127.0.0.1:5432/test").replace("+psycopg", "")


@pytest.fixture
def redis_url() -> Iterator[str]:
    """An empty database of a real Redis, for this test alone; emptied afterwards."""
    try:
        url = next(url for number in range(15, 0, -1) if _claimed(url := f"{REDIS}/{number}"))
    except redis.RedisError as error:
        pytest.skip(f"no Redis answers ({error}); name one in TANDEM_TEST_REDIS")
    except StopIteration:
        pytest.skip("every numbered database of the Redis server is in use")
    yield url
    redis.Redis.from_url(url).flushdb()


def _claimed(url: str) -> bool:
    """Was the database empty, and is it ours now? Tests run side by side."""
    client = redis.Redis.from_url(url, socket_connect_timeout=1)
    return not client.dbsize() and bool(client.set("taken by a test", "1", nx=True, ex=600))


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """A schema of its own in a real PostgreSQL; dropped afterwards."""
    try:
        psycopg.connect(POSTGRES, connect_timeout=2).close()
    except psycopg.OperationalError as error:
        pytest.skip(f"no PostgreSQL answers ({error}); name one in TANDEM_TEST_POSTGRES")
    schema = f"tandem_test_{uuid.uuid4().hex[:12]}"
    yield f"{POSTGRES}?schema={schema}"
    with psycopg.connect(POSTGRES, autocommit=True) as conn:
        conn.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")


class Wire:
    """A TCP connection to a real server that can go dead (bytes are taken, nothing comes back) or slow (`delay_s` a piece)."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._target = (address.hostname or "127.0.0.1", address.port or 0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        who, at, _ = address.netloc.rpartition("@")
        self.url = address._replace(netloc=f"{who}{at}127.0.0.1:{self._listener.getsockname()[1]}").geturl()
        self.connections, self.delay_s, self.alive = 0, 0.0, threading.Event()
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
                time.sleep(self.delay_s)
                sink.sendall(data)
        except OSError:
            return

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def wire_to() -> Iterator[Callable[[str], Wire]]:
    """Makes wires to servers; `url` is the server's address by way of the wire."""
    wires: list[Wire] = []

    def make(url: str) -> Wire:
        wires.append(Wire(url))
        return wires[-1]

    yield make
    for wire in wires:
        wire.alive.set()
        wire.close()
