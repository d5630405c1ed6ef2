"""Training, and the trained ranker.

In: `Examples` of the first stage's own candidates for training and validation, and a `RankerConfig`. Out: a `Ranker`, which
predicts every task for raw feature rows, scores them, and lives in a folder of `ranker.safetensors` and `ranker.json`.

What is learned per task, each term divided by what a constant predictor gets, so that tasks and terms are of one size:
  - binary cross-entropy over candidates (probabilities), and
  - softmax cross-entropy within the request (order), Cao et al. 2007 "Learning to Rank: From Pairwise Approach to Listwise
    Approach", with the request's positives as the target.
Rounds are judged by NDCG@10 of the utility's order on the validation requests; the best is kept, and the untrained network (the
first stage's own order) is a contestant like any other.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy.special import expit, logit
from torch import Tensor, nn
from torch.nn import functional as F

from ranking.batches import (
    Examples,
    Floats,
    Groups,
    InputTransform,
    Ints,
    aligned,
    negatives_for,
    request_batches,
    thin,
)
from ranking.model import RankerNet, RequestDropout, TrunkKind
from ranking.tasks import RankingTask, base_rate, check_tasks, learnable, parents
from ranking.utility import Utility, UtilityKind
from ranking.weighting import Weighting, make_weighting
from tandem.core.errors import IncompatibleError, InputError, IntegrityError
from tandem.core.folders import file_hash, read_json, whole_folder, write_json
from tandem.core.metrics import ndcg_at_k

Log = Callable[[dict[str, float]], None]
FORMAT: Final = 1
WEIGHTS: Final = "ranker.safetensors"
SETTINGS: Final = "ranker.json"
_CHUNK: Final = 65_536
_SMALL: Final = 5_000


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


def train_ranker(training: Examples, validation: Examples, config: RankerConfig, log: Log) -> Ranker:
    """Train on `training`, stop and choose on `validation` (other users, or later ones; its missed positives are ignored).

    Deterministic on the CPU for a seed and a number of threads. `log` receives one dict per round: round, loss, ndcg (validation
    NDCG@10), best; `task_without_positives/<task>` = 1 for a task that had to be left out, which then answers its base rate; and
    `validation_without_positives` = 1 when nothing can be judged, so that the untrained ranker (the base's order) is returned.
    Raises InputError for empty training, IncompatibleError for columns or tasks that the examples lack.
    """
    _check(training, validation, config)
    rng = np.random.default_rng(config.seed)
    served = training.served()
    learned = learnable(config.tasks, served.labels)
    for task in config.tasks:
        if task.name not in learned:
            log({f"task_without_positives/{task.name}": 1.0})
    rates = {task.name: base_rate(served.labels[task.name]) for task in config.tasks}
    transform = InputTransform.fit(training, config.base, config.within_request, config.knots, rng)
    members = config.models or (3 if len(Groups.of(training.request).starts) < _SMALL else 1)
    network = make_network(config, transform, learned, rates, members)
    ranker = Ranker(config, transform, network.eval(), learned, rates)
    return _fit(ranker, training, validation.served(), rng, log) if learned else ranker


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


def ndcg_within(scores: NDArray[Any], labels: Floats, request: Ints, k: int = 10) -> NDArray[np.float64]:
    """NDCG@k with binary gain among the given candidates, one value for each request that has a positive, in request order.

    Ties in score are broken by the earlier row. Järvelin and Kekäläinen 2002.
    """
    groups = Groups.of(request)
    order = np.lexsort((np.arange(len(scores)), -scores, groups.index))
    rank = np.arange(len(scores)) - groups.starts[groups.index]
    top = rank < k
    hits = np.zeros((len(groups.starts), k), bool)
    hits[groups.index[top], rank[top]] = (labels > 0)[order][top]
    positives = groups.sum((labels > 0).astype(np.float64)).astype(np.int64)
    values = ndcg_at_k(hits, positives, k)
    return values[positives > 0]


def _fit(start: Ranker, training: Examples, validation: Examples, rng: np.random.Generator, log: Log) -> Ranker:
    """The training loop."""
    config, network = start.config, copy.deepcopy(start.network)
    data = _training_data(start, training, rng)
    judge = _judge(start, validation)
    weighting = make_weighting(config.weighting, _task_weights(start), network.members)
    optimizer = _optimizer(network, weighting, config)
    generator = torch.Generator().manual_seed(config.seed + 1)
    untrained = judge(network)
    best, best_round, best_state = untrained, 0, network.state_dict()
    log({"round": 0.0, "ndcg": _mean(untrained), "best": _mean(untrained)})
    if not np.any(validation.labels[config.positive] > 0):
        log({"validation_without_positives": 1.0})
        return start
    for number in range(1, config.rounds + 1):
        network.train()
        losses = []
        for batch in data.round(config, rng):
            drop = RequestDropout(config.dropout, len(batch.sizes), batch.index, generator)
            loss = weighting(batch.losses(network(batch.base, batch.inputs, drop), data.scale, config)) / network.members
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        ndcg = judge(network)
        if best_round == 0 or ndcg.mean() > best.mean():
            best, best_round, best_state = ndcg, number, copy.deepcopy(network.state_dict())
        log(
            {
                "round": float(number),
                "loss": float(np.mean(losses)),
                "ndcg": _mean(ndcg),
                "best": max(_mean(best), _mean(untrained)),
            }
        )
        if number - best_round >= config.patience:
            break
    if not clearly_better(best, untrained):
        log({"kept_base_order": 1.0})
        return start
    network.load_state_dict(best_state)
    return replace(start, network=network.eval())


@dataclass(frozen=True)
class _Batch:
    """Whole requests as tensors: base (Q,), inputs (Q, D), labels (T, Q) NaN = unknown, weight (Q,), sizes (R,), index (Q,)."""

    base: Tensor
    inputs: Tensor
    labels: Tensor
    weight: Tensor
    sizes: Tensor
    index: Tensor

    def losses(self, logits: Tensor, scale: Tensor, config: RankerConfig) -> Tensor:
        """Logits (M, T, Q) → losses (M, T); `scale` (2, T): a constant predictor's loss of each kind."""
        known = torch.isfinite(self.labels)
        labels = torch.where(known, self.labels, 0.0)
        return (
            config.bce * self._bce(logits, labels, known) / scale[0]
            + config.listwise * self._listwise(logits, labels, known) / scale[1]
        )

    def _bce(self, logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
        weight = self.weight * known
        each = F.binary_cross_entropy_with_logits(logits, labels.expand_as(logits), reduction="none")
        return (each * weight).sum(-1) / weight.sum(-1).clamp(min=1.0)

    def _listwise(self, logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
        """A sampled negative stands for several, so its exp(logit) counts as many times; missed positives count in the target."""
        stands_for = torch.where(known, torch.log(self.weight.clamp(min=1.0)), -torch.inf)
        log_total = self._log_sum_exp(logits + stands_for)
        target = labels * self.weight
        mass = self._sum(target)
        share = target / mass.clamp(min=1e-9)[..., self.index]
        each = self._sum(share * (log_total[..., self.index] - logits))
        has = (mass > 0).to(logits.dtype)
        return (each * has).sum(-1) / has.sum(-1).clamp(min=1.0)

    def _sum(self, values: Tensor) -> Tensor:
        """(…, Q) → (…, R): sum per request."""
        flat = values.reshape(-1, values.shape[-1]).t().contiguous()
        out = torch.segment_reduce(flat, "sum", lengths=self.sizes, axis=0, unsafe=True)
        return out.t().reshape(*values.shape[:-1], len(self.sizes))

    def _log_sum_exp(self, logits: Tensor) -> Tensor:
        flat = logits.detach().reshape(-1, logits.shape[-1]).t().contiguous()
        top = torch.segment_reduce(flat, "max", lengths=self.sizes, axis=0, unsafe=True).t().reshape(*logits.shape[:-1], -1)
        return torch.log(self._sum(torch.exp(logits - top[..., self.index]))) + top


@dataclass(frozen=True)
class _Data:
    """The training rows, see `_Batch`; `positive` (Q,) of any task; `scale` (2, T): the losses of a constant predictor."""

    base: Tensor
    inputs: Tensor
    labels: Tensor
    weight: Tensor
    positive: NDArray[np.bool_]
    request: Ints
    scale: Tensor

    def round(self, config: RankerConfig, rng: np.random.Generator) -> Iterator[_Batch]:
        """One round over all requests, with negatives drawn anew."""
        everything = Groups.of(self.request)
        room = negatives_for(self.positive, len(everything.starts), config.rows_per_round)
        kept = thin(self.positive, everything, min(room, config.negatives_per_request or room), rng)
        for places, sizes in request_batches(Groups.of(self.request[kept.rows]), config.requests_per_batch, rng):
            yield self._batch(torch.from_numpy(kept.rows[places]), torch.from_numpy(kept.weight[places]), torch.from_numpy(sizes))

    def _batch(self, rows: Tensor, weight: Tensor, sizes: Tensor) -> _Batch:
        index = torch.repeat_interleave(sizes)
        return _Batch(self.base[rows], self.inputs[rows], self.labels[:, rows], self.weight[rows] * weight, sizes, index)


def _training_data(ranker: Ranker, training: Examples, rng: np.random.Generator) -> _Data:
    """Transformed rows, thinned to `max_rows`; without the missed positives where they weigh nothing."""
    groups, counted = Groups.of(training.request), ~training.missed
    positive = training.missed | np.any([values > 0 for values in training.labels.values()], axis=0)
    kept = thin(positive, groups, negatives_for(positive, len(groups.starts), ranker.config.max_rows), rng)
    missed_weight = np.where(training.missed[kept.rows], np.float32(ranker.config.missed_weight), np.float32(1.0))
    rows, weight = kept.rows[missed_weight > 0], (kept.weight * missed_weight)[missed_weight > 0]
    base, inputs = ranker.transform(training.features, groups, counted, rows)
    labels = np.stack([training.labels[name][rows] for name in ranker.learned])
    scale = torch.from_numpy(_constant_losses(labels, weight, Groups.of(training.request[rows])))
    return _Data(
        torch.from_numpy(base),
        torch.from_numpy(inputs),
        torch.from_numpy(labels),
        torch.from_numpy(weight),
        positive[rows],
        training.request[rows],
        scale,
    )


def _constant_losses(labels: Floats, weight: Floats, groups: Groups) -> Floats:
    """(T, Q), (Q,) → (2, T): both losses of a predictor that says the base rate everywhere."""
    rates = np.array([base_rate(row, weight) for row in labels])
    entropy = -(rates * np.log(rates) + (1 - rates) * np.log1p(-rates))
    uniform = np.log(np.maximum(groups.sum(weight.astype(np.float64)), 2.0)).mean()
    return np.stack([entropy, np.full(len(rates), uniform)]).astype(np.float32)


def clearly_better(values: NDArray[np.float64], base: NDArray[np.float64]) -> bool:
    """Is the mean paired gain over requests (R,) above its own standard error?

    The one-standard-error rule (Breiman et al. 1984, "Classification and Regression Trees", 3.4.3): on a few dozen users the best
    of many rounds is above the base by luck alone, and an order that is only luckier should not replace a simpler one.
    """
    gain = values - base
    return len(gain) > 1 and float(gain.mean()) > float(gain.std(ddof=1)) / math.sqrt(len(gain))


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _judge(ranker: Ranker, validation: Examples) -> Callable[[RankerNet], NDArray[np.float64]]:
    """Network → validation NDCG@10 of the utility's order for the positive task, by request; empty without positives."""
    base, inputs = ranker.transform(validation.features, Groups.of(validation.request))
    labels = validation.labels[ranker.config.positive]

    def ndcg(network: RankerNet) -> NDArray[np.float64]:
        logits = replace(ranker, network=network.eval()).logits_of_inputs(base, inputs)
        return ndcg_within(ranker.utility.of_logits(logits), labels, validation.request)

    return ndcg


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


def _optimizer(network: RankerNet, weighting: nn.Module, config: RankerConfig) -> torch.optim.Optimizer:
    """AdamW; the residual's slope, offsets and loss weights learn faster and do not decay towards zero."""
    quick = [network.slope, network.offset, *weighting.parameters()]
    slow = [p for p in network.parameters() if not any(p is q for q in quick)]
    return torch.optim.AdamW(
        [
            {"params": slow, "weight_decay": config.weight_decay},
            {"params": quick, "lr": 5 * config.learning_rate, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
    )


def _task_weights(ranker: Ranker) -> list[float]:
    weight = {task.name: task.weight for task in ranker.config.tasks}
    return [weight[name] for name in ranker.learned]


def _check(training: Examples, validation: Examples, config: RankerConfig) -> None:
    if not len(training):
        raise InputError("there are no training examples; lower the thresholds of the split or import more events")
    if validation.names != training.names:
        raise IncompatibleError(f"validation has other features than training: {validation.names} and {training.names}")
    for examples, what in ((training, "training"), (validation, "validation")):
        missing = sorted({task.name for task in config.tasks} - set(examples.labels))
        if missing:
            raise IncompatibleError(f"{what} examples lack labels for tasks {missing}; they have {sorted(examples.labels)}")


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
