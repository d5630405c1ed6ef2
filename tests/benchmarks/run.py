"""`make bench`: figures of the whole loop, each against a peer or a limit in the same run, alternating, five repeats, medians.

    python tests/benchmarks/run.py [--workspace FOLDER]     with a promoted release; by default a small world is made first

Prints tables; paste them into LOG.md with the machine's name. Quality figures come from `make accept`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from feature_repo.offline import open_store
from feature_repo.snapshot import Snapshot
from feature_repo.store import load_events, load_source
from tandem.service import recipes
from tandem.service.settings import Settings, load_settings
from tandem.service.slate import Ask
from tandem.service.wiring import open_recommender

REPEATS = 5
REQUESTS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", type=Path)
    asked = parser.parse_args()
    print("versions:", ", ".join(f"{name} {version(name)}" for name in ("feast", "polars", "torch", "faiss-cpu", "fastapi")))
    with tempfile.TemporaryDirectory() as scratch:
        settings = load_settings(asked.workspace or Path(scratch))
        if asked.workspace is None:
            recipes.simulate(settings, 1200, 1500, 60, 0)
            recipes.run_all(settings)
        users = some_users(settings)
        start_up()
        item_columns(settings)
        in_process(settings, users)
        over_http(settings, users)


def some_users(settings: Settings) -> list[str]:
    events = load_events(settings.data).filter(load_source(settings.data).is_history())
    found: list[str] = events["user_id"].unique().sort().head(REQUESTS).to_list()
    return found


def start_up() -> None:
    """`tandem --help` against a bare interpreter that imports typer and rich."""

    def shell(*words: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *words], check=True, capture_output=True)

    table("start-up, seconds", alternate({
        "tandem --help": shell("-m", "tandem.service.cli", "--help"),
        "python, typer and rich": shell("-c", "import typer, rich.console"),
    }))  # fmt: skip


def item_columns(settings: Settings) -> None:
    """Numeric columns of 200 items for ranking: gathered from the snapshot, and read through Feast's SDK."""
    store, snapshot = open_store(settings.workspace), Snapshot.load(settings.workspace / "snapshot")
    rows = np.random.default_rng(0).choice(len(snapshot.item_ids), min(200, len(snapshot.item_ids)), replace=False)
    ids = [{"item_id": snapshot.item_ids[int(row)]} for row in rows]
    views = {
        view.name: [field.name for field in view.features] for view in store.list_feature_views() if view.entities == ["item"]
    }
    refs = [f"{view}:{name}" for view, names in views.items() for name in names if name in snapshot.names]

    table(f"{len(ids)} items x {len(refs)} features, seconds", alternate({
        "snapshot": lambda: snapshot.gather(rows),
        "Feast SDK on SQLite": lambda: store.get_online_features(features=refs, entity_rows=ids).to_dict(),
    }))  # fmt: skip


def in_process(settings: Settings, users: list[str]) -> None:
    """One slate of ten: the median by stage over the requests of the third repeat."""
    recommender = open_recommender(settings)
    recommender.recommend(Ask(user_id=users[0], query="warm up"))
    medians, stages = [], []
    for _ in range(REPEATS):
        slates = [recommender.recommend(Ask(user_id=user)) for user in users]
        stages = [slate.took_ms for slate in slates]
        medians.append(statistics.median(each["total"] for each in stages))
    recommender.close()
    table("recommend in process, milliseconds", {
        "median of five medians": medians,
        **{name: [statistics.median(each.get(name, 0.0) for each in stages)] for name in stages[0]},
        "95th percentile": [float(np.percentile([each["total"] for each in stages], 95))],
    })  # fmt: skip


def over_http(settings: Settings, users: list[str]) -> None:
    """The same through `tandem serve`, beside `healthz`, which is what HTTP alone costs."""
    command = [sys.executable, "-m", "tandem.service.cli", "--workspace", str(settings.workspace), "serve", "--port", "8199"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for("http://127.0.0.1:8199/readyz")
        for user in users[:20]:
            post(user)
        times: dict[str, list[float]] = {"POST /v1/recommend": [], "GET /healthz": []}
        for _ in range(REPEATS):
            times["POST /v1/recommend"].append(statistics.median(timed(lambda user=user: post(user)) for user in users) * 1000)
            times["GET /healthz"].append(
                statistics.median(timed(lambda: get("http://127.0.0.1:8199/healthz")) for _ in users) * 1000
            )
        table("over HTTP, milliseconds", times)
    finally:
        server.terminate()
        server.wait()


def post(user: str) -> Any:
    body = json.dumps({"user_id": user, "k": 10}).encode()
    request = urllib.request.Request("http://127.0.0.1:8199/v1/recommend", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        content: bytes = answer.read()
        return content


def wait_for(url: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            get(url)
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"{url} did not answer within {seconds} s")


def alternate(rivals: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each rival, REPEATS times in turn after one warm-up."""
    for run in rivals.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(REPEATS):
        for name, run in rivals.items():
            times[name].append(timed(run))
    return times


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def table(title: str, rows: Mapping[str, list[float]]) -> None:
    print(f"\n| {title} | median | min | max |\n|---|---|---|---|")
    for name, values in rows.items():
        print(f"| {name} | {statistics.median(values):.4g} | {min(values):.4g} | {max(values):.4g} |")


if __name__ == "__main__":
    main()
