"""Sampled softmax: what the formula says on numbers small enough to work out by hand, and what logQ is for."""

import numpy as np
import pytest
import torch

from retrieval.loss import sampled_softmax


def test_equals_cross_entropy_without_correction() -> None:
    scores = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
    rows, columns = torch.tensor([0, 1]), torch.tensor([1, 2])
    expected = torch.nn.functional.cross_entropy(scores, columns)
    assert torch.isclose(sampled_softmax(scores, torch.zeros(3), rows, columns), expected)


def test_by_hand_with_logq() -> None:
    scores, log_expected = torch.zeros(1, 2), torch.log(torch.tensor([1.0, 0.25]))
    loss = sampled_softmax(scores, log_expected, torch.tensor([0]), torch.tensor([1]))
    assert float(loss) == pytest.approx(-np.log(4 / 5), rel=1e-6)


def test_hidden_candidates_take_no_probability() -> None:
    hidden = torch.tensor([[True, False, False]])
    loss = sampled_softmax(torch.tensor([[50.0, 0.0, 0.0]]), torch.zeros(3), torch.tensor([0]), torch.tensor([1]), hidden)
    assert float(loss) == pytest.approx(np.log(2), rel=1e-5)


def test_a_row_with_many_targets_weighs_as_the_root_of_their_number() -> None:
    loss = sampled_softmax(torch.zeros(1, 4), torch.zeros(4), torch.zeros(4, dtype=torch.long), torch.arange(4))
    assert float(loss) == pytest.approx(np.log(4) * 2, rel=1e-6)


def test_logq_recovers_the_full_softmax_where_raw_in_batch_does_not() -> None:
    """Popular candidates are drawn more often; with the correction the fitted probabilities are the true ones all the same."""
    random = np.random.default_rng(0)
    share = np.array([0.6, 0.25, 0.1, 0.05])
    fitted = {}
    for corrected in (True, False):
        logits = torch.zeros(4, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.02)
        for _ in range(1500):
            positives = random.choice(4, 3, p=share)
            items = np.unique(positives)
            expected = np.log(-np.expm1(3 * np.log1p(-share[items])))
            log_expected = torch.tensor(expected if corrected else np.zeros(len(items)), dtype=torch.float32)
            columns = torch.from_numpy(np.searchsorted(items, positives))
            loss = sampled_softmax(logits[items].expand(3, -1), log_expected, torch.arange(3), columns)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        fitted[corrected] = torch.softmax(logits, 0).detach().numpy()
    assert np.abs(fitted[True] - share).max() < 0.5 * np.abs(fitted[False] - share).max()
