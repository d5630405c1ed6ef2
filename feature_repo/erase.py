"""Erasure: everything that names one user goes from events, features, online store and served-log, and cannot come back.

In: a workspace and a user id. Out: what was removed where, and the proof: the same places asked again. First the user's hash is
written down in `data/erased.json`, from which on no import, push or answer takes the id; an erasure that was cut short is
finished by the next one. Releases are immutable: `kept` names those whose evaluation rows hold the user, until they are pruned.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import polars as pl

from feature_repo.erased import ERASED_FILE, ErasedUsers, user_hash
from feature_repo.materialize import QUARANTINE
from feature_repo.offline import LOCK, is_applied, open_own
from feature_repo.store import LOCK_FILE, NEW_FOLDER, UNREADABLE, write_parquet
from tandem.core.errors import IntegrityError
from tandem.core.folders import held, read_json, write_json
from tandem.core.schema import check_id

PROOF_FILE: Final = "state/erasures.json"
_TABLES: Final = (
    "data/*.parquet",
    "data/new/*.parquet",
    "features/**/*.parquet",
    "served/*.parquet",
    "shadow/*.parquet",
    f"{QUARANTINE}/**/*.parquet",
)
_EVALUATIONS: Final = ("models/evaluation/users.parquet", "releases/*/evaluation/users.parquet")
_WAIT_S: Final = 60.0


@dataclass(frozen=True)
class Erased:
    """Rows removed by file (relative to the workspace), entities removed online by view, and evaluation files that hold it."""

    user_hash: str
    at: datetime
    rows: dict[str, int]
    online: dict[str, int]
    kept: tuple[str, ...]


def erase_user(workspace: Path, user_id: str) -> Erased:
    """Remove a user everywhere, then ask every place again.

    Raises IntegrityError when a place still names the user, and BusyError while an import or a build holds the workspace.
    """
    user_id, data = check_id(user_id, "user_id"), workspace / "data"
    # A build takes the locks in this order, too.
    with held(workspace / LOCK, "erase", _WAIT_S), held(data / LOCK_FILE, "erase", _WAIT_S):
        _remember(data, user_id)
        rows = {str(path.relative_to(workspace)): gone for path in _tables(workspace) if (gone := _strike(path, user_id))}
        rows |= {str(path.relative_to(workspace)): 1 for path in _unreadable(data)}
        (workspace / "state" / "demo.json").unlink(missing_ok=True)  # the demo's people
        online = _strike_online(workspace, user_id)
        _prove(workspace, user_id)
        done = Erased(user_hash(user_id), datetime.now(UTC), rows, online, tuple(_kept(workspace, user_id)))
        _record(workspace, done)
    return done


def _remember(data: Path, user_id: str) -> None:
    known = ErasedUsers(data).hashes
    write_json(data / ERASED_FILE, {"users": sorted(known | {user_hash(user_id)})})


def _tables(workspace: Path) -> Iterator[Path]:
    return (path for pattern in _TABLES for path in sorted(workspace.glob(pattern)))


def _unreadable(data: Path) -> Iterator[Path]:
    """Delete parts of events that nobody can read: nobody can say that they do not name the user."""
    for path in sorted((data / NEW_FOLDER).glob(f"*{UNREADABLE}")):
        path.unlink()
        yield path


def _names(user_id: str, schema: pl.Schema) -> pl.Expr | None:
    """Which rows of a table name the user; None where none can. A refused row is kept as JSON of what was sent."""
    if "user_id" in schema:
        return pl.col("user_id") == user_id
    if "content" in schema:
        return pl.col("content").str.contains(json.dumps(user_id, ensure_ascii=False), literal=True)
    return None


def _strike(path: Path, user_id: str) -> int:
    named = _names(user_id, pl.read_parquet_schema(path))  # type: ignore[arg-type]
    if named is None or not (gone := _count(path, named)):
        return 0
    write_parquet(pl.read_parquet(path).filter(~named.fill_null(False)), path)
    return gone


def _count(path: Path, named: pl.Expr) -> int:
    return int(pl.scan_parquet(path).filter(named).select(pl.len()).collect().item())


def _strike_online(workspace: Path, user_id: str) -> dict[str, int]:
    if not is_applied(workspace):
        return {}
    store = open_own(workspace)
    views = [view for view in store.list_feature_views() if view.entities == ["user"]]
    online = store.provider.online_store
    gone = {view.name: online.erase(store.config, view, [user_id]) for view in views}
    if any(gone.values()):
        online.scrub(store.config)
    return gone


def _prove(workspace: Path, user_id: str) -> None:
    left = []
    for path in _tables(workspace):
        named = _names(user_id, pl.read_parquet_schema(path))  # type: ignore[arg-type]
        if named is not None and _count(path, named):
            left.append(str(path.relative_to(workspace)))
    if any(_strike_online(workspace, user_id).values()):
        left.append("the online store")
    if left:
        raise IntegrityError(f"{', '.join(left)} got new rows of the user meanwhile; stop what writes them and erase once more")


def _kept(workspace: Path, user_id: str) -> Iterator[str]:
    for pattern in _EVALUATIONS:
        for path in sorted(workspace.glob(pattern)):
            if _count(path, pl.col("user_id") == user_id):
                yield str(path.relative_to(workspace))


def _record(workspace: Path, done: Erased) -> None:
    path = workspace / PROOF_FILE
    record = asdict(done) | {"at": done.at.isoformat()}
    write_json(path, {"erasures": [*(read_json(path)["erasures"] if path.is_file() else []), record]})
