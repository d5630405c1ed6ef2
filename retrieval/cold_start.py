"""Items that nobody has touched: taste and popularity from what they say about themselves.

In: trained towers, contents, histories. Out: a map from content to the coordinates that an index needs: a ridge regression on the
vectors of known items, from content and from how near it is to that of the items most touched (a subset of regressors,
https://gaussianprocess.org/gpml, 8.3.1), since the next book of a series wants what the last one had. Regression shrinks what it
is unsure of, so its new items come up too seldom or too often beside known ones. Hence some known items, the share that is new,
are treated as if they were new, and say how much has to be added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from retrieval.batches import Histories, pad_left
from retrieval.validate import K, Quality, Questions
from retrieval.warm_start import content_map

if TYPE_CHECKING:
    from retrieval.towers import Towers

Log = Callable[[dict[str, float]], None]
RIDGE: Final = 30.0
MOST_LOST: Final = 0.015
"""Share of known items' NDCG@100 that new ones may cost: few people are asked, and 2% is what is bearable."""

LANDMARKS: Final = 2000
_POWER: Final = 3
"""Of a cosine: near is what counts."""

_MOST_ROWS: Final = 50_000
_BLOCK: Final = 10_000
_APART: Final = (0.05, 0.3)
_SILENT: Final = 1e9
_QUANTILES: Final = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8)


@dataclass(frozen=True)
class ColdStart:
    """What content says of items that nobody has touched.

    `landmarks` (L, C): contents of known items, as unit rows; `map` (C + 1 + L, D + 1): from content, 1 and nearness to each
    landmark to taste and popularity; `touched` (N,) bool: the items of the catalogue that speak for themselves.
    """

    landmarks: np.ndarray
    map: np.ndarray
    touched: np.ndarray

    def __call__(self, content: np.ndarray) -> np.ndarray:
        """Taste and popularity (n, D + 1) of contents (n, C)."""
        said = np.empty((len(content), self.map.shape[1]), np.float32)
        for start in range(0, len(content), _BLOCK):
            part = slice(start, start + _BLOCK)
            said[part] = _inputs(content[part], self.landmarks) @ self.map
        return said

    def instead(self, taste: np.ndarray, content: np.ndarray, touched: np.ndarray) -> np.ndarray:
        """`taste` (n, D + 1), with what `content` (n, C) says in the rows that are not `touched` (n,)."""
        if touched.all():
            return taste
        whole = taste.copy()
        whole[~touched] = self(content[~touched])
        return whole

    def louder(self, shift: float) -> ColdStart:
        """The same with `shift` added to the popularity of new items."""
        map_ = self.map.copy()
        map_[-len(self.landmarks) - 1, -1] += shift
        return replace(self, map=map_)


def _inputs(content: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """(n, C + 1 + L) float32: what the map is multiplied with."""
    return np.concatenate([content, np.ones((len(content), 1), np.float32), (_unit(content) @ landmarks.T) ** _POWER], axis=1)


def _unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9), np.float32)


def fit_cold_start(
    towers: Towers, content: np.ndarray, learn: Histories, questions: Questions, random: np.random.Generator, log: Log
) -> ColdStart:
    """The map of all items that `learn` touches; `questions`, of people that nothing was learned from, say how loud it speaks."""
    counts, width = learn.counts(len(content)), towers.shape.dimension + 1
    known = np.flatnonzero(counts)

    def regression(rows: np.ndarray) -> ColdStart:
        most = rows[np.argsort(-counts[rows], kind="stable")[:_MOST_ROWS]]
        landmarks = _unit(content[most[:LANDMARKS]])
        map_ = content_map(_inputs(content[most], landmarks), towers.item_vectors[most, :width], counts[most], RIDGE)
        return ColdStart(landmarks, map_, counts > 0)

    apart = np.sort(random.permutation(known)[: int(len(known) * _share_apart(counts))])
    vectors = towers.item_vectors.copy()
    vectors[apart, :width] = regression(np.setdiff1d(known, apart))(content[apart])
    vectors[counts == 0, :width] = 0.0
    return regression(known).louder(_louder(towers, vectors, apart, questions, log))


def _share_apart(counts: np.ndarray) -> float:
    """Share of the known items to be treated as new: that of the new ones, within `_APART`."""
    return float(np.clip(np.mean(counts == 0), *_APART))


def _louder(towers: Towers, vectors: np.ndarray, apart: np.ndarray, questions: Questions, log: Log) -> float:
    """What to add to the popularity of new items: the best recall@100 over all items among what costs known ones little.

    `vectors` (N, Q): items as they are, those of `apart` as if they were new.
    """
    about_new, about_known = (_about(questions, np.isin(np.arange(len(vectors)), apart) == new) for new in (True, False))
    if not about_new.pasts:
        return 0.0
    popularity = towers.shape.dimension

    def quality(asked: Questions, shift: float) -> Quality:
        shifted = vectors.copy()
        shifted[apart, popularity] += shift

        def score(pasts: Sequence[np.ndarray]) -> torch.Tensor:
            return torch.from_numpy(towers.query(pad_left(pasts, towers.shape.history)) @ shifted.T)

        return asked.judge(score)

    alone = quality(about_known, -_SILENT).ndcg
    reached: dict[float, float] = {}
    lacking = _shifts(towers.query(pad_left(about_new.pasts, towers.shape.history)) @ vectors.T, about_new.wanted)
    for shift in sorted((0.0, *lacking)):
        if reached and quality(about_known, shift).ndcg < (1 - MOST_LOST) * alone:
            break
        reached[shift] = quality(questions, shift).recall
    best = max(reached, key=lambda shift: (reached[shift], -abs(shift)))
    before, after = (quality(about_new, shift).recall for shift in (0.0, best))
    log({"cold/louder": best, "cold/recall_at_100": after, "cold/recall_at_100_before": before})
    return best


def _shifts(scores: np.ndarray, wanted: Sequence[np.ndarray]) -> list[float]:
    """What the answers `wanted` lack to be among the best 100 of their row of `scores` (B, N): quantiles, ascending."""
    place = min(K, scores.shape[1])
    last = -np.partition(-scores, place - 1, axis=1)[:, place - 1]
    gaps = np.concatenate([last[row] - scores[row, own] for row, own in enumerate(wanted)])
    return [float(gap) for gap in np.quantile(gaps, _QUANTILES)]


def _about(questions: Questions, items: np.ndarray) -> Questions:
    """The questions whose answers are among `items` (N,) bool, with only these as answers."""
    wanted = [each[items[each]] for each in questions.wanted]
    asked = [place for place, each in enumerate(wanted) if len(each)]
    return Questions([questions.pasts[at] for at in asked], [wanted[at] for at in asked], questions.exclude_seen)
