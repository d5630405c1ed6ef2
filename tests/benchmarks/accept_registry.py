"""`make accept-registry`: releases of RankLens made, judged, promoted, rolled back, compared and scored with, as people do it.

In the middle a running service follows: a canary for half of the users, the promotion, no failed request.
Once with everything embedded (SQLite, MLflow in a file), once as a team has it (PostgreSQL, a running `mlflow server`),
which is then stopped: promotions must go on without it. One release is worse on purpose; the gate must refuse it, with intervals.

    python tests/benchmarks/accept_registry.py [--keep FOLDER]      (TANDEM_TEST_POSTGRES names the PostgreSQL)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("TANDEM_SHARED_DATA", ROOT.parent / "shared" / "data"))
POSTGRES = os.environ.get("TANDEM_TEST_POSTGRES", "postgresql+psycopg://root@127.0.0.1:5432/test")
WORSE = {"TANDEM_RANKER__UTILITY": "{ click = -1.0 }"}
"""A ranker that puts last what it believes in most."""

Tandem = Callable[..., tuple[int, dict[str, Any]]]
"""Runs a command, given its words and `extra` environment; answers with the exit code and the JSON."""

Ask = Callable[[str], dict[str, Any]]
"""A slate over HTTP for a user id; a request that fails is an error."""

PEOPLE = [f"visitor-{number}" for number in range(40)]

SCORE = """\
import json, sys, mlflow, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/tandem@champion")
slates = model.predict(pd.DataFrame({"user_id": sys.argv[2:]}), params={"k": 5})
print(json.dumps(slates.to_dict("list")))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    asked = parser.parse_args()
    folder = asked.keep or Path(tempfile.mkdtemp(prefix="tandem-accept-registry-"))
    base = folder / "base"
    prepare(base, commands(base, {}))
    print("\n== SQLite, MLflow in a file", flush=True)
    accept(base, folder / "embedded", {}, lambda: None)
    try:
        with database() as url, mlflow_server(url, folder) as (uri, stop):
            print("\n== PostgreSQL, a running mlflow server", flush=True)
            accept(base, folder / "team", {"TANDEM_REGISTRY__URL": url, "TANDEM_REGISTRY__MLFLOW_URI": uri}, stop)
    except ConnectionError as error:
        print(f"no PostgreSQL answers ({error}); name one in TANDEM_TEST_POSTGRES")
    if not asked.keep:
        shutil.rmtree(folder)
    return 0


def prepare(base: Path, tandem: Tandem) -> None:
    """A workspace with the data, good parts in `good/` and the same towers with a worse ranker in `worse/`, both evaluated."""
    if (base / "worse").is_dir():
        return
    base.mkdir(parents=True, exist_ok=True)
    steps = [("import", "metarank", str(DATA / "ranklens" / "events.jsonl.gz"), "--replace"), ("features", "build")]
    steps += [("features", "apply"), ("features", "materialize"), ("train",), ("evaluate",)]
    for words in steps:
        told(tandem, *words)
    spoil(base, tandem)


def spoil(base: Path, tandem: Tandem) -> None:
    """Keep the trained parts as `good/`, train a worse ranker on the same towers, keep that as `worse/`."""
    shutil.copytree(base / "models", base / "good")
    told(tandem, "train", "ranker", extra=WORSE)
    told(tandem, "evaluate", extra=WORSE)
    shutil.copytree(base / "models", base / "worse.part")
    (base / "worse.part").rename(base / "worse")


def accept(base: Path, workspace: Path, environment: Mapping[str, str], stop: Callable[[], None]) -> None:
    """The whole loop in a workspace of its own; `stop` takes MLflow away in the middle."""
    shutil.rmtree(workspace, ignore_errors=True)
    shutil.copytree(base, workspace, ignore=shutil.ignore_patterns("releases", "tandem.db*", "mlflow.db*", "mlruns", "served"))
    uri = environment.get("TANDEM_REGISTRY__MLFLOW_URI", f"sqlite:///{workspace / 'state' / 'mlflow.db'}")
    users = json.loads(
        subprocess.run(
            [sys.executable, "-c", FIRST_USERS, str(workspace)], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout
    )

    def score() -> dict[str, Any]:
        command = [sys.executable, "-c", SCORE, uri, *users]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return dict(json.loads(done.stdout))

    for line in loop(workspace, commands(workspace, environment), score, users, stop, lambda: service(workspace, environment)):
        print(line, flush=True)


FIRST_USERS = """\
import json, sys
import polars as pl
print(json.dumps(pl.read_parquet(f"{sys.argv[1]}/models/evaluation/users.parquet")["user_id"].unique().sort().head(3).to_list()))
"""


def loop(
    workspace: Path,
    tandem: Tandem,
    score: Callable[[], dict[str, Any]],
    users: list[str],
    stop: Callable[[], None],
    serve: Callable[[], AbstractContextManager[Ask]],
) -> Iterator[str]:
    """Issue to answer, step by step; every claim is an assert. Yields what a person would want to read."""
    use(workspace, "good")
    told(tandem, "release", "create", "--name", "first")
    told(tandem, "release", "promote", "first", "--because", "the first")
    more = {"TANDEM_RERANK__DIVERSITY": "0.2"}
    told(tandem, "evaluate", extra=more)
    told(tandem, "release", "create", "--name", "second", extra=more)
    verdict = told(tandem, "release", "gate", "second")
    assert verdict["passed"] is True, verdict["refusals"]
    assert verdict == told(tandem, "release", "gate", "second") | {"took_s": verdict["took_s"]}, "the same verdict twice"
    with serve() as ask:
        yield canary(tandem, ask)
        promoted = told(tandem, "release", "promote", "second", "--because", "more diverse slates")
        until(ask, {"second"})
    assert (promoted["champion"], promoted["before"]) == ("second", "first")
    (experiment,) = told(tandem, "experiment", "list")["experiments"]
    assert experiment["changes"][-1]["outcome"] == "won"
    yield f"second passed {len(verdict['sentences'])} demands and is live; the service followed"

    use(workspace, "worse")
    told(tandem, "release", "create", "--name", "worse")
    for words in (("release", "gate", "worse"), ("release", "promote", "worse")):
        code, refused = tandem(*words)
        assert (code, refused["passed"]) == (3, False), words
    row = next(row for row in refused["table"] if row["metric"] == "ndcg@10" and row["where"] is None)
    assert row["high"] < 0, "worse beyond its interval"
    assert told(tandem, "status")["champion"] == "second"
    yield f"worse is refused: {refused['refusals'][0]}"

    slates = score()
    assert [slates["user_id"].count(user) for user in users] == [5] * len(users)
    asked = told(tandem, "recommend", users[0], "-k", "5")
    assert asked["release"] == "second"
    assert [item["item_id"] for item in asked["items"]] == slates["item_id"][:5], "batch and online agree"
    yield f"models:/tandem@champion scores {len(slates['item_id'])} rows, the same as online"

    changes = {(section, what) for section, what, *_ in told(tandem, "release", "diff", "first", "second")["changes"]}
    assert ("setting", "rerank.diversity") in changes
    stop()
    before = time.perf_counter()
    assert told(tandem, "release", "rollback", "--because", "an exercise")["champion"] == "first"
    took = time.perf_counter() - before
    assert told(tandem, "recommend", users[0])["release"] == "first"
    history = told(tandem, "release", "history")["history"]
    assert [(line["kind"], line["to"], line["why"]) for line in history] == [
        ("promote", "first", "the first"),
        ("promote", "second", "more diverse slates"),
        ("rollback", "first", "an exercise"),
    ]
    live = told(tandem, "release", "at", history[1]["at"].replace("+00:00", ".999999+00:00"))
    assert live["release"] in ("second", "first")
    yield f"rolled back in {took:.1f} s; {len(changes)} differences between the two; history has {len(history)} lines"


def canary(tandem: Tandem, ask: Ask) -> str:
    """The challenger for half of the people, each of whom stays where they are."""
    told(tandem, "experiment", "start", "second", "--kind", "canary", "--percent", "50", "--because", "a look")
    until(ask, {"first", "second"})
    arms = [{user: ask(user)["arm"] for user in PEOPLE} for _ in range(2)]
    assert arms[0] == arms[1], "nobody changes sides"
    share = sum(arm == "challenger" for arm in arms[0].values()) / len(PEOPLE)
    assert 0.2 < share < 0.8
    report = told(tandem, "experiment", "report")
    assert report["split"]["broken"] is False, report["split"]
    return f"a canary answered {share:.0%} of the people"


def until(ask: Ask, wanted: set[str], seconds: float = 120.0) -> None:
    """Wait until exactly these releases answer."""
    deadline = time.monotonic() + seconds
    while (seen := {ask(user)["release"] for user in PEOPLE}) != wanted:
        assert time.monotonic() < deadline, (seen, wanted)
        time.sleep(0.2)


def use(workspace: Path, which: str) -> None:
    """Let `models/` be the parts called `which`."""
    shutil.rmtree(workspace / "models")
    shutil.copytree(workspace / which, workspace / "models")


def told(tandem: Tandem, *words: str, **options: Any) -> dict[str, Any]:
    """The answer of a command that must succeed."""
    code, answer = tandem(*words, **options)
    assert code == 0, (words, answer)
    return answer


def commands(workspace: Path, environment: Mapping[str, str]) -> Tandem:
    """Every command in a process of its own, as a person types it."""

    def tandem(*words: str, extra: Mapping[str, str] | None = None) -> tuple[int, dict[str, Any]]:
        command = [sys.executable, "-m", "tandem.service.cli", "--workspace", str(workspace), *words, "--json"]
        variables = {**os.environ, **environment, **(extra or {})}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=variables)
        if not done.stdout:
            raise SystemExit(f"`tandem {' '.join(words)}` failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
        return done.returncode, json.loads(done.stdout)

    return tandem


@contextmanager
def service(workspace: Path, environment: Mapping[str, str]) -> Iterator[Ask]:
    """`tandem serve` in a process of its own."""
    command = [sys.executable, "-m", "tandem.service.cli", "--workspace", str(workspace), "serve", "--port", "0", "--json"]
    with (workspace / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=log)
    assert process.stdout is not None
    url = json.loads(process.stdout.readline())["url"]

    def ask(user: str) -> dict[str, Any]:
        body = json.dumps({"user_id": user, "k": 3}).encode()
        request = urllib.request.Request(f"{url}/v1/recommend", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return dict(json.load(answer))

    try:
        _wait_for(f"{url}/readyz", process)
        yield ask
    finally:
        process.terminate()
        process.wait(timeout=60)


@contextmanager
def database() -> Iterator[str]:
    """A PostgreSQL database for this run alone, dropped afterwards. ConnectionError where no PostgreSQL answers."""
    from sqlalchemy import create_engine, make_url, text
    from sqlalchemy.exc import OperationalError

    engine = create_engine(POSTGRES, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 2})
    name = f"tandem_accept_{uuid.uuid4().hex[:12]}"
    try:
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
    except OperationalError as error:
        raise ConnectionError(str(error.orig).strip()) from None
    try:
        yield make_url(POSTGRES).set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@contextmanager
def mlflow_server(backend: str, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """A running `mlflow server` on `backend`: its address, and how to stop it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {"host": "127.0.0.1", "port": port, "workers": 1, "backend-store-uri": backend}
    options |= {"artifacts-destination": folder / "artifacts"}
    words = [sys.executable, "-m", "mlflow", "server", *(f"--{name}={value}" for name, value in options.items())]
    with (folder / "mlflow-server.log").open("wb") as log:
        own = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # ten more processes, for nothing here
        process = subprocess.Popen(words, cwd=folder, env=own, stdout=log, stderr=log, start_new_session=True)

    def stop() -> None:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)

    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}", stop
    finally:
        stop()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, f"what should answer at {url} ended"
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"nothing answers at {url}")


if __name__ == "__main__":
    raise SystemExit(main())
