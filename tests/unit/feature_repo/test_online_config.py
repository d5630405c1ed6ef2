"""One URL to Feast's `online_store` section."""

from __future__ import annotations

from pathlib import Path

import pytest

from feature_repo.online_config import OnlineConfig
from tandem.core.errors import InputError

HOME = Path("/a workspace")


def test_the_default_is_a_file_of_the_workspace() -> None:
    assert OnlineConfig().section(HOME)["path"] == "/a workspace/state/online.db"


def test_redis() -> None:
    section = OnlineConfig("redis://:s%40cret@cache:6380/3").section(HOME)
    assert section["connection_string"] == "cache:6380,db=3,password=s@cret"
    assert section["type"].endswith("NewestRedisOnlineStore")
    assert OnlineConfig("rediss://cache").section(HOME)["connection_string"] == "cache:6379,db=0,ssl=true"


def test_postgres() -> None:
    section = OnlineConfig("postgresql://ann:p%40ss@db/shop?schema=features&sslmode=require").section(HOME)
    assert section == {
        "type": "feature_repo.postgres_store.NewestPostgresOnlineStore",
        "host": "db",
        "port": 5432,
        "database": "shop",
        "db_schema": "features",
        "user": "ann",
        "password": "p@ss",
        "sslmode": "require",
    }


def test_a_password_may_wait_in_the_environment() -> None:
    assert OnlineConfig("postgresql://ann:${SHOP_PASSWORD}@db/shop").section(HOME)["password"] == "${SHOP_PASSWORD}"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://db/shop", "begins with 'mysql'"),
        ("localhost:6379", "begins with 'localhost'"),
        ("postgresql://db", "lacks a part"),
        ("postgresql://db/shop?scheme=x", r"unknown options \['scheme'\]"),
        ("redis://:s%2Ccret@cache", "a comma"),
    ],
)
def test_other_urls_are_refused(url: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        OnlineConfig(url)
