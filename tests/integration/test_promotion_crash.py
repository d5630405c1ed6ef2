"""kill -9 at every step of creating, registering, promoting, rolling back, pruning and upgrading: one whole champion, and the
next try goes through. And many at once: one winner per expected champion, and a history without a gap.

The steps are not slept for: a process of its own kills itself when the code under test says that a step is done.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.exc import OperationalError

from registry.database import UPGRADE_STEPS
from registry.migrations import BOOKS
from registry.release import CREATE_STEPS, ReleaseFacts, create_release, verify_release
from registry.retention import DELETE_STEPS
from registry.store import ReleaseStore
from registry.tables import TABLES_VERSION, Base
from registry.work import ADD_STEPS, PROMOTE_STEPS
from tandem.core.errors import ConflictError

POSTGRES = os.environ.get("TANDEM_TEST_POSTGRES", "postgresql+psycopg://root@127.0.0.1:5432/test")
FACTS = ReleaseFacts(created_at=datetime(2026, 11, 20, tzinfo=UTC))

MOTHER = """
import json, os, signal, sys
from datetime import UTC, datetime
from pathlib import Path
from registry.release import ReleaseFacts, create_release, verify_release
from registry.retention import prune
from registry.store import ReleaseStore

def act(what, url, root, fatal):
    def after(step):
        if step == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    if what == "create":
        facts = ReleaseFacts(created_at=datetime(2026, 11, 20, tzinfo=UTC))
        create_release({"popular.json": Path(root, "popular.json")}, Path(root, "releases", "b"), facts, after=after)
    elif what == "add":
        folder = Path(root, "releases", "b")
        ReleaseStore(url, folder.parent, after=after).add(verify_release(folder), folder)
    elif what == "open":
        ReleaseStore(url, Path(root, "releases"), after=after)
    elif what == "prune":
        prune(ReleaseStore(url, Path(root, "releases"), after=after), Path(root, "releases"), 0, after)
    elif what == "promote":
        ReleaseStore(url, after=after).promote("b", expected="a", who="ada", why="better")
    else:
        ReleaseStore(url, after=after).rollback(expected="b", who="ada", why="errors")

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        act(*json.loads(line))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Forks a child for each line on its standard input and tells how it ended: a fresh interpreter each time would take seconds."""

RACE = """
import json, multiprocessing, sys
from sqlalchemy import create_engine
from registry.store import ReleaseStore
from tandem.core.errors import ConflictError

def one(url, number, start, results):
    store = ReleaseStore(url)
    start.wait()
    try:
        results.put([number, store.promote(f"r{number}", expected="a", who=f"process {number}", why="race").name])
    except ConflictError as error:
        results.put([number, str(error)])

url = sys.argv[1]
create_engine(url)  # imports the driver once, before forking
fork = multiprocessing.get_context("fork")
start, results = fork.Barrier(50), fork.SimpleQueue()
racers = [fork.Process(target=one, args=(url, number, start, results)) for number in range(50)]
[racer.start() for racer in racers]
print(json.dumps([results.get() for _ in racers]))
[racer.join() for racer in racers]
"""

QUEUE = """
import multiprocessing, sys
from sqlalchemy import create_engine
from registry.store import ReleaseStore
from tandem.core.errors import ConflictError

def one(url, number, start):
    store = ReleaseStore(url)
    start.wait()
    for turn in range(5):
        while True:
            live = store.champion()
            try:
                if live.version % 7 == 6:
                    store.rollback(expected=live.name, who=f"process {number}", why="every seventh change")
                else:
                    store.promote(f"r{number}-{turn}", expected=live.name, who=f"process {number}", why=f"turn {turn}")
                    break
            except ConflictError:
                continue

url = sys.argv[1]
create_engine(url)
fork = multiprocessing.get_context("fork")
start = fork.Barrier(10)
racers = [fork.Process(target=one, args=(url, number, start)) for number in range(10)]
[racer.start() for racer in racers]
[racer.join() for racer in racers]
sys.exit(max(racer.exitcode for racer in racers))
"""
"""Ten processes, each of which makes five releases live one after the other, and rolls back whenever six changes have gone by."""


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of an empty database; PostgreSQL's is a schema of its own, dropped afterwards."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/state/tandem.db"
        return
    engine = create_engine(POSTGRES, connect_args={"connect_timeout": 2})
    schema = f"tandem_test_{uuid.uuid4().hex[:12]}"
    try:
        with engine.begin() as connection:
            connection.execute(text(f"CREATE SCHEMA {schema}"))
    except OperationalError:
        pytest.skip("no PostgreSQL answers; name one in TANDEM_TEST_POSTGRES")
    yield f"{POSTGRES}?options=-csearch_path%3D{schema}"
    with engine.begin() as connection:
        connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
    engine.dispose()


@pytest.fixture
def store(database: str, tmp_path: Path) -> Iterator[ReleaseStore]:
    """Release `a` live and `b` waiting, both real folders."""
    store = ReleaseStore(database)
    (tmp_path / "popular.json").write_text("[1, 2, 3]")
    for name in ("a", "b"):
        target = tmp_path / "releases" / name
        store.add(create_release({"popular.json": tmp_path / "popular.json"}, target, FACTS), target)
    store.promote("a", expected=None, who="ada", why="the first")
    yield store
    store.close()


Run = Callable[[str, str, Path, str | None], int]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Does "create", "promote" or "rollback" in a process that dies after a given step; gives its exit status (-9: killed)."""
    with subprocess.Popen([sys.executable, "-c", MOTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as mother:
        assert mother.stdin is not None
        assert mother.stdout is not None
        ask, answer = mother.stdin, mother.stdout

        def run(act: str, url: str, root: Path, fatal: str | None) -> int:
            print(json.dumps([act, url, str(root), fatal]), file=ask, flush=True)
            return int(answer.readline())

        yield run
        ask.close()


def whole_champion(store: ReleaseStore) -> str:
    """The live release's name, once its folder and the history have been found to agree with it."""
    live = store.champion()
    assert live.name is not None
    last = store.history()[-1]
    assert (last.name, last.version, last.at) == (live.name, live.version, live.since)
    assert len(store.history()) == live.version
    verify_release(store.get(live.name).folder, store.get(live.name).content_hash)
    return live.name


@pytest.mark.parametrize("step", CREATE_STEPS)
def test_killed_while_creating(run: Run, tmp_path: Path, step: str) -> None:
    (tmp_path / "popular.json").write_text("[1, 2, 3]")
    releases = tmp_path / "releases"
    assert run("create", "", tmp_path, step) == -signal.SIGKILL
    assert (releases / "b").exists() == (step == "published")
    assert bool(list(releases.glob(".partial-*"))) == (step != "published")
    assert run("create", "", tmp_path, None) == 0
    assert verify_release(releases / "b").files.keys() == {"popular.json"}
    assert list(releases.glob(".partial-*")) == []


@pytest.mark.parametrize("step", ADD_STEPS)
def test_killed_while_registering(run: Run, database: str, tmp_path: Path, step: str) -> None:
    (tmp_path / "popular.json").write_text("[1, 2, 3]")
    create_release({"popular.json": tmp_path / "popular.json"}, tmp_path / "releases" / "b", FACTS)
    assert run("add", database, tmp_path, step) == -signal.SIGKILL
    store = ReleaseStore(database, tmp_path / "releases")
    assert [release.name for release in store.list()] == (["b"] if step == "committed" else [])
    assert run("add", database, tmp_path, None) == 0
    assert verify_release(store.get("b").folder, store.get("b").content_hash).name == "b"
    store.close()


@pytest.mark.parametrize("step", DELETE_STEPS)
def test_killed_while_pruning(run: Run, store: ReleaseStore, database: str, tmp_path: Path, step: str) -> None:
    """Release `b` goes, known or unknown as a whole; at no step does its name lead to half a folder."""
    releases = tmp_path / "releases"
    assert run("prune", database, tmp_path, step) == -signal.SIGKILL
    assert whole_champion(store) == "a"
    assert ("b" in [release.name for release in store.list()]) == (step == "marked")
    if (releases / "b").exists():
        assert verify_release(releases / "b").name == "b"
    assert (releases / "b").exists() == (step in ("marked", "committed"))
    assert run("prune", database, tmp_path, None) == 0
    assert [path.name for path in releases.iterdir() if path.is_dir()] == ["a"]
    assert [release.name for release in store.list()] == ["a"]


@pytest.mark.parametrize("step", UPGRADE_STEPS)
def test_killed_while_making_the_tables(run: Run, database: str, tmp_path: Path, step: str) -> None:
    assert run("open", database, tmp_path, step) == -signal.SIGKILL
    assert tables(database) == (_EVERY_TABLE if step == "upgraded" else set())
    assert run("open", database, tmp_path, None) == 0
    assert tables(database) == _EVERY_TABLE


@pytest.mark.parametrize("step", UPGRADE_STEPS)
def test_killed_while_upgrading_the_tables(run: Run, store: ReleaseStore, database: str, tmp_path: Path, step: str) -> None:
    first_layout(database)
    assert run("open", database, tmp_path, step) == -signal.SIGKILL
    before, after = (1, str(tmp_path / "releases" / "a")), (TABLES_VERSION, "a")
    assert version_and_folder(database) == (after if step == "upgraded" else before)
    assert run("open", database, tmp_path, None) == 0
    assert version_and_folder(database) == after
    assert whole_champion(ReleaseStore(database, tmp_path / "releases")) == "a"


_EVERY_TABLE = {*Base.metadata.tables, BOOKS}


def tables(url: str) -> set[str]:
    engine = create_engine(url)
    names = set(inspect(engine).get_table_names())
    engine.dispose()
    return names


def first_layout(url: str) -> None:
    """Turn the tables back into what Tandem made before there were migrations: the store was opened without a releases folder."""
    engine = create_engine(url)
    with engine.begin() as connection:
        for name in ("traffic", "rollout", "experiment_changes", "rollout_experiments"):
            connection.execute(text(f"DROP TABLE {name}"))
        connection.execute(text(f"DROP TABLE {BOOKS}"))
        connection.execute(text("UPDATE tandem_tables SET version = 1"))
    engine.dispose()


def version_and_folder(url: str) -> tuple[int, str]:
    engine = create_engine(url)
    with engine.connect() as connection:
        found = connection.execute(text("SELECT version, folder FROM tandem_tables, releases WHERE name = 'a'")).one()
    engine.dispose()
    return found.version, found.folder


@pytest.mark.parametrize("step", PROMOTE_STEPS)
def test_killed_while_promoting(run: Run, store: ReleaseStore, database: str, tmp_path: Path, step: str) -> None:
    assert run("promote", database, tmp_path, step) == -signal.SIGKILL
    if step == "committed":
        assert whole_champion(store) == "b"
        with pytest.raises(ConflictError, match="'b' is live already"):
            store.promote("b", expected="a", who="ada", why="again")
    else:
        assert whole_champion(store) == "a"
        store.promote("b", expected="a", who="ada", why="again")
    assert whole_champion(store) == "b"


@pytest.mark.parametrize("step", PROMOTE_STEPS)
def test_killed_while_rolling_back(run: Run, store: ReleaseStore, database: str, tmp_path: Path, step: str) -> None:
    store.promote("b", expected="a", who="ada", why="better")
    assert run("rollback", database, tmp_path, step) == -signal.SIGKILL
    assert whole_champion(store) == ("a" if step == "committed" else "b")
    if step != "committed":
        store.rollback(expected="b", who="ada", why="again")
    assert whole_champion(store) == "a"


def test_of_fifty_processes_one_wins(store: ReleaseStore, database: str, tmp_path: Path) -> None:
    with store.work() as work:
        for number in range(50):
            manifest = verify_release(tmp_path / "releases" / "a").to_dict() | {"name": f"r{number}"}
            work.add(type(work.get("a").manifest)(**manifest), tmp_path / "releases" / "a")
        work.commit()
    told = subprocess.run([sys.executable, "-c", RACE, database], check=True, timeout=240, capture_output=True, text=True).stdout
    results = dict(json.loads(told))
    winner = store.champion()
    assert winner.version == 2
    assert [number for number, said in results.items() if said == f"r{number}"] == [int(str(winner.name)[1:])]
    number = str(winner.name)[1:]
    told_of = f"but '{winner.name}' is live since {winner.since:%Y-%m-%d %H:%M:%S} UTC by process {number} (change 2)"
    assert sum(told_of in said for said in results.values()) == 49
    assert [(line.name, line.previous, line.who, line.why) for line in store.history()] == [
        ("a", None, "ada", "the first"),
        (winner.name, "a", f"process {number}", "race"),
    ]


def test_ten_processes_taking_turns_leave_a_history_without_a_gap(store: ReleaseStore, database: str, tmp_path: Path) -> None:
    with store.work() as work:
        plain = verify_release(tmp_path / "releases" / "a")
        for name in (f"r{number}-{turn}" for number in range(10) for turn in range(5)):
            work.add(replace(plain, name=name), tmp_path / "releases" / "a")
        work.commit()
    subprocess.run([sys.executable, "-c", QUEUE, database], check=True, timeout=240)
    history = store.history()
    assert [line.version for line in history] == list(range(1, len(history) + 1))
    assert [line.previous for line in history[1:]] == [line.name for line in history[:-1]]
    assert sorted(line.at for line in history) == [line.at for line in history]
    assert len({line.at for line in history}) == len(history)
    promoted = [line.name for line in history if line.kind == "promote"]
    assert sorted(promoted) == ["a", *sorted(f"r{number}-{turn}" for number in range(10) for turn in range(5))]
    assert sum(line.kind == "rollback" for line in history) >= 7
    assert (store.champion().name, store.champion().version) == (history[-1].name, len(history))
