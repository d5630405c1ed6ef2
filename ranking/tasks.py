"""What the ranker predicts: names, loss weights and, optionally, "given what".

In: the tasks of a source (by name) and the labels of the training examples. Out: checked `RankingTask`s, which of them can be
learned at all, and the parent of each in the chain of conditions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tandem.core.errors import InputError

NO_PARENT: Final = -1


@dataclass(frozen=True)
class RankingTask:
    """One probability that the ranker predicts for each candidate.

    With `given`, the task can only happen where its parent did, and the model predicts p = p(given) · p(task | given), learned on
    all candidates: the entire-space model of Ma et al. 2018, "Entire Space Multi-Task Model" (arXiv:1804.07931).
    `weight` multiplies the task's loss (see weighting.py).
    """

    name: str
    given: str | None = None
    weight: float = 1.0


def check_tasks(tasks: Sequence[RankingTask], positive: str) -> None:
    """Raise InputError unless names are unique, `positive` is one of them, weights are not negative and parents come first."""
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise InputError(f"tasks {names} repeat a name; name each task once")
    if positive not in names:
        raise InputError(f"positive = {positive!r} is not one of the tasks {names}; name one of them")
    for place, task in enumerate(tasks):
        if task.weight < 0:
            raise InputError(f"task {task.name!r} has weight {task.weight}; give 0 or more")
        if task.given is not None and task.given not in names[:place]:
            raise InputError(f"task {task.name!r} is given {task.given!r}, which does not come before it in {names}")


def learnable(tasks: Sequence[RankingTask], labels: Mapping[str, NDArray[np.float32]]) -> tuple[str, ...]:
    """Names of the tasks with at least one positive and one negative label; the others have nothing to learn from."""
    return tuple(task.name for task in tasks if np.any(labels[task.name] > 0) and np.any(labels[task.name] == 0))


def parents(tasks: Sequence[RankingTask], names: Sequence[str]) -> tuple[int, ...]:
    """Place in `names` of each named task's parent, NO_PARENT where it has none or its parent is not among `names`."""
    given = {task.name: task.given for task in tasks}
    place = {name: i for i, name in enumerate(names)}
    return tuple(place.get(given[name] or "", NO_PARENT) for name in names)


def base_rate(labels: NDArray[np.float32], weight: NDArray[np.float32] | None = None) -> float:
    """Share of positives among known labels (weighted), smoothed by half an example so that it is never 0 or 1."""
    known = np.isfinite(labels)
    mass = np.ones(labels.shape, np.float64) if weight is None else weight.astype(np.float64)
    return float((mass[known] @ labels[known].astype(np.float64) + 0.5) / (mass[known].sum() + 1.0))
