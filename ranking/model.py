"""The network: a trunk (shared bottom or MMoE), one head per task, and a residual on the first stage's score.

In: base (P,) and inputs (P, D). Out: logits (M, T, P) of M ensemble members and T tasks:

    logitₜ = aₜ · base + bₜ + wₜ · inputs + headₜ(trunk(inputs))

Heads end in a layer of zeros, wₜ is zero and aₜ starts at 1, so the untrained network orders candidates exactly as the first
stage did, and training can only move away from that order where the data says so. The linear path wₜ beside the trunk is that of
Cheng et al. 2016, "Wide & Deep Learning for Recommender Systems" (arXiv:1606.07792): on a hundred users of goodbooks it lifted
NDCG@10 by 0.005, because what a good linear combination can say needs no hidden units to be learned.

The M members are one network with a leading dimension in every weight: they train at once, each as if alone (no parameter is
shared), and answer in a handful of batched matrix products. Their mean is used: on a few hundred requests the order that one
net learns depends on its seed, and averaging three removes most of that variance for a cost that small data does not notice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranking.tasks import NO_PARENT

TrunkKind = Literal["shared", "mmoe"]
Drop = Callable[[Tensor], Tensor]
_TOWER: int = 16


def keep_all(hidden: Tensor) -> Tensor:
    """No dropout: what serving uses."""
    return hidden


class RequestDropout:
    """Dropout whose mask is drawn once per request, not per candidate: candidates of a request meet the same sub-network, so the
    listwise loss compares like with like; and two hundred times fewer random numbers are drawn.
    """

    def __init__(self, rate: float, requests: int, index: Tensor, generator: torch.Generator) -> None:
        self._rate, self._requests, self._index, self._generator = rate, requests, index, generator

    def __call__(self, hidden: Tensor) -> Tensor:
        """(N, P, H) → the same shape, units zeroed at `rate` and the rest scaled up."""
        if not self._rate:
            return hidden
        draw = torch.rand(hidden.shape[0], self._requests, hidden.shape[2], generator=self._generator)
        mask = (draw >= self._rate).to(hidden.dtype) / (1.0 - self._rate)
        return hidden * mask[:, self._index]


class Linear(nn.Module):
    """N independent linear maps side by side: (N, P, I) → (N, P, O); He initialisation, or zeros."""

    def __init__(self, n: int, inputs: int, outputs: int, generator: torch.Generator | None) -> None:
        super().__init__()
        bound = math.sqrt(6.0 / max(inputs, 1))
        drawn = torch.zeros(n, inputs, outputs)
        self.weight = nn.Parameter(drawn if generator is None else drawn.uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.zeros(n, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class Layers(nn.Module):
    """N independent stacks of linear + ReLU (+ dropout): (N, P, I) → (N, P, hidden[-1])."""

    def __init__(self, n: int, inputs: int, hidden: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        sizes = (inputs, *hidden)
        self.stack = nn.ModuleList(Linear(n, i, o, generator) for i, o in pairwise(sizes))

    def forward(self, x: Tensor, drop: Drop) -> Tensor:
        for layer in self.stack:
            x = drop(F.relu(layer(x)))
        return x


class SharedBottom(nn.Module):
    """One body for all tasks (Caruana 1997, "Multitask Learning"): (M, P, D) → (M, T, P, H)."""

    def __init__(self, members: int, tasks: int, inputs: int, hidden: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.tasks = tasks
        self.body = Layers(members, inputs, hidden, generator)

    def forward(self, x: Tensor, drop: Drop) -> Tensor:
        body: Tensor = self.body(x, drop)
        return body.unsqueeze(1).expand(-1, self.tasks, -1, -1)


class MMoE(nn.Module):
    """Experts that all tasks share, mixed by one softmax gate per task: (M, P, D) → (M, T, P, H).

    Ma et al. 2018, "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts" (KDD). Gates start
    even, so that no expert is starved before it has learned anything.
    """

    def __init__(
        self, members: int, tasks: int, inputs: int, hidden: tuple[int, ...], experts: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.members, self.tasks, self.experts = members, tasks, experts
        self.body = Layers(members * experts, inputs, hidden, generator)
        self.gate = Linear(members, inputs, tasks * experts, None)

    def gates(self, x: Tensor) -> Tensor:
        """(M, P, D) → (M, T, P, E): how much of each expert each task takes, summing to 1."""
        scores: Tensor = self.gate(x)
        split = scores.view(self.members, -1, self.tasks, self.experts)
        return split.transpose(1, 2).softmax(-1)

    def forward(self, x: Tensor, drop: Drop) -> Tensor:
        spread = x.repeat_interleave(self.experts, dim=0)
        body = self.body(spread, drop)
        experts = body.view(self.members, self.experts, body.shape[1], body.shape[2])
        return torch.einsum("mtpe,meph->mtph", self.gates(x), experts)


class RankerNet(nn.Module):
    """Trunk, heads and residual of all members: base (P,), inputs (P, D) → logits (M, T, P)."""

    def __init__(
        self,
        *,
        trunk: TrunkKind,
        members: int,
        inputs: int,
        hidden: tuple[int, ...],
        experts: int,
        base_logits: tuple[float, ...],
        parents: tuple[int, ...],
        generator: torch.Generator,
    ) -> None:
        """`base_logits` (T): each head's logit before training (of its base rate); `parents` (T): see `chain`."""
        super().__init__()
        tasks = len(base_logits)
        self.members, self.tasks, self.parents = members, tasks, parents
        self.trunk: SharedBottom | MMoE = (
            SharedBottom(members, tasks, inputs, hidden, generator)
            if trunk == "shared"
            else MMoE(members, tasks, inputs, hidden, experts, generator)
        )
        self.tower = Linear(members * tasks, hidden[-1], _TOWER, generator)
        self.head = Linear(members * tasks, _TOWER, 1, None)
        self.wide = Linear(members * tasks, inputs, 1, None)
        self.slope = nn.Parameter(torch.ones(members, tasks, 1))
        self.offset = nn.Parameter(torch.tensor(base_logits, dtype=torch.float32).repeat(members, 1).unsqueeze(-1))

    def forward(self, base: Tensor, x: Tensor, drop: Drop = keep_all) -> Tensor:
        body = self.trunk(x.unsqueeze(0).expand(self.members, -1, -1), drop)
        wide = self.wide(x.unsqueeze(0).expand(self.members * self.tasks, -1, -1))
        tower = F.relu(self.tower(body.reshape(self.members * self.tasks, body.shape[2], body.shape[3])))
        residual = (self.head(tower) + wide).view(self.members, self.tasks, x.shape[0])
        return chain(self.slope * base + self.offset + residual, self.parents)


def chain(logits: Tensor, parents: tuple[int, ...]) -> Tensor:
    """Logits (M, T, P) of p(task | parent) → those of p(parent) · p(task | parent); parents come first (arXiv:1804.07931)."""
    if all(parent == NO_PARENT for parent in parents):
        return logits
    out: list[Tensor] = []
    for task, parent in enumerate(parents):
        own = logits[:, task]
        out.append(own if parent == NO_PARENT else _both(out[parent], own))
    return torch.stack(out, dim=1)


def _both(left: Tensor, right: Tensor) -> Tensor:
    """logit(σ(left) · σ(right)) without leaving the log domain."""
    log_p = (F.logsigmoid(left) + F.logsigmoid(right)).clamp(max=-1e-6)
    return log_p - torch.log(-torch.expm1(log_p))
