"""What time it is for features and requests: now, or where the data ends.

A data set that ended years ago, asked as of today, would show every user as long gone and every item as forgotten: nothing that
the models were trained on. So unless settings say otherwise, data older than two days is asked as of its end.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

import polars as pl

from tandem.service.settings import Settings

LIVE_WITHIN: Final = timedelta(days=2)
_INSTANT: Final = timedelta(microseconds=1)


def make_clock(settings: Settings) -> Callable[[], datetime]:
    """The clock that `service.clock` asks for: "now", "data" (fixed where the events end) or "auto" (by the age of the data)."""
    end = data_end(settings)
    fixed = settings.service.clock == "data" or (settings.service.clock == "auto" and datetime.now(UTC) - end > LIVE_WITHIN)
    return (lambda: end) if fixed else (lambda: datetime.now(UTC))


def data_end(settings: Settings) -> datetime:
    """Just after the newest event; now when there is none."""
    path = settings.data / "events.parquet"
    newest = pl.scan_parquet(path).select(pl.col("timestamp").max()).collect().item() if path.is_file() else None
    return datetime.now(UTC) if newest is None else newest + _INSTANT
