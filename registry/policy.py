"""What a challenger must show before it goes live, as `[gates]` in the settings declares it, and the verdict on it.

In: the config, per-user rows and figures of both releases. Out: one `Verdict` over all gates and guardrails. Pure: the same rows,
figures and config give the same verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import polars as pl

from registry.gates import Gate, Kind, Verdict, judge
from registry.guardrails import Figures, Guardrail, hold
from tandem.core.errors import InputError


@dataclass(frozen=True)
class MetricGate:
    """The demand on one metric. `margin` is in the metric's own unit; see `registry.gates.Gate` for the kinds.

    `slices` are further demands of the same kind, each with its own margin, since fewer users give wider intervals:
    {"cold_user": 0.05, "country=FR": 0.05}. The name is a boolean column of the per-user rows, "column=value", or "column=*" for
    every value with enough users.
    """

    margin: float = 0.0
    kind: Kind = "non_inferiority"
    minimum_users: int = 30
    higher_is_better: bool = True
    slices: Mapping[str, float] = field(default_factory=dict)

    def gates(self, metric: str) -> tuple[Gate, ...]:
        """The demand on all users, then one per slice."""
        everyone = Gate(metric, self.margin, self.kind, self.minimum_users, None, self.higher_is_better)
        return (everyone, *(replace(everyone, where=where, margin=margin) for where, margin in self.slices.items()))


def _metrics() -> dict[str, MetricGate]:
    return {"ndcg@10": MetricGate(margin=0.01), "recall@100": MetricGate(margin=0.02)}


def _guardrails() -> dict[str, Guardrail]:
    """Loose on purpose: they stop what is broken on any data; tighten them once you know your own figures."""
    return {
        "towers_ranker/coverage@10": Guardrail(may_fall=0.5),
        "task/*/ece": Guardrail(at_most=0.2),
        "index/recall": Guardrail(at_least=0.9),
        "bytes": Guardrail(may_rise=4.0),
        "measured/checks/leakage/wrong": Guardrail(at_most=0, required=False),
        "measured/checks/tables_in_time/wrong": Guardrail(at_most=0, required=False),
        "measured/checks/online_parity/wrong": Guardrail(at_most=0, required=False),
        "measured/latency_ms/total/p50": Guardrail(may_rise=4.0, required=False),
    }


@dataclass(frozen=True)
class GateConfig:
    """All demands. `level` is that of the two-sided intervals (0.95: a gate errs in 2.5%), from `resamples` drawn by `seed`.

    Naming `metrics` or `guardrails` in the settings replaces the defaults here as a whole: what is written is what is asked.
    """

    level: float = 0.95
    resamples: int = 2000
    seed: int = 0
    metrics: Mapping[str, MetricGate] = field(default_factory=_metrics)
    guardrails: Mapping[str, Guardrail] = field(default_factory=_guardrails)

    def __post_init__(self) -> None:
        if not 0.5 <= self.level < 1 or self.resamples < 100:
            raise InputError(f"gates: level = {self.level} must be in [0.5, 1), resamples = {self.resamples} at least 100")
        if not self.gates():
            raise InputError("gates: no metric to judge by; name at least one under [gates.metrics]")

    def gates(self) -> tuple[Gate, ...]:
        """Every gate, metric by metric. Raises InputError where a margin or a number of users makes no sense."""
        return tuple(gate for metric, demand in self.metrics.items() for gate in demand.gates(metric))


@dataclass(frozen=True)
class Evidence:
    """What a release is judged on: its per-user rows (see `registry.gates.judge`) and its figures."""

    rows: pl.DataFrame
    figures: Figures


def judge_release(config: GateConfig, champion: Evidence | None, challenger: Evidence) -> Verdict:
    """The verdict of all gates and guardrails on `challenger`. Without a champion (None) only absolute limits can refuse it."""
    old_rows, old_figures = (champion.rows, champion.figures) if champion else (None, None)
    verdict = judge(old_rows, challenger.rows, config.gates(), seed=config.seed, resamples=config.resamples, level=config.level)
    return verdict.guarded(hold(config.guardrails, old_figures, challenger.figures))
