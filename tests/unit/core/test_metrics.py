"""Metrics against hand-made lists, ranx and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from ranx import Qrels, Run, evaluate
from sklearn.metrics import roc_auc_score

from tandem.core.errors import InputError
from tandem.core.metrics import (
    auc,
    coverage_at_k,
    expected_calibration_error,
    hit_matrix,
    hit_rate_at_k,
    ild_at_k,
    mrr_at_k,
    ndcg_at_k,
    recall_at_k,
    truth_sizes,
)

RANKED = np.array([[3, 1, 4, -1], [0, 2, 5, 6], [7, 8, 9, 1], [1, 2, 3, 4]])
TRUTH = [np.array([4, 9]), np.array([0]), np.array([2]), np.array([], dtype=np.int64)]


def world(seed: int, users: int = 40, items: int = 60, k: int = 20) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    rng = np.random.default_rng(seed)
    ranked = np.stack([rng.permutation(items)[:k] for _ in range(users)])
    return ranked, [rng.choice(items, rng.integers(1, 12), replace=False) for _ in range(users)]


def test_hits_are_where_a_users_own_truth_stands() -> None:
    expected = [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert np.array_equal(hit_matrix(RANKED, TRUTH), np.array(expected, bool))


def test_padding_never_hits_even_beside_another_users_largest_id() -> None:
    """Row keys are id + user * span: a -1 of user 1 would otherwise be the last id of user 0."""
    ranked = np.array([[0], [-1]])
    assert not hit_matrix(ranked, [np.array([9]), np.array([9])]).any()


def test_metrics_by_hand() -> None:
    hits, sizes = hit_matrix(RANKED, TRUTH), truth_sizes(TRUTH)
    assert recall_at_k(hits, sizes, 3)[:3].tolist() == [0.5, 1.0, 0.0]
    assert recall_at_k(hits, sizes, 1)[:3].tolist() == [0.0, 1.0, 0.0]
    assert mrr_at_k(hits, sizes, 3)[:3].tolist() == [1 / 3, 1.0, 0.0]
    assert hit_rate_at_k(hits, sizes, 2)[:3].tolist() == [0.0, 1.0, 0.0]
    ideal = 1 + 1 / math.log2(3)
    assert ndcg_at_k(hits, sizes, 3)[:3] == pytest.approx([0.5 / ideal, 1.0, 0.0])


def test_a_user_without_truth_has_no_metric() -> None:
    hits, sizes = hit_matrix(RANKED, TRUTH), truth_sizes(TRUTH)
    for metric in (recall_at_k, ndcg_at_k, hit_rate_at_k, mrr_at_k):
        assert np.isnan(metric(hits, sizes, 2)).tolist() == [False, False, False, True]


def test_recall_is_one_when_all_k_hit_although_truth_is_larger() -> None:
    hits = hit_matrix(np.array([[1, 2]]), [np.arange(50)])
    assert recall_at_k(hits, np.array([50]), 2).tolist() == [1.0]
    assert ndcg_at_k(hits, np.array([50]), 2).tolist() == [1.0]


def test_lists_shorter_than_k_are_judged_at_k() -> None:
    hits, sizes = hit_matrix(np.array([[1]]), [np.array([1, 2, 3])]), np.array([3])
    assert recall_at_k(hits, sizes, 10).tolist() == [1 / 3]
    assert ndcg_at_k(hits, sizes, 10)[0] == pytest.approx(1 / (1 + 1 / math.log2(3) + 0.5))


def test_no_users_and_no_columns() -> None:
    nobody, nothing = np.zeros((0, 5), np.int64), np.zeros((2, 0), np.int64)
    assert hit_matrix(nobody, []).shape == (0, 5)
    hits = hit_matrix(nothing, [np.array([1]), np.array([], np.int64)])
    for metric in (recall_at_k, ndcg_at_k, hit_rate_at_k, mrr_at_k):
        assert np.array_equal(metric(hits, np.array([1, 0]), 3), [0.0, np.nan], equal_nan=True)


def test_truth_counts_an_item_once() -> None:
    assert truth_sizes([np.array([5, 5, 6]), np.array([], np.int64)]).tolist() == [2, 0]


@pytest.mark.parametrize("k", [1, 5, 20])
def test_ndcg_hit_rate_and_reciprocal_rank_agree_with_ranx(k: int) -> None:
    ranked, truth = world(k)
    hits, sizes = hit_matrix(ranked, truth), truth_sizes(truth)
    qrels = Qrels({f"{user:03d}": {str(item): 1 for item in items} for user, items in enumerate(truth)})
    run = Run({f"{user:03d}": {str(item): float(-rank) for rank, item in enumerate(row)} for user, row in enumerate(ranked)})
    names = [f"ndcg@{k}", f"hit_rate@{k}", f"mrr@{k}", f"hits@{k}"]
    judged = evaluate(qrels, run, names, return_mean=False)
    assert ndcg_at_k(hits, sizes, k) == pytest.approx(judged[names[0]])
    assert hit_rate_at_k(hits, sizes, k) == pytest.approx(judged[names[1]])
    assert mrr_at_k(hits, sizes, k) == pytest.approx(judged[names[2]])
    assert recall_at_k(hits, sizes, k) == pytest.approx(judged[names[3]] / np.minimum(sizes, k))


def test_coverage_counts_distinct_items_in_the_first_k() -> None:
    ranked = np.array([[0, 1, 2], [1, 0, -1]])
    assert coverage_at_k(ranked, 2, items=8) == 0.25
    assert coverage_at_k(ranked, 3, items=8) == 0.375
    assert math.isnan(coverage_at_k(ranked, 3, items=0))


def test_intra_list_diversity_by_hand() -> None:
    """Items 0 and 1 share one of three categories, 0 and 2 none, 3 and 4 have none at all."""
    categories = np.array([[0, 1, -1], [1, 2, -1], [3, -1, -1], [-1, -1, -1], [-1, -1, -1]])
    ranked = np.array([[0, 1, 2, -1], [0, 2, 3, -1], [3, 4, -1, -1], [0, -1, -1, -1], [0, 1, 2, 2]])
    found = ild_at_k(ranked, categories, 3)
    assert found[:2] == pytest.approx([(2 / 3 + 1 + 1) / 3, 1.0])
    assert np.isnan(found[2:4]).all()
    assert found[4] == found[0], "the fourth place is behind k"
    assert ild_at_k(ranked, categories, 2)[0] == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="k = 0"):
        ild_at_k(ranked, categories, 0)


@given(hnp.arrays(np.int64, (6, 3), elements=st.integers(-1, 4)), st.permutations(range(6)))
def test_intra_list_diversity_is_a_mean_over_pairs_of_sets(codes: NDArray[np.int64], order: list[int]) -> None:
    """Against Python sets, pair by pair; the order within the first k changes nothing."""
    rows = [sorted(set(row) - {-1}) for row in codes.tolist()]
    categories = np.array([row + [-1] * (3 - len(row)) for row in rows])
    pairs = [(set(rows[a]), set(rows[b])) for a in range(6) for b in range(a) if rows[a] or rows[b]]
    expected = np.mean([1 - len(a & b) / len(a | b) for a, b in pairs]) if pairs else np.nan
    assert ild_at_k(np.array([order]), categories, 6)[0] == pytest.approx(expected, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.int64, st.integers(2, 60), elements=st.integers(0, 6)))
def test_auc_agrees_with_scikit_learn_ties_included(scores: NDArray[np.int64]) -> None:
    labels = np.arange(len(scores)) % 3 == 0
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))


def test_auc_of_one_class_is_not_a_number() -> None:
    assert math.isnan(auc([0.1, 0.2], [1, 1]))
    assert math.isnan(auc([0.1, 0.2], [0, 0]))
    assert math.isnan(auc([], []))


def test_calibration_error_by_hand() -> None:
    """Two bins of two: predicted 0.2 against 0.5 observed, and 0.9 against 1.0."""
    error = expected_calibration_error([0.1, 0.3, 0.8, 1.0], [0, 1, 1, 1], bins=2)
    assert error == pytest.approx((0.3 * 2 + 0.1 * 2) / 4)


def test_a_calibrated_model_has_a_small_error_and_a_biased_one_its_bias() -> None:
    rng = np.random.default_rng(1)
    truth = rng.uniform(0.2, 0.6, 200_000)
    labels = rng.random(200_000) < truth
    assert expected_calibration_error(truth, labels) < 0.006
    assert expected_calibration_error(truth + 0.1, labels) == pytest.approx(0.1, abs=0.006)


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.int64, 40, elements=st.integers(0, 4)), st.permutations(range(40)))
def test_calibration_error_does_not_depend_on_the_order_of_rows(tenths: NDArray[np.int64], order: list[int]) -> None:
    probabilities, labels = tenths / 10, np.arange(40) % 4 == 0
    shuffled = expected_calibration_error(probabilities[order], labels[order])
    assert shuffled == pytest.approx(expected_calibration_error(probabilities, labels), abs=1e-12)


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="k = 0"):
        recall_at_k(np.zeros((1, 3), bool), np.array([1]), 0)
    with pytest.raises(InputError, match="truth for 1 users"):
        hit_matrix(RANKED, [np.array([1])])
    with pytest.raises(InputError, match="1 of 2 scores are NaN"):
        auc([0.1, float("nan")], [0, 1])
    with pytest.raises(InputError, match="one score per label"):
        expected_calibration_error([0.1, 0.2], [1])
