"""Diversity, rules and exploration."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ranking.rerank import apply_rules, at_most_per_key, by_score, demote, explore, frequency_cap, jaccard, mmr, pin
from tandem.core.errors import InputError

SCORES = hnp.arrays(np.float32, st.integers(0, 25), elements=st.floats(-100, 100, width=32))


def codes(n: int, seed: int) -> np.ndarray:
    rows = np.tile(np.arange(4), (n, 1))
    return np.where(np.random.default_rng(seed).random((n, 4)) < 0.5, rows, -1)


@settings(max_examples=80, deadline=None)
@given(SCORES, st.integers(0, 1000), st.floats(0, 1), st.integers(1, 30))
def test_mmr_gives_k_different_candidates_and_starts_with_the_best(
    scores: np.ndarray, seed: int, diversity: float, k: int
) -> None:
    order = mmr(scores, codes(len(scores), seed), diversity, k)
    assert len(order) == min(k, len(scores)) == len(set(order.tolist()))
    assert all(0 <= one < len(scores) for one in order)
    if len(order) and diversity < 1:
        assert order[0] == by_score(scores)[0]


@settings(max_examples=50, deadline=None)
@given(SCORES, st.integers(0, 1000), st.integers(1, 30))
def test_no_diversity_is_the_score_order(scores: np.ndarray, seed: int, k: int) -> None:
    order = mmr(scores, codes(len(scores), seed), 0.0, k)
    assert order.tolist() == sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


@settings(max_examples=50, deadline=None)
@given(SCORES, st.integers(0, 1000), st.floats(0, 1))
def test_mmr_agrees_with_its_definition(scores: np.ndarray, seed: int, diversity: float) -> None:
    """Slot by slot, nobody left had a higher marginal relevance than the one taken."""
    categories = codes(len(scores), seed)
    order = mmr(scores, categories, diversity, 10).tolist()
    wide = scores.astype(np.float64)
    span = np.ptp(wide) if len(wide) else 0.0
    relevance = (wide - wide.min()) / span if span else np.zeros(len(scores))

    def overlap(a: int, b: int) -> float:
        left, right = set(categories[a]) - {-1}, set(categories[b]) - {-1}
        return len(left & right) / len(left | right) if left | right else 0.0

    for slot, taken in enumerate(order):
        value = {
            one: (1 - diversity) * relevance[one] - diversity * max((overlap(one, other) for other in order[:slot]), default=0.0)
            for one in range(len(scores))
            if one not in order[:slot]
        }
        assert value[taken] >= max(value.values()) - 1e-9


def test_diversity_brings_in_the_other_category() -> None:
    scores = np.array([1.0, 0.9, 0.8, 0.0, 0.3], np.float32)
    categories = np.array([[0], [0], [0], [1], [1]])
    assert mmr(scores, categories, 0.0, 3).tolist() == [0, 1, 2]
    assert mmr(scores, categories, 0.5, 3).tolist() == [0, 4, 1]
    with pytest.raises(InputError, match=r"diversity = 1\.5"):
        mmr(scores, categories, 1.5, 3)


def test_jaccard_by_hand() -> None:
    table = np.array([[0, 1, -1], [2, -1, -1], [-1, -1, -1], [1, 0, 2]])
    np.testing.assert_allclose(jaccard(table, table[0]), [1, 0, 0, 2 / 3])
    assert jaccard(table, table[2]).tolist() == [0, 0, 0, 0]


def test_rules_move_and_never_lose() -> None:
    order = np.array([5, 4, 3, 2, 1, 0])
    keys = np.array([7, 7, 8, 7, 7, -1])
    assert at_most_per_key(keys, 2)(order).tolist() == [5, 4, 3, 2, 1, 0]
    assert at_most_per_key(keys, 1)(order).tolist() == [5, 4, 2, 3, 1, 0]
    assert frequency_cap(np.array([0, 3, 0, 9, 0, 0]), 3)(order).tolist() == [5, 4, 2, 0, 3, 1]
    assert pin(1, 0)(order).tolist() == [1, 5, 4, 3, 2, 0]
    assert pin(9, 0)(order).tolist() == order.tolist()
    rules = [demote(np.arange(6) == 5), pin(0, 1)]
    assert apply_rules(order, rules).tolist() == [4, 0, 3, 2, 1, 5]
    with pytest.raises(InputError, match="limit = 0"):
        at_most_per_key(keys, 0)


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(12)), st.lists(st.integers(-1, 3), min_size=12, max_size=12), st.integers(1, 4))
def test_at_most_per_key_keeps_the_limit_before_any_surplus(order: list[int], keys: list[int], limit: int) -> None:
    found = at_most_per_key(np.array(keys), limit)(np.array(order))
    assert sorted(found.tolist()) == list(range(12))
    seen: dict[int, int] = {}
    expected_head = []
    for one in order:
        seen[keys[one]] = seen.get(keys[one], 0) + 1
        if keys[one] < 0 or seen[keys[one]] <= limit:
            expected_head.append(one)
    assert found[: len(expected_head)].tolist() == expected_head


def test_logged_propensities_are_the_frequencies_with_which_candidates_stand_there() -> None:
    order, k, epsilon, slot, draws = np.array([3, 1, 4, 0, 5, 2]), 3, 0.4, 1, 6000
    rng = np.random.default_rng(0)
    counts = np.zeros(6)
    logged = np.full(6, np.nan)
    for _ in range(draws):
        one = explore(order, k, epsilon, slot, rng)
        assert one.order[[0, 2]].tolist() == [3, 4]
        assert one.propensity[[0, 2]].tolist() == [1.0, 1.0]
        counts[one.order[slot]] += 1
        logged[one.order[slot]] = one.propensity[slot]
    seen = counts > 0
    assert np.flatnonzero(seen).tolist() == [0, 1, 2, 5]
    assert logged[seen].sum() == pytest.approx(1.0)
    np.testing.assert_allclose(counts[seen] / draws, logged[seen], atol=4 * np.sqrt(0.25 / draws))


def test_inverse_propensity_weighting_of_the_log_is_unbiased() -> None:
    """Mean of value · 1[item] / propensity over the log estimates each item's value at the slot."""
    order, rng = np.arange(5), np.random.default_rng(1)
    value = np.array([0.1, 0.9, 0.4, 0.7, 0.2])
    estimate = np.zeros(5)
    for _ in range(8000):
        one = explore(order, 2, 0.3, 1, rng)
        estimate[one.order[1]] += value[one.order[1]] / one.propensity[1] / 8000
    np.testing.assert_allclose(estimate[1:], value[1:], rtol=0.15)


@pytest.mark.parametrize(("k", "slot", "epsilon"), [(3, 5, 1.0), (6, 2, 1.0), (3, 1, 0.0)])
def test_nothing_is_explored_without_a_pool_a_slot_or_a_chance(k: int, slot: int, epsilon: float) -> None:
    found = explore(np.arange(6), k, epsilon, slot, np.random.default_rng(0))
    assert found.order.tolist() == list(range(k))
    assert found.propensity.tolist() == [1.0] * k
    assert not found.swapped
