"""What `POST /v1/retrieve` answers: candidates before any ranking, with who named them and what the filters removed.

In: the candidates of one request. Out: `Retrieved`, best tower score first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrieval.candidates import Candidates


@dataclass(frozen=True)
class Named:
    """A source named the item at this rank (from 1), with a score of the source's own kind (higher is better)."""

    rank: int
    score: float


@dataclass(frozen=True)
class RetrievedItem:
    """One candidate: `score` is the towers' inner product, whoever named it."""

    item_id: str
    title: str
    score: float
    sources: dict[str, Named]


@dataclass(frozen=True)
class Retrieved:
    """Candidates of one request. Of the catalogue `eligible` items could be returned, after each filter `removed` its own."""

    items: tuple[RetrievedItem, ...]
    release: str
    request_id: str
    index: str
    eligible: int
    removed: dict[str, int]
    degraded: tuple[str, ...]
    took_ms: dict[str, float]
    cold_start: bool = False
    truncated: bool = False


def retrieved_items(
    found: Candidates, scores: NDArray[np.float32], item_ids: Sequence[str], titles: Sequence[str]
) -> tuple[RetrievedItem, ...]:
    """The candidates of the first request, best score first; `scores`, `item_ids` and `titles` go with its k columns."""
    order = np.argsort(-scores, kind="stable").tolist()
    return tuple(RetrievedItem(item_ids[at], titles[at], float(scores[at]), _named(found, at)) for at in order)


def _named(found: Candidates, at: int) -> dict[str, Named]:
    ranks = {name: found.ranks[name][0, at] for name in found.names}
    return {name: Named(int(rank) + 1, float(found.scores[name][0, at])) for name, rank in ranks.items() if np.isfinite(rank)}
