"""Train the towers: closed-form start, then sampled softmax with logQ, then a sequence tower; held-out users decide what stays.

In: a catalogue's content and text vectors and users' histories as dense item ids. Out: `Towers`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import scipy.sparse as sp
import torch

from retrieval.batches import Batch, Histories, epoch, pad_left, seen_columns
from retrieval.checkpoint import Checkpoints, Stage
from retrieval.cold_start import ColdStart, fit_cold_start
from retrieval.loss import sampled_softmax
from retrieval.negatives import NegativeSampler
from retrieval.sequence import SequenceConfig, SequenceTower, sequence_scores, train_sequence
from retrieval.towers import TextBlock, Towers, TowerShape, TwoTowers
from retrieval.validate import Quality, Questions
from retrieval.warm_start import content_map, warm_start
from tandem.core.errors import InputError
from tandem.core.folders import content_hash

__all__ = ["Catalogue", "Histories", "TowerConfig", "train_towers"]

Log = Callable[[dict[str, float]], None]
POPULARITY_WEIGHTS: Final = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
SEQUENCE_WEIGHTS: Final = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
PROFILE_WEIGHTS: Final = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
"""How loud the sequence tower and a history's texts may be, as multiples of the spread of the other scores."""


@dataclass(frozen=True)
class TowerConfig:
    """How the towers are built and trained; the defaults hold on the four real data sets (`tests/benchmarks/LOG.md`).

    `horizon`: how many of the next events are the answer to a history, in training and in validation; 1 for "what comes next".
    """

    dimension: int = 192
    text_block: int = 64
    history: int = 100
    ridge: float = 300.0
    epochs: int = 10
    patience: int = 2
    batch_size: int = 256
    horizon: int = 50
    item_learning_rate: float = 1e-4
    learning_rate: float = 1e-4
    history_dropout: float = 0.2
    uniform_negatives: int = 2000
    popular_negatives: int = 1000
    validation_users: float = 0.08
    validation_limit: int = 1000
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    seed: int = 0


@dataclass(frozen=True)
class Catalogue:
    """What is known of N items without any interaction: `content` (N, C) and `text` (N, T), both float32."""

    content: np.ndarray
    text: np.ndarray


@dataclass(frozen=True)
class Bases:
    """What content says of every item's taste, as history and as candidate: (N, D) each, the same for a whole training."""

    inner: torch.Tensor
    outer: torch.Tensor

    @classmethod
    def of(cls, network: TwoTowers, content: np.ndarray) -> Bases:
        inputs = torch.from_numpy(content)
        return cls(network.inner.base(inputs), network.outer.base(inputs))


def train_towers(
    catalogue: Catalogue,
    histories: Histories,
    config: TowerConfig,
    log: Log,
    checkpoints: Path | None = None,
    every_seconds: float = 60.0,
) -> Towers:
    """Trained towers over the catalogue; deterministic on the CPU for one seed. Raises InputError without any usable history.

    With a folder for `checkpoints` a training that was killed goes on where it was at most `every_seconds` before, and ends with
    the same bytes; the folder is removed at the end.
    """
    _check(catalogue, histories)
    kept = Checkpoints(checkpoints, "" if checkpoints is None else _key(catalogue, histories, config), every_seconds)
    random = np.random.default_rng(config.seed)
    learn, validate = _held_out(histories, config, random)
    questions = Questions.of(validate, config.horizon, 2 * config.validation_limit)
    shape = _shape(catalogue, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = _started(catalogue, learn, shape, config)
        bases = Bases.of(network, catalogue.content)
        facts = _fit(network, bases, learn, questions, config, random, log, kept)
        if config.sequence.rounds:
            tower = _sequence_tower(network, bases, learn, questions, config, random, log, kept)
            shape, network, quality = _joined(shape, network, tower, bases, learn, questions, catalogue.content, log)
            facts |= {"sequence_weight": network.loudness, "validation_recall_at_100": quality.recall}
        block = TextBlock.fit(catalogue.text, shape.text_block)
        quality = _weigh_profile(network, bases, block(catalogue.text), questions, log)
        facts |= {"validation_recall_at_100": quality.recall, "validation_users": len(validate.sequences)}
        towers = _finished(shape, network, catalogue, block, learn, facts, validate)
        towers = towers.with_cold_start(fit_cold_start(towers, catalogue.content, learn, questions, random, log))
    kept.forget()
    return towers


def _fit(
    network: TwoTowers,
    bases: Bases,
    learn: Histories,
    questions: Questions,
    config: TowerConfig,
    random: np.random.Generator,
    log: Log,
    kept: Checkpoints,
) -> dict[str, object]:
    """The training loop, written out. Leaves the best weights in `network`; the closed-form start competes as epoch 0."""
    usable = learn.usable()
    counts = learn.counts(len(bases.inner))
    sampler = NegativeSampler(counts, config.uniform_negatives, config.popular_negatives)
    optimizers = optimizers_of(network, config)
    stage = Stage("pooled", network, optimizers, random, kept)
    if not stage.resumed:
        stage.finish(0, _weigh_popularity(network, bases, counts, questions).recall)
        log({"towers/epoch": 0, "towers/validation_recall_at_100": stage.best})
    for number in range(stage.number + 1, config.epochs + 1 if usable.sequences else 1):
        if stage.tired(config.patience):
            break
        losses = []
        for batch in epoch(
            usable.sequences, usable.cuts, size=config.batch_size, length=config.history, horizon=config.horizon,
            exclude_seen=usable.exclude_seen, targets=usable.positive, random=random,
        ):  # fmt: skip
            loss = batch_loss(network, bases, batch, sampler, usable.exclude_seen, config, random)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in optimizers:
                optimizer.step()
            losses.append(float(loss.detach()))
        recall = _judge(network, bases, questions).recall
        log({"towers/epoch": number, "towers/loss": float(np.mean(losses)), "towers/validation_recall_at_100": recall})
        stage.finish(number, recall)
    network.load_state_dict(stage.best_state)
    return {"best_epoch": stage.best_number, "validation_recall_at_100": stage.best}


def _weigh_popularity(network: TwoTowers, bases: Bases, counts: np.ndarray, questions: Questions) -> Quality:
    """Give the start the weight of log popularity that has the best validation recall, and return what it reaches."""
    logs = torch.from_numpy(np.log1p(counts).astype(np.float32))
    reached = {}
    for weight in POPULARITY_WEIGHTS:
        network.popularity.data = logs * weight
        reached[weight] = _judge(network, bases, questions)
    best = max(reached, key=lambda weight: reached[weight].recall)
    network.popularity.data = logs * best
    return reached[best]


def _judge(network: TwoTowers, bases: Bases, questions: Questions) -> Quality:
    """Validation quality of the pooled taste with popularity, without a sequence tower."""
    with torch.inference_mode():
        inner, outer = network.inner(bases.inner), network.outer(bases.outer)
    history = len(network.user.recency)
    return questions.judge(
        lambda pasts: network.taste(torch.from_numpy(pad_left(pasts, history)), inner) @ outer.T + network.popularity
    )


def batch_loss(
    network: TwoTowers,
    bases: Bases,
    batch: Batch,
    sampler: NegativeSampler,
    exclude_seen: bool,
    config: TowerConfig,
    random: np.random.Generator,
) -> torch.Tensor:
    """Softmax loss of one batch; only the item rows that it needs are formed, and only they get a gradient."""
    kept = (batch.histories >= 0) & (random.random(batch.histories.shape) >= config.history_dropout)
    read = np.unique(batch.histories[kept])
    places = torch.from_numpy(np.where(kept, np.searchsorted(read, batch.histories), 0))
    user = network.user(network.inner.rows(bases.inner, torch.from_numpy(read)), places, torch.from_numpy(kept))
    drawn = sampler.draw(batch.items, random)
    chosen = torch.from_numpy(drawn.items)
    scores = user @ network.outer.rows(bases.outer, chosen).T + network.popularity[chosen]
    columns = torch.from_numpy(np.searchsorted(drawn.items, batch.items))
    hidden = torch.from_numpy(seen_columns(batch.histories, drawn.items)) if exclude_seen else None
    return sampled_softmax(scores, torch.from_numpy(drawn.log_expected), torch.from_numpy(batch.rows), columns, hidden)


def _sequence_tower(
    network: TwoTowers,
    bases: Bases,
    learn: Histories,
    questions: Questions,
    config: TowerConfig,
    random: np.random.Generator,
    log: Log,
    kept: Checkpoints,
) -> SequenceTower:
    """A sequence tower whose item vectors begin as the leading directions of the pooled ones."""
    width = min(config.sequence.width, config.dimension)
    with torch.inference_mode():
        start = (network.inner(bases.inner) + network.outer(bases.outer))[:, :width].numpy()
    return train_sequence(start, learn, questions, replace(config.sequence, width=width), random, log, kept)


def _joined(
    shape: TowerShape,
    network: TwoTowers,
    tower: SequenceTower,
    bases: Bases,
    learn: Histories,
    questions: Questions,
    content: np.ndarray,
    log: Log,
) -> tuple[TowerShape, TwoTowers, Quality]:
    """Both towers side by side, the sequence tower as loud as validation NDCG@100 wants it; without it where that is silence."""
    with torch.inference_mode():
        inner, outer = network.inner(bases.inner), network.outer(bases.outer)
        loudness = _loudness(network, tower, inner, outer, questions)

    def score(weight: float) -> Callable[[Sequence[np.ndarray]], torch.Tensor]:
        return lambda pasts: (
            network.taste(torch.from_numpy(pad_left(pasts, shape.history)), inner) @ outer.T
            + network.popularity
            + weight * loudness * sequence_scores(tower, pasts)
        )

    reached = {weight: questions.judge(score(weight)) for weight in SEQUENCE_WEIGHTS}
    best = max(reached, key=lambda weight: reached[weight].ndcg)
    log({"sequence/weight": best, "towers/validation_ndcg_at_100": reached[best].ndcg})
    if not best:
        return shape, network, reached[best]
    _fill_unseen(tower, learn, content)
    tower.weight.data = torch.tensor(best * loudness)
    network.sequence = tower
    width, layers = tower.items.shape[1], len(tower.blocks)
    shape = replace(shape, sequence=tower.length, width=width, layers=layers, heads=tower.heads)
    return shape, network, reached[best]


def _weigh_profile(network: TwoTowers, bases: Bases, words: np.ndarray, questions: Questions, log: Log) -> Quality:
    """Let the texts of a history (`words` (N, S)) speak in its query as loud as validation NDCG@100 wants them."""
    with torch.inference_mode():
        block = torch.from_numpy(words)
        inner = torch.cat([network.inner(bases.inner), block], dim=1)
        outer = network.whole_items(network.outer(bases.outer))
    network.profile.data = torch.ones(())

    def scores(pasts: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        taste, profile = network.whole_taste(torch.from_numpy(pad_left(pasts, len(network.user.recency))), inner)
        return taste @ outer.T + network.popularity, profile @ block.T

    def mixed(loud: float) -> Callable[[Sequence[np.ndarray]], torch.Tensor]:
        return lambda pasts: torch.add(*scores(pasts), alpha=loud)

    unit = 1.0
    if questions.pasts:
        with torch.inference_mode():
            rest, spoken = (float(each.std(1).mean()) for each in scores(questions.pasts[:200]))
        unit = rest / max(spoken, 1e-9)
    reached = {weight: questions.judge(mixed(weight * unit)) for weight in PROFILE_WEIGHTS}
    best = max(reached, key=lambda weight: reached[weight].ndcg)
    network.profile.data = torch.tensor(best * unit)
    log({"profile/weight": best, "towers/validation_ndcg_at_100": reached[best].ndcg})
    return reached[best]


def _loudness(network: TwoTowers, tower: SequenceTower, inner: torch.Tensor, outer: torch.Tensor, questions: Questions) -> float:
    """Spread of the pooled scores over the catalogue, as a multiple of the sequence tower's."""
    pasts = questions.pasts[:200]
    if not pasts:
        return 1.0
    histories = torch.from_numpy(pad_left(pasts, len(network.user.recency)))
    pooled = network.taste(histories, inner) @ outer.T + network.popularity
    return float(pooled.std(1).mean() / sequence_scores(tower, pasts).std(1).mean().clamp(min=1e-9))


def _fill_unseen(tower: SequenceTower, learn: Histories, content: np.ndarray) -> None:
    """Items that nobody has touched get the sequence vector that their content suggests."""
    counts = learn.counts(len(content))
    vectors = tower.items.detach().numpy()
    suggested = content @ content_map(content, vectors, counts)
    tower.items.data = torch.from_numpy(np.where(counts[:, None] > 0, vectors, suggested).astype(np.float32))


def _started(catalogue: Catalogue, learn: Histories, shape: TowerShape, config: TowerConfig) -> TwoTowers:
    network = TwoTowers(shape)
    counts = learn.counts(shape.items)
    inner, outer = warm_start(_matrix(learn, shape.items), shape.dimension, config.ridge, config.seed)
    seen = (counts > 0).astype(np.float32)[:, None]
    for tower, vectors in ((network.inner, inner), (network.outer, outer)):
        weights = content_map(catalogue.content, vectors, counts)
        tower.content.data = torch.from_numpy(weights)
        # An item nobody has touched keeps a zero id vector: it is what its content says.
        tower.id.data = torch.from_numpy((vectors - catalogue.content @ weights) * seen)
    return network


def optimizers_of(network: TwoTowers, config: TowerConfig) -> tuple[torch.optim.Optimizer, ...]:
    """One for the id vectors, which moves only the rows of a batch, and one for everything else that learns."""
    ids = [network.inner.id, network.outer.id]
    others = [value for name, value in network.named_parameters() if not name.startswith(("inner", "outer"))]
    return (
        torch.optim.SparseAdam(ids, lr=config.item_learning_rate),
        torch.optim.AdamW(others, lr=config.learning_rate, weight_decay=0.0),
    )


def _finished(
    shape: TowerShape,
    network: TwoTowers,
    catalogue: Catalogue,
    block: TextBlock,
    learn: Histories,
    facts: dict[str, object],
    sample: Histories,
) -> Towers:
    """The towers, whose cold start says nothing yet."""
    nothing = np.zeros((0, shape.content), np.float32), np.zeros((shape.content + 1, shape.dimension + 1), np.float32)
    cold = ColdStart(*nothing, learn.counts(shape.items) > 0)
    towers = Towers(shape, network, catalogue.content, catalogue.text, block, cold, facts | {"spread": 1.0})
    pasts = [sequence for sequence in sample.sequences[:200] if len(sequence)]
    scores = towers.query(pad_left(pasts, shape.history)) @ towers.item_vectors.T
    facts = facts | {"spread": float(scores.std(1).mean())}
    return Towers(shape, network, catalogue.content, catalogue.text, block, cold, facts)


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


def _key(catalogue: Catalogue, histories: Histories, config: TowerConfig) -> str:
    """What a training is made from, as a hash: another catalogue, another history or another setting is another training."""
    arrays = [catalogue.content, catalogue.text]
    for parts in (histories.sequences, histories.positive, histories.cuts):
        arrays += [np.array([len(part) for part in parts]), np.concatenate([np.asarray(part, np.int64) for part in parts])]
    hashes = [hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() for array in arrays]
    return content_hash({"config": asdict(config), "exclude_seen": histories.exclude_seen, "data": hashes})


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
