"""Have features moved? The newest rows against the training window: population stability, missing values, and range.

In: three frames of training rows: the newest ones, a sample of everything before them, and the last ones before them. Out: one
`CheckResult`. Counters grow with time and so differ from the whole past; features of a day have a phase and so may differ from
the days just before. A feature has moved when it differs from both: the smaller of the two figures counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from feature_repo.checks import CheckResult, as_numbers
from tandem.core.errors import InputError

NOTICEABLE: Final = 0.2
"""Above it, an index is usually read as a shift that matters: reported, not refused."""

_MAX_VALUES: Final = 20
_SMOOTHING: Final = 0.5
_NAMED: Final = 3


@dataclass(frozen=True)
class DriftLimits:
    """Above which a feature's move fails: the index (beyond what chance does to so few rows), change of the share of missing
    values, and share of numbers outside the range of the past.

    The defaults lie above everything that the four public data sets do between their last tenths (0.32, 0.07 and 0.09).
    """

    psi: float = 0.5
    missing: float = 0.2
    outside: float = 0.2

    def __post_init__(self) -> None:
        if min(self.psi, self.missing, self.outside) <= 0:
            raise InputError(f"{self} has a limit that is not above 0, which every sample exceeds; raise it")


def drift(current: pl.DataFrame, whole: pl.DataFrame, recent: pl.DataFrame, limits: DriftLimits | None = None) -> CheckResult:
    """Have the features of `current` moved away from those of `whole` (all the past) and of `recent` (its end)?

    Columns are numbers or strings; lists are no features here. The result's table, worst first: feature, psi, missing_before,
    missing_now, outside, noticed (psi > 0.2), problem (null: none). Raises InputError when a frame is empty.
    """
    limits = limits or DriftLimits()
    if current.is_empty() or whole.is_empty() or recent.is_empty():
        raise InputError(f"drift needs rows on all sides, not {len(current)}, {len(whole)} and {len(recent)}")
    names = [name for name in whole.columns if name in current.columns and _can_drift(whole.schema[name])]
    rows = [(name, *_move(current[name], whole[name], recent[name], limits)) for name in names]
    table = pl.DataFrame(rows, schema=_TABLE, orient="row").sort(pl.col("problem").is_null(), -pl.col("psi"), "feature")
    moved, noticed = table.filter(pl.col("problem").is_not_null()), table.filter("noticed")
    detail = (
        f"{len(noticed)} of {len(names)} features have an index above {NOTICEABLE}{_named(noticed, 'psi')}; none beyond its limit"
    )
    if not moved.is_empty():
        detail = f"{len(moved)} of {len(names)} features moved{_named(moved, 'problem')}"
    return CheckResult("drift", moved.is_empty(), len(current), detail, table)


def psi(reference: pl.Series, current: pl.Series, bins: int = 10) -> float:
    """Population stability index, sum of (q - p) ln(q / p) over bins (Siddiqi 2006, Credit Risk Scorecards).

    Numbers are binned by the reference's quantiles, strings by its most frequent values; missing is a bin of its own.
    """
    return _psi(*_binned(reference, current, bins))


_TABLE: Final = {
    "feature": pl.String(),
    "psi": pl.Float64(),
    "missing_before": pl.Float64(),
    "missing_now": pl.Float64(),
    "outside": pl.Float64(),
    "noticed": pl.Boolean(),
    "problem": pl.String(),
}


def _move(current: pl.Series, whole: pl.Series, recent: pl.Series, limits: DriftLimits) -> tuple[Any, ...]:
    index, chance = min((psi(past, current), _chance(past, current)) for past in (whole, recent))
    now = _missing(current)
    before = min((_missing(past) for past in (whole, recent)), key=lambda share: abs(share - now))
    outside = _outside(current, pl.concat([whole, recent]))
    problem = None
    if abs(now - before) > limits.missing:
        problem = f"missing in {now:.0%} of rows, before in {before:.0%}"
    elif outside > limits.outside:
        problem = f"{outside:.0%} of values outside the range of the past"
    elif index > limits.psi + chance:
        problem = f"index {index:.2f}, the limit is {limits.psi + chance:.2f}"
    return index, before, now, outside, index > NOTICEABLE, problem


def _chance(past: pl.Series, current: pl.Series, bins: int = 20) -> float:
    """The index that two samples of one population exceed once in twenty times: (1/n + 1/m) times chi-square's quantile (Yurdakul
    2018, Statistical properties of the population stability index), which is near df + 1.645 sqrt(2 df).
    """
    return (1 / len(past) + 1 / len(current)) * (bins + 1.645 * math.sqrt(2 * bins))


def _missing(values: pl.Series) -> float:
    if values.dtype.is_numeric():
        return float(np.isnan(as_numbers(values)).mean())
    return values.null_count() / len(values)


def _outside(current: pl.Series, past: pl.Series) -> float:
    """Share of current numbers below the past's least or above its largest; 0 where there are none."""
    if not current.dtype.is_numeric():
        return 0.0
    now, before = (values[~np.isnan(values)] for values in (as_numbers(current), as_numbers(past)))
    return float(((now < before.min()) | (now > before.max())).mean()) if len(now) and len(before) else 0.0


def _named(table: pl.DataFrame, column: str) -> str:
    """ ": a (0.31), b (0.22) and 4 more", or nothing."""
    rows = table.select("feature", column).rows()
    shown = [f"{name} ({value:.2f})" if column == "psi" else f"{name} ({value})" for name, value in rows]
    more = f" and {len(shown) - _NAMED} more" if len(shown) > _NAMED else ""
    return f": {', '.join(shown[:_NAMED])}{more}" if shown else ""


def _can_drift(dtype: pl.DataType) -> bool:
    return dtype.is_numeric() or dtype in (pl.String, pl.Boolean)


def _binned(reference: pl.Series, current: pl.Series, bins: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts per bin of both columns; the last bin counts what is missing."""
    if reference.dtype.is_numeric():
        before, now = as_numbers(reference), as_numbers(current)
        known = before[~np.isnan(before)]
        edges = np.unique(np.quantile(known, np.linspace(0, 1, bins + 1)[1:-1])) if len(known) else np.zeros(0)
        return _histogram(before, edges), _histogram(now, edges)
    return _by_value(reference.cast(pl.String), current.cast(pl.String))


def _histogram(values: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    """Counts between the edges and on each edge: a column of few values, or of one, has them all on edges."""
    place = np.searchsorted(edges, values, side="left") + np.searchsorted(edges, values, side="right")
    missing = 2 * len(edges) + 1
    return np.bincount(np.where(np.isnan(values), missing, place), minlength=missing + 1)


def _by_value(reference: pl.Series, current: pl.Series) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts of the reference's most frequent values, of all others, and of missing ones."""
    counts = reference.drop_nulls().value_counts(name="count").sort("count", reference.name, descending=[True, False])
    frequent = counts[reference.name].head(_MAX_VALUES)

    def tally(values: pl.Series) -> NDArray[np.int64]:
        named = [int((values == value).sum()) for value in frequent]
        missing = values.null_count()
        return np.array([*named, len(values) - sum(named) - missing, missing])

    return tally(reference), tally(current)


def _psi(before: NDArray[np.int64], now: NDArray[np.int64]) -> float:
    """The index over smoothed shares: an empty bin is rare, not impossible."""
    p = (before + _SMOOTHING) / (before.sum() + _SMOOTHING * len(before))
    q = (now + _SMOOTHING) / (now.sum() + _SMOOTHING * len(now))
    return float(((q - p) * np.log(q / p)).sum())
