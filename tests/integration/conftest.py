"""Real servers for tests: TANDEM_TEST_REDIS and TANDEM_TEST_POSTGRES, else the local defaults; without one a test is skipped."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

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
