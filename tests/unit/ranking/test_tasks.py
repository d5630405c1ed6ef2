"""Tasks: what is refused, what can be learned, and the chain of conditions."""

from __future__ import annotations

import numpy as np
import pytest

from ranking.tasks import NO_PARENT, RankingTask, base_rate, check_tasks, learnable, parents
from tandem.core.errors import InputError

CHAIN = (RankingTask("click"), RankingTask("like", given="click"), RankingTask("purchase", given="like"))


@pytest.mark.parametrize(
    ("tasks", "positive", "message"),
    [
        (CHAIN, "view", "positive = 'view'"),
        ((CHAIN[0], CHAIN[0]), "click", "repeat"),
        ((CHAIN[1], CHAIN[0]), "click", "does not come before it"),
        ((RankingTask("click", weight=-1),), "click", "weight -1"),
    ],
)
def test_bad_tasks_are_refused(tasks: tuple[RankingTask, ...], positive: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_tasks(tasks, positive)


def test_a_task_needs_both_labels_to_be_learned_and_loses_a_parent_that_is_not() -> None:
    labels = {
        "click": np.array([0, 1], np.float32),
        "like": np.array([0, np.nan], np.float32),
        "purchase": np.array([1, 0], np.float32),
    }
    assert learnable(CHAIN, labels) == ("click", "purchase")
    assert parents(CHAIN, ("click", "like", "purchase")) == (NO_PARENT, 0, 1)
    assert parents(CHAIN, ("click", "purchase")) == (NO_PARENT, NO_PARENT)


def test_base_rate_is_smoothed_weighted_and_skips_unknown_labels() -> None:
    labels = np.array([1, 0, np.nan, 0], np.float32)
    assert base_rate(labels) == pytest.approx(1.5 / 4)
    assert base_rate(labels, np.array([1, 5, 9, 5], np.float32)) == pytest.approx(1.5 / 12)
    assert 0 < base_rate(np.zeros(100, np.float32)) < 0.01
