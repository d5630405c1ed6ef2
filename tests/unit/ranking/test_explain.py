"""Reasons by strength, and contributions that point at what matters."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ranking.batches import Examples
from ranking.explain import Evidence, ReasonRules, contributions, reason
from ranking.ranker import Ranker
from tandem.core.errors import InputError


@pytest.mark.parametrize(
    ("evidence", "code", "words"),
    [
        (Evidence(similar_title="Heat", similarity=0.9, popularity=0.96), "similar_to", "Because you liked “Heat”"),
        (Evidence(similar_title="Heat", similarity=0.55, popularity=0.999), "popular_now", "Popular now"),
        (Evidence(query_similarity=0.9, similarity=0.6, similar_title="Heat"), "matches_query", "Close to your words"),
        (Evidence(age_days=1.0, category="Crime", category_share=0.3), "new", "New here"),
        (Evidence(age_days=13.0, category="Crime", category_share=0.7), "category", "More in Crime, which you follow"),
    ],
)
def test_the_strongest_evidence_speaks(evidence: Evidence, code: str, words: str) -> None:
    found = reason(evidence)
    assert (found.code, found.sentence) == (code, words)
    assert 0.0 < found.strength <= 1.0


@pytest.mark.parametrize(
    "evidence",
    [
        Evidence(),
        Evidence(similarity=0.99),
        Evidence(similar_title="Heat", similarity=0.2, query_similarity=0.1, popularity=0.5, age_days=90.0),
        Evidence(similar_title="Heat", similarity=float("nan"), popularity=float("nan"), age_days=float("nan")),
        Evidence(age_days=-3.0),
        Evidence(category_share=0.9),
    ],
)
def test_weak_partial_and_missing_evidence_says_nothing_untrue(evidence: Evidence) -> None:
    assert reason(evidence).code == "for_you"


def test_rules_move_the_thresholds_and_equals_go_to_the_earlier() -> None:
    popular = Evidence(popularity=0.6)
    assert reason(popular).code == "for_you"
    assert reason(popular, ReasonRules(popularity=0.5)).code == "popular_now"
    assert reason(Evidence(query_similarity=1.0, similar_title="Heat", similarity=1.0, popularity=1.0)).code == "matches_query"


def test_contributions_find_the_features_that_drive_the_score(trained: Ranker, make_world: Callable[..., Examples]) -> None:
    world = make_world(5, 7)
    found = contributions(trained, world.features, world.names, request=world.request)
    spread = {name: float(np.std(values)) for name, values in found.items()}
    assert min(spread["hidden"], spread["tower_score"]) > 3 * max(spread["noise"], spread["gap"])
    assert np.corrcoef(found["hidden"], np.log(world.features[:, 1]))[0, 1] > 0.9


def test_groups_are_taken_away_together_and_all_together_leave_a_constant(
    trained: Ranker, make_world: Callable[..., Examples]
) -> None:
    world = make_world(2, 7)
    groups = {"everything": world.names, "nothing": ()}
    found = contributions(trained, world.features, world.names, groups, world.request)
    score = trained.score(world.features, world.names, world.request)
    assert np.ptp(score - found["everything"]) < 1e-4
    assert found["nothing"].tolist() == [0.0] * len(world)
    with pytest.raises(InputError, match=r"\['colour'\]"):
        contributions(trained, world.features, world.names, {"look": ("colour",)})
