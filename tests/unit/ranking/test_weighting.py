"""Fixed and uncertainty weighting, against their formulas."""

from __future__ import annotations

import pytest
import torch

from ranking.weighting import make_weighting


def test_fixed_weighting_is_the_weighted_sum() -> None:
    losses = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert float(make_weighting("fixed", [1.0, 0.5], 2)(losses)) == pytest.approx(1 + 1 + 3 + 2)


def test_uncertainty_weighting_settles_where_each_weight_is_one_over_its_loss() -> None:
    """d/ds (e^-s L + s) = 0 at e^s = L."""
    weighting = make_weighting("uncertainty", [1.0, 1.0], 1)
    losses = torch.tensor([[0.2, 3.0]])
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        weighting(losses).backward()
        optimizer.step()
    (log_variance,) = weighting.parameters()
    torch.testing.assert_close(log_variance.exp().detach(), losses, rtol=1e-3, atol=1e-3)
