"""One judge for all contenders: `tandem/core/metrics.py` over the ids they return, against the whole catalogue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from data import Case
from numpy.typing import NDArray

from retrieval.baselines import Csr, top_k
from tandem.core.metrics import hit_matrix, ndcg_at_k, recall_at_k, truth_sizes

K = 100
Ids = NDArray[np.int64]
Score = Callable[[Sequence[Ids], Csr], NDArray[np.float32]]


@dataclass(frozen=True)
class Line:
    """One contender: what it answered (Q, 100), how long it learned in seconds, and what should be said about it."""

    name: str
    found: Ids
    seconds: float
    note: str = ""


def table(title: str, lines: Sequence[Line], truth: Sequence[Ids]) -> None:
    """Print one row per contender, in Markdown."""
    sizes = truth_sizes(truth)
    print(f"\n| {title} | NDCG@10 | recall@10 | NDCG@100 | recall@50 | recall@100 | learned in, CPU s | |")
    print("|---|---|---|---|---|---|---|---|")
    for line in lines:
        hits = hit_matrix(line.found, truth)
        figures = (
            ndcg_at_k(hits, sizes, 10),
            recall_at_k(hits, sizes, 10),
            ndcg_at_k(hits, sizes, K),
            recall_at_k(hits, sizes, 50),
        )
        cells = " | ".join(f"{np.nanmean(each):.4f}"[1:] for each in (*figures, recall_at_k(hits, sizes, K)))
        print(f"| {line.name} | {cells} | {line.seconds:,.0f} | {line.note} |")
    print(flush=True)


def best_ids(score: Score, case: Case, histories: Sequence[Ids], allowed: Ids | None = None) -> Ids:
    """Ids (Q, 100) of the best scores, without seen items where the source excludes them, within `allowed` (N,) bool."""
    found = []
    for at in range(0, len(histories), 500):
        part = histories[at : at + 500]
        seen = matrix(part, case.items)
        scores = np.array(score(part, seen), np.float32)
        if allowed is not None:
            scores[:, ~allowed] = -np.inf
        found.append(top_k(scores, K, seen if case.exclude_seen else None))
    return np.concatenate(found)


def matrix(histories: Sequence[Ids], items: int) -> Csr:
    """Histories as a binary CSR (Q, N)."""
    rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    cells = (rows, np.concatenate([np.zeros(0, np.int64), *histories]).astype(np.int64))
    binary = sp.csr_matrix((np.ones(len(rows), np.float32), cells), shape=(len(histories), items))
    binary.sum_duplicates()
    binary.data[:] = 1.0
    return binary
