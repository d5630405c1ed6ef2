"""The report's pure parts: who did what in which arm, and how alike two slates are."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

from feature_repo.served import SERVED, join_events
from tandem.core.schema import EVENTS, Task
from tandem.service.experiment import compare_slates, contrasts, overlap, per_user, rank_biased_overlap

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
TASKS = {"click": Task("click", "click").matches().fill_null(False), "like": Task("like", "rate", 4.0).matches().fill_null(False)}


def slate(request: str, unit: str, arm: str, items: str, score: float = 1.0) -> pl.DataFrame:
    rows = [
        {"request_id": request, "user_id": unit, "item_id": item, "position": place + 1, "score": score, "timestamp": NOON,
         "arm": arm, "unit": unit}
        for place, item in enumerate(items)
    ]  # fmt: skip
    return pl.DataFrame(rows, schema_overrides=SERVED)


def event(number: int, request: str, user: str, item: str, action: str, value: float | None = None) -> dict[str, object]:
    return {"event_id": f"e{number}", "user_id": user, "item_id": item, "action": action, "value": value, "timestamp": NOON,
            "request_id": request}  # fmt: skip


def test_each_slate_counts_once_per_task_and_each_user_is_one_row() -> None:
    served = pl.concat(
        [slate("q1", "ann", "champion", "ab"), slate("q2", "ann", "champion", "bc"), slate("q3", "bob", "challenger", "ab")]
    )
    happened = [
        event(1, "q1", "ann", "a", "click"), event(2, "q1", "ann", "b", "click"), event(3, "q3", "bob", "a", "rate", 5.0),
        event(4, "q3", "bob", "b", "rate", 2.0), event(5, "q9", "bob", "a", "click"),
    ]  # fmt: skip
    joined = join_events(served, pl.DataFrame(happened, schema_overrides=EVENTS))
    users = per_user(joined.sample(fraction=1, shuffle=True, seed=1), TASKS)
    assert users.select("unit", "arm", "slates", "click", "like").rows() == [
        ("ann", "champion", 2, 1, 0),
        ("bob", "challenger", 1, 0, 1),
    ]


def test_contrasts_are_per_slate_and_per_user() -> None:
    users = pl.DataFrame(
        {
            "unit": ["a", "b", "c", "d"],
            "arm": ["champion", "champion", "challenger", "challenger"],
            "slates": [4, 2, 1, 3],
            "click": [1, 0, 1, 2],
        }
    )
    found = contrasts(users, ["click"])
    assert set(found) == {"click/slate", "click/user", "slates/user"}
    assert (found["click/slate"].mean_a, found["click/slate"].mean_b) == pytest.approx((1 / 6, 3 / 4))
    assert (found["click/user"].mean_a, found["click/user"].mean_b) == (0.5, 1.0)
    assert (found["slates/user"].mean_a, found["slates/user"].mean_b) == (3, 2)


def test_one_user_in_an_arm_is_not_compared() -> None:
    users = pl.DataFrame({"unit": ["a", "b"], "arm": ["champion", "challenger"], "slates": [1, 1], "click": [1, 0]})
    assert contrasts(users, ["click"]) == {}


def test_overlap_and_agreement_at_their_ends() -> None:
    letters = "abcdefghij"
    assert (overlap(letters, letters), rank_biased_overlap(letters, letters)) == (1, pytest.approx(1))
    assert (overlap("abc", "xyz"), rank_biased_overlap("abc", "xyz")) == (0, 0)
    assert (overlap("abcd", "cdab"), overlap("ab", "abcd")) == (1, 0.5)


def test_agreement_is_the_formula_of_its_paper() -> None:
    """RBO_ext = X_k/k p^k + (1-p)/p * sum of X_d/d p^d, with X_d the number of items that both have among their first d."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (rng.permutation(15)[:10].astype(str).tolist() for _ in range(2))
        common = [len(set(a[:d]) & set(b[:d])) for d in range(1, 11)]
        expected = common[-1] / 10 * 0.9**10 + 0.1 / 0.9 * sum(x / d * 0.9**d for d, x in enumerate(common, 1))
        assert rank_biased_overlap(a, b) == pytest.approx(expected)


def test_agreement_weighs_the_top_most() -> None:
    assert rank_biased_overlap("abcdefghij", "bacdefghij") < rank_biased_overlap("abcdefghij", "abcdefghji")


def test_slates_are_compared_request_by_request() -> None:
    champion = pl.concat([slate("q1", "ann", "champion", "abcd", 2.0), slate("q2", "bob", "champion", "abcd", 2.0)])
    challenger = pl.concat([slate("q1", "ann", "challenger", "abcd", 3.0), slate("q3", "eve", "challenger", "wxyz")])
    found = compare_slates(champion.sample(fraction=1, shuffle=True, seed=1), challenger)
    assert found is not None
    assert (found.requests, found.overlap, found.agreement, found.same_first) == (1, 1, pytest.approx(1), 1)
    assert found.scores == {"champion": 2.0, "challenger": 3.0}
    assert compare_slates(champion, slate("q7", "ann", "challenger", "ab")) is None
