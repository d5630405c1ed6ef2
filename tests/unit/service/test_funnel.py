"""The funnel's arithmetic on slates worked out by hand."""

import numpy as np
import pytest

from tandem.service.funnel import Truth, compare, measure, summarise


def _truth() -> Truth:
    cold = np.zeros(6, bool)
    cold[5] = True
    wanted = (np.array([0, 1]), np.array([5]), np.array([2]))
    return Truth(("r1", "r2", "r3"), ("a", "b", "c"), np.array([9, 2, 9]), wanted, cold, 6)


SYSTEMS = {"good": np.array([[0, 1, 2], [5, 0, 1], [2, 0, 1]]), "bad": np.array([[2, 3, 4], [0, 1, 2], [3, 4, 2]])}


def test_means_slices_and_coverage() -> None:
    truth = _truth()
    users = measure(truth, SYSTEMS)
    table = {(row["slice"], row["system"]): row for row in summarise(truth, SYSTEMS, users).to_dicts()}
    assert table["all users", "good"]["recall@10"] == 1.0
    assert table["all users", "good"]["ndcg@10"] == pytest.approx(1.0)
    assert table["all users", "bad"]["recall@10"] == pytest.approx(1 / 3)
    assert table["all users", "bad"]["ndcg@10"] == pytest.approx((1 / np.log2(4)) / 3)
    assert table["cold users", "good"]["users"] == 1
    assert table["cold items", "bad"]["recall@100"] == 0.0
    assert table["cold items", "good"]["users"] == 1
    assert table["all users", "good"]["coverage@10"] == pytest.approx(4 / 6)


def test_intervals_are_paired_and_signed() -> None:
    rows = compare(measure(_truth(), SYSTEMS), ("good",), ("bad",), 500, 0).to_dicts()
    recall = next(row for row in rows if row["metric"] == "recall@100")
    assert recall["difference"] == pytest.approx(2 / 3)
    assert recall["low"] <= recall["difference"] <= recall["high"]


def test_padding_is_never_a_hit() -> None:
    users = measure(_truth(), {"empty": np.full((3, 3), -1)})
    assert users["recall@100"].to_list() == [0.0, 0.0, 0.0]
