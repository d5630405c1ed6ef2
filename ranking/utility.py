"""Task predictions → one number per candidate.

In: calibrated predictions by task. Out: the ranking score, higher is better.

The utility is defined on calibrated **probabilities**, because only there do weights of several tasks mean anything; it is
computed from their **logits**, because probabilities of sure things round to 1 and tie. With one weighted task (the default: the
positive task weighs 1, the others 0) the score is that task's calibrated logit: calibration is strictly increasing, so the order
is the network's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit, logit

from tandem.core.errors import InputError

UtilityKind = Literal["geometric", "linear"]


@dataclass(frozen=True)
class Utility:
    """Weighted value of a candidate: Σ wₜ log pₜ ("geometric": all must hold) or Σ wₜ pₜ ("linear": expected value).

    `weights` task → weight; a negative weight counts against (returns, skips). Tasks that are not named weigh 0.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    kind: UtilityKind = "geometric"

    def __post_init__(self) -> None:
        if not any(self.weights.values()):
            raise InputError(f"utility weights {dict(self.weights)} are all zero; give one task a weight")
        if not all(np.isfinite(list(self.weights.values()))):
            raise InputError(f"utility weights {dict(self.weights)} are not all finite numbers")

    def __call__(self, predictions: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Probabilities by task, each (P,) → score (P,) float32. Raises InputError for a weighted task without predictions."""
        return self.of_logits({name: logit(p.astype(np.float64)) for name, p in predictions.items()})

    def of_logits(self, logits: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float32]:
        """The same from calibrated logits by task, each (P,)."""
        weighted = {name: weight for name, weight in self.weights.items() if weight}
        missing = sorted(set(weighted) - set(logits))
        if missing:
            raise InputError(f"utility weighs tasks {missing} that the ranker does not predict; it predicts {sorted(logits)}")
        if len(weighted) == 1:
            ((name, weight),) = weighted.items()
            return (weight * logits[name]).astype(np.float32)
        value = log_expit if self.kind == "geometric" else expit
        total = sum(weight * value(logits[name].astype(np.float64)) for name, weight in weighted.items())
        return np.asarray(total, np.float32)
