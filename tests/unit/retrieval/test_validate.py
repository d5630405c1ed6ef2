"""What held-out users were to be shown, by hand."""

import numpy as np
import torch

from retrieval.batches import Histories, cut_places
from retrieval.validate import Questions


def _histories(exclude_seen: bool) -> Histories:
    sequences = [np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 0]), np.array([5, 6])]
    moments = [np.array([0, 1, 2, 3, 4, 5, 6, 6, 8, 9]), np.array([1, 1])]
    positive = [np.ones(10, bool), np.ones(2, bool)]
    return Histories(sequences, positive, [cut_places(each) for each in moments], exclude_seen).usable()


def test_a_long_horizon_asks_once_and_for_everything_that_follows() -> None:
    questions = Questions.of(_histories(exclude_seen=False), 50, 10)
    assert [past.tolist() for past in questions.pasts] == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert [wanted.tolist() for wanted in questions.wanted] == [[0, 8]]


def test_a_horizon_of_one_asks_at_every_later_moment() -> None:
    questions = Questions.of(_histories(exclude_seen=True), 1, 10)
    assert [wanted.tolist() for wanted in questions.wanted] == [[8]]  # the last event repeats item 0, which is no answer
    assert len(Questions.of(_histories(exclude_seen=False), 1, 10).wanted) == 2
    assert len(Questions.of(_histories(exclude_seen=False), 1, 1).wanted) == 1


def test_recall_and_ndcg_by_hand() -> None:
    """One wanted item in second place: recall 1, NDCG 1 / log2(3); seen items take no place."""
    questions = Questions([np.array([0])], [np.array([2])], exclude_seen=True)
    quality = questions.judge(lambda pasts: torch.tensor([[9.0, 3.0, 2.0, 1.0]]))
    assert quality.recall == 1.0
    assert np.isclose(quality.ndcg, 1 / np.log2(3))


def test_no_question_is_no_quality() -> None:
    quality = Questions([], [], exclude_seen=True).judge(lambda pasts: torch.zeros(0, 4))
    assert (quality.recall, quality.ndcg) == (0.0, 0.0)
