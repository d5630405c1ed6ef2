"""What declared features cost to build: CPU seconds over a million events of a skewed catalogue, beside the plain ways to do it.

    python tests/benchmarks/declared.py [--rows 1000000]

Polars' own rolling window counts the events of a week before each event (hours instead of UTC days, and no row when it empties);
the loop is the recursion of a decayed count as one would write it in Python. The values of the decay must agree with the loop's.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Final

import numpy as np
import polars as pl

from feature_repo.features import Declared
from feature_repo.views import TIMESTAMP
from feature_repo.windows import declared_table
from tandem.core.schema import TIME, Source, Task

SHOP: Final = Source("shop", (Task("click", "click"),), "click", ("click", "buy"), False, "time")
DAY: Final = 86_400_000_000
HALF_LIFE: Final = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    events = make_events(parser.parse_args().rows)
    longest = events.group_by("item_id").len()["len"].max()
    print(f"{len(events):,} events, {events['item_id'].n_unique():,} items, {longest:,} events of one")
    timed("count of 7 days", lambda: ours(events, Declared("item", window_days=7)))
    timed("count of 7 days, Polars' rolling", lambda: rolling(events))
    fading = timed("half-life of 3 days", lambda: ours(events, Declared("item", half_life_days=HALF_LIFE)))
    looped = timed("half-life of 3 days, a Python loop", lambda: loop(events))
    np.testing.assert_allclose(fading["f"].to_numpy(), looped["f"].to_numpy(), rtol=1e-9)
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def make_events(rows: int) -> pl.DataFrame:
    random = np.random.default_rng(0)
    return pl.DataFrame(
        {
            "event_id": np.arange(rows).astype(str),
            "item_id": (random.zipf(1.2, rows) % 20_000).astype(str),
            "action": np.where(random.random(rows) < 0.1, "buy", "click"),
            "value": random.random(rows),
            "timestamp": pl.Series(1_700_000_000_000_000 + random.integers(0, 90 * DAY, rows)).cast(TIME),
        }
    ).unique(["item_id", "timestamp"], maintain_order=True)


def ours(events: pl.DataFrame, declared: Declared) -> pl.DataFrame:
    return declared_table(events.lazy(), "item", {"f": declared}, SHOP, None)


def rolling(events: pl.DataFrame) -> pl.DataFrame:
    ordered = events.sort("item_id", "timestamp")
    return ordered.rolling("timestamp", period="7d", group_by="item_id").agg(pl.len())


def loop(events: pl.DataFrame) -> pl.DataFrame:
    ordered = events.select("item_id", "timestamp").sort("item_id", "timestamp")
    keys, times = ordered["item_id"].to_list(), ordered["timestamp"].dt.epoch("us").to_list()
    found, before, then, value = [], None, 0, 0.0
    for key, now in zip(keys, times, strict=True):
        value = value * 0.5 ** ((now - then) / (HALF_LIFE * DAY)) + 1.0 if key == before else 1.0
        before, then = key, now
        found.append(value)
    return ordered.rename({"timestamp": TIMESTAMP}).with_columns(pl.Series("f", found))


def timed(name: str, make: Callable[[], pl.DataFrame]) -> pl.DataFrame:
    begin = time.process_time()
    made = make()
    print(f"| {name} | {time.process_time() - begin:.2f} CPU s | {len(made):,} rows |", flush=True)
    return made


if __name__ == "__main__":
    main()
