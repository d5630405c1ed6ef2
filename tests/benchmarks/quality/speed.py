"""Examples per CPU second: our training step beside a plain torch loop that forms every item's vector and moves every row.

Same batches, same negatives, same sizes, one process; an example is one target. The plain loop is what most two-tower code does:
an embedding table per side, gather and mean, dense Adam.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import torch
from data import Case, unordered
from ours import TowerConfig, histories

from retrieval.batches import Batch, epoch
from retrieval.loss import sampled_softmax
from retrieval.negatives import NegativeSampler
from retrieval.towers import TowerShape, TwoTowers
from retrieval.train import Bases, batch_loss, optimizers_of

STEPS, WARM = 40, 5


def report(scratch: Path, name: str = "goodbooks") -> None:
    case = unordered(name, scratch)
    config = TowerConfig()
    learn = histories(case)
    sampler = NegativeSampler(learn.counts(case.items), config.uniform_negatives, config.popular_negatives)
    batches = list(
        itertools.islice(
            epoch(
                learn.sequences, learn.cuts, size=config.batch_size, length=config.history, horizon=config.horizon,
                exclude_seen=learn.exclude_seen, targets=None, random=np.random.default_rng(0),
            ),
            STEPS + WARM,
        )
    )  # fmt: skip
    ours, plain = _ours(case, config, sampler, batches), _plain(case, config, sampler, batches)
    print(f"\n| {name}, {STEPS} steps of {config.batch_size} users, {case.items:,} items | examples / CPU s | |")
    print("|---|---|---|")
    print(f"| plain torch loop | {plain:,.0f} | 1.00 x |\n| towers | {ours:,.0f} | {ours / plain:.2f} x |", flush=True)


def _timed(step: object, batches: list[Batch]) -> float:
    """Targets per CPU second over the batches after the warm-up."""
    for batch in batches[:WARM]:
        step(batch)  # type: ignore[operator]
    began = time.process_time()
    for batch in batches[WARM:]:
        step(batch)  # type: ignore[operator]
    return sum(len(batch.rows) for batch in batches[WARM:]) / (time.process_time() - began)


def _ours(case: Case, config: TowerConfig, sampler: NegativeSampler, batches: list[Batch]) -> float:
    random = np.random.default_rng(1)
    shape = TowerShape(case.items, case.content.shape[1], case.text.shape[1], config.dimension, config.text_block, config.history)
    network = TwoTowers(shape)
    for tower in (network.inner, network.outer):
        torch.nn.init.normal_(tower.id, std=0.05)
    bases, optimizers = Bases.of(network, case.content), optimizers_of(network, config)

    def step(batch: Batch) -> None:
        loss = batch_loss(network, bases, batch, sampler, case.exclude_seen, config, random)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    return _timed(step, batches)


def _plain(case: Case, config: TowerConfig, sampler: NegativeSampler, batches: list[Batch]) -> float:
    content = torch.from_numpy(case.content)
    tables = torch.nn.ModuleList(torch.nn.Embedding(case.items, config.dimension) for _ in range(2))
    maps = torch.nn.ModuleList(torch.nn.Linear(case.content.shape[1], config.dimension, bias=False) for _ in range(2))
    optimizer = torch.optim.AdamW([*tables.parameters(), *maps.parameters()], lr=1e-3)
    random = np.random.default_rng(1)

    def step(batch: Batch) -> None:
        inner, outer = (table.weight + along(content) for table, along in zip(tables, maps, strict=True))
        past = torch.from_numpy(batch.histories)
        present = (past >= 0)[..., None]
        user = (inner[past.clamp(min=0)] * present).sum(1) / present.sum(1).clamp(min=1)
        drawn = sampler.draw(batch.items, random)
        scores = user @ outer[torch.from_numpy(drawn.items)].T
        columns = torch.from_numpy(np.searchsorted(drawn.items, batch.items))
        loss = sampled_softmax(scores, torch.from_numpy(drawn.log_expected), torch.from_numpy(batch.rows), columns)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return _timed(step, batches)
