"""Raw logits → probabilities that mean what they say, per task, on held-out candidate lists.

In: a trained `Ranker` and `Examples` that neither towers nor ranker learned from (full lists; missed positives are left out).
Out: the same ranker with a `Calibrator` per task. Few positives: Platt's straight line; many: isotonic regression. Both become
strictly increasing piecewise-linear maps of the logit, so no order changes, and both are a few numbers in JSON.

Where a source logs no impressions, these are probabilities relative to retrieved candidates: "a user whom we show these".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression

from ranking.batches import Examples
from ranking.ranker import Calibrator, Ranker

ISOTONIC_FROM: Final = 1_000
"""Positives from which isotonic regression is used: below, its steps are noise (Niculescu-Mizil and Caruana 2005)."""
_BINS: Final = 200

Logits = NDArray[np.float64]


def calibrate(ranker: Ranker, examples: Examples, isotonic_from: int = ISOTONIC_FROM) -> Ranker:
    """The ranker with calibrators fitted on `examples`; a task that the network did not learn keeps its base rate."""
    served = examples.served()
    logits = ranker.raw_logits(served.features, served.names, served.request)
    fitted = {name: _fit(logits[name], served.labels[name], isotonic_from) for name in ranker.learned}
    return replace(ranker, calibrators=fitted)


def _fit(logits: Logits, labels: NDArray[np.float32], isotonic_from: int) -> Calibrator:
    known = np.isfinite(labels)
    x, y = logits[known], labels[known].astype(np.float64)
    positives = int(y.sum())
    return isotonic(x, y) if min(positives, len(y) - positives) >= isotonic_from else platt(x, y)


def platt(logits: Logits, labels: Logits) -> Calibrator:
    """Straight line a·logit + b by penalised maximum likelihood with Platt's smoothed targets, a > 0.

    Platt 1999, "Probabilistic Outputs for Support Vector Machines". The penalty pulls a towards 1 and b towards 0 with the
    strength of about one example, so that no positives at all shift the line down instead of to minus infinity.
    """
    n, positives = len(labels), float(labels.sum())
    if not n:
        return Calibrator()
    target = np.where(labels > 0, (positives + 1.0) / (positives + 2.0), 1.0 / (n - positives + 2.0))
    design = np.stack([logits, np.ones(n)], axis=1)
    line, prior = np.array([1.0, 0.0]), np.array([1.0, 0.0])
    for _ in range(50):
        p = expit(design @ line)
        gradient = design.T @ (p - target) + (line - prior)
        hessian = (design * (p * (1.0 - p))[:, None]).T @ design + np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        line = line - step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-12))
        if np.abs(step).max() < 1e-9:
            break
    slope = max(float(line[0]), 1e-3)
    return Calibrator("platt", (0.0,), (float(line[1]),), slope)


def isotonic(logits: Logits, labels: Logits) -> Calibrator:
    """Isotonic regression (pool adjacent violators) through the centres of its blocks, in the logit domain.

    Zadrozny and Elkan 2002. Logits are first pooled into 200 equal-mass bins, whose rates are smoothed by one example of the
    base rate: straight lines between block centres, instead of steps, keep the map strictly increasing.
    """
    order = np.argsort(logits, kind="stable")
    parts = [part for part in np.array_split(order, min(_BINS, len(order))) if len(part)]
    size = np.array([len(part) for part in parts], np.float64)
    x = np.array([logits[part].mean() for part in parts])
    rate = np.array([labels[part].sum() + labels.mean() for part in parts]) / (size + 1.0)
    level = IsotonicRegression().fit_transform(x, rate, sample_weight=size)
    starts = np.flatnonzero(np.diff(level, prepend=-1.0) > 1e-9)
    mass = np.add.reduceat(size, starts)
    centre = np.add.reduceat(x * size, starts) / mass
    height = logit(np.clip(level[starts], 1e-6, 1.0 - 1e-6))
    rising = np.concatenate([[True], (np.diff(centre) > 1e-9) & (np.diff(height) > 1e-9)])
    return Calibrator("isotonic", tuple(centre[rising].tolist()), tuple(height[rising].tolist()), 1.0)
