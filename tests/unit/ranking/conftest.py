"""Worlds with known answers for the ranker's tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.special import expit

from ranking.batches import Examples
from ranking.ranker import Ranker, RankerConfig
from ranking.tasks import RankingTask
from ranking.train import train_ranker

World = Callable[..., Examples]
NAMES = ("tower_score", "hidden", "noise", "gap")


@pytest.fixture(scope="session")
def make_world() -> World:
    """World with clicks of logit −3 + base·tower + hidden·h; purchases are 30% of clicks; column `gap` is half missing."""

    def make(requests: int, seed: int, base: float = 1.0, hidden: float = 2.0, candidates: int = 40) -> Examples:
        rng = np.random.default_rng(seed)
        rows = requests * candidates
        tower, h = rng.normal(size=rows), rng.normal(size=rows)
        gap = np.where(rng.random(rows) < 0.5, np.nan, rng.normal(size=rows))
        click = rng.random(rows) < expit(-3.0 + base * tower + hidden * h)
        purchase = click & (rng.random(rows) < 0.3)
        shift = np.repeat(rng.normal(size=requests) * 5, candidates)
        features = np.stack([tower + shift, np.exp(h), rng.normal(size=rows), gap], axis=1).astype(np.float32)
        labels = {"click": click.astype(np.float32), "purchase": purchase.astype(np.float32)}
        return Examples(features, NAMES, labels, np.repeat(np.arange(requests), candidates), np.zeros(rows, bool))

    return make


@pytest.fixture(scope="session")
def config() -> RankerConfig:
    """Two tasks, a small net, few rounds."""
    tasks = (RankingTask("click"), RankingTask("purchase", given="click"))
    return RankerConfig(tasks=tasks, positive="click", hidden=(16, 8), rounds=12, patience=3, learning_rate=1e-2, models=2)


@pytest.fixture(scope="session")
def trained(make_world: World, config: RankerConfig) -> Ranker:
    """A ranker trained on the world whose labels depend on the hidden feature."""
    return train_ranker(make_world(150, 0), make_world(60, 1), config, lambda _: None)
