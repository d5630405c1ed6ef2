"""A clock for data that has none: users end to end, in the seeded order of the splits.

In: cleaned events whose timestamps are null (no time at all) or real but too close together. Out: the same rows with times that
start at 2000-01-01. Held-out users come last in the order, so that as-of statistics at their requests come from other users only.

Two imports of data without time cannot be told earlier and later: import such data again with `--replace`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from feature_repo.splits import user_order
from tandem.core.schema import TIME

START_US: Final = 946_684_800_000_000
"""2000-01-01T00:00Z."""

STEP_US: Final = 60_000_000
_SPAN_US: Final = 20 * 365 * 86_400_000_000
"""However large the data, its clock ends in 20 years: long before now, when events would count as being in the future."""


def end_to_end(events: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Set every timestamp so that each user begins one step after the user before ended.

    Rows without a time lie one step apart, in the order of `event_id` (a hash: row order means nothing there); rows with one keep
    the distances within their user. Seed as in `SplitConfig`. Returns rows sorted by (timestamp, event_id).
    """
    step = min(STEP_US, max(1, _SPAN_US // max(1, events.height)))
    order = user_order(events["user_id"], seed).select("user_id", "rank")
    placed = events.join(order, on="user_id", how="left").sort("rank", "timestamp", "event_id")
    own = pl.col("timestamp").cast(pl.Int64)
    since = placed.select(
        pl.coalesce(own - own.min().over("rank"), pl.int_range(pl.len()).over("rank") * step).alias("since"), "rank"
    )
    lengths = since.group_by("rank").agg(pl.col("since").max()).sort("rank")["since"].to_numpy() + step
    starts = START_US + np.cumsum(lengths) - lengths
    times = starts[since["rank"].to_numpy()] + since["since"].to_numpy()
    return placed.with_columns(pl.Series("timestamp", times).cast(TIME)).select(events.columns)
