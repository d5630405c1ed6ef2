"""`tandem serve` as a process: fifty requests at once, then SIGTERM in traffic. Nothing fails and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import polars as pl
import pytest

SECRET = "s3cret-of-the-caller"
PATIENCE = 120.0
SERVE = [sys.executable, "-c", "from tandem.service.cli import main; main()"]


@dataclass
class Life:
    """What was seen of one process from its start to its end."""

    together: list[int] = field(default_factory=list)
    drained: list[int] = field(default_factory=list)
    readiness: list[int] = field(default_factory=list)
    request_ids: list[str] = field(default_factory=list)
    announced: dict[str, object] = field(default_factory=dict)
    exit_code: int = -1
    errors: str = ""
    served: pl.DataFrame = field(default_factory=pl.DataFrame)


def spawn(workspace: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [*SERVE, "--workspace", str(workspace), "serve", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture(scope="module")
def life(tiny_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    workspace = tmp_path_factory.mktemp("serve") / "workspace"
    shutil.copytree(tiny_workspace, workspace, ignore=shutil.ignore_patterns("served"))
    process = spawn(workspace, "--port", "0", "--json")
    try:
        yield _live(process, workspace)
    finally:
        process.kill()


def _live(process: subprocess.Popen[str], workspace: Path) -> Life:
    seen = Life()
    assert process.stdout is not None
    assert process.stderr is not None
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
    reader.start()
    line = process.stdout.readline()
    assert line, "".join(errors)
    seen.announced = json.loads(line)
    with httpx.Client(base_url=str(seen.announced["url"]), timeout=PATIENCE, limits=httpx.Limits(max_connections=60)) as client:
        _until_ready(client)
        seen.together = _fifty_at_once(client, seen)
        _terminate_in_traffic(process, client, seen)
    seen.exit_code = process.wait(PATIENCE)
    reader.join(PATIENCE)
    seen.errors = "".join(errors)
    seen.served = pl.concat([pl.read_parquet(part) for part in sorted((workspace / "served").glob("*.parquet"))])
    return seen


def _until_ready(client: httpx.Client) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise TimeoutError("the service did not become ready")


def _ask(client: httpx.Client, number: int, seen: Life) -> int:
    body = {"user_id": f"u{number:03d}", "query": SECRET if number % 5 == 0 else None, "k": 5}
    answer = client.post("/v1/recommend", json=body)
    if answer.status_code == 200:
        seen.request_ids.append(answer.json()["request_id"])
    return answer.status_code


def _fifty_at_once(client: httpx.Client, seen: Life) -> list[int]:
    with ThreadPoolExecutor(50) as pool:
        return list(pool.map(lambda number: _ask(client, number, seen), range(50)))


def _terminate_in_traffic(process: subprocess.Popen[str], client: httpx.Client, seen: Life) -> None:
    """Four callers ask on while readiness is watched; SIGTERM comes; callers leave when readiness is off, as a balancer does."""
    leave = threading.Event()

    def call(number: int) -> list[int]:
        answers = []
        while not leave.is_set():
            answers.append(_ask(client, number, seen))
        return answers

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(call, number) for number in range(1, 5)]
        seen.readiness.append(client.get("/readyz").status_code)
        process.send_signal(signal.SIGTERM)
        while (status := client.get("/readyz").status_code) == 200:
            seen.readiness.append(status)
        seen.readiness.append(status)
        leave.set()
        seen.drained = [status for each in calls for status in each.result(PATIENCE)]


def test_it_announces_where_and_what(life: Life) -> None:
    assert str(life.announced["url"]).startswith("http://127.0.0.1:")
    assert str(life.announced["release"])


def test_fifty_at_once_are_all_answered(life: Life) -> None:
    assert life.together == [200] * 50


def test_readiness_goes_off_first_and_no_request_fails(life: Life) -> None:
    assert life.readiness[0] == 200
    assert life.readiness[-1] == 503
    assert len(life.drained) >= 4
    assert set(life.drained) == {200}


def test_it_ends_well_and_every_slate_is_in_the_served_log(life: Life) -> None:
    assert life.exit_code == 0
    assert set(life.request_ids) == set(life.served["request_id"])


def test_its_log_is_json_without_ids_or_words(life: Life) -> None:
    lines = [json.loads(line) for line in life.errors.splitlines() if line.startswith("{")]
    assert len([line for line in lines if line["event"] == "request" and line["route"] == "/v1/recommend"]) >= 50
    assert {"ready", "draining"} <= {line["event"] for line in lines}
    assert SECRET not in life.errors
    assert "u001" not in life.errors


def test_an_open_bind_without_keys_is_refused(tiny_workspace: Path) -> None:
    process = spawn(tiny_workspace, "--host", "0.0.0.0", "--port", "0")
    out, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (2, "")
    assert errors.startswith("error: service.host = '0.0.0.0'")
    assert "Traceback" not in errors


def test_a_taken_port_fails_before_anything_is_loaded(tiny_workspace: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = spawn(tiny_workspace, "--port", str(taken.getsockname()[1]))
        out, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (1, "")
    assert errors.startswith("error: cannot take port")
