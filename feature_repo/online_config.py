"""Where online features lie: a SQLite file of the workspace, Redis or PostgreSQL, named by one URL.

In: `[online]` of `tandem.toml`. Out: the `online_store` section of `feature_store.yaml`, which Feast's own commands read too.
`${NAME}` in the URL stays as it is, in the file too, and is taken from the environment when a store is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from tandem.core.errors import InputError

_REDIS: Final = {"redis": False, "rediss": True}
_POSTGRES: Final = ("postgresql", "postgres")
REGISTRY_TIMEOUT_S: Final = 5
_HELP_REGISTRY: Final = "write postgresql://user:password@host:port/database?schema=…"
_HELP: Final = "write redis://[:password@]host:port/db, rediss://… or postgresql://user:password@host:port/database?schema=…"


@dataclass(frozen=True)
class OnlineConfig:
    """`url` empty: `state/online.db` in the workspace; else `redis://…`, `rediss://…` or `postgresql://…`.

    `registry` is where Feast keeps its definitions, empty: `state/registry.db`, else `postgresql://…`. One Redis database or
    PostgreSQL schema holds one workspace. Raises InputError for any other URL.
    """

    url: str = ""
    registry: str = ""

    def __post_init__(self) -> None:
        if self.url:
            _section(self.url)
        registry_path(self.registry)

    def section(self, home: Path) -> dict[str, Any]:
        """`online_store` for the workspace at the absolute path `home`."""
        return _section(self.url) if self.url else sqlite_section(home)


def sqlite_section(home: Path) -> dict[str, Any]:
    """The default: a file of the workspace."""
    return {"type": "feature_repo.sqlite_store.NewestSqliteOnlineStore", "path": str(home / "state" / "online.db")}


def registry_path(url: str) -> str:
    """SQLAlchemy's URL of Feast's registry; empty stays empty. A server that does not answer is given up after some seconds."""
    if not url:
        return ""
    address = urlsplit(url)
    if address.scheme not in _POSTGRES or not address.hostname or not address.path.strip("/"):
        raise InputError(f"online.registry begins with {address.scheme or 'nothing'!r} or lacks a part; {_HELP_REGISTRY}")
    options = dict(parse_qsl(address.query))
    unknown = set(options) - {"schema", "sslmode"}
    if unknown:
        raise InputError(f"online.registry has unknown options {sorted(unknown)}; there are schema and sslmode")
    schema = options.get("schema", "public")
    if not schema.replace("_", "").isalnum():
        raise InputError(f"online.registry names the schema {schema!r}; use letters, digits and underscores")
    query = f"options=-csearch_path%3D{schema}&connect_timeout={REGISTRY_TIMEOUT_S}&sslmode={options.get('sslmode', 'prefer')}"
    return address._replace(scheme="postgresql+psycopg", query=query).geturl()


def _section(url: str) -> dict[str, Any]:
    address = urlsplit(url)
    if address.scheme in _REDIS and address.hostname:
        return _redis(address)
    if address.scheme in _POSTGRES and address.hostname and address.path.strip("/"):
        return _postgres(address)
    raise InputError(f"online.url begins with {address.scheme or 'nothing'!r} or lacks a part; {_HELP}")


def _redis(address: SplitResult) -> dict[str, Any]:
    words = [f"{_host(address)}:{address.port or 6379}", f"db={address.path.strip('/') or 0}"]
    words += [f"{name}={unquote(value)}" for name in ("username", "password") if (value := getattr(address, name))]
    if _REDIS[address.scheme]:
        words.append("ssl=true")
    if any("," in word for word in words):
        raise InputError("online.url has a comma in a name or password, which Feast's Redis settings cannot hold; use another")
    return {"type": "feature_repo.redis_store.NewestRedisOnlineStore", "connection_string": ",".join(words)}


def _postgres(address: SplitResult) -> dict[str, Any]:
    options = dict(parse_qsl(address.query))
    unknown = set(options) - {"schema", "sslmode"}
    if unknown:
        raise InputError(f"online.url has unknown options {sorted(unknown)}; there are schema and sslmode")
    return {
        "type": "feature_repo.postgres_store.NewestPostgresOnlineStore",
        "host": _host(address),
        "port": address.port or 5432,
        "database": address.path.strip("/"),
        "db_schema": options.get("schema", "public"),
        "user": unquote(address.username or "postgres"),
        "password": unquote(address.password or ""),
        "sslmode": options.get("sslmode", "prefer"),
    }


def _host(address: SplitResult) -> str:
    return address.hostname or "localhost"
