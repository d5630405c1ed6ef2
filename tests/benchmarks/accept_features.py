"""`make accept-features`: the feature plane on each real data set, and what must not get past it.

Features are built, applied, materialised and checked by the commands that a person types, in processes of their own. Then faults:
a training row that sees its own event, and a table that knows the future, must each be refused with exit code 3 and named;
materialisations killed by SIGKILL in their midst and run again must leave the online store that an undisturbed one leaves; of
two at once one must win, and the other be told who holds it. What is broken is broken in a copy of the workspace.

    python tests/benchmarks/accept_features.py [ranklens movielens goodbooks online-retail world] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
from accept import CASES, ROOT, tandem

KILLED = ("in a write", "before the snapshot", "before the snapshot is current")
FAULTY = """\
import os, signal, sys
from datetime import timedelta
from feature_repo import materialize, offline, snapshot, sqlite_store
from tandem.service import cli

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def wait(*given):
    sys.stdin.readline()
    return write_snapshot(*given)

def third(*given):
    calls.append(given)
    return die() if len(calls) == 3 else check_stored(*given)

calls, check_stored, write_snapshot = [], sqlite_store._check_stored, materialize.write_snapshot
module, name, fault = {
    "in a write": (sqlite_store, "_check_stored", third),
    "before the snapshot": (materialize, "write_snapshot", die),
    "before the snapshot is current": (snapshot, "write_text", die),
    "slow": (materialize, "write_snapshot", wait),
    "late by a microsecond": (offline, "JUST_BEFORE", timedelta(0)),
}[sys.argv[1]]
setattr(module, name, fault)
cli.app(sys.argv[2:])
"""
"""A `tandem` with one fault, named first. In the third write rows of three views are stored, in a transaction or before it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=[case.name for case in CASES if case.name != "world"])
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    asked = parser.parse_args()
    folder = asked.keep or Path(tempfile.mkdtemp(prefix="tandem-accept-features-"))
    for case in CASES:
        if case.name not in asked.cases:
            continue
        print(f"\n== {case.name}", flush=True)
        workspace = folder / case.name
        shutil.rmtree(workspace, ignore_errors=True)
        workspace.mkdir(parents=True)
        if case.settings:
            shutil.copy(ROOT / case.settings, workspace / "tandem.toml")
        steps = (case.bring, ("features", "build"), ("features", "apply"), ("features", "materialize"))
        took = {" ".join(words[:2]): tandem(workspace, *words)[1] for words in steps}
        print(", ".join(f"{step} {seconds} s" for step, seconds in took.items()), flush=True)
        for line in accept(workspace, folder / f"{case.name}-broken"):
            print(line, flush=True)
    if not asked.keep:
        shutil.rmtree(folder)
    return 0


def accept(workspace: Path, broken: Path) -> Iterator[str]:
    """Every claim about a materialised workspace, as an assert; faults go into the copy `broken`. Yields what a person reads."""
    started = time.perf_counter()
    code, checked = check(workspace)
    assert (code, refused(checked)) == (0, set()), checked
    yield f"features check passes: {len(checked['checks'])} checks in {time.perf_counter() - started:.0f} s"

    code, checked = answer(workspace, "features", "check", fault="late by a microsecond")
    assert code == 3
    assert "leakage" in refused(checked), refused(checked)
    yield f"a row that sees its own event is refused: leakage, {checked['checks']['leakage']['detail'][:90]}"

    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(workspace, broken)
    yield killed(broken, stored(workspace))
    yield two_at_once(broken)
    assert stored(broken) == stored(workspace)

    changed = inject_future(broken)
    code, checked = check(broken)
    assert code == 3
    assert "tables in time" in refused(checked), refused(checked)
    detail = checked["checks"]["tables in time"]["detail"]
    assert "values from the future" in detail, detail
    yield f"{changed:,} values from the future in a table are refused: tables in time, {detail[:90]}"


def killed(workspace: Path, wanted: str) -> str:
    """Materialise into an emptied store, killed at every step, then whole; the hash of what is stored must be `wanted`."""
    from feature_repo.materialize import forget

    forget(workspace)
    for step in KILLED:
        done = run(workspace, "features", "materialize", fault=step)
        assert done.returncode == -signal.SIGKILL, (step, done.returncode, done.stderr[-2000:])
        if step == "in a write":
            assert stored(workspace) != wanted
    _, seconds = tandem(workspace, "features", "materialize")
    assert stored(workspace) == wanted, "a store of other content"
    return f"killed {', '.join(KILLED)}, then run again in {seconds} s: content hash {wanted[:16]}, as undisturbed"


def two_at_once(workspace: Path) -> str:
    """While one is at work another is told, at once, who holds the lock."""
    lock = workspace / "state" / "materialize.lock"
    words = command(workspace, "features", "materialize", fault="slow")
    first = subprocess.Popen(words, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while str(first.pid) not in lock.read_text():
        assert first.poll() is None, first.communicate()[1][-2000:]
        assert time.monotonic() < deadline, "the first never took the lock"
        time.sleep(0.05)
    second = run(workspace, "features", "materialize")
    _, errors = first.communicate("go on\n", timeout=600)
    assert first.returncode == 0, errors[-2000:]
    told = f"busy, held by features materialize (process {first.pid}) since 20"
    assert (second.returncode, told in second.stderr) == (1, True), second.stderr[-2000:]
    return f"of two at once one won and one was told: {told}.."


def inject_future(workspace: Path) -> int:
    """Give every user's rows the number of events of the row after it; returns how many values that changes."""
    from feature_repo.views import read_views

    view = next(view for view in read_views(workspace / "features") if view.name == "user_stats")
    (path,) = (workspace / view.path).glob("part-*.parquet")
    rows = pl.read_parquet(path)
    later = pl.col("user_events").shift(-1).over("user_id").fill_null(pl.col("user_events"))
    leaky = rows.with_columns(later)
    leaky.write_parquet(path)
    return int((rows["user_events"] != leaky["user_events"]).sum())


def stored(workspace: Path) -> str:
    """Hash of everything that the online store holds, row by row in order."""
    found = hashlib.sha256()
    with closing(sqlite3.connect(workspace / "state" / "online.db")) as conn:
        tables = conn.execute("SELECT name FROM sqlite_master WHERE name LIKE 'tandem_%' AND type = 'table' ORDER BY name")
        for (table,) in tables.fetchall():
            columns = "entity_key, feature_name, value, value_text, event_ts, event_us"
            for row in conn.execute(f"SELECT '{table}', {columns} FROM {table} ORDER BY entity_key, feature_name"):
                found.update(repr(row).encode())
    return found.hexdigest()


def check(workspace: Path) -> tuple[int, dict[str, Any]]:
    return answer(workspace, "features", "check")


def refused(checked: dict[str, Any]) -> set[str]:
    return {name for name, each in checked["checks"].items() if not each["passed"]}


def answer(workspace: Path, *words: str, fault: str = "") -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of a command."""
    done = run(workspace, *words, fault=fault)
    assert done.stdout, done.stderr[-3000:]
    return done.returncode, json.loads(done.stdout)


def run(workspace: Path, *words: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(workspace, *words, fault=fault), cwd=ROOT, capture_output=True, text=True, check=False)


def command(workspace: Path, *words: str, fault: str = "") -> list[str]:
    program = ["-c", FAULTY, fault] if fault else ["-m", "tandem.service.cli"]
    return [sys.executable, *program, "--workspace", str(workspace), *words, "--json"]


if __name__ == "__main__":
    raise SystemExit(main())
