"""What each part of the training is worth: the towers without it, on two data sets, one seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import data
import numpy as np
import torch
from judge import Line, table
from ours import TowerConfig, towers

from retrieval.loss import sampled_softmax
from retrieval.negatives import Negatives


class InBatch:
    """Only the batch's own positives, and nothing said of how often each is one."""

    def __init__(self, *_: object) -> None:
        pass

    def draw(self, positives: np.ndarray, random: np.random.Generator) -> Negatives:
        items = np.unique(positives)
        return Negatives(items, np.zeros(len(items), np.float32))


def _random_start(matrix: object, dimension: int, ridge: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    shape = (matrix.shape[1], dimension)  # type: ignore[attr-defined]
    return tuple((random.standard_normal(shape) / dimension**0.5).astype(np.float32) for _ in range(2))  # type: ignore[return-value]


def _without_logq(scores: torch.Tensor, log_expected: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    return sampled_softmax(scores, torch.zeros_like(log_expected), *rest)


@contextmanager
def _instead(**parts: object) -> Iterator[None]:
    with ExitStack() as patched:
        for name, part in parts.items():
            patched.enter_context(mock.patch(f"retrieval.train.{name}", part))
        yield


def report(scratch: Path) -> None:
    """MovieLens asked for the next item, RankLens for a fifth of each user's clicks."""
    for case, config in (
        (data.next_item("movielens", scratch), TowerConfig(horizon=1)),
        (data.unordered("ranklens", scratch), TowerConfig()),
    ):
        silent = replace(config, sequence=replace(config.sequence, rounds=0))
        long = replace(silent, item_learning_rate=3e-3, learning_rate=3e-3, epochs=30)
        variants = (
            ("everything", config, {}),
            ("no sequence tower", silent, {}),
            ("closed form only", replace(silent, epochs=0), {}),
            ("no logQ", silent, {"sampled_softmax": _without_logq}),
            ("uniform negatives only", replace(silent, popular_negatives=1, uniform_negatives=2000), {}),
            ("popular negatives only", replace(silent, popular_negatives=2000, uniform_negatives=1), {}),
            ("every item a negative: the limit of hard ones", replace(silent, uniform_negatives=100_000), {}),
            ("raw in-batch negatives", silent, {"NegativeSampler": InBatch}),
            ("no dropout of history", replace(silent, history_dropout=0.0), {}),
            ("texts of the history unheard", config, {"PROFILE_WEIGHTS": (0.0,)}),
            ("random start", long, {"warm_start": _random_start}),
            ("random start, raw in-batch negatives", long, {"warm_start": _random_start, "NegativeSampler": InBatch}),
        )
        lines: list[Line] = []
        for label, changed, parts in variants:
            with _instead(**parts):
                lines.append(towers(case, changed, label))
        table(f"{case.name}, what each part is worth", lines, case.truth())
