"""Guardrails on live traffic: they see what is broken, and leave equals alone however often they look."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from registry.traffic import Counts, bin_of
from registry.watch import LatencyLimit, RolloutConfig, ShareLimit, broken, difference_low, wilson
from tandem.core.errors import InputError

CONFIG = RolloutConfig()


def counts(requests: int, failed: int = 0, degraded: int = 0, milliseconds: float = 10.0) -> Counts:
    return Counts(requests, failed, degraded, 0, {bin_of(milliseconds): requests})


def latencies(values: np.ndarray) -> Counts:
    bins, sizes = np.unique([bin_of(value) for value in values], return_counts=True)
    return Counts(len(values), 0, 0, 0, dict(zip(bins.tolist(), sizes.tolist(), strict=True)))


def test_equal_arms_hold() -> None:
    assert broken(CONFIG, counts(1000, 3, 20), counts(1000, 3, 20)) is None


def test_failures_break_and_are_told_with_numbers() -> None:
    said = broken(CONFIG, counts(1000, 1), counts(50, 50))
    assert said == ("50 of 50 requests failed (100.0%), the champion's 0.1%: surely above the 2.0% that it may exceed by")


def test_nothing_is_said_below_the_minimum() -> None:
    assert broken(CONFIG, counts(1000), counts(49, 49)) is None
    assert broken(CONFIG, counts(49), counts(1000, 0, 1000)) is None
    assert broken(CONFIG, counts(199, milliseconds=1), counts(1000, milliseconds=500)) is None


def test_a_challenger_that_fails_breaks_without_a_champion_to_compare_with() -> None:
    assert "failed" in str(broken(CONFIG, Counts(), counts(50, 40)))
    assert broken(CONFIG, Counts(), counts(5000, 0, 5000, 999.0)) is None


def test_what_degrades_both_is_not_held_against_the_challenger() -> None:
    assert broken(CONFIG, counts(1000, 0, 1000), counts(1000, 0, 1000)) is None
    assert "degraded" in str(broken(CONFIG, counts(1000, 0, 10), counts(1000, 0, 1000)))


def test_a_slow_challenger_breaks_and_a_few_milliseconds_do_not() -> None:
    assert "p95 is" in str(broken(CONFIG, counts(400, milliseconds=20), counts(400, milliseconds=40)))
    assert broken(CONFIG, counts(400, milliseconds=2), counts(400, milliseconds=8)) is None, "within floor_ms"
    tail = counts(400, milliseconds=20) + counts(16, milliseconds=900)
    assert broken(CONFIG, counts(400, milliseconds=20), tail) is None, "four in a hundred is less than p95 looks at"


def test_limits_are_those_of_the_settings() -> None:
    loose = replace(CONFIG, failed=ShareLimit(may_exceed=1.0), p95=LatencyLimit(may_rise=math.inf))
    assert broken(loose, counts(1000), counts(1000, 900, 0, 500.0)) is None
    strict = replace(CONFIG, p95=LatencyLimit(may_rise=0.1, floor_ms=0, minimum_requests=100))
    assert "p95" in str(broken(strict, counts(400, milliseconds=20), counts(100, milliseconds=25)))


@pytest.mark.parametrize("changed", [{"level": 1.0}, {"shadow_queue": 0}, {"window_minutes": 0}, {"failed": ShareLimit(-0.1)}])
def test_settings_that_make_no_sense_are_refused(changed: dict[str, object]) -> None:
    with pytest.raises(InputError, match="rollout"):
        RolloutConfig(**changed)  # type: ignore[arg-type]


def test_ten_minutes_of_looks_seldom_end_an_equal_challenger() -> None:
    """300 equal arms, looked at after every 20 requests up to 3,000, with 1% failing, 3% degraded and heavy-tailed times."""
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(300):
        old, new = Counts(), Counts()
        for _ in range(150):
            arms = []
            for requests in (100, 20):
                part = latencies(rng.lognormal(3, 0.6, requests))
                arms.append(replace(part, failed=int(rng.binomial(requests, 0.01)), degraded=int(rng.binomial(requests, 0.03))))
            old, new = old + arms[0], new + arms[1]
            if broken(CONFIG, old, new):
                ended += 1
                break
    assert ended <= 3


def test_a_share_beyond_its_limit_is_found_soon() -> None:
    """A challenger that fails in 10% of its requests has ended before 300 of them, in most runs."""
    rng = np.random.default_rng(1)
    found = sum(bool(broken(CONFIG, counts(3000, 30), counts(300, int(rng.binomial(300, 0.1))))) for _ in range(500))
    assert found > 400


def test_intervals_cover_what_they_promise() -> None:
    rng = np.random.default_rng(2)
    hits = rng.binomial(200, 0.07, 4000)
    low = np.array([wilson(int(each), 200, 1.645)[0] for each in hits])
    assert 0.92 < (low < 0.07).mean() < 0.98
    ends = [difference_low((int(a), 500), (int(b), 200), 0.95) for a, b in zip(rng.binomial(500, 0.05, 4000), hits, strict=True)]
    assert 0.92 < np.mean(np.array(ends) < 0.02) < 0.98
