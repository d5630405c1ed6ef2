"""May the challenger go on answering? Guardrails on live traffic, as `[rollout]` in the settings declares them.

In: counts of the champion and of the challenger. Out: a sentence that says which guardrail broke, or None. Each guardrail
compares a share of requests: those that failed, those that degraded, and those slower than the champion's p95 allows. It breaks
when the share is surely too large: the whole interval lies beyond the limit, at a level that stands many looks. Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Final

from registry.traffic import Counts
from tandem.core.errors import InputError

_QUANTILE: Final = 0.95


@dataclass(frozen=True)
class ShareLimit:
    """The challenger's share of such requests may exceed the champion's by `may_exceed` (0.02: two in a hundred).

    With fewer than `minimum_requests` of either nothing is said.
    """

    may_exceed: float = 0.02
    minimum_requests: int = 50


@dataclass(frozen=True)
class LatencyLimit:
    """The challenger's p95 may exceed the champion's by this share of it (0.5: half as long again), and always by `floor_ms`."""

    may_rise: float = 0.5
    floor_ms: float = 10.0
    minimum_requests: int = 200


@dataclass(frozen=True)
class OutcomeLimit:
    """What `tandem experiment check` asks of a metric of the report ("" : what the source calls positive, per slate).

    The experiment has lost when the metric is surely lower than the champion's by more than `margin`, in the metric's own unit.
    Below `minimum_users` in either arm nothing is said.
    """

    metric: str = ""
    margin: float = 0.0
    minimum_users: int = 100


@dataclass(frozen=True)
class RolloutConfig:
    """`window_minutes`: how far back guardrails look. `watch_minutes`: how long a promotion is watched; 0: not at all.

    `level`: of each guardrail's one-sided interval. `shadow_queue`: requests that may wait for a shadow; more are dropped.
    """

    window_minutes: float = 10.0
    watch_minutes: float = 30.0
    level: float = 0.999
    shadow_queue: int = 100
    failed: ShareLimit = field(default_factory=ShareLimit)
    degraded: ShareLimit = field(default_factory=ShareLimit)
    p95: LatencyLimit = field(default_factory=LatencyLimit)
    outcome: OutcomeLimit = field(default_factory=OutcomeLimit)

    def __post_init__(self) -> None:
        if not 0.5 < self.level < 1 or self.shadow_queue < 1 or not self.window_minutes > 0 or not self.watch_minutes >= 0:
            raise InputError(
                f"rollout: level = {self.level} must be in (0.5, 1), shadow_queue = {self.shadow_queue} at least 1, "
                f"window_minutes = {self.window_minutes} above 0, watch_minutes = {self.watch_minutes} 0 or more"
            )
        limits = (self.failed.may_exceed, self.degraded.may_exceed, self.p95.may_rise, self.p95.floor_ms, self.outcome.margin)
        if not all(limit >= 0 for limit in limits):
            raise InputError(f"rollout: a limit among {limits} is below 0; write how much worse a challenger may be")


def broken(config: RolloutConfig, champion: Counts, challenger: Counts) -> str | None:
    """Why the challenger must not go on, or None. A champion without enough requests to compare with is taken to never fail."""
    return _failed(config, champion, challenger) or _degraded(config, champion, challenger) or _slow(config, champion, challenger)


def _failed(config: RolloutConfig, champion: Counts, challenger: Counts) -> str | None:
    if challenger.requests < config.failed.minimum_requests:
        return None
    known = champion.requests >= config.failed.minimum_requests
    old = (champion.failed, champion.requests) if known else (0, challenger.requests)
    return _share("failed", config.failed, old, (challenger.failed, challenger.requests), config.level)


def _degraded(config: RolloutConfig, champion: Counts, challenger: Counts) -> str | None:
    if min(champion.requests, challenger.requests) < config.degraded.minimum_requests:
        return None
    old, new = (champion.degraded, champion.requests), (challenger.degraded, challenger.requests)
    return _share("degraded", config.degraded, old, new, config.level)


def _share(what: str, limit: ShareLimit, old: tuple[int, int], new: tuple[int, int], level: float) -> str | None:
    if difference_low(old, new, level) <= limit.may_exceed:
        return None
    return (
        f"{new[0]} of {new[1]} requests {what} ({new[0] / new[1]:.1%}), the champion's {old[0] / old[1]:.1%}: "
        f"surely above the {limit.may_exceed:.1%} that it may exceed by"
    )


def _slow(config: RolloutConfig, champion: Counts, challenger: Counts) -> str | None:
    """Too many requests beyond the champion's p95 with its allowance: a quantile is a share turned round."""
    own = config.p95
    if min(champion.requests, challenger.requests) < own.minimum_requests:
        return None
    z = NormalDist().inv_cdf(config.level)
    sure = min(1.0, _QUANTILE + z * math.sqrt(_QUANTILE * (1 - _QUANTILE) / champion.requests))
    p95, high = champion.quantile_ms(_QUANTILE), champion.quantile_ms(sure)
    if p95 is None or high is None:
        return None
    limit = max(high * (1 + own.may_rise), high + own.floor_ms)
    slow = challenger.slower_than(limit)
    if wilson(slow, challenger.requests, z)[0] <= 1 - _QUANTILE:
        return None
    return (
        f"p95 is {challenger.quantile_ms(_QUANTILE):.1f} ms, the champion's {p95:.1f} ms: {slow} of {challenger.requests} "
        f"requests took longer than the {limit:.1f} ms that {1 - _QUANTILE:.0%} may exceed"
    )


def difference_low(old: tuple[int, int], new: tuple[int, int], level: float) -> float:
    """Lower end of the one-sided interval of share(new) - share(old), each (hits, requests): Newcombe 1998, method 10."""
    z = NormalDist().inv_cdf(level)
    p_old, p_new = old[0] / old[1], new[0] / new[1]
    above, below = wilson(*old, z)[1] - p_old, p_new - wilson(*new, z)[0]
    return p_new - p_old - math.hypot(above, below)


def wilson(hits: int, requests: int, z: float) -> tuple[float, float]:
    """Wilson's score interval of a share, `z` standard normal quantiles wide on each side (Wilson 1927)."""
    share, extra = hits / requests, z * z / requests
    middle = (share + extra / 2) / (1 + extra)
    reach = z * math.sqrt(share * (1 - share) / requests + extra / (4 * requests)) / (1 + extra)
    return max(0.0, middle - reach), min(1.0, middle + reach)
