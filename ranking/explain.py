"""Why an item stands where it stands: one sentence for people, numbers per feature group for engineers.

In: what is known about one item and one request (`Evidence`), or feature rows. Out: a `Reason`, or contributions to the score.
Reasons are evidence that is true of the item, chosen by strength; they do not claim to be the model's inner workings. For those,
`contributions` takes one group of features away at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ranking.batches import Floats, Groups, Ints, aligned
from ranking.ranker import Ranker
from tandem.core.errors import InputError

ReasonCode = Literal["similar_to", "matches_query", "popular_now", "new", "category", "for_you"]


@dataclass(frozen=True)
class Evidence:
    """What can be said for one item; None = not known.

    `similar_title`, `similarity`: the history item nearest to it and their cosine. `query_similarity`: cosine to the query's
    words. `popularity`: share of the catalogue that is less popular now, 0..1. `age_days`: since it became available.
    `category`, `category_share`: its category that the user follows most, and that category's share of the user's history, 0..1.
    """

    similar_title: str | None = None
    similarity: float | None = None
    query_similarity: float | None = None
    popularity: float | None = None
    age_days: float | None = None
    category: str | None = None
    category_share: float | None = None


@dataclass(frozen=True)
class ReasonRules:
    """Where evidence starts to count. Strength runs from 0 there to 1 at the strongest possible value."""

    similarity: float = 0.5
    query_similarity: float = 0.3
    popularity: float = 0.95
    new_days: float = 14.0
    category_share: float = 0.2


@dataclass(frozen=True)
class Reason:
    """A code for programs, a sentence for people, and how strong the evidence is, 0..1."""

    code: ReasonCode
    sentence: str
    strength: float


def reason(evidence: Evidence, rules: ReasonRules | None = None) -> Reason:
    """The strongest evidence; among equals the earlier of: query, similar item, category, popular, new. Else "for you"."""
    rules = rules or ReasonRules()
    found = [
        _matches_query(evidence, rules),
        _similar_to(evidence, rules),
        _category(evidence, rules),
        _popular(evidence, rules),
        _new(evidence, rules),
    ]
    given = [one for one in found if one is not None]
    return max(given, key=lambda one: one.strength, default=Reason("for_you", "Picked for you", 0.0))


def contributions(
    ranker: Ranker,
    features: Floats,
    names: Sequence[str],
    groups: Mapping[str, Sequence[str]] | None = None,
    request: Ints | None = None,
) -> dict[str, Floats]:
    """group → (P,) float32: the score minus the score without that group (occlusion).

    "Without" means that all model inputs made from the group's columns (standardised, flags, copies within the request, and the
    residual for the base) stand at 0, the middle of the training data. `groups` name raw columns (default: each column alone);
    pass a request's whole candidate list, because within-request inputs need it. Contributions do not add up to the score where
    features interact. Raises InputError for a column that the ranker does not have.
    """
    groups = groups if groups is not None else {name: (name,) for name in ranker.names}
    unknown = sorted({name for columns in groups.values() for name in columns} - set(ranker.names))
    if unknown:
        raise InputError(f"feature groups name columns {unknown} that the ranker does not have; it has {list(ranker.names)}")
    rows = aligned(features, names, ranker.names)
    base, inputs = ranker.transform(rows, Groups.single(len(rows)) if request is None else Groups.of(request))
    whole = _score(ranker, base, inputs)
    return {group: whole - _score(ranker, *_without(ranker, base, inputs, columns)) for group, columns in groups.items()}


def _without(ranker: Ranker, base: Floats, inputs: Floats, columns: Sequence[str]) -> tuple[Floats, Floats]:
    gone = np.isin(ranker.transform.sources, list(columns))
    return (np.zeros_like(base) if ranker.transform.base in columns else base), np.where(gone, np.float32(0.0), inputs)


def _score(ranker: Ranker, base: Floats, inputs: Floats) -> Floats:
    return ranker.utility.of_logits(ranker.calibrated(ranker.logits_of_inputs(base, inputs)))


def _strength(value: float | None, start: float, end: float = 1.0) -> float | None:
    """0 at `start` to 1 at `end`; None when the value is unknown, NaN or does not reach `start`."""
    if value is None or not value >= start:
        return None
    return min((value - start) / max(end - start, 1e-9), 1.0)


def _matches_query(evidence: Evidence, rules: ReasonRules) -> Reason | None:
    strength = _strength(evidence.query_similarity, rules.query_similarity)
    return None if strength is None else Reason("matches_query", "Close to your words", strength)


def _similar_to(evidence: Evidence, rules: ReasonRules) -> Reason | None:
    strength = _strength(evidence.similarity, rules.similarity)
    if strength is None or not evidence.similar_title:
        return None
    return Reason("similar_to", f"Because you liked “{evidence.similar_title}”", strength)


def _category(evidence: Evidence, rules: ReasonRules) -> Reason | None:
    strength = _strength(evidence.category_share, rules.category_share)
    if strength is None or not evidence.category:
        return None
    return Reason("category", f"More in {evidence.category}, which you follow", strength)


def _popular(evidence: Evidence, rules: ReasonRules) -> Reason | None:
    """Half as strong as it seems: it would be said of the same items to everybody."""
    strength = _strength(evidence.popularity, rules.popularity)
    return None if strength is None else Reason("popular_now", "Popular now", 0.5 * strength)


def _new(evidence: Evidence, rules: ReasonRules) -> Reason | None:
    age = evidence.age_days
    strength = _strength(None if age is None or age < 0 else rules.new_days - age, 0.0, rules.new_days)
    return None if strength is None else Reason("new", "New here", strength)
