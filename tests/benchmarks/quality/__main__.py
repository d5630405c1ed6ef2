"""`make bench-quality`: the towers beside their peers, on one set of splits, judged in one place; tables in Markdown.

    next       leave-one-out on MovieLens and online-retail: popularity, EASE, ALS, SASRec, eSASRec
    unordered  80/20 per user on goodbooks' to-read marks: popularity, EASE, ALS, Mult-VAE
    cold       a fifth of the items unknown, goodbooks and RankLens: MiniLM's nearest neighbours, a linear map to ALS's factors
    parts      what each part of the training is worth, on two data sets
    encode     10,000 item texts with MiniLM: sentence-transformers in float32
    speed      examples per CPU second of a training step: a plain torch loop

Peers run as processes of their own, with the Python that --peers names (`pip install rectools[torch] implicit polars
sentence-transformers torch==2.13.0`); without it they are left out. Their answers are kept under --scratch: a run that was
stopped goes on. Seconds are those of the processor, so that a busy machine changes little.

    python tests/benchmarks/quality [part ...] [--peers PYTHON] [--scratch FOLDER] [--minutes M] [--texts N]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path

import cold
import data
import encode
import numpy as np
import ours
import parts
import speed
from judge import Line, table

HERE = Path(__file__).parent
PARTS = ("next", "unordered", "cold", "parts", "encode", "speed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS, help=f"some of {', '.join(PARTS)}; all of them by default")
    parser.add_argument("--peers", type=Path, help="Python of the peers' virtual environment")
    parser.add_argument("--scratch", type=Path, default=Path("workspaces/bench-quality"))
    parser.add_argument("--minutes", type=float, default=20.0, help="processor time after which a peer is cut short, and says so")
    parser.add_argument("--texts", type=int, default=10_000, help="how many item texts to encode")
    asked = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')}")
    peers = Peers(asked.peers, asked.minutes)
    every = {
        "next": lambda: next_item(asked.scratch, peers),
        "unordered": lambda: unordered(asked.scratch, peers),
        "cold": lambda: cold_items(asked.scratch, peers),
        "parts": lambda: parts.report(asked.scratch),
        "encode": lambda: encode.report(asked.scratch, asked.texts, asked.peers),
        "speed": lambda: speed.report(asked.scratch),
    }
    for part in asked.parts:
        every[part]()


class Peers:
    """Runs a peer's script on a case's folder, once; its answer is kept there."""

    def __init__(self, python: Path | None, minutes: float) -> None:
        self.python, self.minutes = python, minutes

    def line(self, name: str, case: data.Case, script: str, *arguments: str) -> list[Line]:
        """One line, or none where there is no environment for peers."""
        out = case.folder / name
        if not out.with_suffix(".json").exists():
            if self.python is None:
                return []
            command = [self.python, HERE / "peers" / script, case.folder, out, *arguments]
            subprocess.run(
                [str(word) for word in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_plain()
            )
        facts = json.loads(out.with_suffix(".json").read_text())
        note = ", ".join([facts["version"], *(f"{key} {value}" for key, value in facts["settings"].items())])
        return [Line(name, np.load(out.with_suffix(".npy")), facts["seconds"], note)]


def _plain() -> dict[str, str]:
    """The environment without our own PYTHONPATH: peers have versions of their own."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def next_item(scratch: Path, peers: Peers) -> None:
    longest = {"movielens": ("--batch", "16", "--length", "100"), "online-retail": ("--batch", "64", "--length", "50")}
    for name, sizes in longest.items():
        case = data.next_item(name, scratch)
        config = ours.TowerConfig(horizon=1)
        lines = [ours.popularity(case), ours.ease(case, 10), *peers.line("ALS", case, "als.py", "--metric", "10")]
        for peer in ("sasrec", "esasrec"):
            lines += peers.line(peer, case, "sequence.py", peer, *sizes, "--minutes", str(peers.minutes))
        table(f"{name}, leave-one-out, {len(case.asked()):,} users", [*lines, ours.towers(case, config)], case.truth())


def unordered(scratch: Path, peers: Peers) -> None:
    case = data.unordered("goodbooks", scratch)
    lines = [ours.popularity(case), ours.ease(case, 100), *peers.line("ALS", case, "als.py")]
    lines += peers.line("Mult-VAE", case, "vae.py", "--minutes", str(peers.minutes))
    title = f"goodbooks to-read, 80/20, {len(case.asked()):,} users"
    table(title, [*lines, ours.towers(case, ours.TowerConfig())], case.truth())


def cold_items(scratch: Path, peers: Peers) -> None:
    def factors(case: data.Case) -> Path | None:
        where = case.folder / "ALS.npz"
        return where if peers.line("ALS", case, "als.py", "--factors-out", str(where)) else None

    for name in ("goodbooks", "ranklens"):
        cold.report(name, scratch, factors)


if __name__ == "__main__":
    main()
