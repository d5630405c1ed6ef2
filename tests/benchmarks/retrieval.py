"""`make bench-retrieval`: exact and approximate search beside their peers, and a live catalogue; as tables in Markdown.

Peers run in the same process and in turns with ours: five rounds, medians. hnswlib and usearch are no dependencies; install them
into a folder on PYTHONPATH, or their rows say that they are absent. The load before the start is part of the head line: above 1,
compare within a table only. `-P` keeps this file from hiding the package of its name.

    python -P tests/benchmarks/retrieval.py [exact ann live] [--items 300000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.exact import exact_search, scan
from retrieval.index import IndexConfig, VectorIndex
from retrieval.int8 import Codes, multiplies_int8
from retrieval.live import LiveIndex

Floats = NDArray[np.float32]
Search = Callable[[Floats, int], NDArray[np.int64]]

WIDTH, K, BATCH, TARGET = 64, 100, 1_000, 0.98
CHANGES_PER_SECOND, CHANGE_SIZE = 1_000, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["exact", "ann", "live"])
    parser.add_argument("--items", type=int, help="one size instead of 300,000 and 1,000,000")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, int8 products {'yes' if multiplies_int8() else 'no'}\n")
    if "exact" in asked.parts:
        for count in (asked.items,) if asked.items else (300_000, 1_000_000):
            exact(count, asked.rounds)
    if "ann" in asked.parts:
        approximate(asked.items or 300_000, asked.rounds)
    if "live" in asked.parts:
        live(asked.items or 1_000_000)


def exact(count: int, rounds: int) -> None:
    """Top 100 of unit vectors, 1,000 queries at once: ours, int8 with re-scoring, FAISS Flat, and the product alone."""
    vectors, queries = unit(count, 0), unit(BATCH, 1)
    began = time.perf_counter()
    codes = Codes.of(vectors)
    coded = time.perf_counter() - began
    flat = faiss_flat(vectors)
    runs: dict[str, Callable[[], Any]] = {
        "ours, float32": lambda: scan(vectors, queries, K)[1],
        "ours, int8 + re-scoring": lambda: codes.scan(vectors, queries, K)[1],
        "FAISS Flat": lambda: flat.search(queries, K)[1],
        "product alone": lambda: product(vectors, queries),
    }
    seconds = in_turns(runs, rounds)
    truth = runs["FAISS Flat"]()
    rate = 2e-9 * count * WIDTH * BATCH / seconds["product alone"]
    print(f"| exact, {count:,} x {WIDTH}, top {K}, batch {BATCH:,} | queries/s | x FAISS | GFLOP/s | ids as FAISS |")
    print("|---|---|---|---|---|")
    for name, run in runs.items():
        speed = 2e-9 * count * WIDTH * BATCH / seconds[name]
        same = "" if name == "product alone" else f"{np.mean([set(a) == set(b) for a, b in zip(run(), truth, strict=True)]):.4f}"
        times = seconds["FAISS Flat"] / seconds[name]
        print(f"| {name} | {BATCH / seconds[name]:,.0f} | {times:.2f} | {speed:.0f} ({speed / rate:.0%}) | {same} |")
    print(f"\nCodes are made in {coded:.2f} s. The last column: share of queries whose {K} ids are FAISS's.\n", flush=True)


def product(vectors: Floats, queries: Floats) -> None:
    """The machine's sgemm rate: all scores, in blocks that are thrown away."""
    import torch

    rows, columns = torch.from_numpy(vectors), torch.from_numpy(queries).T
    out = torch.empty((16_384, len(queries)))
    for start in range(0, len(vectors), 16_384):
        part = rows[start : start + 16_384]
        torch.mm(part, columns, out=out[: len(part)])


@dataclass
class Contender:
    """One index: how long it took to build, and a search as broad as the target takes."""

    name: str
    seconds: float = 0.0
    search: Search | None = None
    note: str = ""


def approximate(count: int, rounds: int) -> None:
    """Vectors and queries of one kind (`embedded`): each index at the least breadth whose recall@100 is .98."""
    vectors, queries = embedded(count, 2), embedded(BATCH, 3)
    tuning, truth = embedded(256, 4), exact_search(vectors, queries, K)[1]
    makers = [lambda kind=kind: ours(kind, vectors, tuning) for kind in ("auto", "ivfpq", "int8")]
    makers += [lambda: faiss_hnsw(vectors, tuning), lambda: hnswlib(vectors, tuning), lambda: usearch(vectors, tuning)]
    contenders = [make() for make in makers]
    present = {one.name: one for one in contenders if one.search is not None}
    seconds = in_turns({name: (lambda one=one: one.search(queries, K)) for name, one in present.items()}, rounds)
    print(f"| {count:,} x {WIDTH}, recall@{K} >= {TARGET} | build, s | queries/s, batch {BATCH:,} | recall | |")
    print("|---|---|---|---|---|")
    for one in contenders:
        if one.search is None:
            print(f"| {one.name} | | | | {one.note} |")
            continue
        recall = share_found(one.search(queries, K), truth)
        print(f"| {one.name} | {one.seconds:.1f} | {BATCH / seconds[one.name]:,.0f} | {recall:.4f} | {one.note} |")
    print("\nOurs counts its tuning as building; the peers' tuning is not counted.\n", flush=True)


def ours(kind: str, vectors: Floats, tuning: Floats) -> Contender:
    began = time.perf_counter()
    index = VectorIndex.build(vectors, IndexConfig(kind, k=K, target_recall=TARGET), tuning)
    seconds = time.perf_counter() - began
    note = f"{index.kind}, breadth {index.breadth}" + (f", re-scores {index.widen} k" if index.widen > 1 else "")
    return Contender(f"ours, {kind}", seconds, lambda queries, k: index.search(queries, k)[1], note)


def faiss_hnsw(vectors: Floats, tuning: Floats) -> Contender:
    import faiss

    index = faiss.IndexHNSWFlat(WIDTH, 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 100
    began = time.perf_counter()
    index.add(vectors)
    seconds = time.perf_counter() - began

    def search(queries: Floats, k: int, breadth: int) -> NDArray[np.int64]:
        return index.search(queries, k, params=faiss.SearchParametersHNSW(efSearch=breadth))[1]

    return tuned("FAISS HNSW32", seconds, search, vectors, tuning)


def hnswlib(vectors: Floats, tuning: Floats) -> Contender:
    library = found("hnswlib")
    if library is None:
        return Contender("hnswlib", note="not installed: pip install hnswlib")
    index = library.Index("ip", WIDTH)
    index.init_index(len(vectors), M=16, ef_construction=100, random_seed=0)
    began = time.perf_counter()
    index.add_items(vectors)
    seconds = time.perf_counter() - began

    def search(queries: Floats, k: int, breadth: int) -> NDArray[np.int64]:
        index.set_ef(breadth)
        return index.knn_query(queries, k)[0].astype(np.int64)

    return tuned("hnswlib M16", seconds, search, vectors, tuning)


def usearch(vectors: Floats, tuning: Floats) -> Contender:
    library = found("usearch.index")
    if library is None:
        return Contender("usearch", note="not installed: pip install usearch")
    index = library.Index(ndim=WIDTH, metric="ip", dtype="f32", connectivity=16, expansion_add=100)
    began = time.perf_counter()
    index.add(np.arange(len(vectors)), vectors)
    seconds = time.perf_counter() - began

    def search(queries: Floats, k: int, breadth: int) -> NDArray[np.int64]:
        index.expansion_search = breadth
        return np.asarray(index.search(queries, k).keys, np.int64).reshape(len(queries), -1)

    return tuned("usearch M16", seconds, search, vectors, tuning)


def tuned(name: str, seconds: float, search: Callable[..., Any], vectors: Floats, tuning: Floats) -> Contender:
    truth = exact_search(vectors, tuning, K)[1]
    for breadth in (100, 128, 160, 200, 256, 320, 400, 512, 640, 800, 1_024, 2_048, 4_096):
        if share_found(search(tuning, K, breadth), truth) >= TARGET:
            break
    return Contender(name, seconds, lambda queries, k: search(queries, k, breadth), f"breadth {breadth}")


@dataclass
class Changes:
    """What was done to the live catalogue, in order: (ids put or deleted, their vectors or None)."""

    done: list[tuple[list[int], Floats | None]] = field(default_factory=list)

    def next(self, noise: np.random.Generator, count: int) -> tuple[list[int], Floats | None]:
        """A fifth deletes, a fifth adds, the rest updates."""
        kind = len(self.done) % 5
        first = 0 if kind != 1 else count + CHANGE_SIZE * len(self.done)
        rows = range(first, first + CHANGE_SIZE) if kind == 1 else np.unique(noise.integers(0, count, CHANGE_SIZE)).tolist()
        vectors = None if kind == 0 else unit(len(list(rows)), int(noise.integers(1 << 30)))
        self.done.append((list(rows), vectors))
        return self.done[-1]


def live(count: int, seconds: float = 10.0) -> None:
    """1,000 changes a second for ten seconds beside searches of 16 queries; some answers are judged afterwards."""
    vectors, queries = unit(count, 5), unit(16, 6)
    main = VectorIndex.build(vectors, IndexConfig("int8"))
    changes, lasted, answers = Changes(), [], []
    with tempfile.TemporaryDirectory() as folder:
        index = LiveIndex(main, [str(row) for row in range(count)], Path(folder), "bench")
        other = LiveIndex(main, [str(row) for row in range(count)], Path(folder), "bench")
        stop = threading.Event()
        writer = threading.Thread(target=change, args=(index, changes, count, stop))
        began = time.perf_counter()
        writer.start()
        while time.perf_counter() - began < seconds:
            at = time.perf_counter()
            view = other.view()
            answer = view.search(queries, K)[1]
            lasted.append(time.perf_counter() - at)
            answers.append((view, answer))
        stop.set()
        writer.join()
        took = time.perf_counter() - began
        made = sum(len(rows) for rows, _ in changes.done)
        wrong = sum(judged(vectors, changes, view, answer, queries) for view, answer in answers[:: max(1, len(answers) // 8)])
    print(f"| live, {count:,} x {WIDTH}, int8 | |\n|---|---|")
    print(f"| changes/s, durable, by one writer | {made / took:,.0f} |")
    print(f"| searches/s of 16 queries in a second reader | {len(lasted) / took:,.1f} |")
    print(
        f"| one search, median and 95th percentile | {np.median(lasted) * 1e3:.0f} and {np.quantile(lasted, 0.95) * 1e3:.0f} ms |"
    )
    print(f"| wrong answers among those judged | {wrong} |", flush=True)


def change(index: LiveIndex, changes: Changes, count: int, stop: threading.Event) -> None:
    noise, began = np.random.default_rng(7), time.perf_counter()
    while not stop.is_set():
        rows, vectors = changes.next(noise, count)
        ids = [str(row) for row in rows]
        index.delete(ids) if vectors is None else index.put(ids, vectors)
        due = began + len(changes.done) * CHANGE_SIZE / CHANGES_PER_SECOND
        stop.wait(max(0.0, due - time.perf_counter()))


def judged(vectors: Floats, changes: Changes, view: Any, answer: NDArray[np.int64], queries: Floats) -> int:
    """How many queries were answered with items that exact search over the catalogue of that moment would not return."""
    rows = len(vectors) + CHANGE_SIZE * (view.version + 1)
    then, listed = np.zeros((rows, vectors.shape[1]), np.float32), np.zeros(rows, np.bool_)
    then[: len(vectors)], listed[: len(vectors)] = vectors, True
    for ids, changed in changes.done[: view.version]:
        listed[ids] = changed is not None
        if changed is not None:
            then[ids] = changed
    _, truth = exact_search(then, queries, K, listed)
    found = [{int(item_id) for item_id in view.item_ids(row)} for row in answer]
    return sum(len(one - set(true)) > 1 for one, true in zip(found, truth.tolist(), strict=True))  # 1: a tie in float32


def in_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each; every round runs each once, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: float(np.median(times[1:])) for name, times in seconds.items()}


def share_found(ids: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(ids.tolist(), truth.tolist(), strict=True)]))


def unit(count: int, seed: int) -> Floats:
    rows = np.random.default_rng(seed).standard_normal((count, WIDTH), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def embedded(count: int, seed: int) -> Floats:
    """Unit vectors that differ mostly in a few directions, as towers make them: 24 of falling weight, and some noise."""
    noise = np.random.default_rng(seed)
    directions = unit(24, 99) / np.sqrt(np.arange(1, 25, dtype=np.float32))[:, None]
    rows = noise.standard_normal((count, 24), np.float32) @ directions + 0.05 * noise.standard_normal((count, WIDTH), np.float32)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def faiss_flat(vectors: Floats) -> Any:
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


def found(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


if __name__ == "__main__":
    main()
