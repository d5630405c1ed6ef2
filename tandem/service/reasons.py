"""A slate's items with a reason each: like something of the history, close to the words, popular, new, of a favourite category.

In: the ranked candidates of one request. Out: `SlateItem`s.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from ranking.explain import Evidence, reason
from retrieval.candidates import Candidates
from retrieval.listing import Listing
from retrieval.retriever import Queries
from tandem.core.schema import MICROSECONDS_PER_DAY, to_us
from tandem.service.assemble import Users
from tandem.service.parts import Parts
from tandem.service.slate import SlateItem


class Reasons:
    """Explains slates of one release."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._popularity = _percentiles(parts.retriever.counts)

    @property
    def _now(self) -> Listing:
        return self._parts.retriever.listing

    def items(
        self,
        users: Users,
        found: Candidates,
        order: NDArray[np.int64],
        propensity: NDArray[np.float64],
        scores: NDArray[np.float32],
        predictions: Mapping[str, NDArray[np.float32]],
        queries: Queries,
        now: datetime,
    ) -> tuple[SlateItem, ...]:
        """The candidates at the places `order` (k,), which is their order on the slate."""
        items = []
        nearest = self._nearest_history(users, found.ids[0, order])
        close = self.close_to_words(queries, found.ids[0, order])
        for place, at in enumerate(order.tolist()):
            row = int(found.ids[0, at])
            why = reason(self._evidence(row, nearest[place], None if close is None else float(close[place]), users, now))
            items.append(
                SlateItem(
                    self._now.item_id(row), self._now.title(row), self._now.categories(row), float(scores[at]),
                    {name: float(values[at]) for name, values in predictions.items()}, why.sentence, why.code,
                    found.names[int(found.source[0, at])], place + 1, float(propensity[place]),
                )
            )  # fmt: skip
        return tuple(items)

    def _nearest_history(self, users: Users, items: NDArray[np.int64]) -> list[tuple[str, float] | None]:
        """Per item the most similar of the last 20 history items, by text: its title and their cosine."""
        history = users.histories[0]
        history = history[history >= 0]
        history = history[self._now.listed[history]][-20:]  # a deleted item is not spoken of
        if not len(history):
            return [None] * len(items)
        cosine = self._now.text_vectors(items) @ self._now.text_vectors(history).T
        cosine[items[:, None] == history[None, :]] = -1.0
        best = cosine.argmax(1)
        return [(self._now.title(history[at]), float(cosine[place, at])) for place, at in enumerate(best)]

    def close_to_words(self, queries: Queries, items: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """(len(items),) cosine of each item's text and the request's sentence; None without a sentence."""
        if queries.sentences is None:
            return None
        towers = self._parts.retriever.towers
        words = self._parts.retriever.vectors(queries)[0, towers.shape.dimension + 1 :]
        return np.asarray(self._now.text_vectors(items) @ (words / (np.linalg.norm(words) + 1e-9)), np.float32)

    def _evidence(self, row: int, near: tuple[str, float] | None, close: float | None, users: Users, now: datetime) -> Evidence:
        since = self._now.available_us(row)
        codes, shares = users.context.top_categories[0], users.context.category_shares[0]
        names = self._parts.assembler.catalogue.category_code
        share = {name: float(shares[codes == names[name]].sum()) for name in self._now.categories(row)}
        favourite = max(share, key=share.__getitem__, default=None)
        return Evidence(
            similar_title=near[0] if near else None,
            similarity=near[1] if near else None,
            query_similarity=close,
            popularity=float(self._popularity[row]) if row < len(self._popularity) else 0.0,
            age_days=None if since is None else (to_us(now) - since) / MICROSECONDS_PER_DAY,
            category=favourite,
            category_share=share[favourite] if favourite else None,
        )


def _percentiles(counts: NDArray[np.float32]) -> NDArray[np.float32]:
    """Share of the catalogue that is less popular than each item, 0..1."""
    return (np.searchsorted(np.sort(counts), counts, side="left") / max(len(counts), 1)).astype(np.float32)
