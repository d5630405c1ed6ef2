"""Training a ranker.

In: `Examples` of the first stage's own candidates for training and validation, and a `RankerConfig`. Out: a `Ranker`.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ranking.batches import Examples, Floats, Groups, InputTransform, Ints, negatives_for, request_batches, thin
from ranking.model import RankerNet, RequestDropout
from ranking.ranker import Ranker, RankerConfig, make_network
from ranking.tasks import base_rate, learnable
from ranking.weighting import make_weighting
from tandem.core.errors import IncompatibleError, InputError
from tandem.core.metrics import ndcg_at_k

Log = Callable[[dict[str, float]], None]
_SMALL: Final = 5_000
_ONE_SIDED_95: Final = 1.645


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
    """Is the mean paired gain over requests (R,) above zero beyond the one-sided 95% bound of the normal distribution?

    On a few dozen users the best of many rounds is above the base by luck alone, and an order that is only luckier should not
    replace a simpler one.
    """
    gain = values - base
    return len(gain) > 1 and float(gain.mean()) > _ONE_SIDED_95 * float(gain.std(ddof=1)) / math.sqrt(len(gain))


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
