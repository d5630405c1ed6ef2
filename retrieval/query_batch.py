"""A batch of requests to candidate sources: query vectors, histories, and what must not be returned to whom.

In: arrays over B requests and masks over N items. Out: `QueryBatch`, which says for every request which items are barred.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tandem.core.errors import IncompatibleError

Floats: TypeAlias = NDArray[np.float32]
Ids: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]
Answer: TypeAlias = tuple[Floats, Ids]
"""Scores (B, k) float32 and ids (B, k) int64, best first, -inf and -1 as padding."""


@dataclass(frozen=True, eq=False)
class QueryBatch:
    """B requests over N items. Ids are dense item ids.

    `vectors` (B, D) float32; `history` (B, H) int64, oldest first, padded with -1 on the left; `exclude`: per request the ids
    that must not be returned (seen or removed); `allowed` (N,) bool and the named masks in `filters` hold for the whole batch.
    """

    vectors: Floats
    history: Ids
    exclude: Sequence[Ids]
    allowed: Mask | None = None
    filters: Mapping[str, Mask] = field(default_factory=dict)
    _barred: dict[int, Mask] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = {"vectors": len(self.vectors), "history": len(self.history), "exclude": len(self.exclude)}
        if len(set(sizes.values())) != 1:
            raise IncompatibleError(f"a batch's parts differ in length: {sizes}; give one row of each per request")

    def __len__(self) -> int:
        return len(self.history)

    def rows(self, start: int, end: int) -> QueryBatch:
        """The requests start..end-1."""
        return QueryBatch(self.vectors[start:end], self.history[start:end], self.exclude[start:end], self.allowed, self.filters)

    def eligible(self) -> Mask | None:
        """(N,) bool: allowed and passed by every filter; None when nothing is filtered."""
        masks = [mask for mask in (self.allowed, *self.filters.values()) if mask is not None]
        return np.logical_and.reduce(masks) if masks else None

    def excluded(self) -> tuple[Ids, Ids]:
        """(rows, ids) of everything excluded, flat."""
        rows = np.repeat(np.arange(len(self)), [len(ids) for ids in self.exclude])
        return rows, np.concatenate([np.empty(0, np.int64), *self.exclude]).astype(np.int64)

    def barred(self, items: int) -> Mask:
        """(B, N) bool: what must not be returned to each request. Made once, all sources ask for it."""
        if items not in self._barred:
            self._barred[items] = self._bar(items)
        return self._barred[items]

    def _bar(self, items: int) -> Mask:
        eligible = self.eligible()
        if eligible is not None and eligible.shape != (items,):
            raise IncompatibleError(
                f"the batch filters {eligible.shape} items but the source holds {items}; use one release's parts"
            )
        barred = np.zeros((len(self), items), np.bool_)
        if eligible is not None:
            barred[:] = ~eligible
        rows, ids = self.excluded()
        known = (ids >= 0) & (ids < items)
        barred[rows[known], ids[known]] = True
        return barred


def removed_by(batch: QueryBatch, request: int, item: int, items: int) -> str | None:
    """Name of the filter that bars `item` from request number `request`: "unknown", "allowed", a filter's name or "excluded"."""
    if not 0 <= item < items:
        return "unknown"
    if batch.allowed is not None and not batch.allowed[item]:
        return "allowed"
    for name, mask in batch.filters.items():
        if not mask[item]:
            return name
    return "excluded" if item in batch.exclude[request] else None
