"""What may be set about tuning; on its own, because settings are read without loading torch."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.core.errors import InputError


@dataclass(frozen=True)
class TuningConfig:
    """How the encoder is tuned. `steps` 0: not at all.

    `batch`: pairs per step. `rank`, `alpha`: size and weight of the adapter (Hu et al. 2021, "LoRA"). `window`: how far apart in
    a history the two items of a pair may stand. `task_weight`: what the tasks' losses count beside the softmax. `patience`:
    judgements (each `judge_every` steps) without a better one before it stops.
    """

    steps: int = 0
    batch: int = 64
    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 5e-4
    temperature: float = 0.05
    window: int = 5
    task_weight: float = 0.3
    judge_every: int = 50
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "rank", "window", "judge_every", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"tuning.{name} = {getattr(self, name)}; give at least 1")
        if self.steps < 0 or self.temperature <= 0 or self.learning_rate <= 0 or self.task_weight < 0:
            raise InputError("tuning wants steps and task_weight of 0 or more, temperature and learning_rate above 0")
