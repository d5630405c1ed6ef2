"""What is declared is what is asked: metrics, slices and guardrails in one verdict that repeats."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from registry.gates import Gate
from registry.guardrails import Guardrail
from registry.policy import Evidence, GateConfig, MetricGate, judge_release
from tandem.core.errors import InputError

FIGURES = {"towers_ranker/coverage@10": 0.5, "task/click/ece": 0.01, "index/recall": 0.99, "bytes": 1e6}


def evidence(lift: float = 0.0, seed: int = 0, **figures: float) -> Evidence:
    """Two hundred users, every fourth one cold; `lift` is added to both metrics."""
    rng = np.random.default_rng(seed)
    rows = pl.DataFrame(
        {
            "user_id": [f"u{each}" for each in range(200)],
            "cold_user": [each % 4 == 0 for each in range(200)],
            "country": ["FR" if each % 2 else "DE" for each in range(200)],
            "ndcg@10": rng.random(200) * 0.2 + lift,
            "recall@100": rng.random(200) * 0.5 + lift,
        }
    )
    return Evidence(rows, FIGURES | {key.replace("__", "/"): value for key, value in figures.items()})


def test_the_defaults_ask_for_both_metrics_with_their_margins() -> None:
    assert GateConfig().gates() == (
        Gate("ndcg@10", margin=0.01, minimum_users=30),
        Gate("recall@100", margin=0.02, minimum_users=30),
    )
    assert judge_release(GateConfig(), evidence(), evidence(0.001)).passed


def test_slices_are_gates_of_their_own_with_their_own_margin() -> None:
    config = GateConfig(metrics={"ndcg@10": MetricGate(margin=0.01, slices={"cold_user": 0.05, "country=FR": 0.04})})
    assert [(gate.where, gate.margin) for gate in config.gates()] == [(None, 0.01), ("cold_user", 0.05), ("country=FR", 0.04)]
    challenger = evidence()
    cold = pl.when("cold_user").then(pl.col("ndcg@10") - 0.06).otherwise(pl.col("ndcg@10") + 0.03)
    worse = Evidence(challenger.rows.with_columns(cold.alias("ndcg@10")), challenger.figures)
    verdict = judge_release(config, evidence(), worse)
    assert [result.passed for result in verdict.results] == [True, False, True]
    assert verdict.refusals == (verdict.sentences[1],)
    assert verdict.table()["users"].to_list()[:3] == [200, 50, 100]


def test_a_slice_that_no_row_has_a_column_for_is_refused_by_name() -> None:
    config = GateConfig(metrics={"ndcg@10": MetricGate(slices={"heavy_user": 0.1})}, guardrails={})
    verdict = judge_release(config, evidence(), evidence(0.01))
    assert "no column 'heavy_user'" in verdict.refusals[0]


def many(values: list[str | None], lift: float = 0.0) -> Evidence:
    """Two hundred users, the first ones with the main category that `values` says."""
    rows = evidence().rows.with_columns(pl.col("ndcg@10") + lift, category=pl.Series(values + [None] * (200 - len(values))))
    return Evidence(rows, FIGURES)


def test_a_star_is_a_gate_for_every_value_that_enough_users_have() -> None:
    config = GateConfig(
        metrics={"ndcg@10": MetricGate(margin=0.01, slices={"category=*": 0.05, "cold_user": 0.03})}, guardrails={}
    )
    groups: list[str | None] = ["Drama"] * 60 + ["War"] * 30 + ["Noir"] * 29
    verdict = judge_release(config, many(groups), many(groups, 0.001))
    assert [(result.gate.where, result.gate.margin) for result in verdict.results] == [
        (None, 0.01), ("category=*", 0.05), ("category=Drama", 0.05), ("category=War", 0.05), ("cold_user", 0.03),
    ]  # fmt: skip
    assert verdict.passed
    assert verdict.sentences[1] == "ndcg@10 on category=*: 2 of 3 values have 30 users or more"
    worse = many(groups).rows.with_columns(
        pl.when(pl.col("category") == "War").then(pl.col("ndcg@10") - 0.1).otherwise(pl.col("ndcg@10") + 0.1)
    )
    assert [each[:24] for each in judge_release(config, many(groups), Evidence(worse, FIGURES)).refusals] == [
        "ndcg@10 on category=War:"
    ]


def test_a_star_without_a_value_of_enough_users_is_refused() -> None:
    config = GateConfig(metrics={"ndcg@10": MetricGate(slices={"category=*": 0.5})}, guardrails={})
    few: list[str | None] = ["Drama"] * 29
    (refusal,) = judge_release(replace(config, metrics={"ndcg@10": replace(config.metrics["ndcg@10"], margin=0.5)}),
                               many(few), many(few)).refusals  # fmt: skip
    assert refusal == "ndcg@10 on category=*: refused, 0 of 1 values have 30 users or more"
    assert "no column 'category'" in judge_release(config, evidence(), evidence()).refusals[-1]


def test_a_guardrail_refuses_what_the_metrics_would_let_through() -> None:
    verdict = judge_release(GateConfig(), evidence(), evidence(0.1, task__click__ece=0.3))
    assert all(result.passed for result in verdict.results)
    assert not verdict.passed
    (sentence,) = verdict.refusals
    assert sentence == "task/click/ece: refused, challenger 0.3, champion 0.01; it must be at most 0.2"


def test_the_table_has_a_row_per_gate_and_per_guardrail() -> None:
    table = judge_release(GateConfig(), evidence(), evidence(bytes=3e6)).table()
    assert table["metric"].to_list() == [
        "ndcg@10",
        "recall@100",
        "towers_ranker/coverage@10",
        "task/click/ece",
        "index/recall",
        "bytes",
        "measured/checks/leakage/wrong",
        "measured/checks/tables_in_time/wrong",
        "measured/checks/online_parity/wrong",
        "measured/latency_ms/total/p50",
    ]
    assert table.row(5, named=True) == {
        "metric": "bytes", "where": None, "kind": "guardrail", "margin": None, "users": None, "champion": 1e6,
        "challenger": 3e6, "difference": 2e6, "low": None, "high": None, "passed": True,
    }  # fmt: skip


def test_without_a_champion_only_absolute_limits_refuse() -> None:
    assert judge_release(GateConfig(), None, evidence(-0.1, bytes=1e12)).passed
    assert not judge_release(GateConfig(), None, evidence(index__recall=0.5)).passed


def test_the_same_evidence_gives_the_same_verdict_through_json_too() -> None:
    config = GateConfig(resamples=300, seed=5)
    first, second = (judge_release(config, evidence(seed=1), evidence(seed=2)) for _ in range(2))
    assert first == second
    assert json.loads(json.dumps(first.to_dict())) == second.to_dict()
    other = judge_release(GateConfig(resamples=300, seed=6), evidence(seed=1), evidence(seed=2))
    assert other.results[0].interval != first.results[0].interval


def test_a_config_that_makes_no_sense_is_refused_when_it_is_built() -> None:
    with pytest.raises(InputError, match="level"):
        GateConfig(level=0.4)
    with pytest.raises(InputError, match="resamples"):
        GateConfig(resamples=10)
    with pytest.raises(InputError, match=r"no metric to judge by; name at least one under \[gates.metrics\]"):
        GateConfig(metrics={})
    with pytest.raises(InputError, match="margin -1"):
        GateConfig(metrics={"m": MetricGate(slices={"cold_user": -1})})
    assert GateConfig(guardrails={"bytes": Guardrail(at_most=1)}).guardrails.keys() == {"bytes"}
