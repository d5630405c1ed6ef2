"""What held-out users were to be shown, and how well a scorer does it: what decides when to stop and how loud each part is.

In: histories of users that nothing was learned from. Out: mean recall@100 and NDCG@100 against the whole catalogue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from retrieval.batches import Histories, late_cut
from tandem.core.metrics import hit_matrix, ndcg_at_k, recall_at_k, truth_sizes

K: Final = 100
MOST_PER_USER: Final = 20
Scorer = Callable[[Sequence[np.ndarray]], torch.Tensor]
"""Histories -> scores (B, N)."""


@dataclass(frozen=True)
class Quality:
    """Means over the questions; 0 where there are none."""

    recall: float
    ndcg: float


@dataclass(frozen=True)
class Questions:
    """Parallel lists: a past, and the distinct dense ids that were to be found after it."""

    pasts: Sequence[np.ndarray]
    wanted: Sequence[np.ndarray]
    exclude_seen: bool

    @classmethod
    def of(cls, histories: Histories, horizon: int, most: int) -> Questions:
        """Users cut at 80% of their history and again every `horizon` events; `most` questions at most, evenly taken."""
        pasts, wanted = [], []
        for sequence, positive, cuts in zip(histories.sequences, histories.positive, histories.cuts, strict=True):
            for cut in _cuts(cuts, len(sequence), horizon):
                future = np.unique(sequence[cut : cut + horizon][positive[cut : cut + horizon]])
                if histories.exclude_seen:
                    future = np.setdiff1d(future, sequence[:cut])
                if len(future):
                    pasts.append(sequence[:cut])
                    wanted.append(future)
        taken = np.unique(np.linspace(0, max(0, len(pasts) - 1), min(most, len(pasts))).astype(int))
        return cls([pasts[place] for place in taken], [wanted[place] for place in taken], histories.exclude_seen)

    def judge(self, score: Scorer) -> Quality:
        """Mean recall@100 and NDCG@100 of `score`'s order; seen items are no answers where the source excludes them."""
        if not self.pasts:
            return Quality(0.0, 0.0)
        found = np.concatenate([self._best(score, self.pasts[at : at + 500]) for at in range(0, len(self.pasts), 500)])
        hits, sizes = hit_matrix(found, self.wanted), truth_sizes(self.wanted)
        return Quality(float(recall_at_k(hits, sizes, K).mean()), float(ndcg_at_k(hits, sizes, K).mean()))

    def _best(self, score: Scorer, pasts: Sequence[np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            scores = score(pasts).clone()
            if self.exclude_seen:
                rows = np.repeat(np.arange(len(pasts)), [len(past) for past in pasts])
                scores[torch.from_numpy(rows), torch.from_numpy(np.concatenate(pasts))] = -torch.inf
            best = scores.topk(min(K, scores.shape[1]), dim=1).indices.numpy()
        return np.pad(best, ((0, 0), (0, K - best.shape[1])), constant_values=-1)


def _cuts(cuts: np.ndarray, length: int, horizon: int) -> list[int]:
    """The late cut, then the first cut at least `horizon` events after the one before."""
    chosen = [late_cut(cuts, length)]
    for cut in cuts:
        if cut >= chosen[-1] + horizon and len(chosen) < MOST_PER_USER:
            chosen.append(int(cut))
    return chosen
