"""Limits on a release's own figures: what no gain in a metric may buy.

In: `Guardrail`s by figure ("task/*/ece" is every task's), and the figures of challenger and champion. Out: a result
with a sentence for each figure. Pure: no files, no chance, so the same figures always give the same answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase

from tandem.core.errors import InputError

Figures = Mapping[str, float | None]
"""Figures of one release by name, in each one's own unit; None where it could not be measured."""


@dataclass(frozen=True)
class Guardrail:
    """Limits of one figure. `at_least` and `at_most` are in its own unit and hold for every release, the first one too.

    `may_fall` and `may_rise` are shares of the champion's figure (0.2: by at most 20%); where the champion lacks the figure they
    say nothing. A figure exactly at its limit is within it. A `required` figure that the challenger lacks is a refusal.
    """

    at_least: float | None = None
    at_most: float | None = None
    may_fall: float | None = None
    may_rise: float | None = None
    required: bool = True

    def __post_init__(self) -> None:
        limits = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "required"}
        given = {name: value for name, value in limits.items() if value is not None}
        if not given:
            raise InputError(f"a guardrail needs a limit; give one of {', '.join(limits)}")
        for name, value in given.items():
            if value != value or (name.startswith("may_") and value < 0):
                raise InputError(f"{name} = {value} of a guardrail is no limit; give a number{', 0 or more' * ('may' in name)}")

    @property
    def asked(self) -> str:
        """What is asked, in short: "≥ 0.9, falls ≤ 50%"."""
        fixed = {"≥": self.at_least, "≤": self.at_most}
        shares = {"falls ≤": self.may_fall, "rises ≤": self.may_rise}
        said = [f"{sign} {value:g}" for sign, value in fixed.items() if value is not None]
        return ", ".join(said + [f"{sign} {value:.0%}" for sign, value in shares.items() if value is not None])


@dataclass(frozen=True)
class GuardrailResult:
    """What one guardrail found for one figure; None where a release lacks it. `asked` says in short what is."""

    figure: str
    champion: float | None
    challenger: float | None
    passed: bool
    sentence: str
    asked: str = ""


def hold(guardrails: Mapping[str, Guardrail], champion: Figures | None, challenger: Figures) -> tuple[GuardrailResult, ...]:
    """Every guarded figure of `challenger`, in the order of the guardrails. A required figure that it lacks is refused.

    `champion` None: nothing is live yet, so only `at_least` and `at_most` count.
    """
    old = champion or {}
    return tuple(
        _hold_one(figure, guardrail, old.get(figure), challenger.get(figure))
        for pattern, guardrail in guardrails.items()
        for figure in _figures(pattern, old, challenger)
    )


def _figures(pattern: str, old: Figures, new: Figures) -> list[str]:
    """The figures that a pattern names, the champion's too; the pattern itself where it names none."""
    return sorted(name for name in old.keys() | new.keys() if fnmatchcase(name, pattern)) or [pattern]


def _hold_one(figure: str, guardrail: Guardrail, old: float | None, new: float | None) -> GuardrailResult:
    if new is None and not guardrail.required:
        return GuardrailResult(figure, old, None, True, f"{figure}: not measured, and not required", guardrail.asked)
    if new is None:
        reason = "the challenger has no such figure; evaluate and create it again, or take it out of [gates.guardrails]"
        return GuardrailResult(figure, old, None, False, f"{figure}: refused, {reason}", guardrail.asked)
    broken = "; ".join(_broken(guardrail, old, new))
    compared = f"challenger {new:.4g}, champion {'none' if old is None else f'{old:.4g}'}"
    sentence = f"{figure}: refused, {compared}; {broken}" if broken else f"{figure}: {compared}; within its limits"
    return GuardrailResult(figure, old, new, not broken, sentence, guardrail.asked)


def _broken(guardrail: Guardrail, old: float | None, new: float) -> Iterator[str]:
    """What is wrong with `new`, in words; nothing when it is within all limits."""
    if guardrail.at_least is not None and not new >= guardrail.at_least:
        yield f"it must be at least {guardrail.at_least:g}"
    if guardrail.at_most is not None and not new <= guardrail.at_most:
        yield f"it must be at most {guardrail.at_most:g}"
    if old is None:
        return
    if guardrail.may_fall is not None and not new >= old - guardrail.may_fall * abs(old):
        yield f"it may fall by {guardrail.may_fall:.0%} of the champion's at most"
    if guardrail.may_rise is not None and not new <= old + guardrail.may_rise * abs(old):
        yield f"it may rise by {guardrail.may_rise:.0%} of the champion's at most"
