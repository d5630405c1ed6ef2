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
from tandem.core.metrics import coverage_at_k, hit_matrix, ndcg_at_k, recall_at_k, truth_sizes

METRICS: Final = ("recall@10", "recall@50", "recall@100", "ndcg@10")
COLD_USER: Final = 5
"""A user with fewer training events is cold."""


@dataclass(frozen=True)
class Truth:
    """R requests: who asked, how much of them was known, what they did (dense ids), and which of it is cold."""

    request_ids: tuple[str, ...]
    user_ids: tuple[str, ...]
    history_sizes: NDArray[np.int64]
    items: tuple[NDArray[np.int64], ...]
    cold_items: NDArray[np.bool_]
    catalogue: int

    @property
    def cold_users(self) -> NDArray[np.bool_]:
        return self.history_sizes < COLD_USER


@dataclass(frozen=True)
class Report:
    """`rows`: one per (system, slice) with the mean of every metric; `users`: one per (request, system); `intervals`: paired."""

    rows: pl.DataFrame
    users: pl.DataFrame
    intervals: pl.DataFrame
    tasks: pl.DataFrame


def measure(truth: Truth, systems: Mapping[str, NDArray[np.int64]]) -> pl.DataFrame:
    """Per request and system: [request_id, user_id, system, cold_user, metrics..., the same as cold_* on cold items only]."""
    cold_only = tuple(items[truth.cold_items[items]] for items in truth.items)
    frames = []
    for system, ranked in systems.items():
        every = _metrics(ranked, truth.items)
        cold = {f"cold_{name}": values for name, values in _metrics(ranked, cold_only).items()}
        frames.append(
            pl.DataFrame(
                {"request_id": truth.request_ids, "user_id": truth.user_ids}
                | {"system": [system] * len(truth.user_ids), "cold_user": truth.cold_users}
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
    """One row per slice and system: [slice, system, users, metrics..., coverage@10]."""
    rows: list[dict[str, Any]] = []
    for system, ranked in systems.items():
        own = users.filter(pl.col("system") == system)
        covered = coverage_at_k(ranked, 10, truth.catalogue)
        rows.append(_row("all users", system, own, "") | {"coverage@10": covered})
        rows.append(_row("cold users", system, own.filter("cold_user"), "") | {"coverage@10": None})
        rows.append(
            _row("cold items", system, own.filter(pl.col("cold_recall@10").is_not_nan()), "cold_") | {"coverage@10": None}
        )
    order = {"all users": 0, "cold users": 1, "cold items": 2}
    return pl.DataFrame(rows, infer_schema_length=None).sort(pl.col("slice").replace_strict(order), maintain_order=True)


def _row(part: str, system: str, own: pl.DataFrame, prefix: str) -> dict[str, Any]:
    means = {name: (float(own[f"{prefix}{name}"].mean()) if len(own) else None) for name in METRICS}  # type: ignore[arg-type]
    return {"slice": part, "system": system, "users": len(own)} | means


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
