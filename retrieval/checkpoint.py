"""Training that goes on after a kill: what a loop of rounds must remember, written whole after the first round of each minute.

In: a module, its optimisers and the random generator of a loop. Out: the same loop continued, bit for bit on the CPU. A
checkpoint belongs to one training (data, settings): another one's is not looked at.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from retrieval.tensors import load_tensors, save_tensors
from tandem.core.errors import IntegrityError, NotFoundError

_FACTS = "facts"


class Checkpoints:
    """A folder of checkpoints of the training called `key`; without a folder nothing is written or read."""

    def __init__(
        self, folder: Path | None, key: str = "", every_seconds: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder, self.key = folder, key
        self._every, self._clock = every_seconds, clock
        self._last = clock()

    def due(self) -> bool:
        """Has `every_seconds` passed since the last one?"""
        if self.folder is None or self._clock() - self._last < self._every:
            return False
        self._last = self._clock()
        return True

    def forget(self) -> None:
        """The training is done: remove the folder."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class Stage:
    """One loop of rounds: the round that was finished last, and the best one with its weights.

    `resumed` is true when a checkpoint of this loop was found; weights, optimisers and random states are then as they were.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        random: np.random.Generator,
        checkpoints: Checkpoints,
    ) -> None:
        self._name, self._module, self._optimizers, self._random, self._checkpoints = (
            name,
            module,
            optimizers,
            random,
            checkpoints,
        )
        self.number = self.best_number = 0
        self.best = -np.inf
        self.best_state = copy.deepcopy(module.state_dict())
        self.resumed = self._restore()

    def finish(self, number: int, quality: float) -> None:
        """Round `number` reached `quality`; its weights are kept when that is the best so far. Equals go to the earlier round."""
        self.number = number
        if quality > self.best:
            self.best, self.best_number = quality, number
            self.best_state = copy.deepcopy(self._module.state_dict())
        if self._checkpoints.due():
            self._save()

    def tired(self, patience: int) -> bool:
        """Have the last `patience` rounds all been no better?"""
        return self.number - self.best_number >= patience

    @property
    def _path(self) -> Path | None:
        folder = self._checkpoints.folder
        return None if folder is None else folder / f"{self._name}.safetensors"

    def _save(self) -> None:
        assert self._path is not None
        tensors = {f"now.{name}": value.numpy() for name, value in self._module.state_dict().items()}
        tensors |= {f"best.{name}": value.numpy() for name, value in self.best_state.items()}
        for place, optimizer in enumerate(self._optimizers):
            for row, values in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{place}.{row}.{name}": np.asarray(value) for name, value in values.items()}
        tensors["torch"] = torch.get_rng_state().numpy()
        facts = {"key": self._checkpoints.key, "number": self.number, "best": self.best, "best_number": self.best_number}
        facts |= {"random": self._random.bit_generator.state, "rates": [_rate(optimizer) for optimizer in self._optimizers]}
        tensors[_FACTS] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        save_tensors(self._path, tensors)

    def _restore(self) -> bool:
        if self._path is None:
            return False
        try:
            tensors = load_tensors(self._path, _FACTS)
        except (NotFoundError, IntegrityError):
            return False
        facts = json.loads(tensors[_FACTS].tobytes())
        if facts["key"] != self._checkpoints.key:
            return False
        self._module.load_state_dict(_named("now.", tensors))
        self.best_state = _named("best.", tensors)
        for place, optimizer in enumerate(self._optimizers):
            _load_optimizer(optimizer, _named(f"optimizer.{place}.", tensors), facts["rates"][place])
        torch.set_rng_state(torch.from_numpy(tensors["torch"].copy()))
        self._random.bit_generator.state = facts["random"]
        self.number, self.best, self.best_number = facts["number"], facts["best"], facts["best_number"]
        return True


def _named(prefix: str, tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): torch.tensor(value) for name, value in tensors.items() if name.startswith(prefix)}


def _rate(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def _load_optimizer(optimizer: torch.optim.Optimizer, values: dict[str, torch.Tensor], rate: float) -> None:
    """`values` by "row.name". Whole numbers are Python's: SparseAdam counts its steps so."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in values.items():
        row, name = key.split(".", 1)
        state.setdefault(int(row), {})[name] = int(value) if value.dtype == torch.int64 else value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": [group | {"lr": rate} for group in groups]})
