"""Guardrails: each limit at, inside and outside of its edge, and figures that are not there."""

from __future__ import annotations

import pytest

from registry.guardrails import Guardrail, hold
from tandem.core.errors import InputError


def passes(guardrail: Guardrail, old: float | None, new: float | None) -> bool:
    (result,) = hold({"x": guardrail}, {"x": old}, {"x": new})
    return result.passed


@pytest.mark.parametrize(
    ("guardrail", "old", "within", "outside"),
    [
        (Guardrail(at_least=0.5), None, 0.5, 0.49),
        (Guardrail(at_most=0.5), None, 0.5, 0.51),
        (Guardrail(may_fall=0.25), 1.0, 0.75, 0.74),
        (Guardrail(may_rise=0.25), 1.0, 1.25, 1.26),
        (Guardrail(may_fall=0.0), 0.8, 0.8, 0.79),
        (Guardrail(may_fall=0.5), -2.0, -3.0, -3.1),
        (Guardrail(at_most=0.5, may_rise=9.0), 0.1, 0.5, 0.6),
    ],
)
def test_limits_hold_up_to_their_edge(guardrail: Guardrail, old: float | None, within: float, outside: float) -> None:
    assert passes(guardrail, old, within)
    assert not passes(guardrail, old, outside)


def test_the_first_release_is_held_to_absolute_limits_only() -> None:
    limits = {"x": Guardrail(at_least=0.5), "y": Guardrail(may_rise=0.0)}
    assert [each.passed for each in hold(limits, None, {"x": 0.4, "y": 9.0})] == [False, True]


def test_a_refusal_says_what_was_found_and_what_is_allowed() -> None:
    (result,) = hold({"bytes": Guardrail(at_most=2e9, may_rise=0.2)}, {"bytes": 2e9}, {"bytes": 3e9})
    assert result.sentence == (
        "bytes: refused, challenger 3e+09, champion 2e+09; it must be at most 2e+09; it may rise by 20% of the champion's at most"
    )
    (kept,) = hold({"ece": Guardrail(at_most=0.2)}, {}, {"ece": 0.005})
    assert kept.sentence == "ece: challenger 0.005, champion none; within its limits"


def test_a_pattern_means_every_figure_that_fits_also_one_that_only_the_champion_has() -> None:
    old, new = {"task/click/ece": 0.01, "task/like/ece": 0.01}, {"task/click/ece": 0.3, "task/buy/ece": 0.1, "task/buy/auc": 0.9}
    results = hold({"task/*/ece": Guardrail(at_most=0.2)}, old, new)
    assert [(each.figure, each.passed) for each in results] == [
        ("task/buy/ece", True),
        ("task/click/ece", False),
        ("task/like/ece", False),
    ]
    assert "no such figure" in results[2].sentence


@pytest.mark.parametrize("figures", [{}, {"x": None}, {"y": 1.0}])
def test_a_figure_that_is_missing_is_refused(figures: dict[str, float | None]) -> None:
    (result,) = hold({"x": Guardrail(at_most=1.0)}, None, figures)
    assert not result.passed
    assert "[gates.guardrails]" in result.sentence


def test_a_figure_that_is_not_required_may_be_missing_and_counts_where_it_is_there() -> None:
    loose = {"measured/checks/*/wrong": Guardrail(at_most=0, required=False)}
    (missing,) = hold(loose, None, {})
    assert (missing.passed, missing.sentence) == (True, "measured/checks/*/wrong: not measured, and not required")
    (wrong,) = hold(loose, None, {"measured/checks/leakage/wrong": 3.0})
    assert not wrong.passed
    with pytest.raises(InputError, match="needs a limit"):
        Guardrail(required=False)


def test_a_figure_that_is_no_number_is_never_within_a_limit() -> None:
    for guardrail in (Guardrail(at_most=1.0), Guardrail(at_least=0.0), Guardrail(may_fall=0.5), Guardrail(may_rise=0.5)):
        assert not passes(guardrail, 0.5, float("nan"))


def test_limits_that_are_none_are_refused() -> None:
    with pytest.raises(InputError, match="needs a limit; give one of at_least, at_most, may_fall, may_rise"):
        Guardrail()
    for name, value in (("may_fall", -0.1), ("may_rise", float("nan")), ("at_most", float("nan"))):
        with pytest.raises(InputError, match=name):
            Guardrail(**{name: value})
