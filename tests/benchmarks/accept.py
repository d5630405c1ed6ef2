"""`make accept`: each real data set, whole, from raw files to a promoted release that answers; then the figures it must reach.

Every step is the command a person would type, in a process of its own. Figures go to the terminal and, with --keep, to
`accept-figures.json` in that folder; what is missed is said, and the exit code is 1.

    python tests/benchmarks/accept.py [ranklens movielens goodbooks online-retail world] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("TANDEM_SHARED_DATA", ROOT.parent / "shared" / "data"))


@dataclass(frozen=True)
class Case:
    """One data set: how it is brought in, and a sentence that its catalogue can answer."""

    name: str
    bring: tuple[str, ...]
    sentence: str
    settings: str | None = None


CASES = (
    Case("ranklens", ("import", "metarank", str(DATA / "ranklens" / "events.jsonl.gz")), "a space adventure with robots"),
    Case(
        "movielens",
        ("import", "movielens", str(DATA / "movielens-latest-small" / "ml-latest-small.zip")),
        "a space adventure with robots",
    ),
    Case("goodbooks", ("import", "goodbooks", str(DATA / "goodbooks-10k")), "a detective story set in Scandinavia"),
    Case(
        "online-retail",
        ("import", "table", str(DATA / "online-retail" / "online_retail.parquet")),
        "christmas decoration for the tree",
        "docs/examples/online-retail.toml",
    ),
    Case("world", ("simulate", "--users", "1200", "--items", "1500", "--days", "60", "--seed", "0"), "something for the kitchen"),
)

STEPS = (
    ("features", "build"),
    ("features", "apply"),
    ("features", "materialize"),
    ("features", "check"),
    ("train",),
    ("evaluate",),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=[case.name for case in CASES])
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    asked = parser.parse_args()
    folder = asked.keep or Path(tempfile.mkdtemp(prefix="tandem-accept-"))
    figures: dict[str, Any] = {}
    misses: list[str] = []
    for case in CASES:
        if case.name in asked.cases:
            figures[case.name] = run_case(case, folder / case.name)
            misses += judge(case.name, figures[case.name])
    misses += judge_together(figures)
    (folder / "accept-figures.json").write_text(json.dumps(figures, indent=2))
    print(f"\nfigures: {folder / 'accept-figures.json'}" if asked.keep else "")
    print("\n".join(["MISSED:", *misses]) if misses else "everything that was asked for is reached")
    if not asked.keep:
        shutil.rmtree(folder)
    return 1 if misses else 0


def run_case(case: Case, workspace: Path) -> dict[str, Any]:
    """The whole loop on one data set; returns the evaluation's figures with the seconds of every step."""
    print(f"\n== {case.name}", flush=True)
    shutil.rmtree(workspace, ignore_errors=True)
    workspace.mkdir(parents=True)
    if case.settings:
        shutil.copy(ROOT / case.settings, workspace / "tandem.toml")
    seconds: dict[str, float] = {}
    answers: dict[str, Any] = {}
    for step in (case.bring, *STEPS):
        answers[" ".join(step[:2])], seconds[" ".join(step[:2])] = tandem(workspace, *step)
    created, seconds["release create"] = tandem(workspace, "release", "create")
    promoted, seconds["release promote"] = tandem(workspace, "release", "promote", created["release"])
    assert promoted["champion"] == created["release"], promoted
    figures = answers["evaluate"]
    figures["seconds"] = seconds | {"total": sum(seconds.values())}
    figures["slates"] = ask(workspace, case.sentence)
    show(case.name, figures)
    return dict(figures)


def ask(workspace: Path, sentence: str) -> dict[str, Any]:
    """A known user, an unknown user and a sentence: each must be answered in full."""
    import polars as pl

    users = pl.read_parquet(workspace / "models" / "evaluation" / "users.parquet")["user_id"]
    slates = {
        "known user": tandem(workspace, "recommend", users[0])[0],
        "unknown user": tandem(workspace, "recommend", "nobody has this id")[0],
        "sentence": tandem(workspace, "search", sentence)[0],
    }
    for who, slate in slates.items():
        assert len(slate["items"]) == 10, f"{who}: {len(slate['items'])} items"
        print(f"{who:>12}: " + "; ".join(item["title"][:40] for item in slate["items"][:5]), flush=True)
    return slates


def tandem(workspace: Path, *words: str) -> tuple[dict[str, Any], float]:
    """Run one command with --json; returns its answer and the seconds it took. A failure ends the run with its message."""
    command = [sys.executable, "-m", "tandem.service.cli", "--workspace", str(workspace), *words, "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    took = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"`tandem {' '.join(words)}` failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout), round(took, 1)


def systems(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["system"]: row for row in figures["funnel"] if row["slice"] == "all users"}


def show(name: str, figures: dict[str, Any]) -> None:
    for system, row in systems(figures).items():
        figures_of_row = "  ".join(f"{metric} {row[metric]:.4f}" for metric in ("recall@100", "ndcg@10", "coverage@10"))
        print(f"{system:>16}  {figures_of_row}")
    for row in figures["tasks"]:
        print(f"{row['task']:>16}  auc {row['auc'] or float('nan'):.3f}  ece {row['ece']:.4f}")
    print(f"{name}: {figures['seconds']}", flush=True)


def judge(name: str, figures: dict[str, Any]) -> list[str]:
    """What one data set misses, in sentences."""
    rows = systems(figures)
    towers, ranked, knn = rows["towers"], rows["towers + ranker"], rows["item-kNN"]
    misses = []
    if "EASE" in rows:
        gap = towers["recall@100"] - rows["EASE"]["recall@100"]
        print(f"{name}: towers' recall@100 minus EASE's: {gap:+.4f}")
    if name == "world":
        world = figures["world"]
        share = (world["slate"] - world["popularity"]) / (world["best possible"] - world["popularity"])
        popular = world["popularity"] / world["best possible"]
        print(f"world: the slate reaches {share:.3f} of the way; popularity is {popular:.2f} of the best possible")
        misses += [f"world: share of the best {share:.3f} < 0.4"] if share < 0.4 else []
        return misses + (["world: popularity is above half of the best"] if popular > 0.5 else [])
    for metric, low, high, what in (
        ("recall@100", knn, towers, "towers below item-kNN"),
        ("ndcg@10", towers, ranked, "ranker below towers"),
        ("ndcg@10", knn, ranked, "ranker below item-kNN"),
    ):
        if high[metric] < low[metric]:
            misses.append(f"{name}: {what} in {metric}: {high[metric]:.4f} < {low[metric]:.4f}")
    return misses


def judge_together(figures: dict[str, Any]) -> list[str]:
    """On how many data sets is the ranker better than the towers beyond doubt?"""
    real = [name for name in figures if name != "world"]
    clear = [
        name
        for name in real
        for row in figures[name]["intervals"]
        if (row["system"], row["baseline"], row["metric"]) == ("towers + ranker", "towers", "ndcg@10") and row["low"] > 0
    ]
    print(f"towers + ranker above towers beyond the 95% interval on: {clear or 'none'}")
    return ["the ranker's interval lies above zero on fewer than two data sets"] if len(real) == 4 and len(clear) < 2 else []


if __name__ == "__main__":
    raise SystemExit(main())
