"""What every reader gives back: three clean tables, what they mean, and the rows that were refused.

In: nothing. Out: `Raw`, the schema of `rejected`, and counts of refusals by reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import polars as pl

from tandem.core.errors import InputError
from tandem.core.schema import Source

REJECTED: Final[dict[str, pl.DataType]] = {
    "table": pl.String(),
    "row": pl.Int64(),
    "reason": pl.String(),
    "content": pl.String(),
}
"""Columns of `rejected`: table ("events", "items", "users"), row in its file (0 = first data row), reason, the row as JSON."""


@dataclass(frozen=True)
class Raw:
    """One source, read.

    `events`, `items` and `users` follow `tandem.core.schema`; every row read is in a table or in `rejected`.
    """

    events: pl.DataFrame
    items: pl.DataFrame
    users: pl.DataFrame
    source: Source
    rejected: pl.DataFrame

    @property
    def reasons(self) -> dict[str, int]:
        """Refused rows by "table: reason", most frequent first."""
        return count_reasons(self.rejected)


def count_reasons(rejected: pl.DataFrame) -> dict[str, int]:
    """Rows of a `REJECTED` frame by "table: reason", most frequent first."""
    label = pl.concat_str("table", pl.lit(": "), "reason").alias("label")
    counts = rejected.group_by(label).len().sort(["len", "label"], descending=[True, False])
    return dict(counts.rows())


def no_rejections() -> pl.DataFrame:
    """An empty `rejected` table."""
    return pl.DataFrame(schema=REJECTED)


def require_events(raw: Raw) -> Raw:
    """Return `raw`, or raise InputError with the reasons when not one event is usable."""
    if raw.events.height == 0:
        refused = count_reasons(raw.rejected.filter(pl.col("table") == "events"))
        why = "; ".join(f"{count} {reason}" for reason, count in refused.items()) or "it holds no rows"
        raise InputError(f"the {raw.source.kind} data has no usable events: {why}; check the files and import again")
    return raw
