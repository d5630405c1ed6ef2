"""Train the towers: closed-form start, then sampled softmax with logQ, stopped by recall on held-out users.

In: a catalogue's content and text vectors and users' histories as dense item ids. Out: `Towers`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import scipy.sparse as sp
import torch

from retrieval.batches import Batch, epoch, late_cut, pad_left
from retrieval.loss import sampled_softmax
from retrieval.negatives import NegativeSampler
from retrieval.towers import TextBlock, Towers, TowerShape, TwoTowers
from retrieval.warm_start import content_map, warm_start
from tandem.core.errors import InputError

Log = Callable[[dict[str, float]], None]
POPULARITY_WEIGHTS: Final = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class TowerConfig:
    """How the towers are built and trained; the defaults hold on the four real data sets (`tests/benchmarks/LOG.md`)."""

    dimension: int = 192
    text_block: int = 64
    history: int = 100
    sequence: int = 32
    width: int = 64
    layers: int = 1
    ridge: float = 300.0
    epochs: int = 10
    patience: int = 2
    batch_size: int = 256
    horizon: int = 50
    item_learning_rate: float = 1e-4
    learning_rate: float = 1e-4
    history_dropout: float = 0.2
    id_dropout: float = 0.05
    uniform_negatives: int = 2000
    popular_negatives: int = 1000
    validation_users: float = 0.08
    validation_limit: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Catalogue:
    """What is known of N items without any interaction: `content` (N, C) and `text` (N, T), both float32."""

    content: np.ndarray
    text: np.ndarray


@dataclass(frozen=True)
class Histories:
    """Users' histories as dense item ids, oldest first.

    `positive` marks the events that retrieval should find; `cuts` are the places where time moves on (`batches.cut_places`).
    """

    sequences: Sequence[np.ndarray]
    positive: Sequence[np.ndarray]
    cuts: Sequence[np.ndarray]
    exclude_seen: bool

    def take(self, users: Iterable[int]) -> Histories:
        chosen = list(users)
        columns = {name: [getattr(self, name)[user] for user in chosen] for name in ("sequences", "positive", "cuts")}
        return Histories(**columns, exclude_seen=self.exclude_seen)

    def usable(self) -> Histories:
        """Those that can be cut into a past and a future."""
        return self.take(user for user, cuts in enumerate(self.cuts) if len(cuts))


@dataclass(frozen=True)
class Bases:
    """What content says of every item's taste, as history and as candidate: (N, D) each, the same for a whole training."""

    inner: torch.Tensor
    outer: torch.Tensor

    @classmethod
    def of(cls, network: TwoTowers, content: np.ndarray) -> Bases:
        inputs = torch.from_numpy(content)
        return cls(network.inner.base(inputs), network.outer.base(inputs))


def train_towers(catalogue: Catalogue, histories: Histories, config: TowerConfig, log: Log) -> Towers:
    """Trained towers over the catalogue; deterministic on the CPU for one seed. Raises InputError without any usable history."""
    _check(catalogue, histories)
    random = np.random.default_rng(config.seed)
    learn, validate = _held_out(histories, config, random)
    shape = _shape(catalogue, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = _started(catalogue, learn, shape, config)
        best = _fit(network, Bases.of(network, catalogue.content), learn, validate, config, random, log)
    block = TextBlock.fit(catalogue.text, shape.text_block)
    return _finished(shape, network, catalogue, block, best, validate)


def _fit(
    network: TwoTowers,
    bases: Bases,
    learn: Histories,
    validate: Histories,
    config: TowerConfig,
    random: np.random.Generator,
    log: Log,
) -> dict[str, object]:
    """The training loop, written out. Leaves the best weights in `network`; the closed-form start competes as epoch 0."""
    usable = learn.usable()
    counts = _counts(learn, len(bases.inner))
    sampler = NegativeSampler(counts, config.uniform_negatives, config.popular_negatives)
    optimizer = _optimizer(network, config)
    best_recall, best_epoch = _weigh_popularity(network, bases, counts, validate, config), 0
    best_state = copy.deepcopy(network.state_dict())
    log({"towers/epoch": 0, "towers/validation_recall_at_100": best_recall})
    for number in range(1, config.epochs + 1 if usable.sequences else 1):
        losses = []
        for batch in epoch(
            usable.sequences, usable.cuts, size=config.batch_size, length=config.history, horizon=config.horizon,
            exclude_seen=usable.exclude_seen, targets=usable.positive, random=random,
        ):  # fmt: skip
            loss = _batch_loss(network, bases, batch, sampler, usable.exclude_seen, config, random)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            losses.append(float(loss.detach()))
        recall = validation_recall(network, bases, validate, config)
        log({"towers/epoch": number, "towers/loss": float(np.mean(losses)), "towers/validation_recall_at_100": recall})
        if recall > best_recall:
            best_recall, best_epoch, best_state = recall, number, copy.deepcopy(network.state_dict())
        elif number - best_epoch >= config.patience:
            break
    network.load_state_dict(best_state)
    return {"best_epoch": best_epoch, "validation_recall_at_100": best_recall, "validation_users": len(validate.sequences)}


def _weigh_popularity(network: TwoTowers, bases: Bases, counts: np.ndarray, validate: Histories, config: TowerConfig) -> float:
    """Give the start the weight of log popularity that has the best validation recall, and return that recall."""
    logs = torch.from_numpy(np.log1p(counts).astype(np.float32))
    recalls = {}
    for weight in POPULARITY_WEIGHTS:
        network.popularity.data = logs * weight
        recalls[weight] = validation_recall(network, bases, validate, config)
    best = max(recalls, key=recalls.__getitem__)
    network.popularity.data = logs * best
    return recalls[best]


def _batch_loss(
    network: TwoTowers,
    bases: Bases,
    batch: Batch,
    sampler: NegativeSampler,
    exclude_seen: bool,
    config: TowerConfig,
    random: np.random.Generator,
) -> torch.Tensor:
    network.train()
    keep = torch.from_numpy((random.random(len(bases.inner)) >= config.id_dropout).astype(np.float32))
    histories = torch.from_numpy(batch.histories)
    present = (histories >= 0) & torch.from_numpy(random.random(histories.shape) >= config.history_dropout)
    user = network.taste(histories, network.inner(bases.inner), present)
    drawn = sampler.draw(batch.items, random)
    chosen = torch.from_numpy(drawn.items)
    scores = user @ network.outer(bases.outer, keep)[chosen].T + network.popularity[chosen]
    columns = torch.from_numpy(np.searchsorted(drawn.items, batch.items))
    hidden = _seen_columns(batch.histories, drawn.items) if exclude_seen else None
    return sampled_softmax(scores, torch.from_numpy(drawn.log_expected), torch.from_numpy(batch.rows), columns, hidden)


def _seen_columns(histories: np.ndarray, candidates: np.ndarray) -> torch.Tensor:
    """(B, C) bool: the candidates that stand in the row's history."""
    hidden = np.zeros((len(histories), len(candidates)), bool)
    rows, steps = np.nonzero(histories >= 0)
    seen = histories[rows, steps]
    columns = np.minimum(np.searchsorted(candidates, seen), len(candidates) - 1)
    found = candidates[columns] == seen
    hidden[rows[found], columns[found]] = True
    return torch.from_numpy(hidden)


def validation_recall(network: TwoTowers, bases: Bases, histories: Histories, config: TowerConfig, k: int = 100) -> float:
    """Mean recall@k over the users cut at 80% of their history, against the whole catalogue."""
    network.eval()
    cuts = [late_cut(places, len(sequence)) for places, sequence in zip(histories.cuts, histories.sequences, strict=True)]
    pasts = [sequence[:cut] for sequence, cut in zip(histories.sequences, cuts, strict=True)]
    futures = [
        np.unique(sequence[cut:][positive[cut:]])
        for sequence, positive, cut in zip(histories.sequences, histories.positive, cuts, strict=True)
    ]
    k = min(k, len(bases.inner))
    recalls: list[float] = []
    with torch.inference_mode():
        inner, outer = network.inner(bases.inner), network.outer(bases.outer)
        for start in range(0, len(pasts), 500):
            indices = torch.from_numpy(pad_left(pasts[start : start + 500], config.history))
            scores = network.taste(indices, inner, indices >= 0) @ outer.T + network.popularity
            for row, (past, future) in enumerate(zip(pasts[start : start + 500], futures[start : start + 500], strict=True)):
                wanted = np.setdiff1d(future, past) if histories.exclude_seen else future
                if not len(wanted):
                    continue
                if histories.exclude_seen:
                    scores[row, torch.from_numpy(past)] = -torch.inf
                found = scores[row].topk(k).indices.numpy()
                recalls.append(len(np.intersect1d(found, wanted)) / min(k, len(wanted)))
    return float(np.mean(recalls)) if recalls else 0.0


def _started(catalogue: Catalogue, learn: Histories, shape: TowerShape, config: TowerConfig) -> TwoTowers:
    network = TwoTowers(shape)
    counts = _counts(learn, shape.items)
    inner, outer = warm_start(_matrix(learn, shape.items), shape.dimension, config.ridge, config.seed)
    seen = (counts > 0).astype(np.float32)[:, None]
    for tower, vectors in ((network.inner, inner), (network.outer, outer)):
        weights = content_map(catalogue.content, vectors, counts)
        tower.content.data = torch.from_numpy(weights)
        # An item nobody has touched keeps a zero id vector: it is what its content says.
        tower.id.data = torch.from_numpy((vectors - catalogue.content @ weights) * seen)
    return network


def _optimizer(network: TwoTowers, config: TowerConfig) -> torch.optim.Optimizer:
    slow = [network.inner.id, network.outer.id]
    fast = [value for name, value in network.named_parameters() if not name.startswith(("inner", "outer"))]
    return torch.optim.AdamW(
        [{"params": slow, "lr": config.item_learning_rate}, {"params": fast, "lr": config.learning_rate}], weight_decay=0.0
    )


def _finished(
    shape: TowerShape, network: TwoTowers, catalogue: Catalogue, block: TextBlock, facts: dict[str, object], sample: Histories
) -> Towers:
    towers = Towers(shape, network, catalogue.content, catalogue.text, block, facts | {"spread": 1.0})
    pasts = [sequence for sequence in sample.sequences[:200] if len(sequence)]
    scores = towers.query(pad_left(pasts, shape.history)) @ towers.item_vectors.T
    return Towers(shape, network, catalogue.content, catalogue.text, block, facts | {"spread": float(scores.std(1).mean())})


def _shape(catalogue: Catalogue, config: TowerConfig) -> TowerShape:
    items, content = catalogue.content.shape
    text = catalogue.text.shape[1]
    return TowerShape(
        items,
        content,
        text,
        config.dimension,
        min(config.text_block, text, items),
        config.history,
        config.sequence,
        config.width,
        config.layers,
    )


def _held_out(histories: Histories, config: TowerConfig, random: np.random.Generator) -> tuple[Histories, Histories]:
    """Users to learn from, and users whose recall decides when to stop; the latter are unseen by the warm start too."""
    order = random.permutation(len(histories.sequences))
    count = min(config.validation_limit, max(1, int(len(order) * config.validation_users)))
    return histories.take(order[count:]), histories.take(order[:count]).usable()


def _matrix(histories: Histories, items: int) -> sp.csr_matrix:
    rows = np.repeat(np.arange(len(histories.sequences)), [len(sequence) for sequence in histories.sequences])
    columns = np.concatenate([np.asarray(sequence, np.int64) for sequence in histories.sequences])
    matrix = sp.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), (len(histories.sequences), items))
    matrix.data[:] = 1.0
    return matrix


def _counts(histories: Histories, items: int) -> np.ndarray:
    return np.bincount(np.concatenate([np.asarray(sequence, np.int64) for sequence in histories.sequences]), minlength=items)


def _check(catalogue: Catalogue, histories: Histories) -> None:
    if len(catalogue.content) != len(catalogue.text):
        raise InputError(f"content has {len(catalogue.content)} rows and text {len(catalogue.text)}; both need one row per item")
    for name, matrix in (("content", catalogue.content), ("text", catalogue.text)):
        bad = np.flatnonzero(~np.isfinite(matrix).all(1))
        if len(bad):
            raise InputError(
                f"{name} vectors of {len(bad)} items hold NaN or infinity (rows {bad[:5].tolist()}); repair or drop those items"
            )
    if len(histories.usable().sequences) < 2:
        raise InputError("fewer than two users have history at two moments: nothing to learn from; import more events")
