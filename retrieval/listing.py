"""The catalogue of one moment, by dense id: the items that a release was trained on, and what was put over them since.

In: the items of a release (`Stock`) and a `View` of the fresh tier, None while nothing was put. Out: titles, categories, vectors,
masks. A dense id means one item for as long as a process runs: ids found in one listing may be looked up in a later one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from retrieval.filters import ALWAYS, NOT_INCLUDED, FilterColumns, Filters
from retrieval.index import VectorIndex
from retrieval.tier import View
from retrieval.towers import Towers

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]

CARD: Final = "card"
INNER: Final = "inner"
AVAILABLE: Final = "available"
CODES: Final = "codes"
ATTRIBUTE: Final = "attribute "
"""Names of the fresh tier's columns; an attribute's own name stands behind `ATTRIBUTE`."""


@dataclass(frozen=True)
class Card:
    """What an item says of itself: categories in the order given, attributes by name, None or absent where it has none.

    `available_us`: since when (UTC microseconds), None for always.
    """

    item_id: str
    title: str
    text: str
    categories: tuple[str, ...] = ()
    available_us: int | None = None
    attributes: Mapping[str, str | float | None] | None = None


@dataclass(frozen=True, eq=False)
class Stock:
    """The items of a release by dense id, as its parts know them; what is derived from them is derived once."""

    items: pl.DataFrame
    towers: Towers
    index: VectorIndex
    counts: Floats

    @cached_property
    def item_ids(self) -> list[str]:
        return self.items["item_id"].to_list()

    @cached_property
    def row_of(self) -> dict[str, int]:
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    @cached_property
    def titles(self) -> list[str]:
        return self.items["title"].to_list()

    @cached_property
    def categories(self) -> list[list[str]]:
        return self.items["categories"].to_list()

    @cached_property
    def columns(self) -> FilterColumns:
        return FilterColumns.of(self.items)


@dataclass(frozen=True, eq=False)
class Listing:
    """One moment; immutable. Ids given to it are dense ids that some listing of the same stock gave out."""

    stock: Stock
    view: View | None = None

    @property
    def count(self) -> int:
        """How many dense ids there are; those of deleted items count."""
        return len(self.stock.items) if self.view is None else self.view.count

    @property
    def index(self) -> VectorIndex | View:
        """What answers for the towers."""
        return self.stock.index if self.view is None else self.view

    @cached_property
    def available(self) -> NDArray[np.int64]:
        """(count,) UTC microseconds since when each item is available, `ALWAYS` for always."""
        if self.view is None:
            return self.stock.columns.available
        moments = np.full(self.count, ALWAYS)
        moments[: len(self.stock.items)] = self.stock.columns.available
        alive = np.flatnonzero(self.view.alive)
        moments[self.view.owners[alive]] = self._column(AVAILABLE)[alive]
        return moments

    @cached_property
    def listed(self) -> Mask:
        """(count,) bool: not deleted."""
        return np.ones(self.count, np.bool_) if self.view is None else self.view.listed()

    def row(self, item_id: str) -> int | None:
        """The dense id of an item, deleted or not; None for one that was never there."""
        known = self.stock.row_of.get(item_id)
        return self.view.new_row(item_id) if known is None and self.view is not None else known

    def rows(self, item_ids: Sequence[str]) -> Ids:
        """Dense ids of those items that were ever there; the others are left out."""
        found = (self.row(item_id) for item_id in item_ids)
        return np.array([row for row in found if row is not None], np.int64)

    def card(self, row: int) -> Card | None:
        """What was put of the item; None while it is as the release knows it."""
        return None if (place := self._place(row)) < 0 else self._column(CARD)[place]

    def item_id(self, row: int) -> str:
        return self.stock.item_ids[row] if row < len(self.stock.items) else self._fresh(row).item_id

    def title(self, row: int) -> str:
        card = self.card(row)
        return self.stock.titles[row] if card is None else card.title

    def categories(self, row: int) -> tuple[str, ...]:
        card = self.card(row)
        return tuple(self.stock.categories[row]) if card is None else card.categories

    def available_us(self, row: int) -> int | None:
        """Since when the item is available; None for always."""
        moment = int(self.gathered(AVAILABLE, self.stock.columns.available, np.array([row]))[0])
        return None if moment == ALWAYS else moment

    def item_vectors(self, rows: Ids) -> Floats:
        """(..., Q) float32."""
        return self._merged(self.stock.towers.item_vectors, None if self.view is None else self.view.rows, rows)

    def cosines(self, row: int, columns: slice) -> Floats:
        """(count,) float32: of one item's vector with every item's, by some of their coordinates."""
        own = self.item_vectors(np.array([row]))[0, columns]
        cosines = np.zeros(self.count, np.float32)
        cosines[: len(self.stock.items)] = _cosines(self.stock.towers.item_vectors[:, columns], own)
        if self.view is not None:
            alive = np.flatnonzero(self.view.alive)
            cosines[self.view.owners[alive]] = _cosines(self.view.rows[alive][:, columns], own)
        return cosines

    def text_vectors(self, rows: Ids) -> Floats:
        """(..., S) float32 unit rows: the text block."""
        return self.item_vectors(rows)[..., self.stock.towers.shape.dimension + 1 :]

    def counts(self, rows: Ids) -> Floats:
        """(...) float32: training users of each item; 0 for a new one."""
        old = rows < len(self.stock.items)
        return np.where(old, self.stock.counts[np.where(old, rows, 0)] if len(self.stock.counts) else 0, np.float32(0))

    def attribute(self, name: str, rows: Ids) -> NDArray[np.float64]:
        """(...) float64: a numeric attribute, NaN where missing."""
        return self.gathered(f"{ATTRIBUTE}{name}", self.stock.columns.numbers[name], rows)

    def changed(self, rows: Ids) -> Mask:
        """(...) bool: new, or put since the release was trained."""
        return np.zeros(rows.shape, np.bool_) if self.view is None else self.view.rows_of(rows) >= 0

    def put_in(self, histories: Ids) -> tuple[Ids, Floats] | None:
        """What `Towers.query` needs to read histories with items that were put since; None where there are none."""
        if self.view is None or not self.changed(histories[histories >= 0]).any():
            return None
        rows, places = np.unique(histories, return_inverse=True)
        inner = self._merged(self.stock.towers.inner_vectors, self._column(INNER), rows[rows >= 0])
        return places.reshape(histories.shape) - int(np.count_nonzero(rows < 0)), inner

    def masks(self, filters: Filters, now_us: int) -> dict[str, Mask]:
        """(count,) bool by name for every filter asked for, but `exclude` and `seen`, which are lists per request."""
        self.stock.columns.vocabulary.check(filters)
        masks = self.stock.columns.masks(filters, now_us)
        if self.view is not None:
            fresh = self._fresh_columns.masks(filters, now_us)
            masks = {name: self._over(mask, fresh[name]) for name, mask in masks.items()}
        if filters.include is not None:
            masks[NOT_INCLUDED] = np.zeros(self.count, np.bool_)
            masks[NOT_INCLUDED][self.rows(filters.include)] = True
        return masks

    def gathered(self, name: str, main: NDArray[Any], rows: Ids) -> NDArray[Any]:
        """Values of the release's column `main` (N, ...), those of the fresh tier's column `name` over them, cut to its width."""
        if self.view is None:
            return np.asarray(main[rows])
        fresh = self._column(name)
        return self._merged(main, fresh if main.ndim == 1 else fresh[:, : main.shape[1]], rows)

    def _over(self, main: Mask, fresh: Mask) -> Mask:
        """A mask over the release's items, and one over the fresh tier's rows, as one over dense ids."""
        assert self.view is not None
        mask = np.zeros(self.count, np.bool_)
        mask[: len(main)] = main
        alive = np.flatnonzero(self.view.alive)
        mask[self.view.owners[alive]] = fresh[alive]
        return mask

    def _merged(self, main: NDArray[Any], fresh: NDArray[Any] | None, rows: Ids) -> NDArray[Any]:
        if self.view is None or fresh is None:
            return np.asarray(main[rows])
        places = self.view.rows_of(rows)
        found = np.empty((*rows.shape, *main.shape[1:]), main.dtype)
        found[places < 0], found[places >= 0] = main[rows[places < 0]], fresh[places[places >= 0]]
        return found

    def _place(self, row: int) -> int:
        return -1 if self.view is None else int(self.view.rows_of(np.array([row]))[0])

    def _fresh(self, row: int) -> Card:
        card = self.card(row)
        assert card is not None, f"dense id {row} is none of this stock's"
        return card

    def _column(self, name: str) -> NDArray[Any]:
        assert self.view is not None
        return self.view.columns[name]

    @cached_property
    def _fresh_columns(self) -> FilterColumns:
        """What filters read, by row of the fresh tier."""
        words = self.stock.columns.vocabulary
        codes = self._column(CODES)
        rows, slots = np.nonzero(codes >= 0)
        numbers = {name: self._column(f"{ATTRIBUTE}{name}") for name in self.stock.columns.numbers}
        texts = {name: self._column(f"{ATTRIBUTE}{name}") for name in self.stock.columns.texts}
        return FilterColumns(words, self._column(AVAILABLE), numbers, texts, rows, codes[rows, slots].astype(np.int64), False)


def _cosines(rows: Floats, own: Floats) -> Floats:
    norms = np.linalg.norm(rows, axis=1) + 1e-9
    return np.asarray((rows @ own) / (norms * (np.linalg.norm(own) + 1e-9)), np.float32)
