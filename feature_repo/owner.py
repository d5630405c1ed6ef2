"""Whose a shared store is: a mark in it names the workspace that it holds, so that a second one does not write over the first.

In: an open store and its workspace. Out: nothing, or IncompatibleError naming both. The id of a workspace lies in
`state/workspace.json` and moves with the folder. SQLite files are a workspace's own and need no mark.
"""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tandem.core.errors import IncompatibleError
from tandem.core.folders import read_json, write_json

if TYPE_CHECKING:
    from feast import FeatureStore

ID_FILE: Final = "state/workspace.json"
TABLE: Final = "tandem_owner"
CREATE: Final = f"CREATE TABLE IF NOT EXISTS {TABLE} (project text PRIMARY KEY, owner text NOT NULL)"


def claim(store: FeatureStore, workspace: Path) -> None:
    """Mark the servers that a store writes to as this workspace's. Raises IncompatibleError where another one's mark stands."""
    mine = _owner(workspace)
    for where, found, setting in _marks(store, json.dumps(mine)):
        holder = json.loads(found)
        if holder["id"] != mine["id"]:
            raise IncompatibleError(
                f"{where} holds the features of workspace {holder['workspace']} on {holder['host']} since {holder['since']}; "
                f"this one is {mine['workspace']} on {mine['host']}. Give it a database or schema of its own in {setting}, "
                "or empty that one if its workspace is gone"
            )


def _owner(workspace: Path) -> dict[str, str]:
    path = workspace / ID_FILE
    if not path.is_file():
        write_json(path, {"id": uuid.uuid4().hex})
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"id": read_json(path)["id"], "workspace": str(workspace.resolve()), "host": socket.gethostname(), "since": since}


def _marks(store: FeatureStore, mine: str) -> Iterator[tuple[str, str, str]]:
    """(what, mark that stands there now, the setting that names it) of each server; a place without a mark gets ours."""
    from feature_repo.newest import NewestOnlineStore

    online = store.provider.online_store
    if isinstance(online, NewestOnlineStore) and (found := online.claim(store.config, mine)):
        yield "the online store", found, "online.url"
    engine = getattr(store.registry, "write_engine", None)
    if engine is not None and engine.dialect.name != "sqlite":
        yield "Feast's registry", _claim_sql(engine, store.project, mine), "online.registry"


def _claim_sql(engine: object, project: str, mine: str) -> str:
    from sqlalchemy import Engine, text

    assert isinstance(engine, Engine)
    with engine.begin() as conn:
        if engine.dialect.name == "postgresql":
            conn.execute(text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": TABLE})  # two may create it at once
        conn.execute(text(CREATE))
        insert = f"INSERT INTO {TABLE} (project, owner) VALUES (:project, :owner) ON CONFLICT DO NOTHING"
        conn.execute(text(insert), {"project": project, "owner": mine})
        found: str = conn.execute(text(f"SELECT owner FROM {TABLE} WHERE project = :project"), {"project": project}).scalar_one()
    return found
