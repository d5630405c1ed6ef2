"""Items put and deleted while a release answers: their vectors come from the release's towers, by their text and attributes.

In: `Card`s with text vectors, and ids. Out: a new `Listing` for whoever asks next. Nothing here is kept on disk.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from retrieval.checks import checked_rows
from retrieval.content import ContentMap
from retrieval.filters import ALWAYS
from retrieval.listing import ATTRIBUTE, AVAILABLE, CARD, CODES, INNER, Card, Listing, Stock
from retrieval.records import Record
from retrieval.tier import FreshTier
from tandem.core.errors import InputError
from tandem.core.schema import ITEMS, MAX_CATEGORIES, check_id

_NOTHING: Final = -1


class FreshItems:
    """What changed over one stock; safe to share between threads."""

    def __init__(self, stock: Stock) -> None:
        self._stock = stock
        self._turn = threading.Lock()
        self._tier: FreshTier | None = None
        self._content: ContentMap | None = None
        self.listing = Listing(stock)

    def put(self, cards: Sequence[Card], text: NDArray[np.float32]) -> None:
        """Add items, or change what is there, with their text vectors (n, T).

        Raises InputError for ids that are none or come twice, unfit attributes, too many categories, NaN, or another width.
        """
        text = checked_rows(text, "text vectors")
        ids = tuple(check_id(card.item_id, "item id") for card in cards)
        if len(ids) != len(text) or len(set(ids)) < len(ids):
            raise InputError(f"{len(ids)} ids, {len(set(ids))} of them different, for {len(text)} vectors; give one of each")
        for card in cards:
            self._check(card)
        with self._turn:
            tier, content = self._opened()
            numbers = (self._stock.row_of.get(item_id, _NOTHING) for item_id in ids)
            rows = np.fromiter(numbers, np.int64, len(ids))
            vectors, inner = self._stock.towers.items(content(self._frame(cards), text), text, rows)
            tier.take(Record("put", ids, vectors), {INNER: inner, **self._columns(cards)})
            self.listing = Listing(self._stock, tier.view())

    def delete(self, item_ids: Sequence[str]) -> None:
        """Take items out of every answer; ids that nobody has put are no error."""
        with self._turn:
            tier, _ = self._opened()
            tier.take(Record("delete", tuple(item_ids)))
            self.listing = Listing(self._stock, tier.view())

    def _opened(self) -> tuple[FreshTier, ContentMap]:
        if self._tier is None or self._content is None:
            stock = self._stock
            self._content = ContentMap.of(stock.items)
            self._tier = FreshTier(stock.index, stock.item_ids, stock.row_of, _empty_columns(stock))
        return self._tier, self._content

    def _check(self, card: Card) -> None:
        kinds = self._stock.columns.vocabulary.attributes
        for name, value in (card.attributes or {}).items():
            wanted = kinds.get(name)
            if wanted is not None and value is not None and isinstance(value, str) != (wanted == "text"):
                raise InputError(f"item {card.item_id!r}: {name} = {value!r} is no {wanted}, as that attribute's values are")
        if len(card.categories) > MAX_CATEGORIES:
            raise InputError(f"item {card.item_id!r} has {len(card.categories)} categories; an item may have {MAX_CATEGORIES}")

    def _frame(self, cards: Sequence[Card]) -> pl.DataFrame:
        """The columns that the content map reads."""
        items = self._stock.items
        numbers = [name for name, kind in items.schema.items() if name not in ITEMS and kind.is_numeric()]
        values = {name: [(card.attributes or {}).get(name) for card in cards] for name in numbers}
        schema: dict[str, Any] = {"categories": pl.List(pl.String), **dict.fromkeys(numbers, pl.Float64)}
        return pl.DataFrame({"categories": [list(card.categories) for card in cards], **values}, schema=schema)

    def _columns(self, cards: Sequence[Card]) -> dict[str, NDArray[Any]]:
        columns = self._stock.columns
        words = columns.vocabulary
        codes = np.full((len(cards), MAX_CATEGORIES), _NOTHING, np.int32)
        whole = np.empty(len(cards), object)
        for row, card in enumerate(cards):
            own = [words.category(name) for name in dict.fromkeys(card.categories)]
            codes[row, : len(own)], whole[row] = own, card
        moments = [ALWAYS if card.available_us is None else card.available_us for card in cards]
        made: dict[str, NDArray[Any]] = {CODES: codes, CARD: whole, AVAILABLE: np.array(moments, np.int64)}
        for name in columns.numbers:
            values = [(card.attributes or {}).get(name) for card in cards]
            made[f"{ATTRIBUTE}{name}"] = np.array([np.nan if value is None else value for value in values], np.float64)
        for name in columns.texts:
            texts = [(card.attributes or {}).get(name) for card in cards]
            numbers = [_NOTHING if value is None else words.text(name, str(value)) for value in texts]
            made[f"{ATTRIBUTE}{name}"] = np.array(numbers, np.int32)
        return made


def card_of(row: dict[str, Any]) -> Card:
    """A row of the items table as a card; what the table has beside its own columns are attributes."""
    available: datetime | None = row.get("available_from")
    moment = None if available is None else round(available.astimezone(UTC).timestamp() * 1e6)
    attributes = {name: value for name, value in row.items() if name not in ITEMS}
    return Card(row["item_id"], row["title"], row["text"], tuple(row["categories"]), moment, attributes)


def _empty_columns(stock: Stock) -> dict[str, NDArray[Any]]:
    columns = stock.columns
    empty: dict[str, NDArray[Any]] = {
        INNER: np.empty((0, stock.towers.inner_vectors.shape[1]), np.float32),
        CARD: np.empty(0, object),
        AVAILABLE: np.empty(0, np.int64),
        CODES: np.empty((0, MAX_CATEGORIES), np.int32),
    }
    empty |= {f"{ATTRIBUTE}{name}": np.empty(0, np.float64) for name in columns.numbers}
    return empty | {f"{ATTRIBUTE}{name}": np.empty(0, np.int32) for name in columns.texts}
