"""The funnel's arithmetic on slates worked out by hand."""

import numpy as np
import pytest

from tandem.service.funnel import Truth, compare, heavy, main_categories, measure, summarise

CATEGORIES = np.array([[0, -1], [0, 1], [1, -1], [2, -1], [2, -1], [-1, -1]])


def _truth() -> Truth:
    cold = np.zeros(6, bool)
    cold[5] = True
    wanted = (np.array([0, 1]), np.array([5]), np.array([2, 5]))
    return Truth(("r1", "r2", "r3"), ("a", "b", "c"), np.array([9, 2, 90]), wanted, cold, CATEGORIES, ("Drama", None, "Drama"))


SYSTEMS = {"good": np.array([[0, 1, 2], [5, 0, 1], [2, 5, 1]]), "bad": np.array([[2, 3, 4], [0, 1, 2], [3, 4, 2]])}


def test_means_slices_and_coverage() -> None:
    truth = _truth()
    users = measure(truth, SYSTEMS)
    table = {(row["slice"], row["system"]): row for row in summarise(truth, SYSTEMS, users).to_dicts()}
    assert table["all users", "good"]["recall@10"] == 1.0
    assert table["all users", "good"]["ndcg@10"] == pytest.approx(1.0)
    assert table["all users", "bad"]["recall@10"] == pytest.approx(0.5 / 3)
    assert table["all users", "bad"]["ndcg@10"] == pytest.approx((1 / np.log2(4)) / (1 + 1 / np.log2(3)) / 3)
    assert table["cold users", "good"]["users"] == 1
    assert table["cold items", "bad"]["recall@100"] == 0.0
    assert table["cold items", "good"]["users"] == 2
    assert table["heavy users", "good"]["users"] == 1
    assert table["all users", "good"]["coverage@10"] == pytest.approx(4 / 6)


def test_every_request_says_which_slices_it_belongs_to() -> None:
    own = measure(_truth(), SYSTEMS).filter(system="good")
    assert own["cold_user"].to_list() == [False, True, False]
    assert own["cold_item"].to_list() == [False, True, True]
    assert own["cold_share"].to_list() == [0.0, 1.0, 0.5]
    assert own["category"].to_list() == ["Drama", None, "Drama"]


def test_diversity_of_slates_by_hand() -> None:
    """Slate r1 of "good": pairs (0, 1), (0, 2), (1, 2) overlap by 1/2, 0 and 1/2. In r2 only the pair (0, 1) has categories on
    both sides; item 5 has none, and against an item that has some it overlaps in nothing."""
    own = measure(_truth(), SYSTEMS).filter(system="good")
    assert own["ild@10"].to_list() == pytest.approx([2 / 3, (1 + 1 + 1 / 2) / 3, (1 + 1 + 1 / 2) / 3])


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [(list(range(1, 101)), [size > 90 for size in range(1, 101)]), ([5] * 20, [False] * 20), ([], []), ([3], [False])],
)
def test_heavy_users_have_longer_histories_than_nine_in_ten(sizes: list[int], expected: list[bool]) -> None:
    assert heavy(np.array(sizes, np.int64)).tolist() == expected


def test_the_main_category_is_the_most_frequent_of_the_history() -> None:
    histories = [np.array([0, 1, 2, 2]), np.array([3]), np.array([5]), np.array([], np.int64), np.array([0, 2])]
    assert main_categories(histories, CATEGORIES, ["Comedy", "Drama", "War"]) == ("Drama", "War", None, None, "Comedy")


def test_a_category_with_enough_users_is_a_slice_of_the_report() -> None:
    users = 40
    truth = Truth(
        tuple(f"r{each}" for each in range(users)),
        tuple(f"u{each}" for each in range(users)),
        np.arange(users),
        (np.array([1]),) * users,
        np.zeros(6, bool),
        CATEGORIES,
        ("War",) * 31 + ("Drama",) * 9,
    )
    systems = {"towers": np.tile([0, 1, 2], (users, 1))}
    table = {row["slice"]: row for row in summarise(truth, systems, measure(truth, systems)).to_dicts()}
    assert list(table) == ["all users", "cold users", "heavy users", "cold items", "category=War"]
    assert (table["category=War"]["users"], table["heavy users"]["users"], table["cold users"]["users"]) == (31, 4, 5)
    assert table["cold items"]["recall@10"] is None


def test_intervals_are_paired_and_signed() -> None:
    rows = compare(measure(_truth(), SYSTEMS), ("good",), ("bad",), 500, 0).to_dicts()
    recall = next(row for row in rows if row["metric"] == "recall@100")
    assert recall["difference"] == pytest.approx(5 / 6)
    assert recall["low"] <= recall["difference"] <= recall["high"]


def test_padding_is_never_a_hit() -> None:
    users = measure(_truth(), {"empty": np.full((3, 3), -1)})
    assert users["recall@100"].to_list() == [0.0, 0.0, 0.0]
