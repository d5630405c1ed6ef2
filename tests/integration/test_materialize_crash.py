"""kill -9 in the middle of a materialisation, then again: the same store, value for value. And two at once: one wins,
one is told.

A child kills itself at a step of the code under test; nothing is slept for. Every online store, on real servers.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import psycopg
import pytest
import redis
from psycopg.conninfo import make_conninfo

from feature_repo.materialize import forget, freshness, materialize
from feature_repo.offline import apply, open_store
from feature_repo.online_config import OnlineConfig
from feature_repo.views import TIMESTAMP, ViewSchema, write_views
from tandem.core.schema import TIME

START = datetime(2026, 1, 1, 12, tzinfo=UTC)
UNTIL = START + timedelta(days=30)
USERS = 900
STEPS = ("in a write", "between two writes", "before the snapshot", "before the snapshot is current")

CHILD = """
import json, os, signal, sys
from datetime import datetime
from pathlib import Path
import feature_repo.engine, feature_repo.postgres_store, feature_repo.redis_store
import feature_repo.snapshot, feature_repo.sqlite_store
from feature_repo import materialize as plane

home, until, steps = Path(sys.argv[1]), datetime.fromisoformat(sys.argv[2]), json.loads(sys.argv[3])
feature_repo.engine._ROWS_PER_RANGE, feature_repo.engine._ROWS_PER_WRITE, feature_repo.redis_store._PER_SCRIPT = 700, 300, 50

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def run(step):
    progress = die if step == "between two writes" else None
    if step == "in a write":  # rows are in the transaction, or half of the scripts have run
        feature_repo.sqlite_store._check_stored = feature_repo.postgres_store._check_stored = die
        feature_repo.redis_store.NewestRedisOnlineStore._send = half(feature_repo.redis_store.NewestRedisOnlineStore._send)
    elif step == "before the snapshot":
        plane.write_snapshot = die
    elif step == "before the snapshot is current":
        feature_repo.snapshot.write_text = die
    plane.materialize(home, until=until, progress=progress)

def half(send):
    def some(self, config, commands):
        for number, reply in enumerate(send(self, config, commands)):
            if number == 2:
                die()
            yield reply
    return some

for step in steps:
    child = os.fork()
    if child == 0:
        run(step)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

RIVAL = """
import sys, time
from pathlib import Path
from feature_repo import materialize as plane
from feature_repo import offline
from tandem.core.errors import BusyError

home, what = Path(sys.argv[1]), sys.argv[2]
slow = plane.write_snapshot
plane.write_snapshot = lambda *all: (time.sleep(2), slow(*all))[1]
check = offline.write_feast_files
offline.write_feast_files = lambda *all: (time.sleep(2), check(*all))[1]
sys.stdin.readline()
try:
    plane.materialize(home) if what == "materialize" else offline.apply(home)
except BusyError as error:
    print("told:", error)
else:
    print("won")
"""


@pytest.fixture(params=["sqlite", "redis", "postgres"])
def online(request: pytest.FixtureRequest) -> OnlineConfig:
    """An empty online store of its own."""
    return OnlineConfig("" if request.param == "sqlite" else request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def workspace(tmp_path: Path, online: OnlineConfig) -> Path:
    """Two views of three rows per entity, applied with the online store; nothing is stored yet."""
    tables = {"user_stats": table("user_id", USERS), "item_stats": table("item_id", 400)}
    (tmp_path / "features").mkdir()
    for name, rows in tables.items():
        rows.write_parquet(tmp_path / "features" / f"{name}.parquet")
    views = (ViewSchema.of_table(name, name.split("_")[0], rows) for name, rows in tables.items())
    write_views(tmp_path / "features", tuple(views))
    apply(tmp_path, online)
    return tmp_path


def table(key: str, entities: int) -> pl.DataFrame:
    rows = [
        (
            f"{'x' * (number % 13)}{number}",
            START + timedelta(days=day, microseconds=number),
            number * 10 + day,
            [f"i{number}"] * day,
        )
        for number in range(entities)
        for day in range(3)
    ]
    entity = key.removesuffix("_id")
    schema = {key: pl.String, TIMESTAMP: TIME, f"{entity}_events": pl.Int64, f"{entity}_words": pl.List(pl.String)}
    return pl.DataFrame(rows, schema=schema, orient="row")


def stored(workspace: Path) -> str:
    """Hash of everything that the online store holds, as the server itself gives it."""
    found = hashlib.sha256()
    for line in sorted(_cells(workspace)):
        found.update(repr(line).encode())
    return found.hexdigest()


def _cells(workspace: Path) -> Iterator[tuple[Any, ...]]:
    store = open_store(workspace)
    settings, online = store.config.online_store, store.provider.online_store
    if settings.type.endswith("NewestRedisOnlineStore"):
        client: Any = online._get_client(settings)
        assert isinstance(client, redis.Redis)
        for key in client.scan_iter(b"*", _type="hash"):
            yield key, *sorted(client.hgetall(key).items())  # type: ignore[union-attr]
        return
    columns = "entity_key, feature_name, value, value_text, event_ts"
    for view in ("user_stats", "item_stats"):
        if settings.type.endswith("NewestSqliteOnlineStore"):
            yield from online._get_conn(store.config).execute(f"SELECT '{view}', {columns}, event_us FROM tandem_{view}")
            continue
        where = make_conninfo("", host=settings.host, port=settings.port, dbname=settings.database, user=settings.user)
        with psycopg.connect(where) as conn:
            yield from conn.execute(f"SELECT '{view}', {columns} FROM {settings.db_schema}.tandem_{view}")  # type: ignore[arg-type]


def watermarks(workspace: Path) -> list[Any]:
    return freshness(workspace)["materialized_until"].to_list()


def test_killed_at_every_step_and_run_again_it_stores_the_same(workspace: Path) -> None:
    whole = materialize(workspace, until=UNTIL)
    wanted = stored(workspace)
    assert whole.written == USERS + 400
    forget(workspace)
    assert stored(workspace) != wanted
    apply(workspace)

    command = [sys.executable, "-c", CHILD, str(workspace), UNTIL.isoformat(), json.dumps(STEPS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(STEPS), done.stderr
    assert (workspace / "snapshot" / "CURRENT").read_text().strip() == whole.snapshot

    again = materialize(workspace, until=UNTIL)
    assert (again.views, again.snapshot) == (whole.views, whole.snapshot)
    assert stored(workspace) == wanted
    assert watermarks(workspace) == [UNTIL, UNTIL]
    assert not list((workspace / "snapshot").glob(".partial-*"))


def test_a_watermark_stays_where_it_was_until_its_view_is_stored(workspace: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(workspace), UNTIL.isoformat(), json.dumps(["in a write"])]
    subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert watermarks(workspace) == [None, None]


@pytest.mark.parametrize("what", ["materialize", "apply"])
def test_of_two_at_once_one_wins_and_one_is_told_who_holds_it(tmp_path: Path, what: str) -> None:
    rows = table("user_id", 10)
    (tmp_path / "features").mkdir()
    rows.write_parquet(tmp_path / "features" / "user_stats.parquet")
    write_views(tmp_path / "features", (ViewSchema.of_table("user_stats", "user", rows),))
    apply(tmp_path)
    command = [sys.executable, "-c", RIVAL, str(tmp_path), what]
    rivals = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for rival in rivals:
        assert rival.stdin is not None
        rival.stdin.write("go\n")
        rival.stdin.flush()
    answers = sorted(rival.communicate(timeout=120)[0].strip() for rival in rivals)
    assert answers[1] == "won"
    holders = [f"told: materialize is busy, held by features {what} (process {rival.pid}) since 20" for rival in rivals]
    assert any(answers[0].startswith(holder) for holder in holders), answers[0]
    assert [view.name for view in open_store(tmp_path).list_feature_views()] == ["user_stats"]
