"""Checks that features are what they claim: no leak, online equals offline, fresh. `replay.py` and `shift.py` have more.

In: Polars frames (a training frame, offline tables, online rows). Out: one `CheckResult` per check, whose `table` shows what
was found wrong, row by row. Nothing here shares code with the offline store that it judges: the as-of value is found by sorting
questions and answers together and filling forward, not by an as-of join.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from feature_repo.views import ENTITIES, TIMESTAMP
from tandem.core.errors import InputError

EVE: Final = timedelta(microseconds=1)
"""Training frames are asked just before the event, so that no row sees its own."""

CLOCK_SKEW: Final = timedelta(minutes=5)
"""How far in the future a timestamp may lie before it counts as wrong."""


@dataclass(frozen=True)
class FreshnessLimits:
    """How old features may be, in hours: above `fresh_hours` the checks fail and `tandem_features_old` is 1; above `stale_hours`
    serving takes item features for missing (0: never), since by then the windows of days and weeks say nothing.

    For views with a ttl, that is both limits.
    """

    fresh_hours: float = 48.0
    stale_hours: float = 168.0

    def __post_init__(self) -> None:
        if self.fresh_hours <= 0 or self.stale_hours < 0:
            raise InputError(f"{self} has a limit that cannot be kept; fresh_hours is above 0, stale_hours is 0 (never) or above")

    @property
    def fresh(self) -> timedelta:
        return timedelta(hours=self.fresh_hours)

    @property
    def stale(self) -> timedelta | None:
        return timedelta(hours=self.stale_hours) if self.stale_hours else None


@dataclass(frozen=True)
class CheckResult:
    """One check's verdict: `rows` were looked at, `detail` says what was found, `table` shows it row by row.

    `skipped` rows could not be looked at; `detail` says why.
    """

    name: str
    passed: bool
    rows: int
    detail: str
    table: pl.DataFrame = field(default_factory=pl.DataFrame, compare=False, repr=False)
    skipped: int = 0


def leakage(
    frame: pl.DataFrame, tables: Mapping[str, pl.DataFrame], ttl: Mapping[str, timedelta] | None = None, *, eve: timedelta = EVE
) -> CheckResult:
    """Does each feature of a training frame equal what its view knew `eve` before the row's event_timestamp?

    `frame` holds user_id and/or item_id, event_timestamp and features; `tables` are the offline tables by view. The result's
    table names each wrong value: kind "leak" when the view learned that value only later, else "mismatch". `ttl` by view
    as Feast reads it. Raises InputError when frame and tables have no feature in common.
    """
    parts = [part for view, table in tables.items() for part in _view_mistakes(frame, view, table, (ttl or {}).get(view), eve)]
    if not parts:
        raise InputError(f"the training frame has no feature of the views {sorted(tables)}; nothing could be checked")
    mistakes = pl.concat(parts).sort("row", "feature")
    leaks = mistakes.filter(pl.col("kind") == "leak")
    detail = f"{len(parts)} features in {len(frame)} rows equal the as-of value"
    if not mistakes.is_empty():
        counts = mistakes.group_by("feature").len().sort("feature").rows()
        named = ", ".join(f"{name} ({count})" for name, count in counts)
        detail = f"{len(leaks)} values from the future and {len(mistakes) - len(leaks)} other wrong values: {named}"
    return CheckResult("leakage", mistakes.is_empty(), len(frame), detail, mistakes)


def parity(
    served: pl.DataFrame, store: pl.DataFrame, keys: Sequence[str], features: Sequence[str] | None = None, tolerance: float = 1e-6
) -> CheckResult:
    """Do served feature rows equal the store's rows of the same `keys`, feature by feature?

    Numbers may differ by `tolerance` relative to their size (the snapshot holds float32); null and NaN both mean missing. The
    result's table has one row per difference: keys, feature, served and stored value, kind "differs" or "absent" (no such
    row in the store). `features` defaults to the columns that both have. Raises InputError for doubled keys in `store`.
    """
    names = list(features or [name for name in served.columns if name in store.columns and name not in keys])
    if not names:
        raise InputError(f"served rows and store rows share no feature beside {list(keys)}; nothing could be compared")
    if store.select(keys).is_duplicated().any():
        raise InputError(f"the store's rows repeat some {list(keys)}; give one row per key")
    marked = store.select(*keys, *(pl.col(name).alias(f"{name}:stored") for name in names), pl.lit(True).alias(":present"))
    both = served.join(marked, on=list(keys), how="left", nulls_equal=True, maintain_order="left")
    present = both[":present"].fill_null(False)
    parts = [_differences(both, name, keys, present, tolerance) for name in names]
    table = pl.concat(parts)
    detail = f"{len(names)} features of {len(served)} served rows equal the store's"
    if not table.is_empty():
        wrong, absent = sorted(table["feature"].unique()), int((~present).sum())
        detail = f"{len(table)} of {len(served) * len(names)} values differ, in {wrong}; {absent} rows are not in the store"
    return CheckResult("parity", table.is_empty(), len(served), detail, table)


def freshness(as_of: datetime, ttl: timedelta, now: datetime) -> CheckResult:
    """Is a snapshot or online store of `as_of` at most `ttl` old at `now`, and not from the future?"""
    age = now - as_of
    passed = -CLOCK_SKEW <= age <= ttl
    detail = f"features are as of {as_of.isoformat()}, {_spoken(age)} old; the limit is {_spoken(ttl)}"
    if age < -CLOCK_SKEW:
        detail = f"features are as of {as_of.isoformat()}, {_spoken(-age)} in the future; check the clocks"
    return CheckResult("freshness", passed, 1, detail)


def views_fresh(views: pl.DataFrame, limits: Mapping[str, timedelta], now: datetime, otherwise: timedelta) -> CheckResult:
    """Was every view brought online within its ttl (`limits` by view; without one `otherwise`), and did no view expire whole?

    `views` is [view, online_newest, materialized_until], as `materialize.freshness` gives it. The result's table: view, age_h and
    limit_h (hours since the moment that was materialised up to, and how many it may be), newest_h (since the newest row online),
    problem (null: none), the worst first. The detail names the worst.
    """
    rows = [_view_age(row, limits.get(row["view"]), otherwise, now) for row in views.iter_rows(named=True)]
    table = pl.DataFrame(rows, schema=_AGES, orient="row").sort(
        pl.col("problem").is_null(), -(pl.col("age_h") / pl.col("limit_h")).fill_null(float("inf")), "view"
    )
    stale = table.filter(pl.col("problem").is_not_null())
    if table.is_empty():
        return CheckResult("views fresh", False, 0, "no view is applied; run `tandem features apply`", table)
    worst = table.row(0, named=True)
    age = "" if worst["age_h"] is None else f", as of {_spoken(timedelta(hours=worst['age_h']))} ago"
    detail = f"{len(stale)} of {len(table)} views are not: {worst['view']} {worst['problem']}{age}"
    if stale.is_empty():
        detail = f"{len(table)} views within their limits; nearest to it: {worst['view']}{age} of {worst['limit_h']:g} h"
    return CheckResult("views fresh", stale.is_empty(), len(table), detail, table)


_AGES: Final = {
    "view": pl.String(),
    "age_h": pl.Float64(),
    "limit_h": pl.Float64(),
    "newest_h": pl.Float64(),
    "problem": pl.String(),
}


def _view_age(row: Mapping[str, Any], ttl: timedelta | None, otherwise: timedelta, now: datetime) -> tuple[object, ...]:
    limit = ttl or otherwise
    age, newest = (None if moment is None else now - moment for moment in (row["materialized_until"], row["online_newest"]))
    problem: str | None
    if age is None:
        problem = "was never materialised"
    elif age < -CLOCK_SKEW:
        problem = "is materialised up to a moment in the future"
    elif age > limit:
        problem = f"was materialised longer than {_spoken(limit)} ago"
    elif newest is None:
        problem = "has no row online"
    else:
        problem = "has only expired rows online" if ttl and newest > ttl else None
    return row["view"], _hours(age), _hours(limit), _hours(newest), problem


def _hours(duration: timedelta | None) -> float | None:
    return None if duration is None else duration / timedelta(hours=1)


# --- leakage -----------------------------------------------------------------------------------------------------------


def _view_mistakes(
    frame: pl.DataFrame, view: str, table: pl.DataFrame, ttl: timedelta | None, eve: timedelta
) -> list[pl.DataFrame]:
    """One frame of mistakes per feature of the view that the training frame holds."""
    key = next(name for name in ENTITIES.values() if name in table.columns)
    features = [name for name in table.columns if name not in (key, TIMESTAMP) and name in frame.columns]
    if key not in frame.columns or not features:
        return []
    asked = frame.select(key, (pl.col(TIMESTAMP) - eve).alias("asked")).with_row_index("row")
    known = _known_rows(asked, table, key, ttl)
    return [_feature_mistakes(frame, asked, table, known, view, key, feature) for feature in features]


def _known_rows(asked: pl.DataFrame, table: pl.DataFrame, key: str, ttl: timedelta | None) -> pl.Series:
    """For each question, the number of the newest table row at or before it and within `ttl`; null for none."""
    answers = table.select(key, pl.col(TIMESTAMP).alias("asked")).with_row_index("answer")
    mixed = pl.concat([answers.with_columns(since=pl.col("asked")), asked], how="diagonal")
    mixed = mixed.sort(key, "asked", "row", nulls_last=False, maintain_order=True)
    filled = mixed.with_columns(pl.col("answer", "since").forward_fill().over(key)).drop_nulls("row")
    if ttl is not None:
        filled = filled.with_columns(pl.when(pl.col("since") >= pl.col("asked") - ttl).then("answer").alias("answer"))
    return filled.sort("row")["answer"]


def _feature_mistakes(
    frame: pl.DataFrame, asked: pl.DataFrame, table: pl.DataFrame, known: pl.Series, view: str, key: str, feature: str
) -> pl.DataFrame:
    expected = table[feature].gather(known)
    wrong = asked.with_columns(frame[feature].alias("found"), expected.alias("expected")).filter(
        ~equal_values(frame[feature], expected)
    )
    later = wrong.join(table.select(key, TIMESTAMP, pl.col(feature).alias("later")), on=key).filter(
        pl.col(TIMESTAMP) > pl.col("asked")
    )
    leaked = later.filter(equal_values(later["found"], later["later"]) & later["found"].is_not_null())["row"].unique()
    return wrong.select(
        "row",
        pl.lit(view).alias("view"),
        pl.lit(feature).alias("feature"),
        pl.col(key).cast(pl.String).alias("entity"),
        "asked",
        _as_text("found", wrong.schema["found"]),
        _as_text("expected", wrong.schema["expected"]),
        pl.when(pl.col("row").is_in(leaked.implode())).then(pl.lit("leak")).otherwise(pl.lit("mismatch")).alias("kind"),
    )


# --- parity ------------------------------------------------------------------------------------------------------------


def _differences(both: pl.DataFrame, name: str, keys: Sequence[str], present: pl.Series, tolerance: float) -> pl.DataFrame:
    stored = both[f"{name}:stored"]
    rows = both.with_columns(present.alias(":present")).filter(~(equal_values(both[name], stored, tolerance) & present))
    return rows.select(
        *keys,
        pl.lit(name).alias("feature"),
        _as_text(name, both.schema[name]).alias("served"),
        _as_text(stored.name, stored.dtype).alias("stored"),
        pl.when(":present").then(pl.lit("differs")).otherwise(pl.lit("absent")).alias("kind"),
    )


def equal_values(left: pl.Series, right: pl.Series, tolerance: float = 0.0) -> pl.Series:
    """Element by element: equal, or both missing (null or NaN)? Numbers within `tolerance` of the larger, at least of 1."""
    if left.dtype.is_numeric() and right.dtype.is_numeric():
        one, other = as_numbers(left), as_numbers(right)
        with np.errstate(invalid="ignore"):
            near = np.abs(one - other) <= tolerance * np.maximum(1.0, np.maximum(np.abs(one), np.abs(other)))
        return pl.Series(near | (one == other) | (np.isnan(one) & np.isnan(other)), dtype=pl.Boolean)
    return left.eq_missing(right.cast(left.dtype))


def as_numbers(values: pl.Series) -> NDArray[np.float64]:
    return values.cast(pl.Float64).fill_null(float("nan")).to_numpy()


def _as_text(name: str, dtype: pl.DataType) -> pl.Expr:
    """A value of any type as text, for a table that holds features of many types."""
    if isinstance(dtype, pl.List):
        return pl.format("[{}]", pl.col(name).cast(pl.List(pl.String)).list.join(", ")).alias(name)
    return pl.col(name).cast(pl.String)


def _spoken(age: timedelta) -> str:
    """A duration as people say it: 3 d 4 h, 5 h 10 min, 12 min."""
    minutes = int(age.total_seconds() // 60)
    days, hours, rest = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {rest} min" if hours else f"{rest} min"
