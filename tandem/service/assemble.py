"""User rows, candidates and item columns -> the ranker's feature matrix. One function for training and serving.

Offline the rows come from the as-of join, online from Feast and the snapshot; from here on both take the same path, so what the
ranker saw in training is what it sees in a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from feature_repo.crosses import ItemColumns, RequestColumns, combined, cross_columns, faded
from feature_repo.features import check_sides, stored_time
from feature_repo.pins import Pins
from retrieval.candidates import Candidates
from retrieval.filters import ALWAYS
from retrieval.listing import AVAILABLE, CODES
from retrieval.retriever import Retriever

SOURCE_COLUMNS: Final = ("covisit", "popular", "history")
"""Candidate sources whose score is a feature beside the towers' own."""

WITHIN_REQUEST: Final = ("tower_score", "covisit_score", "popularity", "similarity_max", "similarity_mean", "item_events_30d")
"""Columns that the ranker also sees relative to the other candidates of the request."""

_CATEGORIES: Final = 8
_TOP: Final = 16
_NO_ITEM: Final = -1


@dataclass(frozen=True)
class CatalogueColumns:
    """What the ranker knows of a release's items beside their features, by dense id.

    `category_code` grows with the categories of items that are put later.
    """

    items: ItemColumns
    category_code: dict[str, int]

    @classmethod
    def of(cls, retriever: Retriever) -> CatalogueColumns:
        categories = retriever.items["categories"].to_list()
        code = retriever.listing.stock.columns.vocabulary.categories
        table = np.full((len(categories), _CATEGORIES), -1, np.int64)
        for row, own in enumerate(categories):
            kept = [code[name] for name in dict.fromkeys(own)][:_CATEGORIES]
            table[row, : len(kept)] = kept
        price = retriever.items["price"].cast(pl.Float64).to_numpy() if "price" in retriever.items.columns else None
        available = retriever.items["available_from"].dt.epoch("us").fill_null(-1).to_numpy()
        return cls(ItemColumns(table, price, np.ascontiguousarray(retriever.towers.text_vectors), available), code)


@dataclass(frozen=True)
class Users:
    """R requests' own side: numeric features (R, F) by name, context among them, and what the crosses read.

    Histories are dense item ids.
    """

    names: tuple[str, ...]
    numbers: NDArray[np.float32]
    context: RequestColumns

    @property
    def histories(self) -> NDArray[np.int64]:
        return self.context.history


class Assembler:
    """Builds feature matrices for one retriever's catalogue; stateless but for what it derives from it once.

    `pins` say which features there are: those that the ranker was trained on, or is to be.
    """

    def __init__(self, retriever: Retriever, pins: Pins, history_length: int) -> None:
        self.retriever, self.pins = retriever, pins
        self.catalogue = CatalogueColumns.of(retriever)
        self.user_names = tuple(name for name in pins.numbers("user") if not name.endswith("_time"))
        self.item_names = tuple(name for name in pins.numbers("item") if not name.endswith(("_time", "_from")))
        self.context_names = tuple(f"{name}={value}" for name, values in pins.context.items() for value in values)
        self.history_length = pins.history_length or history_length
        self._fading = pins.half_lives

    def popularity(self, items: NDArray[np.int64]) -> NDArray[np.float32]:
        """log(1 + training users) of items by dense id."""
        return np.log1p(self.retriever.listing.counts(items)).astype(np.float32)

    def categories(self, items: NDArray[np.int64]) -> NDArray[np.int64]:
        """(len(items), C) category codes, -1 as padding, as they are now."""
        return self.retriever.listing.gathered(CODES, self.catalogue.items.categories, items)

    def users(
        self, rows: Sequence[Mapping[str, Any]], times_us: NDArray[np.int64], contexts: Sequence[Mapping[str, str | None]] = ()
    ) -> Users:
        """`rows`: user features by name, None where missing; `times_us` (R,): the moments asked about.

        `contexts`: per request what is known of where it came from, such as {"device": "phone"}; nothing where it is left out.
        """
        histories = [self._history(row) for row in rows]
        width = max([1, *(len(items) for items, _ in histories)])
        history = np.full((len(rows), width), _NO_ITEM, np.int64)
        history_times = np.full((len(rows), width), _NO_ITEM, np.int64)
        codes = np.full((len(rows), _TOP), -1, np.int64)
        shares = np.zeros((len(rows), _TOP), np.float32)
        for place, (row, (items, times)) in enumerate(zip(rows, histories, strict=True)):
            if items:
                history[place, width - len(items) :] = items
                history_times[place, width - len(items) :] = times
            for slot, (name, share) in enumerate(
                zip(row.get("top_categories") or (), row.get("category_shares") or (), strict=False)
            ):
                if slot < _TOP:
                    codes[place, slot] = self.catalogue.category_code.get(name, -1)
                    shares[place, slot] = share
        last = np.array([_or(row.get("user_last_time"), -1) for row in rows], np.int64)
        numbers = np.array([[_number(row.get(name)) for name in self.user_names] for row in rows], np.float32)
        numbers = self._faded_now(numbers.reshape(len(rows), len(self.user_names)), rows, times_us)
        known = np.array([self._context(each) for each in (contexts or [{}] * len(rows))], np.float32)
        numbers = np.concatenate([numbers, known.reshape(len(rows), len(self.context_names))], axis=1)
        context = RequestColumns(times_us, history, history_times, last, codes, shares)
        return Users((*self.user_names, *self.context_names), numbers, context)

    def _faded_now(
        self, numbers: NDArray[np.float32], rows: Sequence[Mapping[str, Any]], times_us: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        for place, name in enumerate(self.user_names):
            if name in self._fading:
                then = np.array([_number(row.get(stored_time(name))) for row in rows], np.float64)
                values = np.array([_number(row.get(name)) for row in rows], np.float64)
                numbers[:, place] = faded(values, then, times_us, self._fading[name])
        return numbers

    def _context(self, given: Mapping[str, str | None]) -> list[float]:
        """1 for a request's own value and 0 for the column's others; all NaN where it says nothing, or something unknown."""
        found: list[float] = []
        for name, values in self.pins.context.items():
            value = given.get(name)
            found += [float(value == each) for each in values] if value in values else [np.nan] * len(values)
        return found

    def _history(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        items, times = row.get("history_items") or (), row.get("history_times") or ()
        row_of = self.retriever.listing.row
        known = [(at, time) for item, time in zip(items, times, strict=True) if (at := row_of(item)) is not None]
        return [item for item, _ in known[-self.history_length :]], [time for _, time in known[-self.history_length :]]

    def features(
        self, users: Users, found: Candidates, tower: NDArray[np.float32], item_columns: Mapping[str, NDArray[Any]]
    ) -> tuple[NDArray[np.float32], tuple[str, ...]]:
        """(P, F) float32 and its F column names, for the P real candidates in row-major order (`pairs`).

        `tower` (R, k) scores of all candidates; `item_columns` name -> (P,) values as known at each request's time.
        """
        request, item = pairs(found)
        empty = np.full(len(item), np.nan)
        context, columns_of, place = self._now(users.context, item)
        crosses = cross_columns(
            context,
            columns_of,
            request,
            place,
            item_first_time=item_columns.get("item_first_time", empty),
            item_last_time=item_columns.get("item_last_time", empty),
        )
        here = found.ids >= 0
        columns: dict[str, NDArray[Any]] = {
            "tower_score": tower[here],
            "tower_rank": _ranks(tower)[here],
            "popularity": self.popularity(item),
        }
        for source in SOURCE_COLUMNS:
            if source in found.scores:
                columns[f"{source}_score"] = np.nan_to_num(found.scores[source], nan=0.0)[here]
        columns |= dict(crosses.items())
        columns |= {name: users.numbers[request, place] for place, name in enumerate(users.names)}
        columns |= {name: self._item_column(name, item_columns, users.context.time_us[request]) for name in self.item_names}
        check_sides(self.pins.crosses, columns)
        columns |= combined(columns, self.pins.crosses)
        matrix = np.stack([np.asarray(column, np.float32) for column in columns.values()], axis=1)
        return matrix, tuple(columns)

    def _now(self, context: RequestColumns, item: NDArray[np.int64]) -> tuple[RequestColumns, ItemColumns, NDArray[np.int64]]:
        """The request, its items' columns and the pairs' items in them, as the catalogue is now.

        Where something was put since the release, only the items asked about are gathered, and renumbered: crosses do not depend
        on the numbers.
        """
        listing = self.retriever.listing
        if listing.view is None:
            return context, self.catalogue.items, item
        history = context.history
        rows = np.unique(np.concatenate([history[history >= 0], item]))
        local = np.where(history >= 0, np.searchsorted(rows, history), _NO_ITEM)
        own = self.catalogue.items
        available = listing.gathered(AVAILABLE, listing.stock.columns.available, rows)
        columns = ItemColumns(
            self.categories(rows),
            None if own.price is None else listing.attribute("price", rows),
            listing.text_vectors(rows),
            np.where(available == ALWAYS, _NO_ITEM, available),
        )
        return replace(context, history=local), columns, np.searchsorted(rows, item)

    def _item_column(self, name: str, columns: Mapping[str, NDArray[Any]], now_us: NDArray[np.int64]) -> NDArray[Any]:
        """One item feature as it is at each pair's time."""
        if name not in self._fading:
            return columns[name]
        never = np.full(len(now_us), np.nan)
        return faded(columns[name], columns.get(stored_time(name), never), now_us, self._fading[name])


def pairs(found: Candidates) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(request (P,), dense item (P,)) of every real candidate, request by request."""
    request, column = np.nonzero(found.ids >= 0)
    return request.astype(np.int64), found.ids[request, column]


def _ranks(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rank of every score within its row, best 0, as log(1 + rank); padding last."""
    order = np.argsort(-np.nan_to_num(scores, nan=-np.inf), axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(scores.shape[1])[None, :], axis=1)
    return np.log1p(ranks).astype(np.float32)


def _number(value: Any) -> float:
    return float("nan") if value is None or isinstance(value, str) else float(value)


def _or(value: Any, other: int) -> int:
    return other if value is None else int(value)
