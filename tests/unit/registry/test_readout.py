"""Read-outs against simulation: equal arms differ in about 5%, lifts are found, many looks are allowed where that is promised."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare, ttest_ind

from registry.readout import contrast, split
from tandem.core.errors import InputError

Arm = tuple[np.ndarray, np.ndarray]


def arm(rng: np.random.Generator, users: int, lift: float = 1.0) -> Arm:
    """(clicked slates, slates) of people who differ: some come often, and those click less."""
    slates = 1 + rng.poisson(rng.gamma(1.0, 6.0, users))
    taste = rng.beta(2, 8, users) / np.sqrt(slates)
    return rng.binomial(slates, np.minimum(taste * lift, 1.0)), slates


def per_user(rng: np.random.Generator, users: int) -> Arm:
    return rng.exponential(2.0, users), np.ones(users)


@pytest.mark.parametrize(("draw", "users"), [(arm, (400, 400)), (arm, (1500, 80)), (per_user, (300, 300))])
def test_equal_arms_differ_in_one_of_twenty(draw: object, users: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    runs = 2000
    found = [contrast(draw(rng, users[0]), draw(rng, users[1])) for _ in range(runs)]  # type: ignore[operator]
    wrong = sum(not each.low <= 0 <= each.high for each in found) / runs
    assert 0.035 < wrong < 0.07


def test_counting_slates_instead_of_users_would_be_wrong() -> None:
    """Why the delta method: slates of one user are alike, so their number overstates what is known."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(600):
        (y_a, x_a), (y_b, x_b) = arm(rng, 400), arm(rng, 400)
        p_a, p_b = y_a.sum() / x_a.sum(), y_b.sum() / x_b.sum()
        error = np.sqrt(p_a * (1 - p_a) / x_a.sum() + p_b * (1 - p_b) / x_b.sum())
        wrong += abs(p_b - p_a) > 1.96 * error
    assert wrong / 600 > 0.08


def test_a_known_lift_is_found_and_its_size_is_covered() -> None:
    rng = np.random.default_rng(2)
    large = arm(rng, 400_000)[0].sum() / arm(rng, 400_000)[1].sum()
    runs = [contrast(arm(rng, 1500), arm(rng, 1500, 1.3)) for _ in range(300)]
    assert np.mean([each.low > 0 for each in runs]) > 0.9
    assert np.mean([each.low <= 0.3 * large <= each.high for each in runs]) > 0.9


def test_a_mean_over_users_is_welchs() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(1, 1, 40), rng.normal(1.2, 3, 25)
    found = contrast((a, np.ones(40)), (b, np.ones(25)), 0.9)
    expected = ttest_ind(b, a, equal_var=False).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.mean_a, found.mean_b, found.users_a, found.users_b) == pytest.approx((a.mean(), b.mean(), 40, 25))


def test_looking_thirty_times_is_allowed_by_the_interval_that_says_so() -> None:
    """Equal arms that grow by 50 users a look: at one look in thirty the plain interval misses zero far too often."""
    rng = np.random.default_rng(4)
    plain = always = 0
    runs = 400
    for _ in range(runs):
        a, b = arm(rng, 1500), arm(rng, 1500)
        looks = [contrast((a[0][:n], a[1][:n]), (b[0][:n], b[1][:n])) for n in range(50, 1501, 50)]
        plain += any(not each.low <= 0 <= each.high for each in looks)
        always += any(not each.always_low <= 0 <= each.always_high for each in looks)
    assert plain / runs > 0.15
    assert always / runs < 0.05


def test_the_interval_for_many_looks_is_the_wider_one_and_still_finds_a_lift() -> None:
    rng = np.random.default_rng(5)
    runs = [contrast(arm(rng, 3000), arm(rng, 3000, 0.6)) for _ in range(50)]
    assert all(each.always_low <= each.low and each.high <= each.always_high for each in runs)
    assert np.mean([each.always_high < 0 for each in runs]) > 0.9


def test_arms_without_a_difference_anywhere_have_an_interval_of_nothing() -> None:
    ones = np.ones(10)
    found = contrast((ones, ones), (ones, ones))
    assert (found.low, found.high, found.always_low, found.always_high) == (0, 0, 0, 0)


@pytest.mark.parametrize("y", [np.ones(1), np.ones((2, 2)), np.ones(3)])
def test_arms_that_cannot_be_compared_are_refused(y: np.ndarray) -> None:
    with pytest.raises(InputError, match="at least 2 users"):
        contrast((y, np.zeros(y.shape)), (np.ones(5), np.ones(5)))


def test_a_split_is_judged_by_chi_square() -> None:
    found = split(9_420, 580, 5.0)
    assert found.p == pytest.approx(chisquare([9_420, 580], [9_500, 500]).pvalue)
    assert found.broken
    assert not split(9_480, 520, 5.0).broken
    assert (split(9_480, 520, 5.0).expected_champion, split(9_480, 520, 5.0).expected_challenger) == (9_500, 500)


def test_too_few_to_judge_a_split_say_so() -> None:
    assert (split(60, 0, 5.0).p, split(60, 0, 5.0).broken, split(0, 0, 50.0).p, split(0, 900, 100.0).p) == (
        None,
        False,
        None,
        None,
    )


def test_a_fair_split_is_called_broken_once_in_two_thousand() -> None:
    rng = np.random.default_rng(6)
    assert sum(split(2000 - int(hits), int(hits), 10.0).broken for hits in rng.binomial(2000, 0.1, 20_000)) < 30
    assert all(split(2000 - int(hits), int(hits), 10.0).broken for hits in rng.binomial(2000, 0.05, 200))
