"""Sampled softmax with the logQ correction: what a user did next, against a sample of what they did not."""

from __future__ import annotations

import torch
from torch.nn import functional


def sampled_softmax(
    scores: torch.Tensor,
    log_expected: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean multinomial negative log-likelihood of each row's targets; a scalar.

    `scores` (B, C): user by candidate. `log_expected` (C,): log of the expected number of times a candidate is in the
    sample; subtracting it keeps popular candidates, which are sampled more, from being punished for it (Yi et al.,
    "Sampling-bias-corrected neural modeling", RecSys 2019; Bengio and Senecal 2008). `rows`, `columns` (T,): targets as
    (row, candidate column) pairs. `hidden` (B, C) bool: candidates that are no answer for the row (seen items).
    A row with many targets weighs as the square root of their number: between per-user and per-event weighting.
    """
    corrected = scores - log_expected
    if hidden is not None:
        corrected = corrected.masked_fill(hidden, -1e9)
    log_likelihood = functional.log_softmax(corrected, dim=1)[rows, columns]
    targets = torch.bincount(rows, minlength=len(scores)).clamp(min=1)
    return -(log_likelihood / targets[rows].sqrt()).sum() / len(scores)
