"""What comes next, given the order of what came before: a causal transformer over item vectors of its own.

It learns from every position of a history at once (SASRec: Kang & McAuley 2018, arXiv:1808.09781), by sampled softmax over many
shared negatives with logQ, which is what makes it strong (eSASRec: Tikhonovich et al. 2025, arXiv:2508.06450). Its score is an
inner product with the same item vectors that it reads, so it is one more block of the towers' vectors, and one index serves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from retrieval.batches import Histories, Window, pad_left, windows
from retrieval.checkpoint import Checkpoints, Stage
from retrieval.negatives import SharedNegatives
from retrieval.validate import Questions

Log = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class SequenceConfig:
    """How the sequence tower is built and trained. A round is one window of at most `length` events of at most `users` users."""

    width: int = 64
    layers: int = 2
    heads: int = 2
    length: int = 50
    dropout: float = 0.2
    rounds: int = 15
    patience: int = 3
    users: int = 4_000
    batch_size: int = 32
    negatives: int = 1_000
    learning_rate: float = 1e-3
    warm_up: int = 50
    near: float = 0.5
    start_length: float = 0.16


class Block(nn.Module):
    """Attention and a feed-forward part, normalised before each (pre-norm)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.before_attention, self.before_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.dropout = heads, dropout

    def forward(self, hidden: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """`hidden` (B, L, W); `allowed` (B, 1, L, L) bool: row may look at column."""
        size, steps, width = hidden.shape
        parts = self.project(self.before_attention(hidden)).view(size, steps, 3, self.heads, width // self.heads)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)
        hidden = hidden + self._drop(self.join(seen.transpose(1, 2).reshape(size, steps, width)))
        thought = self.down(functional.gelu(self.up(self.before_forward(hidden))))
        return hidden + self._drop(thought)

    def _drop(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.dropout(hidden, self.dropout, self.training)


class SequenceTower(nn.Module):
    """Item vectors (N, W) and the transformer that reads them; `weight` says how loud its scores are beside the other blocks'."""

    def __init__(self, items: int, width: int, layers: int, heads: int, length: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.items = nn.Parameter(torch.zeros(items, width))
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.weight = nn.Parameter(torch.ones(()), requires_grad=False)
        self.heads, self.dropout = heads, dropout

    @property
    def length(self) -> int:
        """How many of the last events it reads."""
        return len(self.position)

    def forward(self, histories: torch.Tensor) -> torch.Tensor:
        """Histories (B, L) int64, L <= length, padded on the left with -1 -> what is expected after each position, (B, L, W)."""
        present, steps = histories >= 0, histories.shape[1]
        hidden = self.items[histories.clamp(min=0)] * self.items.shape[1] ** 0.5 + self.position[-steps:]
        hidden = functional.dropout(hidden, self.dropout, self.training) * present[..., None]
        # A padded row may look at itself only: a softmax over nothing would be NaN.
        causal, itself = torch.ones(steps, steps, dtype=torch.bool).tril(), torch.eye(steps, dtype=torch.bool)
        allowed = ((causal & present[:, None, :]) | itself)[:, None]
        for block in self.blocks:
            hidden = block(hidden, allowed)
        normed: torch.Tensor = self.norm(hidden)
        return normed

    def last(self, histories: torch.Tensor) -> torch.Tensor:
        """What is expected after each whole history (B, H): (B, W); zeros without any history."""
        tail = histories[:, -self.length :]
        return self.forward(tail)[:, -1] * (tail[:, -1:] >= 0)


def train_sequence(
    start: np.ndarray,
    learn: Histories,
    questions: Questions,
    config: SequenceConfig,
    random: np.random.Generator,
    log: Log,
    kept: Checkpoints | None = None,
) -> SequenceTower:
    """The tower of the round with the best validation NDCG@100. `start` (N, width): vectors whose directions it begins with."""
    tower = _started(start, config)
    sampler = SharedNegatives(learn.counts(len(start)), config.negatives)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    stage = Stage("sequence", tower, (optimizer,), random, kept or Checkpoints(None))
    for number in range(stage.number + 1, config.rounds + 1):
        if stage.tired(config.patience):
            break
        tower.train()
        for window in windows(
            learn, users=config.users, size=config.batch_size, length=config.length, near=config.near, random=random
        ):
            loss = next_item_loss(tower, window, sampler, random)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
            group = optimizer.param_groups[0]
            group["lr"] = min(config.learning_rate, group["lr"] + config.learning_rate / config.warm_up)
            optimizer.step()
        quality = questions.judge(lambda pasts: sequence_scores(tower.eval(), pasts))
        log({"sequence/round": number, "sequence/loss": float(loss.detach()), "sequence/validation_ndcg_at_100": quality.ndcg})
        stage.finish(number, quality.ndcg)
    tower.load_state_dict(stage.best_state)
    return tower.eval()


def sequence_scores(tower: SequenceTower, pasts: Sequence[np.ndarray]) -> torch.Tensor:
    """(B, N): each history's inner products with all items, without the weight."""
    with torch.inference_mode():
        scores: torch.Tensor = tower.last(torch.from_numpy(pad_left(pasts, tower.length))) @ tower.items.T
    return scores


def next_item_loss(tower: SequenceTower, window: Window, sampler: SharedNegatives, random: np.random.Generator) -> torch.Tensor:
    """Mean softmax loss of every position that has a target, each against its own target and the batch's shared negatives."""
    wanted = torch.from_numpy(window.targets)
    asked = wanted >= 0
    expected, target = tower(torch.from_numpy(window.histories))[asked], wanted[asked]
    drawn = sampler.draw(random)
    negatives = torch.from_numpy(drawn.items)
    right = (expected * tower.items[target]).sum(1) - torch.from_numpy(sampler.log_expected(target.numpy()))
    wrong = expected @ tower.items[negatives].T - torch.from_numpy(drawn.log_expected)
    wrong = wrong.masked_fill(target[:, None] == negatives, -1e9)
    scores = torch.cat([right[:, None], wrong], dim=1)
    return functional.cross_entropy(scores, torch.zeros(len(target), dtype=torch.int64))


def _started(start: np.ndarray, config: SequenceConfig) -> SequenceTower:
    """Item vectors begin as the directions that the closed form found, short enough for the first softmax to be open."""
    tower = SequenceTower(len(start), config.width, config.layers, config.heads, config.length, config.dropout)
    norms = np.maximum(np.linalg.norm(start, axis=1, keepdims=True), 1e-6)
    noise = 0.005 * torch.randn(start.shape)
    tower.items.data = torch.from_numpy((start / norms * config.start_length).astype(np.float32)) + noise
    return tower
