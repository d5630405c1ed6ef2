"""Arms: the declared shares, the same for ever, only growing with the percentage, and another draw for another experiment."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.assignment import arm_of, digest, place

PLACES = [58.185794, 76.057099, 97.100798]
UNITS = [f"u{number}" for number in range(20_000)]


def challenged(experiment: str, percent: float) -> set[str]:
    return {unit for unit in UNITS if arm_of(digest(experiment, unit), percent) == "challenger"}


@pytest.mark.parametrize("percent", [0.5, 5.0, 50.0, 90.0])
def test_shares_are_the_declared_ones(percent: float) -> None:
    share, error = percent / 100, math.sqrt(percent / 100 * (1 - percent / 100) / len(UNITS))
    assert abs(len(challenged("towers", percent)) / len(UNITS) - share) < 4 * error


def test_places_are_even_over_the_whole_range() -> None:
    counts = [0] * 20
    for unit in UNITS:
        counts[int(place(digest("towers", unit)) // 5)] += 1
    expected = len(UNITS) / 20
    assert sum((count - expected) ** 2 / expected for count in counts) < 45  # chi-square of 19 degrees: p about 0.0007


@given(st.text(max_size=40), st.floats(0.001, 100), st.floats(0.001, 100))
def test_a_larger_share_keeps_everybody_in(unit: str, one: float, other: float) -> None:
    less, more = sorted((one, other))
    hashed = digest("towers", unit)
    assert not (arm_of(hashed, less) == "challenger" and arm_of(hashed, more) == "champion")
    assert arm_of(hashed, 100) == "challenger"


def test_two_experiments_draw_independently() -> None:
    both = len(challenged("first", 20) & challenged("second", 20)) / len(UNITS)
    assert abs(both - 0.04) < 4 * math.sqrt(0.04 * 0.96 / len(UNITS))


def test_the_arm_is_the_same_in_every_process_and_version() -> None:
    """Written down once: another hash would throw users from arm to arm at an upgrade."""
    assert [round(place(digest("towers", unit)), 6) for unit in ("u1", "用户", "")] == PLACES
    program = "from registry.assignment import *; print(place(digest('towers', 'u1')))"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert round(float(told), 6) == PLACES[0]
