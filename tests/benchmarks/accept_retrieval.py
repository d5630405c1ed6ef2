"""`make accept-retrieval`: a simulated catalogue of a million items is built, searched by threads, changed 1,000 times a second.

One writer adds, updates and deletes items; searchers in a second reader of the same journal ask for the 100 best, every other
time among a tenth of the items. Some answers are then judged by exact search over the catalogue of exactly that moment. It fails
when an exact kind gives one wrong answer, when any kind returns a deleted or filtered item or too few, when tuned kinds fall
below their recall, or when changes come slower than asked.

    python -P tests/benchmarks/accept_retrieval.py [--items 1000000] [--seconds 30] [--kinds flat auto]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrieval.exact import exact_search
from retrieval.index import IndexConfig, VectorIndex
from retrieval.live import LiveIndex
from retrieval.tier import View

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

WIDTH, K, BATCH, CHANGES_PER_SECOND, AT_ONCE, SEARCHERS, JUDGED = 64, 100, 16, 1_000, 20, 2, 24
EXACT = ("flat", "int8")
TARGET = 0.98
_SLACK = 0.01
"""A tuned kind's recall was measured on other queries over the catalogue as it was built."""


@dataclass
class Asked:
    """One search: the view that answered, the mask that it was given, what it said and how long it took."""

    view: View
    allowed: NDArray[np.bool_] | None
    scores: Floats
    numbers: Ids
    seconds: float


@dataclass
class Changes:
    """What was done, in order: numbers put or deleted, and their vectors or None."""

    done: list[tuple[Ids, Floats | None]] = field(default_factory=list)
    added: int = 0

    def next(self, noise: np.random.Generator, count: int) -> tuple[Ids, Floats | None]:
        """A fifth deletes, a fifth adds, the rest updates; some of each fall on what was added before."""
        turn = len(self.done) % 5
        if turn == 1:
            rows = np.arange(count + self.added, count + self.added + AT_ONCE)
            self.added += AT_ONCE
        else:
            rows = np.unique(np.append(noise.integers(0, count, AT_ONCE - 4), noise.integers(count, count + self.added + 1, 4)))
            rows = rows[rows < count + self.added]
        self.done.append((rows, None if turn == 0 else embedded(len(rows), int(noise.integers(1 << 30)))))
        return self.done[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--kinds", nargs="*", default=["flat", "auto"])
    asked = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {asked.items:,} x {WIDTH}, top {K}, batches of {BATCH}\n")
    print("| kind | built, s | recall at build | changes/s | queries/s | one batch, p50 and p95, ms | judged | recall | wrong |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    vectors, queries, tuning = embedded(asked.items, 1), embedded(BATCH, 2), embedded(256, 3)
    sound = [accepted(kind, vectors, queries, tuning, asked.seconds) for kind in asked.kinds]
    sys.exit(0 if all(sound) else 1)


def accepted(kind: str, vectors: Floats, queries: Floats, tuning: Floats, seconds: float) -> bool:
    """Build, run, judge, print a row; is it as it should be?"""
    began = time.perf_counter()
    main_index = VectorIndex.build(vectors, IndexConfig(kind, k=K, target_recall=TARGET), tuning)
    built = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        changes, answers, took = run(main_index, Path(folder), queries, seconds)
    chosen = [answers[at] for at in np.linspace(0, len(answers) - 1, JUDGED).astype(int)]
    verdicts = [judged(vectors, changes, each, queries) for each in sorted(chosen, key=lambda each: each.view.version)]
    recall, foul = float(np.mean([recall for recall, _ in verdicts])), sum(foul for _, foul in verdicts)
    wrong = foul + (sum(recall < 1 for recall, _ in verdicts) if kind in EXACT else 0)
    rate = sum(len(rows) for rows, _ in changes.done) / took
    lasted = np.array([each.seconds for each in answers]) * 1e3
    speed, middle, late = len(answers) * BATCH / took, np.median(lasted), np.quantile(lasted, 0.95)
    print(
        f"| {kind} ({main_index.kind}) | {built:.1f} | {main_index.recall:.4f} | {rate:,.0f} | {speed:,.0f} | "
        f"{middle:.0f}, {late:.0f} | {JUDGED * BATCH} | {recall:.4f} | {wrong} |",
        flush=True,
    )
    return wrong == 0 and recall >= main_index.recall - _SLACK and rate >= 0.95 * CHANGES_PER_SECOND


def run(index: VectorIndex, folder: Path, queries: Floats, seconds: float) -> tuple[Changes, list[Asked], float]:
    """Changes through one reader of the journal, searches through another, for so long."""
    names = [str(row) for row in range(index.count)]
    writer, reader = (LiveIndex(index, names, folder, "acceptance") for _ in range(2))
    changes, stop, answers = Changes(), threading.Event(), list[Asked]()
    tenth = np.arange(index.count) % 10 == 0

    def search() -> None:
        while not stop.is_set():
            view, began = reader.view(), time.perf_counter()
            allowed = tenth if len(answers) % 2 else None
            answers.append(Asked(view, allowed, *view.search(queries, K, allowed), time.perf_counter() - began))

    def change() -> None:
        noise, began, made = np.random.default_rng(7), time.perf_counter(), 0
        while not stop.is_set():
            rows, vectors = changes.next(noise, index.count)
            ids = [str(row) for row in rows.tolist()]
            writer.delete(ids) if vectors is None else writer.put(ids, vectors)
            made += len(rows)
            due = began + made / CHANGES_PER_SECOND
            stop.wait(max(0.0, due - time.perf_counter()))

    threads = [threading.Thread(target=change), *(threading.Thread(target=search) for _ in range(SEARCHERS))]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return changes, answers, time.perf_counter() - began


def judged(vectors: Floats, changes: Changes, asked: Asked, queries: Floats) -> tuple[float, int]:
    """Recall of one answer by exact search over the catalogue of its version; how many of its items must not be there.

    An item counts as found when its true score reaches the k-th best: float32 sums differ in the last bits between two orders.
    """
    then, listed = state(vectors, changes, asked.view.version)
    if asked.allowed is not None:
        listed[: len(asked.allowed)] &= asked.allowed
        listed[len(asked.allowed) :] = False
    scores, _ = exact_search(then, queries, K, listed)
    recalls, foul = [], 0
    for query, numbers, best in zip(queries, asked.numbers, scores, strict=True):
        rows = np.array([int(item_id) for item_id in asked.view.item_ids(numbers[numbers >= 0])])
        foul += K - len(set(rows.tolist())) + int(np.count_nonzero(~listed[rows]))
        recalls.append(float(np.mean(then[rows] @ query >= best[-1] - 1e-5)))
    return float(np.mean(recalls)), foul


def state(vectors: Floats, changes: Changes, version: int) -> tuple[Floats, NDArray[np.bool_]]:
    """The catalogue after so many changes: vectors (M, D), and which of them are listed."""
    then = np.concatenate([vectors, np.zeros((changes.added, WIDTH), np.float32)])
    listed = np.arange(len(then)) < len(vectors)
    for rows, changed in changes.done[:version]:
        listed[rows] = changed is not None
        if changed is not None:
            then[rows] = changed
    return then, listed


def embedded(count: int, seed: int) -> Floats:
    """Unit vectors that differ mostly in a few directions, as towers make them: 24 of falling weight, and some noise."""
    weights = 1 / np.sqrt(np.arange(1, 25, dtype=np.float32))[:, None]
    directions = np.random.default_rng(99).standard_normal((24, WIDTH), np.float32) / np.sqrt(WIDTH) * weights
    noise = np.random.default_rng(seed)
    rows = noise.standard_normal((count, 24), np.float32) @ directions
    rows += 0.05 * noise.standard_normal((count, WIDTH), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
