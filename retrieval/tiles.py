"""Which items score near the k best of each query: a scan in tiles that keeps only what may matter, for any matrix product.

Items go through in tiles small enough for the processor's cache, multiplied with a block of queries. Of each tile only the maxima
of 16 items are compared with the query's running k-th best score; groups that reach it are read while they are in the cache, and
whenever enough has come together, it raises that k-th best. So nearly all the time goes into the matrix product.

In: a function that fills a tile with scores. Out: `Near`: loose (query, id, score) triples that hold the k best of each query and
whatever else scores at most `slack` below the k-th best: room for scores that are only estimates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from retrieval.checks import Floats, Mask
from retrieval.topk import best_keys, pack, unpack

Ids = NDArray[np.int64]
Product = Callable[[int, int, Any], None]
"""product(start, end, out): write the scores of the items start..end-1 into `out` (end - start, B)."""

TILE: Final = 2_048
_GROUP: Final = 16
_LOOK_AT: Final = 32
_MOST_LOOKS: Final = 8
_TOO_MANY: Final = 64
_LOWEST: Final = float(np.finfo(np.float32).min)
_LOWEST_WHOLE: Final = -2_000_000_000


class TooManyError(Exception):
    """The slack keeps so many items that estimating them saves nothing; never leaves `retrieval`."""


@dataclass(frozen=True, eq=False)
class Near:
    """Loose triples, each (n,): number of the query, id of the item, score float32; in no order, no pair twice."""

    queries: Ids
    ids: Ids
    scores: Floats


def scan(
    product: Product, tile: Any, first: int, last: int, k: int, allowed: Mask | None = None, slack: Floats | None = None
) -> Near:
    """Everything that scores within `slack` (B,) of the k-th best of the items first..last-1, of those in `allowed` (N,).

    `tile` (T, B), a tensor of float32 or int32, is the room to work in; T is a multiple of 16. Raises TooManyError when much
    more than k items per query come together, which happens only where so many scores lie within the slack.
    """
    import torch

    near = _Running(tile.shape[1], k, tile.dtype.is_floating_point, slack)

    def fill(start: int) -> None:
        end = min(start + len(tile), last)
        product(start, end, tile[: end - start])
        tile[end - start :] = near.barred
        if allowed is not None:
            tile[np.flatnonzero(~allowed[start:end])] = near.barred

    starts = range(first, last, len(tile))
    looks = min(len(starts) // _LOOK_AT, _MOST_LOOKS)
    if looks:
        near.expect(torch.cat([_maxima(fill, start, tile) for start in starts[:looks]]))
    for start in starts:
        fill(start)
        if start == first and not looks:
            near.expect(_groups(tile).amax(1))
        near.take(start, *_reaching(tile, near.least))
        if slack is not None and near.size > _TOO_MANY * k * tile.shape[1]:
            raise TooManyError
    return near.settled()


def _maxima(fill: Callable[[int], None], start: int, tile: Any) -> Any:
    """Maxima (G, B) of a tile's groups. The k-th best of such maxima bounds the k-th best score of all: k items reach it."""
    fill(start)
    return _groups(tile).amax(1)


def _groups(tile: Any) -> Any:
    return tile.view(-1, _GROUP, tile.shape[1])


def _reaching(tile: Any, least: Any) -> tuple[Ids, Ids, Floats]:
    """(row in the tile, query, score) of every score (T, B) that is at least `least` (B,): groups first, then within them."""
    groups = _groups(tile)
    group, query = _true_places(groups.amax(1) >= least)
    values = groups[group, :, query]
    pair, place = _true_places(values >= least[query, None])
    return group[pair] * _GROUP + place, query[pair], values[pair, place].float().numpy()


def _true_places(mask: Any) -> tuple[Ids, Ids]:
    """Rows and columns of what is true: by numpy, which passes over what is false in a fifth of torch's time."""
    row, column = np.divmod(np.flatnonzero(mask.numpy()), mask.shape[1])
    return row, column


class _Running:
    """What was kept so far. A score counts from `least` (B,) on; `barred` is what an item gets that may not be found."""

    def __init__(self, queries: int, k: int, real: bool, slack: Floats | None) -> None:
        import torch

        self.barred: float = -np.inf if real else torch.iinfo(torch.int32).min
        self._lowest: float = _LOWEST if real else _LOWEST_WHOLE
        self._real = real
        self.least = (
            torch.full((queries,), self._lowest) if real else torch.full((queries,), int(self._lowest), dtype=torch.int32)
        )
        self.size = 0
        self._none = pack(np.full((queries, k), -np.inf, np.float32), np.zeros((queries, k), np.int64))
        self._slack = slack
        self._kept = Near(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
        self._new: list[Near] = []

    def expect(self, scores: Any) -> None:
        """Begin with the k-th best of those scores (n, B) of different items, where there are k."""
        import torch

        k = self._none.shape[1]
        if k <= len(scores):
            self._raise(torch.topk(scores, k, dim=0).values[-1].float().numpy())

    def take(self, start: int, rows: Ids, queries: Ids, scores: Floats) -> None:
        """Note scores of the items start + rows; tiles come by ascending id."""
        self._new.append(Near(queries, rows + start, scores))
        self.size += len(rows)
        if self.size > max(2 * len(self._kept.ids), self._none.size):
            self.settled()

    def settled(self) -> Near:
        """Merge what is new, and leave out what no longer counts. A later item must beat the k-th best, unless there is slack."""
        import torch

        parts = [self._kept, *self._new]
        near = Near(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("queries", "ids", "scores")))
        kth, _ = unpack(best_keys(self._none, near.queries, pack(near.scores, near.ids))[:, -1])
        counts = near.scores >= self._raise(kth)[near.queries]
        self._kept = Near(near.queries[counts], near.ids[counts], near.scores[counts])
        self._new, self.size = [], len(self._kept.ids)
        if self._slack is None:
            self.least = torch.nextafter(self.least, torch.tensor(torch.inf))
        return self._kept

    def _raise(self, kth: Floats) -> Floats:
        """Let scores count from what the k-th best ones (B,) leave room for; in the tile's own type, which compares quickest."""
        import torch

        bound = np.maximum(kth if self._slack is None else kth - self._slack, np.float32(self._lowest))
        self.least = torch.from_numpy(bound if self._real else np.ceil(bound).astype(np.int32))
        return bound
