"""How often the gates err, and how much they see: simulated pairs of releases, judged by the real gates.

    python tests/benchmarks/promotions.py [--pairs 2000] [--users 2000]

Prints a table for LOG.md and ends with an error when a superiority gate lets more than 3.5% of equal challengers through. Rows
look like those of a report: NDCG@10 per user, most of them zero, two systems that agree on who is easy to serve.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from registry.gates import Gate, judge
from tandem.core.metrics import ndcg_at_k

Rows = NDArray[np.float64]

PROMISED: Final = 0.025
LIMIT: Final = 0.035
RESAMPLES: Final = 1000
TRUTH: Final = 8
"""At most so many items that a user is going to like."""


@dataclass(frozen=True)
class World:
    """What makes rows realistic: item ranks are log-normal, with a part that both systems share and a part of each one's own."""

    median_rank: float = 60.0
    shared: float = 1.5
    own: float = 0.6

    def pair(self, rng: np.random.Generator, users: int, nearer: float = 1.0) -> tuple[Rows, Rows]:
        """NDCG@10 (users,) of two systems; the second one's ranks are `nearer` times the first one's (1: they are equal)."""
        liked = np.minimum(rng.geometric(0.35, users), TRUTH)
        common = rng.normal(0, self.shared, (users, TRUTH))
        ranks = [np.exp(common + rng.normal(0, self.own, (users, TRUTH))) * self.median_rank for _ in range(2)]
        return ndcg(ranks[0], liked), ndcg(ranks[1] * nearer, liked)


def ndcg(ranks: Rows, liked: NDArray[np.int64]) -> Rows:
    """NDCG@10 (users,) of `ranks` (users, TRUTH), of which each user's first `liked` count; two at one place count once."""
    user, place = np.nonzero((np.arange(TRUTH) < liked[:, None]) & (ranks < 10))
    hits = np.zeros((len(liked), 10), np.bool_)
    hits[user, ranks[user, place].astype(np.int64)] = True
    return ndcg_at_k(hits, liked, 10)


def factor_for(world: World, lift: float, users: int = 100_000) -> float:
    """How much nearer ranks must be for NDCG to be `lift` higher: bisection on one large sample."""
    low, high = 0.3, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        a, b = world.pair(np.random.default_rng(99), users, middle)
        low, high = (low, middle) if b.mean() < a.mean() * (1 + lift) else (middle, high)
    return (low + high) / 2


def verdicts(world: World, gate: Gate, pairs: int, users: int, nearer: float, seed: int) -> Iterator[bool]:
    """Whether the gate let the second system pass, pair by pair."""
    rng, ids = np.random.default_rng(seed), pl.Series("user_id", range(users))
    for pair in range(pairs):
        a, b = (pl.DataFrame([ids, pl.Series(gate.metric, values)]) for values in world.pair(rng, users, nearer))
        yield judge(a, b, [gate], seed=pair, resamples=RESAMPLES).passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--users", type=int, default=2000)
    asked = parser.parse_args()
    world = World()
    print(describe(world))
    better = {lift: factor_for(world, lift) for lift in (0.05, 0.1, 0.2)}
    superiority = Gate("ndcg@10", kind="superiority", minimum_users=30)
    print("\n| superiority gate, one-sided 2.5% | pairs | let through | expected | seconds |\n|---|---|---|---|---|")
    false = [
        row(f"equal, {users:,} users", verdicts(world, superiority, asked.pairs, users, 1.0, users), asked.pairs, "2.5%")
        for users in (30, 100, 500, asked.users)
    ]
    some = max(asked.pairs // 5, 1)
    row("equal, non-inferiority .01", verdicts(world, Gate("ndcg@10", margin=0.01), some, asked.users, 1.0, 3), some, "power")
    for lift, nearer in better.items():
        found = verdicts(world, superiority, some, asked.users, nearer, 4)
        row(f"{lift:.0%} better, {asked.users:,} users", found, some, "power")
    if max(false) > LIMIT:
        raise SystemExit(f"equal challengers pass in {max(false):.2%} of the pairs; at most {LIMIT:.1%} may")


def describe(world: World) -> str:
    """The rows in figures, so that a reader can hold them against a report of their own."""
    a, b = world.pair(np.random.default_rng(0), 100_000)
    return (
        f"NDCG@10: mean {a.mean():.4f}, {(a == 0).mean():.0%} of users zero, standard deviation {a.std():.3f}; "
        f"correlation of two equal systems {np.corrcoef(a, b)[0, 1]:.2f}, of their difference {(b - a).std():.3f}"
    )


def row(title: str, found: Iterator[bool], pairs: int, expected: str) -> float:
    """Print one line of the table and give the share that was let through."""
    started = time.perf_counter()
    share = sum(found) / pairs
    print(f"| {title} | {pairs:,} | {share:.2%} | {expected} | {time.perf_counter() - started:.0f} |", flush=True)
    return share


if __name__ == "__main__":
    main()
