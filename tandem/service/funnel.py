"""Slates + truth -> per-user rows and one table: every stage of the funnel against the same baselines on the same requests.

In: requests, what was true, and per system the ranked dense ids. Out: `Report`. Metrics are those of `tandem.core.metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from registry.gates import Interval, paired_interval
from tandem.core.metrics import coverage_at_k, hit_matrix, ild_at_k, ndcg_at_k, recall_at_k, truth_sizes

METRICS: Final = ("recall@10", "recall@50", "recall@100", "ndcg@10")
COLD_USER: Final = 5
"""A user with fewer training events is cold."""


HEAVY_USER: Final = 0.9
"""A user with more training events than this share of the others is heavy."""

CATEGORY_USERS: Final = 30
"""The report shows a category once so many users have it as their main one."""


@dataclass(frozen=True)
class Truth:
    """R requests: who asked, how much of them was known, what they did (dense ids), and which of it is cold.

    `categories` (N, C) codes of the items, padded with -1; `main_categories` the name of each user's own, None where unknown.
    """

    request_ids: tuple[str, ...]
    user_ids: tuple[str, ...]
    history_sizes: NDArray[np.int64]
    items: tuple[NDArray[np.int64], ...]
    cold_items: NDArray[np.bool_]
    categories: NDArray[np.int64]
    main_categories: tuple[str | None, ...]

    @property
    def catalogue(self) -> int:
        return len(self.cold_items)

    @property
    def slices(self) -> dict[str, Any]:
        """What gates and the report can look at apart, by column: a value per request."""
        cold = [self.cold_items[items] for items in self.items]
        return {
            "cold_user": self.history_sizes < COLD_USER,
            "heavy_user": heavy(self.history_sizes),
            "cold_item": np.array([bool(own.any()) for own in cold], bool),
            "cold_share": np.array([float(own.mean()) if len(own) else np.nan for own in cold], np.float64),
            "category": pl.Series(self.main_categories, dtype=pl.String),
        }


def heavy(sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(R,) whose history is longer than that of nine in ten; of equally long ones at the border none."""
    if not len(sizes):
        return np.zeros(0, bool)
    return np.asarray(sizes > np.quantile(sizes, HEAVY_USER, method="lower"))


def main_categories(
    histories: Sequence[NDArray[np.int64]], categories: NDArray[np.int64], names: Sequence[str]
) -> tuple[str | None, ...]:
    """Per user the most frequent category of their history (dense ids, repeats count), the first by name of equals, or None."""
    found: list[str | None] = []
    for history in histories:
        codes = categories[history]
        counts = np.bincount(codes[codes >= 0])
        found.append(names[int(counts.argmax())] if len(counts) else None)
    return tuple(found)


@dataclass(frozen=True)
class Report:
    """`rows`: one per (system, slice) with the mean of every metric; `users`: one per (request, system); `intervals`: paired."""

    rows: pl.DataFrame
    users: pl.DataFrame
    intervals: pl.DataFrame
    tasks: pl.DataFrame


def measure(truth: Truth, systems: Mapping[str, NDArray[np.int64]]) -> pl.DataFrame:
    """Per request and system: [request_id, user_id, system, slices..., metrics..., the same as cold_* on cold items only]."""
    cold_only = tuple(items[truth.cold_items[items]] for items in truth.items)
    frames = []
    for system, ranked in systems.items():
        every = _metrics(ranked, truth.items) | {"ild@10": ild_at_k(ranked, truth.categories, 10)}
        cold = {f"cold_{name}": values for name, values in _metrics(ranked, cold_only).items()}
        frames.append(
            pl.DataFrame(
                {"request_id": truth.request_ids, "user_id": truth.user_ids}
                | {"system": [system] * len(truth.user_ids)}
                | truth.slices
                | every
                | cold
            )
        )
    return pl.concat(frames)


def _metrics(ranked: NDArray[np.int64], truth: Sequence[NDArray[np.int64]]) -> dict[str, NDArray[np.float64]]:
    hits, sizes = hit_matrix(ranked, truth), truth_sizes(truth)
    values = {f"recall@{k}": recall_at_k(hits, sizes, k) for k in (10, 50, 100)}
    values["ndcg@10"] = ndcg_at_k(hits, sizes, 10)
    return {name: np.where(sizes > 0, value, np.nan) for name, value in values.items()}


def summarise(truth: Truth, systems: Mapping[str, NDArray[np.int64]], users: pl.DataFrame) -> pl.DataFrame:
    """One row per slice and system: [slice, system, users, metrics..., ild@10, coverage@10]; a slice without users has none.

    Slices: all users, cold users, heavy users, cold items (metrics on these alone), and "category=X" of CATEGORY_USERS users.
    """
    parts = {"all users": pl.lit(True), "cold users": pl.col("cold_user"), "heavy users": pl.col("heavy_user")}
    cold_items = pl.col("cold_recall@10").is_not_nan()
    categories = {f"category={name}": pl.col("category") == name for name in _large_categories(users)}
    rows: list[dict[str, Any]] = []
    for part, chosen in {**parts, "cold items": cold_items, **categories}.items():
        for system, ranked in systems.items():
            own = users.filter(pl.col("system") == system).filter(chosen)
            covered = coverage_at_k(ranked, 10, truth.catalogue) if part == "all users" else None
            rows.append(_row(part, system, own, "cold_" if part == "cold items" else "") | {"coverage@10": covered})
    return pl.DataFrame(rows, infer_schema_length=None)


def _large_categories(users: pl.DataFrame) -> list[str]:
    """Main categories of enough users, the largest first."""
    once = users.unique("user_id").drop_nulls("category").group_by("category").len()
    large = once.filter(pl.col("len") >= CATEGORY_USERS).sort(["len", "category"], descending=[True, False])
    names: list[str] = large["category"].to_list()
    return names


def _row(part: str, system: str, own: pl.DataFrame, prefix: str) -> dict[str, Any]:
    means = {name: _mean(own[f"{prefix}{name}"]) for name in METRICS}
    return {"slice": part, "system": system, "users": len(own)} | means | {"ild@10": _mean(own["ild@10"].fill_nan(None))}


def _mean(values: pl.Series) -> float | None:
    mean = values.mean()
    return mean if isinstance(mean, float) else None


def compare(users: pl.DataFrame, better: Sequence[str], baselines: Sequence[str], resamples: int, seed: int) -> pl.DataFrame:
    """Paired bootstrap over users, `better` minus baseline: [system, baseline, metric, difference, low, high, users]."""
    rows: list[dict[str, Any]] = []
    for metric in ("recall@100", "ndcg@10"):
        values = {name: own[metric].to_numpy() for (name,), own in users.group_by(["system"], maintain_order=True)}
        for system in better:
            for baseline in baselines:
                if system != baseline and system in values and baseline in values:
                    rows.append(
                        _interval_row(
                            system, baseline, metric, paired_interval(values[baseline], values[system], seed, resamples)
                        )
                    )
    return pl.DataFrame(rows, infer_schema_length=None)


def _interval_row(system: str, baseline: str, metric: str, interval: Interval) -> dict[str, Any]:
    return {
        "system": system,
        "baseline": baseline,
        "metric": metric,
        "difference": interval.difference,
        "low": interval.low,
        "high": interval.high,
        "users": interval.n,
    }
