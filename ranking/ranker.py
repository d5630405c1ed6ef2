"""The trained ranker: what it is made of, how it answers, and the folder it lives in.

In: feature rows (P, F) float32 and their column names. Out: every task's calibrated probability and one score per row. It is
saved as `ranker.safetensors` and `ranker.json`; train.py makes one, calibrate.py gives it its calibrators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy.special import expit, logit
from torch import Tensor

from ranking.batches import Floats, Groups, InputTransform, Ints, aligned
from ranking.model import RankerNet, TrunkKind
from ranking.tasks import RankingTask, check_tasks, parents
from ranking.utility import Utility, UtilityKind
from ranking.weighting import Weighting
from tandem.core.errors import IncompatibleError, InputError, IntegrityError
from tandem.core.folders import file_hash, read_json, whole_folder, write_json

FORMAT: Final = 1
WEIGHTS: Final = "ranker.safetensors"
SETTINGS: Final = "ranker.json"
_CHUNK: Final = 65_536


@dataclass(frozen=True)
class RankerConfig:
    """How to train a ranker. Defaults suit 300 to 30,000 training requests of about 200 candidates.

    `tasks` and `positive` (the task that retrieval should find): what to predict. `base`: column of the first stage's score that
    the net corrects (None: no residual). `within_request`: score columns that are also given relative to their request.
    `utility`: task → weight of the ranking score, default the positive task alone.
    `bce`, `listwise`: weights of the two losses; `missed_weight`: what a positive counts that the first stage missed;
    0 is the default because candidate lists hold no missed negatives, so that the net would learn "found by no source = wanted"
    (measured on 90 users of goodbooks with first-stage scores from an SVD: NDCG@10 0.087 with 0.25, 0.120 with 0).
    Above `max_rows` rows, negatives are thinned once; above `rows_per_round` (or `negatives_per_request`) anew in each round, so
    that a round's time is bounded and all data is used. `models` None: three members below 5,000 requests, else one (see
    model.py for why). `patience`: rounds without a better validation NDCG@10 before training stops.
    """

    tasks: tuple[RankingTask, ...]
    positive: str
    base: str | None = "tower_score"
    within_request: tuple[str, ...] = ("tower_score",)
    utility: Mapping[str, float] = field(default_factory=dict)
    utility_kind: UtilityKind = "geometric"
    trunk: TrunkKind = "shared"
    hidden: tuple[int, ...] = (64, 32)
    experts: int = 4
    dropout: float = 0.1
    weighting: Weighting = "fixed"
    bce: float = 0.5
    listwise: float = 1.0
    missed_weight: float = 0.0
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    rounds: int = 30
    patience: int = 6
    requests_per_batch: int = 32
    negatives_per_request: int | None = None
    rows_per_round: int = 400_000
    max_rows: int = 2_000_000
    models: int | None = None
    knots: int = 33
    seed: int = 0

    def __post_init__(self) -> None:
        check_tasks(self.tasks, self.positive)
        if not 2 <= self.knots <= 255:
            raise InputError(f"knots = {self.knots}; give 2 to 255")
        if not self.hidden or min(self.hidden) < 1:
            raise InputError(f"hidden = {self.hidden}; give at least one layer of at least one unit")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"dropout = {self.dropout}; give a number from 0 to below 1")
        if self.bce < 0 or self.listwise < 0 or not self.bce + self.listwise:
            raise InputError(f"bce = {self.bce} and listwise = {self.listwise}; neither below 0 and not both 0")
        self.make_utility()

    def make_utility(self) -> Utility:
        """The utility that the settings describe; every weighted task must be among the tasks."""
        utility = Utility(dict(self.utility) or {self.positive: 1.0}, self.utility_kind)
        unknown = sorted(set(utility.weights) - {task.name for task in self.tasks})
        if unknown:
            raise InputError(f"utility names {unknown}, which are not tasks; tasks: {[task.name for task in self.tasks]}")
        return utility


@dataclass(frozen=True)
class Calibrator:
    """A strictly increasing map of one task's logits: straight between the knots (x, y), with `slope` beyond the first and last.

    Strict, so that calibration never ties or swaps two candidates. One knot makes it Platt's straight line. See calibrate.py.
    """

    kind: str = "identity"
    x: tuple[float, ...] = (0.0,)
    y: tuple[float, ...] = (0.0,)
    slope: float = 1.0

    def __call__(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """(P,) logits → (P,) calibrated logits."""
        below, above = np.minimum(logits - self.x[0], 0.0), np.maximum(logits - self.x[-1], 0.0)
        return np.interp(logits, self.x, self.y) + self.slope * (below + above)


@dataclass(frozen=True)
class Ranker:
    """A trained ranker; immutable, and safe to use from many threads.

    `learned` are the tasks that the network predicts, in its order; the others had no positive label and are answered with their
    `base_rates`. `features` passed to the methods are (P, F) float32 with NaN for missing, and `names` their F column names, in
    any order. `request` (P,) ascending says which rows compete; None: all of them are one request's candidates.
    """

    config: RankerConfig
    transform: InputTransform
    network: RankerNet
    learned: tuple[str, ...]
    base_rates: Mapping[str, float]
    calibrators: Mapping[str, Calibrator] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: {name: version(name) for name in ("torch", "numpy", "scipy")})

    @property
    def names(self) -> tuple[str, ...]:
        """Feature columns that the ranker needs."""
        return self.transform.names

    def raw_logits(self, features: Floats, names: Sequence[str], request: Ints | None = None) -> dict[str, NDArray[np.float64]]:
        """task → (P,) logits before calibration. Raises IncompatibleError when `names` are not the columns it was trained on."""
        features = aligned(features, names, self.names)
        groups = Groups.single(len(features)) if request is None else Groups.of(request)
        base, inputs = self.transform(features, groups)
        return self.logits_of_inputs(base, inputs)

    def logits_of_inputs(self, base: Floats, inputs: Floats) -> dict[str, NDArray[np.float64]]:
        """task → (P,) uncalibrated logits from what `transform` gives: the members' mean."""
        logits = _forward(self.network, base, inputs)
        known = dict(zip(self.learned, logits, strict=True))
        constant = {name: np.full(len(base), logit(rate)) for name, rate in self.base_rates.items()}
        return {task.name: known.get(task.name, constant[task.name]) for task in self.config.tasks}

    def logits(self, features: Floats, names: Sequence[str], request: Ints | None = None) -> dict[str, NDArray[np.float64]]:
        """task → (P,) calibrated logits: `predict` and `score` from one pass (`probabilities(...)`, `utility.of_logits(...)`)."""
        return self.calibrated(self.raw_logits(features, names, request))

    def calibrated(self, logits: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        """The calibrators' maps over `raw_logits`; the identity for tasks without one."""
        return {name: self.calibrators.get(name, Calibrator())(values) for name, values in logits.items()}

    def predict(self, features: Floats, names: Sequence[str], request: Ints | None = None) -> dict[str, Floats]:
        """task → (P,) float32 calibrated probabilities."""
        return probabilities(self.logits(features, names, request))

    def score(self, features: Floats, names: Sequence[str], request: Ints | None = None) -> Floats:
        """(P,) float32 ranking score, higher is better: the utility of the calibrated logits (see utility.py)."""
        return self.utility.of_logits(self.logits(features, names, request))

    @property
    def utility(self) -> Utility:
        """What the score is worth: weights over tasks."""
        return self.config.make_utility()

    def save(self, folder: Path) -> None:
        """Write the whole folder, atomically; equal rankers give equal bytes."""
        with whole_folder(folder) as partial:
            state = {name: value.contiguous() for name, value in sorted(self.network.state_dict().items())}
            save_file(state, partial / WEIGHTS)
            write_json(
                partial / SETTINGS,
                {
                    "format": FORMAT,
                    "config": asdict(self.config),
                    "transform": self.transform.to_json(),
                    "learned": list(self.learned),
                    "base_rates": dict(self.base_rates),
                    "calibrators": {name: asdict(calibrator) for name, calibrator in self.calibrators.items()},
                    "versions": dict(self.versions),
                    "weights": file_hash(partial / WEIGHTS),
                },
            )

    @classmethod
    def load(cls, folder: Path) -> Ranker:
        """Read a saved ranker. Raises IntegrityError for damaged files and IncompatibleError for another format."""
        raw = _read_settings(folder)
        config = _config_from_json(raw["config"])
        transform = InputTransform.from_json(raw["transform"])
        learned = tuple(raw["learned"])
        network = make_network(config, transform, learned, raw["base_rates"], _members(load_file(folder / WEIGHTS)))
        network.load_state_dict(load_file(folder / WEIGHTS))
        calibrators = {
            name: Calibrator(c["kind"], tuple(c["x"]), tuple(c["y"]), c["slope"]) for name, c in raw["calibrators"].items()
        }
        return cls(config, transform, network.eval(), learned, raw["base_rates"], calibrators, raw["versions"])


def probabilities(logits: Mapping[str, NDArray[np.float64]]) -> dict[str, Floats]:
    """task → (P,) float32 probabilities of logits."""
    return {name: expit(values).astype(np.float32) for name, values in logits.items()}


def make_network(
    config: RankerConfig, transform: InputTransform, learned: tuple[str, ...], rates: Mapping[str, float], members: int
) -> RankerNet:
    """The untrained network: it orders candidates as the base does."""
    above = parents(config.tasks, learned)
    own = [min(rates[name] / (rates[learned[p]] if p >= 0 else 1.0), 0.99) for name, p in zip(learned, above, strict=True)]
    return RankerNet(
        trunk=config.trunk,
        members=members,
        inputs=len(transform.sources),
        hidden=config.hidden,
        experts=config.experts,
        base_logits=tuple(float(logit(rate)) for rate in own),
        parents=above,
        generator=torch.Generator().manual_seed(config.seed),
    )


def _forward(network: RankerNet, base: Floats, inputs: Floats) -> NDArray[np.float64]:
    """(P,), (P, D) → (T, P) float64: mean over members, in chunks."""
    if not len(base):
        return np.zeros((network.tasks, 0))
    with torch.inference_mode():
        parts = [
            network(torch.from_numpy(base[at : at + _CHUNK]), torch.from_numpy(inputs[at : at + _CHUNK])).double().mean(0)
            for at in range(0, len(base), _CHUNK)
        ]
        return torch.cat(parts, dim=1).numpy()


def _read_settings(folder: Path) -> dict[str, Any]:
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            raise IntegrityError(f"{folder.name}: file {name} is missing; train or fetch the ranker again")
    raw: dict[str, Any] = read_json(folder / SETTINGS)
    if raw.get("format") != FORMAT:
        raise IncompatibleError(f"{folder.name}: ranker format {raw.get('format')}, this version reads {FORMAT}; train again")
    found = file_hash(folder / WEIGHTS)
    if found != raw["weights"]:
        raise IntegrityError(f"{folder.name}: {WEIGHTS} is damaged (sha256 {found[:12]}, expected {raw['weights'][:12]})")
    return raw


def _config_from_json(raw: Mapping[str, Any]) -> RankerConfig:
    tasks = tuple(RankingTask(**task) for task in raw["tasks"])
    lists = {"tasks": tasks, "within_request": tuple(raw["within_request"]), "hidden": tuple(raw["hidden"])}
    try:
        return RankerConfig(**{**raw, **lists})
    except TypeError as error:
        raise IncompatibleError(f"the ranker was saved with settings that this version does not know: {error}") from None


def _members(state: Mapping[str, Tensor]) -> int:
    return int(state["slope"].shape[0])
