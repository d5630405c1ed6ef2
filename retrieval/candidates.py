"""Several sources -> one list of candidates per request: unique, eligible, and never fewer than k while k items are eligible.

In: a batch of requests (query vectors, histories, what to leave out) and the sources. Out: `Candidates`, where every item carries
its score and rank from each source that returned it. Spine: every source answers -> what is barred is struck out -> merge.
"Popular" is always asked last; because it can name any k eligible items, the merged list is full whenever that is possible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from retrieval.checks import MAX_K
from retrieval.merge import Candidates, merge, stacked
from retrieval.query_batch import Answer, Mask, QueryBatch, removed_by
from retrieval.sources import POPULAR, CandidateSource, RankedSource, is_eligible, strike
from tandem.core.errors import InputError

__all__ = ["CandidateConfig", "Candidates", "Trace", "retrieve", "trace"]

_BLOCK_CELLS: Final = 4_000_000
_BLOCK_ROWS: Final = 1_024


@dataclass(frozen=True)
class CandidateConfig:
    """`k` candidates per request, of which each source is sure of a share for its own best (`shares`, at most 1 in all)."""

    k: int = 200
    shares: Mapping[str, float] = field(
        default_factory=lambda: {"towers": 0.5, "covisit": 0.2, "history": 0.1, "new": 0.05, "category": 0.05, POPULAR: 0.1}
    )

    def __post_init__(self) -> None:
        if not 1 <= self.k <= MAX_K:
            raise InputError(f"k = {self.k} candidates is outside 1..{MAX_K:,}; 200 is the default")
        total = sum(self.shares.values())
        if min(self.shares.values(), default=0) < 0 or total > 1 + 1e-9:
            raise InputError(
                f"candidate shares {dict(self.shares)} add up to {total:g}; use shares of 0 or more, at most 1 in all"
            )

    def quotas(self, names: Sequence[str]) -> dict[str, int]:
        """Guaranteed slots of each source that is there."""
        return {name: int(self.shares.get(name, 0.0) * self.k + 1e-9) for name in names}


def retrieve(batch: QueryBatch, sources: Sequence[CandidateSource], popular: RankedSource, config: CandidateConfig) -> Candidates:
    """Ask every source, popular last, and merge. Order of the answer: first source's items by its ranks, then the next one's."""
    everyone = _with_popular(sources, popular)
    quotas = config.quotas([source.name for source in everyone])
    step = min(_BLOCK_ROWS, max(16, _BLOCK_CELLS // max(popular.items, 1)))
    starts = range(0, max(len(batch), 1), step)
    return stacked(
        [_retrieve_block(batch.rows(start, start + step), everyone, popular.items, quotas, config.k) for start in starts]
    )


@dataclass(frozen=True)
class Trace:
    """What became of one item in one request: `removed` is None for a candidate, else the reason; `position` counts from 0.

    `found`: per source that knows the item within the depth searched, its rank and score.
    """

    item: int
    removed: str | None
    position: int | None
    found: dict[str, tuple[int, float]]


def trace(
    batch: QueryBatch,
    request: int,
    item: int,
    sources: Sequence[CandidateSource],
    popular: RankedSource,
    config: CandidateConfig,
    depth: int = 1_000,
) -> Trace:
    """Why `item` is, or is not, a candidate of request number `request`; sources are searched down to rank `depth`.

    `removed` is what `removed_by` says, or "not found" (no source has it within the depth), "too deep" (sources have it, but
    beyond rank k) or "crowded out" (a source returned it, and other items took the room).
    """
    one = batch.rows(request, request + 1)
    reason = removed_by(one, 0, item, popular.items)
    if reason is not None:
        return Trace(item, reason, None, {})
    found = {
        source.name: _place(source.candidates(one, max(depth, config.k)), item) for source in _with_popular(sources, popular)
    }
    known = {name: place for name, place in found.items() if place is not None}
    position = np.flatnonzero(retrieve(one, sources, popular, config).ids[0] == item)
    if len(position):
        return Trace(item, None, int(position[0]), known)
    near = any(rank < config.k for rank, _ in known.values())
    return Trace(item, "crowded out" if near else "too deep" if known else "not found", None, known)


def _with_popular(sources: Sequence[CandidateSource], popular: RankedSource) -> list[CandidateSource]:
    everyone = [*sources, popular]
    names = [source.name for source in everyone]
    if len(set(names)) < len(names):
        raise InputError(f"candidate sources {names} share a name; give each its own, and popular only once")
    return everyone


def _retrieve_block(
    batch: QueryBatch, sources: Sequence[CandidateSource], items: int, quotas: Mapping[str, int], k: int
) -> Candidates:
    barred = batch.barred(items)
    return merge({source.name: _checked(source.candidates(batch, k), barred, k) for source in sources}, quotas, k)


def _checked(answer: Answer, barred: Mask, k: int) -> Answer:
    """No source is trusted with the invariant: whatever is barred is struck out here at the latest."""
    scores, ids = answer
    return strike(scores, ids, barred, k) if (is_eligible(ids, barred) != (ids >= 0)).any() else answer


def _place(answer: Answer, item: int) -> tuple[int, float] | None:
    scores, ids = answer
    rank = np.flatnonzero(ids[0] == item)
    return (int(rank[0]), float(scores[0, rank[0]])) if len(rank) else None
