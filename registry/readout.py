"""What an experiment found: two arms of different users, a difference with its interval, and whether the split can be trusted.

In: per user sums of both arms. Out: `Contrast`s and a `Split`. Users are in one arm each, so nothing is paired: the interval is
Welch's, over users, with ratios ("clicks per slate") linearised by the delta method, since users and not slates were drawn
(Deng, Knoblich and Lu 2018, doi:10.1145/3219819.3219919). Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tandem.core.errors import InputError

Sums = NDArray[np.floating[Any]]

BROKEN_SPLIT: Final = 0.0005
"""Below this p the split is broken, not unlucky (Fabijan et al. 2019, doi:10.1145/3292500.3330722)."""

_ENOUGH: Final = 5.0
"""Expected users in the smaller arm from which chi-square is near enough to the binomial it stands for."""


@dataclass(frozen=True)
class Contrast:
    """Both means, `difference` = challenger - champion, its interval at one look, and the one that stands any number of looks.

    The means are ratios of sums: total / total. `users_a` are the champion's.
    """

    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    always_low: float
    always_high: float
    users_a: int
    users_b: int


@dataclass(frozen=True)
class Split:
    """How many units came in each arm, how many should have, and how likely so large a deviation is by chance.

    `p` is None while too few came to tell.
    """

    champion: int
    challenger: int
    expected_champion: float
    expected_challenger: float
    p: float | None

    @property
    def broken(self) -> bool:
        """Is this no chance? Then something lost users of one arm, and what is left cannot be compared."""
        return self.p is not None and self.p < BROKEN_SPLIT


def split(champion: int, challenger: int, percent: float) -> Split:
    """Sample-ratio-mismatch check: chi-square with one degree of freedom against the declared percentage."""
    total = champion + challenger
    expected = (total * (1 - percent / 100), total * percent / 100)
    if min(expected) < _ENOUGH:
        return Split(champion, challenger, *expected, None)
    statistic = (champion - expected[0]) ** 2 / expected[0] + (challenger - expected[1]) ** 2 / expected[1]
    return Split(champion, challenger, *expected, math.erfc(math.sqrt(statistic / 2)))


def contrast(champion: tuple[Sums, Sums], challenger: tuple[Sums, Sums], level: float = 0.95, expected: int = 1000) -> Contrast:
    """Compare sum(y) / sum(x) of two arms; each is (y, x), both (U,), one entry per user. A mean over users has x = 1.

    `expected`: about how many users the always-valid interval is tightest at. InputError with fewer than 2 users in an arm.
    """
    (mean_a, error_a, users_a), (mean_b, error_b, users_b) = _ratio(*champion), _ratio(*challenger)
    difference, error = mean_b - mean_a, math.hypot(error_a, error_b)
    once = _student(error_a, users_a, error_b, users_b, level) * error
    always = _anytime(users_a + users_b, level, expected) * error
    return Contrast(
        mean_a, mean_b, difference, difference - once, difference + once,
        difference - max(always, once), difference + max(always, once), users_a, users_b,
    )  # fmt: skip


def _ratio(y: Sums, x: Sums) -> tuple[float, float, int]:
    """sum(y) / sum(x), its standard error by the delta method, and the number of users."""
    y, x = np.asarray(y, np.float64), np.asarray(x, np.float64)
    if y.shape != x.shape or y.ndim != 1 or y.size < 2 or not x.sum() > 0:
        raise InputError(
            f"an arm needs sums of at least 2 users, and something to divide by; these have shapes {y.shape}, {x.shape}"
        )
    ratio = float(y.sum() / x.sum())
    linear = (y - ratio * x) / x.mean()
    return ratio, float(linear.std(ddof=1) / math.sqrt(y.size)), y.size


def _student(error_a: float, users_a: int, error_b: float, users_b: int, level: float) -> float:
    """Student's quantile with Welch's degrees of freedom (Welch 1947)."""
    from scipy.special import stdtrit

    variance = error_a**2 + error_b**2
    if variance == 0:
        return 0.0
    freedom = variance**2 / (error_a**4 / (users_a - 1) + error_b**4 / (users_b - 1))
    return float(stdtrit(freedom, (1 + level) / 2))


def _anytime(users: int, level: float, expected: int) -> float:
    """How many standard errors wide an asymptotic confidence sequence is: it holds at all looks together.

    Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas 2024, doi:10.1214/24-AOS2408, tuned to be tightest at `expected` users.
    """
    alpha = 1 - level
    rho2 = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha)) + 1) / expected
    grown = users * rho2 + 1
    return math.sqrt(2 * grown / (users * rho2) * math.log(math.sqrt(grown) / alpha))
