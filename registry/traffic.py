"""What running services answered lately, counted in the registry, so that several processes are judged as one.

In: counts of requests by arm, from each process. Out: sums over all processes. Times are counted in bins 5% apart, so a quantile
is within 2.5% of the exact one however many requests there were, and histograms add up (Masson, Rim and Lee 2019, DDSketch).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from registry.tables import TrafficRow

SLOT_SECONDS: Final = 10
"""How long one slot lasts; slot number = seconds since 1970 // SLOT_SECONDS."""

TOTAL: Final = 0
"""The slot in which everything of an experiment adds up; it stays when the others are deleted."""

_GROWTH: Final = 1.05
_FASTEST_MS: Final = 0.01


@dataclass(frozen=True)
class Counts:
    """Requests of one arm. `failed`: the arm could not answer. `degraded`: it answered with a fallback. `dropped`: a shadow's
    requests that were not asked, since too many waited. `latency`: requests by bin of their milliseconds."""

    requests: int = 0
    failed: int = 0
    degraded: int = 0
    dropped: int = 0
    latency: Mapping[int, int] = field(default_factory=dict)

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.requests + other.requests,
            self.failed + other.failed,
            self.degraded + other.degraded,
            self.dropped + other.dropped,
            dict(Counter(self.latency) + Counter(other.latency)),
        )

    @classmethod
    def one(cls, milliseconds: float, *, failed: bool = False, degraded: bool = False) -> Counts:
        """A single request."""
        return cls(1, int(failed), int(degraded), 0, {bin_of(milliseconds): 1})

    def quantile_ms(self, share: float) -> float | None:
        """The milliseconds that `share` of the requests stayed below; None without requests."""
        total, seen = sum(self.latency.values()), 0
        for number in sorted(self.latency):
            seen += self.latency[number]
            if seen >= share * total:
                return _middle(number)
        return None

    def slower_than(self, milliseconds: float) -> int:
        """How many requests took longer; those in the bin of `milliseconds` itself did not."""
        limit = bin_of(milliseconds) if math.isfinite(milliseconds) else math.inf
        return sum(count for number, count in self.latency.items() if number > limit)


@dataclass(frozen=True)
class TrafficKey:
    """Whose requests: when (`slot`), under which change of champion, in which experiment (0: none), in which arm."""

    slot: int
    champion: int
    experiment: int
    arm: str


class Traffic:
    """The counts' part of a unit of work: nothing lasts until `Work.commit()`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def write(self, process: str, counts: Mapping[TrafficKey, Counts]) -> None:
        """Keep what one process counted so far in each slot, in place of what it said of the slot before."""
        for key, value in counts.items():
            numbers = {name: getattr(value, name) for name in ("requests", "failed", "degraded", "dropped")}
            self._session.merge(
                TrafficRow(
                    process=process, slot=key.slot, champion=key.champion, experiment=key.experiment, arm=key.arm, **numbers,
                    latency={str(number): count for number, count in value.latency.items()},
                )
            )  # fmt: skip
        self._session.flush()

    def of_experiment(self, number: int, since: int = TOTAL + 1) -> dict[str, Counts]:
        """Arm -> counts of an experiment in the slots from `since` on; with `TOTAL`, all of it."""
        slots = TrafficRow.slot == TOTAL if since == TOTAL else TrafficRow.slot >= since
        return self._by_arm(select(TrafficRow).where(TrafficRow.experiment == number, slots))

    def of_champion(self, version: int, since: int = TOTAL + 1) -> Counts:
        """What the champion of change `version` answered, in an experiment or outside, in the slots from `since` on."""
        rows = select(TrafficRow).where(TrafficRow.champion == version, TrafficRow.slot >= max(since, TOTAL + 1))
        return self._by_arm(rows.where(TrafficRow.arm == "champion")).get("champion", Counts())

    def forget_before(self, slot: int) -> None:
        """Delete older slots, whoever wrote them; totals of experiments stay."""
        self._session.execute(delete(TrafficRow).where(TrafficRow.slot > TOTAL, TrafficRow.slot < slot))

    def _by_arm(self, rows: object) -> dict[str, Counts]:
        sums: dict[str, Counts] = {}
        for row in self._session.scalars(rows):  # type: ignore[call-overload]
            sums[row.arm] = sums.get(row.arm, Counts()) + _counts(row)
        return sums


def slot_at(seconds: float) -> int:
    """The slot of a moment, in seconds since 1970."""
    return int(seconds // SLOT_SECONDS)


def summed(counts: Iterable[tuple[TrafficKey, Counts]]) -> dict[TrafficKey, Counts]:
    """Counts of equal keys added up."""
    sums: dict[TrafficKey, Counts] = {}
    for key, value in counts:
        sums[key] = sums.get(key, Counts()) + value
    return sums


def total_of(key: TrafficKey) -> TrafficKey:
    """Where a slot of an experiment adds up."""
    return replace(key, slot=TOTAL, champion=0)


def bin_of(milliseconds: float) -> int:
    """The bin of a time: bin n holds (1.05 ** (n - 1), 1.05 ** n] times 0.01 ms."""
    return max(0, math.ceil(math.log(max(milliseconds, _FASTEST_MS) / _FASTEST_MS, _GROWTH)))


def _middle(number: int) -> float:
    """The value that is off by the same share at both ends of a bin."""
    return float(_FASTEST_MS * 2 * _GROWTH**number / (1 + _GROWTH))


def _counts(row: TrafficRow) -> Counts:
    latency = {int(number): int(count) for number, count in row.latency.items()}
    return Counts(row.requests, row.failed, row.degraded, row.dropped, latency)
