"""User x item x request features: numpy columns in, columns out; the same call trains and serves.

In: R requests (`RequestColumns`), N items by dense id (`ItemColumns`) and P pairs of them. Out: one `(P,) float32` column per
name in `CROSS_COLUMNS`, NaN where a thing is not known. A pair's values depend on nothing but its own request and item, to
the last bit: asked one by one, request by request or all at once, they are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from feature_repo.features import Cross
from tandem.core.errors import InputError
from tandem.core.schema import MICROSECONDS_PER_DAY

SIMILAR_HISTORY: Final = 20
"""How many of the newest history items a candidate is compared with by vector."""

CROSS_COLUMNS: Final = (
    "seen_count",
    "seen_days",
    "category_affinity",
    "category_share_history",
    "item_age_days",
    "item_recency_days",
    "user_recency_days",
    "price_ratio",
    "similarity_max",
    "similarity_mean",
    "hour",
    "weekday",
    "history_size",
)
"""seen_count: times the item stands in the history; seen_days: days since the last of them.
category_affinity: mean over the item's categories of the user's lifetime share (0 outside the user's top categories).
category_share_history: the same over the history given. item_age_days: since the item became available, else since its
first event. item_recency_days, user_recency_days: since the last history event. price_ratio: to the mean price of the
history. similarity_*: cosine to the newest history items. hour, weekday (Monday 0): of the request, UTC."""

_PAIRS_AT_ONCE: Final = 65_536
_SMALL: Final = 1_024
_TABLE_CELLS: Final = 4_000_000
_EPOCH_WEEKDAY: Final = 3  # 1970-01-01 was a Thursday

_GRID: Final = 4_000.0
"""Vectors are rounded to whole numbers of 1/4000 before they are multiplied. By Cauchy-Schwarz every partial sum of two such
unit vectors is a whole number below 2**24 ((4000 + sqrt(D)/2) squared, D up to 36,000), which float32 adds without rounding, in
any order: BLAS gives one pair the same bits as a million. The price is an error of about 1e-4 in the cosine."""


@dataclass(frozen=True)
class RequestColumns:
    """R requests. Dense ids and codes are padded with -1: `history` on the left (oldest first), `top_categories` anywhere.

    `time_us (R,)`, `history (R, H)`, `history_times (R, H)`, `user_last_time (R,)` (-1 none) and `top_categories (R, K)` are
    int64, times in UTC microseconds; `category_shares (R, K)` is float32. A user's top categories are distinct.
    """

    time_us: NDArray[np.int64]
    history: NDArray[np.int64]
    history_times: NDArray[np.int64]
    user_last_time: NDArray[Any]
    top_categories: NDArray[np.int64]
    category_shares: NDArray[np.floating[Any]]

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in vars(self).items()}
        if len(set(lengths.values())) != 1:
            raise InputError(f"request columns have different lengths: {lengths}")
        if self.history.shape != self.history_times.shape or self.top_categories.shape != self.category_shares.shape:
            raise InputError("history and history_times, top_categories and category_shares must have one shape each")


@dataclass(frozen=True)
class ItemColumns:
    """N items by dense id; None where no item has any.

    `categories (N, C) int64` distinct codes padded with -1; `price (N,)`, NaN where unknown; `vectors (N, D) float32` rows of
    length 1; `available_from (N,)` UTC microseconds, -1 or NaN where unknown.
    """

    categories: NDArray[np.int64]
    price: NDArray[np.floating[Any]] | None = None
    vectors: NDArray[np.float32] | None = None
    available_from: NDArray[Any] | None = None


def cross_columns(
    context: RequestColumns,
    items: ItemColumns,
    request_of_pair: NDArray[np.int64],
    item_of_pair: NDArray[np.int64],
    *,
    item_first_time: NDArray[Any],
    item_last_time: NDArray[Any],
) -> dict[str, NDArray[np.float32]]:
    """Every column of `CROSS_COLUMNS` for P pairs, `(P,) float32` each, NaN where unknown.

    `request_of_pair` and `item_of_pair` are (P,) rows of `context` and `items`. `item_first_time` and `item_last_time` are (P,)
    UTC microseconds as known at the request's time: int64 with -1, or floats with NaN, for none. Pairs may come in any
    order; sorted by request is fastest. Raises InputError when lengths differ.
    """
    lengths = {len(request_of_pair), len(item_of_pair), len(item_first_time), len(item_last_time)}
    if len(lengths) != 1:
        raise InputError(f"pair columns have different lengths: {sorted(lengths)}")
    order = None
    if np.any(request_of_pair[1:] < request_of_pair[:-1]):
        order = np.argsort(request_of_pair, kind="stable")
    pairs = _Pairs(context, items, request_of_pair, item_of_pair, item_first_time, item_last_time)
    columns = _in_slices(pairs if order is None else pairs.take(order))
    return columns if order is None else {name: _put_back(values, order) for name, values in columns.items()}


@dataclass(frozen=True)
class _Pairs:
    """Pairs, sorted by request, with the tables that they point into."""

    context: RequestColumns
    items: ItemColumns
    request: NDArray[np.int64]
    item: NDArray[np.int64]
    first_time: NDArray[Any]
    last_time: NDArray[Any]

    def take(self, rows: NDArray[np.int64] | slice) -> _Pairs:
        return _Pairs(self.context, self.items, self.request[rows], self.item[rows], self.first_time[rows], self.last_time[rows])

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """(r,) the pair at which each distinct request begins."""
        changes = np.flatnonzero(self.request[1:] != self.request[:-1]) + 1
        return np.concatenate([[0], changes]) if len(self.request) else changes

    @cached_property
    def local(self) -> NDArray[np.int64]:
        """(P,) which of the r distinct requests each pair belongs to."""
        return np.repeat(np.arange(len(self.starts)), np.diff(self.starts, append=len(self.request)))

    @cached_property
    def distinct(self) -> NDArray[np.int64]:
        """(r,) the distinct requests."""
        return self.request[self.starts]

    @cached_property
    def time(self) -> NDArray[np.int64]:
        """(P,) request time of each pair."""
        return self.context.time_us[self.request]

    @cached_property
    def categories(self) -> NDArray[np.int64]:
        """(P, C) the item's category codes."""
        return self.items.categories[self.item]


def _in_slices(pairs: _Pairs) -> dict[str, NDArray[np.float32]]:
    """The columns, computed in slices of bounded memory."""
    if len(pairs.item) <= _SMALL:
        return _columns(pairs)
    parts = [_columns(pairs.take(rows)) for rows in _slices(pairs)]
    return {name: np.concatenate([part[name] for part in parts]) for name in CROSS_COLUMNS}


def _slices(pairs: _Pairs) -> Iterator[slice]:
    """Runs of pairs with at most `_PAIRS_AT_ONCE` pairs, and requests x categories within `_TABLE_CELLS`."""
    categories = int(pairs.items.categories.max(initial=0)) + 1
    requests = max(_TABLE_CELLS // categories, 1)
    chunk = np.stack([np.arange(len(pairs.item)) // _PAIRS_AT_ONCE, pairs.local // requests])
    edges = [0, *(np.flatnonzero(np.any(chunk[:, 1:] != chunk[:, :-1], axis=0)) + 1), len(pairs.item)]
    for begin, end in pairwise(edges):
        yield slice(int(begin), int(end))


def _put_back(values: NDArray[np.float32], order: NDArray[np.int64]) -> NDArray[np.float32]:
    restored = np.empty_like(values)
    restored[order] = values
    return restored


def _columns(pairs: _Pairs) -> dict[str, NDArray[np.float32]]:
    seen_count, seen_days = _seen(pairs)
    similarity_max, similarity_mean = _similarity(pairs)
    columns = {
        "seen_count": seen_count,
        "seen_days": seen_days,
        "category_affinity": _category_affinity(pairs),
        "category_share_history": _category_share_history(pairs),
        "item_age_days": _item_age_days(pairs),
        "item_recency_days": _days(pairs.time, pairs.last_time),
        "user_recency_days": _days(pairs.time, pairs.context.user_last_time[pairs.request]),
        "price_ratio": _price_ratio(pairs),
        "similarity_max": similarity_max,
        "similarity_mean": similarity_mean,
        "hour": pairs.time // (MICROSECONDS_PER_DAY // 24) % 24,
        "weekday": (pairs.time // MICROSECONDS_PER_DAY + _EPOCH_WEEKDAY) % 7,
        "history_size": _history_size(pairs)[pairs.local],
    }
    return {name: np.asarray(columns[name], np.float32) for name in CROSS_COLUMNS}


# --- what a workspace declares -----------------------------------------------------------------------------------------


def faded(values: NDArray[Any], then_us: NDArray[Any], now_us: NDArray[np.int64], half_life_days: float) -> NDArray[np.float64]:
    """(P,) decayed sums as they are now: halved once per half-life since `then_us`, their last event; without one as they are.

    An event that a clock ahead of ours has dated into the future fades from now on.
    """
    passed = np.maximum(_days(now_us, np.nan_to_num(np.asarray(then_us, np.float64), nan=-1.0)), 0.0)
    return np.asarray(values * np.exp2(-np.nan_to_num(passed, nan=0.0) / half_life_days), np.float64)


def combined(columns: Mapping[str, NDArray[Any]], crosses: Mapping[str, Cross]) -> dict[str, NDArray[np.float64]]:
    """(P,) each declared cross of two (P,) columns, NaN where a side is missing, or where something is divided by 0."""
    found = {}
    for name, cross in crosses.items():
        left, right = (np.asarray(columns[side], np.float64) for side in (cross.left, cross.right))
        with np.errstate(invalid="ignore", divide="ignore"):
            value = {"ratio": np.divide, "difference": np.subtract, "product": np.multiply}[cross.how](left, right)
        found[name] = np.where(np.isfinite(value), value, np.nan)
    return found


# --- history -----------------------------------------------------------------------------------------------------------


def _history_size(pairs: _Pairs) -> NDArray[np.int64]:
    """(r,) how many items each request's history holds."""
    return np.asarray((pairs.context.history[pairs.distinct] >= 0).sum(axis=1))


def _seen(pairs: _Pairs) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """How often each pair's item stands in the history, and the days since the last time."""
    pair, place = np.nonzero(pairs.context.history[pairs.request] == pairs.item[:, None])
    then = np.full(len(pairs.item), -1)
    then[pair] = pairs.context.history_times[pairs.request[pair], place]  # of repeated places numpy keeps the last, the newest
    return np.bincount(pair, minlength=len(pairs.item)), _days(pairs.time, then)


# --- categories --------------------------------------------------------------------------------------------------------


def _category_affinity(pairs: _Pairs) -> NDArray[np.float64]:
    """Mean over an item's categories of the user's share of each; NaN when the user has none on record, or the item."""
    top = pairs.context.top_categories[pairs.distinct]
    known = top >= 0
    shares = np.zeros((len(top), int(max(top.max(initial=0), pairs.categories.max(initial=0))) + 1))
    shares[np.nonzero(known)[0], top[known]] = pairs.context.category_shares[pairs.distinct][known]
    shares[~known.any(axis=1)] = np.nan
    return _mean_over_categories(shares[pairs.local[:, None], pairs.categories], pairs.categories)


def _category_share_history(pairs: _Pairs) -> NDArray[np.float64]:
    """Mean over an item's categories of the share of history items that have it; NaN without history or categories."""
    history = pairs.context.history[pairs.distinct]
    of_history = np.where(history[:, :, None] >= 0, pairs.items.categories[history], -1)
    width = int(max(of_history.max(initial=0), pairs.categories.max(initial=0))) + 1
    keys = (of_history + np.arange(len(history))[:, None, None] * width)[of_history >= 0]
    counts = np.bincount(keys, minlength=len(history) * width).reshape(len(history), width)
    size = _history_size(pairs).astype(np.float64)
    size[size == 0] = np.nan
    shares = counts / size[:, None]
    return _mean_over_categories(shares[pairs.local[:, None], pairs.categories], pairs.categories)


def _mean_over_categories(values: NDArray[np.float64], categories: NDArray[np.int64]) -> NDArray[np.float64]:
    """(P,) mean of `values (P, C)` over each item's real categories, NaN for an item without any."""
    present = categories >= 0
    count = present.sum(axis=1).astype(np.float64)
    count[count == 0] = np.nan
    return np.asarray(_row_sum(np.where(present, values, 0.0)) / count)


def _row_sum(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over the last axis from left to right: numpy's own sum may add in another order for another shape."""
    if values.shape[-1] == 0:
        return np.zeros(values.shape[:-1])
    return np.asarray(np.cumsum(values, axis=-1)[..., -1])


# --- time and price ----------------------------------------------------------------------------------------------------


def _days(now: NDArray[np.int64], then: NDArray[Any]) -> NDArray[np.float64]:
    """Days from `then` to `now`, NaN where `then` is unknown (-1 or NaN)."""
    return np.where(then >= 0, (now - then) / MICROSECONDS_PER_DAY, np.nan)


def _item_age_days(pairs: _Pairs) -> NDArray[np.float64]:
    """Days since an item became available, else since its first event; 0 for one that is yet to come."""
    start = pairs.first_time
    if pairs.items.available_from is not None:
        available = pairs.items.available_from[pairs.item]
        start = np.where(available >= 0, available, start)
    return np.maximum(_days(pairs.time, start), 0.0)


def _price_ratio(pairs: _Pairs) -> NDArray[np.float64]:
    """Price over the mean known price of the request's history, NaN where either is unknown or the mean is 0."""
    if pairs.items.price is None:
        return np.full(len(pairs.item), np.nan)
    history = pairs.context.history[pairs.distinct]
    paid = np.where(history >= 0, pairs.items.price[history], np.nan).astype(np.float64)
    known = ~np.isnan(paid)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = _row_sum(np.where(known, paid, 0.0)) / known.sum(axis=1)
        ratio = pairs.items.price[pairs.item].astype(np.float64) / mean[pairs.local]
    return np.where(np.isfinite(ratio), ratio, np.nan)


# --- vectors -----------------------------------------------------------------------------------------------------------


def _similarity(pairs: _Pairs) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Largest and mean cosine of each pair's item to the newest history items, NaN without vectors or history."""
    largest, mean = np.full(len(pairs.item), np.nan), np.full(len(pairs.item), np.nan)
    if pairs.items.vectors is None:
        return largest, mean
    newest = pairs.context.history[pairs.distinct, -SIMILAR_HISTORY:]
    ends = np.append(pairs.starts, len(pairs.item))[1:]
    for row, begin, end in zip(newest, pairs.starts, ends, strict=True):
        known = row[row >= 0]
        if len(known):
            vectors = pairs.items.vectors
            products = _on_grid(vectors.take(pairs.item[begin:end], axis=0)) @ _on_grid(vectors.take(known, axis=0)).T
            cosines = np.ascontiguousarray(products.T)
            largest[begin:end] = cosines.max(axis=0) / _GRID**2
            mean[begin:end] = cosines.sum(axis=0, dtype=np.float64) / (len(known) * _GRID**2)
    return largest, mean


def _on_grid(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round freshly gathered rows to the grid, in place."""
    rows *= np.float32(_GRID)
    np.rint(rows, out=rows)
    return rows
