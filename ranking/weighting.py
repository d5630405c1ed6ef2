"""How task losses become one: fixed weights, or weights learned from each task's uncertainty.

In: losses (M, T), one per ensemble member and task. Out: a scalar. Members never share a parameter, so adding them up trains each
as if it were alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Weighting = Literal["fixed", "uncertainty"]


class FixedWeighting(nn.Module):
    """Σ wₜ Lₜ with the tasks' own weights."""

    weights: Tensor

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(list(weights), dtype=torch.float32))

    def forward(self, losses: Tensor) -> Tensor:
        """(M, T) → ()"""
        return (losses * self.weights).sum()


class UncertaintyWeighting(nn.Module):
    """Σ wₜ (e^(−sₜ) Lₜ + sₜ) with a learned log-variance sₜ per member and task.

    Kendall, Gal and Cipolla 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses" (arXiv:1705.07115), in the log form.
    """

    weights: Tensor

    def __init__(self, weights: Sequence[float], members: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(list(weights), dtype=torch.float32))
        self.log_variance = nn.Parameter(torch.zeros(members, len(weights)))

    def forward(self, losses: Tensor) -> Tensor:
        """(M, T) → ()"""
        return (self.weights * (torch.exp(-self.log_variance) * losses + self.log_variance)).sum()


def make_weighting(kind: Weighting, weights: Sequence[float], members: int) -> nn.Module:
    """The weighting that the settings name."""
    return FixedWeighting(weights) if kind == "fixed" else UncertaintyWeighting(weights, members)
