"""Cross features: answers worked out by hand, and one result however the pairs are asked for."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from feature_repo import crosses
from feature_repo.crosses import CROSS_COLUMNS, ItemColumns, RequestColumns, combined, cross_columns, faded
from feature_repo.features import Cross
from tandem.core.errors import InputError
from tandem.core.schema import MICROSECONDS_PER_DAY as DAY

NOW = int(datetime(2026, 11, 20, 15, 30, tzinfo=UTC).timestamp()) * 1_000_000  # a Friday
Columns = dict[str, NDArray[np.float32]]


def by_hand() -> tuple[RequestColumns, ItemColumns]:
    """One user who bought item 0, 1 and 0 again (10, 4 and 2 days ago), and one of whom nothing is known."""
    context = RequestColumns(
        time_us=np.array([NOW, NOW + DAY]),
        history=np.array([[-1, 0, 1, 0], [-1, -1, -1, -1]]),
        history_times=np.array([[-1, NOW - 10 * DAY, NOW - 4 * DAY, NOW - 2 * DAY], [-1] * 4]),
        user_last_time=np.array([NOW - 2 * DAY, -1]),
        top_categories=np.array([[7, 5], [-1, -1]]),
        category_shares=np.array([[0.75, 0.5], [0, 0]], np.float32),
    )
    items = ItemColumns(
        categories=np.array([[5, -1], [5, 7], [9, 7], [-1, -1]]),
        price=np.array([10.0, 40.0, 5.0, np.nan], np.float32),
        vectors=np.array([[1, 0], [0, 1], [0.6, 0.8], [-1, 0]], np.float32),
        available_from=np.array([NOW - 30 * DAY, -1, NOW + DAY // 2, -1]),
    )
    return context, items


def ask(context: RequestColumns, items: ItemColumns, request: list[int], item: list[int]) -> Columns:
    first, last = np.array([NOW - 20 * DAY, NOW - 8 * DAY, -1, -1])[item], np.array([NOW - DAY // 4, NOW, -1, -1])[item]
    return cross_columns(
        context, items, np.array(request, np.int64), np.array(item, np.int64), item_first_time=first, item_last_time=last
    )


EXPECTED: dict[str, list[float]] = {
    "seen_count": [2, 1, 0, 0, 0],
    "seen_days": [2, 4, np.nan, np.nan, np.nan],
    "category_affinity": [0.5, (0.5 + 0.75) / 2, 0.75 / 2, np.nan, np.nan],
    "category_share_history": [1, (1 + 1 / 3) / 2, 1 / 6, np.nan, np.nan],
    "item_age_days": [30, 8, 0, np.nan, 31],
    "item_recency_days": [0.25, 0, np.nan, np.nan, 1.25],
    "user_recency_days": [2, 2, 2, 2, np.nan],
    "price_ratio": [0.5, 2, 0.25, np.nan, np.nan],
    "similarity_max": [1, 1, 0.8, 0, np.nan],
    "similarity_mean": [2 / 3, 1 / 3, 2 / 3, -2 / 3, np.nan],
    "hour": [15, 15, 15, 15, 15],
    "weekday": [4, 4, 4, 4, 5],
    "history_size": [3, 3, 3, 3, 0],
}


def test_columns_by_hand() -> None:
    columns = ask(*by_hand(), request=[0, 0, 0, 0, 1], item=[0, 1, 2, 3, 0])
    assert tuple(columns) == CROSS_COLUMNS
    for name, expected in EXPECTED.items():
        assert columns[name].dtype == np.float32
        assert columns[name] == pytest.approx(np.array(expected), abs=2e-4, nan_ok=True), name


def test_unknown_times_may_be_nan_in_a_float_column() -> None:
    context, items = by_hand()
    pair = np.array([0]), np.array([3])
    columns = cross_columns(
        context, items, *pair, item_first_time=np.array([np.nan]), item_last_time=np.array([float(NOW - DAY)])
    )
    assert np.isnan(columns["item_age_days"][0])
    assert columns["item_recency_days"][0] == 1


def test_a_catalogue_without_prices_vectors_and_dates_gives_nan_there() -> None:
    context, items = by_hand()
    columns = ask(context, ItemColumns(items.categories), [0], [1])
    assert all(np.isnan(columns[name][0]) for name in ("price_ratio", "similarity_max", "similarity_mean"))
    assert columns["item_age_days"][0] == 8
    assert columns["seen_count"][0] == 1


def test_a_history_that_cost_nothing_has_no_price_ratio() -> None:
    context, items = by_hand()
    free = replace(items, price=np.array([0.0, 0.0, 3.0, 1.0], np.float32))
    assert np.isnan(ask(context, free, [0], [2])["price_ratio"][0])


def test_no_pairs_and_no_history_columns() -> None:
    context, items = by_hand()
    assert {name: len(values) for name, values in ask(context, items, [], []).items()} == dict.fromkeys(CROSS_COLUMNS, 0)
    bare = replace(context, history=np.zeros((2, 0), np.int64), history_times=np.zeros((2, 0), np.int64))
    columns = ask(bare, items, [0, 1], [0, 1])
    assert columns["seen_count"].tolist() == [0, 0]
    assert np.isnan(columns["similarity_max"]).all()


def test_similarity_looks_at_the_newest_items_only() -> None:
    """The candidate equals the oldest of 21 history items, which is one too many."""
    context, items = by_hand()
    history = np.array([[0] + [1] * crosses.SIMILAR_HISTORY] * 2)
    longer = replace(context, history=history, history_times=np.zeros_like(history))
    columns = ask(longer, items, [0], [0])
    assert columns["similarity_max"][0] == 0
    assert columns["seen_count"][0] == 1


def random_world(seed: int, requests: int = 7, items: int = 40) -> tuple[RequestColumns, ItemColumns, dict[str, Any]]:
    rng = np.random.default_rng(seed)
    length, dimension, pairs = int(rng.integers(1, 30)), int(rng.integers(1, 70)), int(rng.integers(1, 120))
    vectors = rng.standard_normal((items, dimension)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    history = rng.integers(0, items, (requests, length))
    history[np.arange(length) < rng.integers(0, length + 1, (requests, 1))] = -1
    codes = np.argsort(rng.random((items, 9)), axis=1)[:, :3]
    context = RequestColumns(
        time_us=NOW + rng.integers(0, DAY, requests),
        history=history,
        history_times=np.sort(NOW - rng.integers(1, 90 * DAY, (requests, length)), axis=1),
        user_last_time=np.where(rng.random(requests) < 0.3, -1, NOW - rng.integers(1, DAY, requests)),
        top_categories=np.where(rng.random((requests, 4)) < 0.3, -1, np.argsort(rng.random((requests, 9)), axis=1)[:, :4]),
        category_shares=rng.random((requests, 4)).astype(np.float32),
    )
    columns = ItemColumns(
        categories=np.where(rng.random((items, 3)) < 0.3, -1, codes),
        price=np.where(rng.random(items) < 0.2, np.nan, rng.random(items) * 50).astype(np.float32),
        vectors=vectors,
        available_from=np.where(rng.random(items) < 0.5, -1, NOW - rng.integers(0, 900 * DAY, items)),
    )
    asked = {
        "request_of_pair": rng.integers(0, requests, pairs),
        "item_of_pair": rng.integers(0, items, pairs),
        "item_first_time": np.where(rng.random(pairs) < 0.2, -1, NOW - rng.integers(0, 900 * DAY, pairs)),
        "item_last_time": np.where(rng.random(pairs) < 0.2, -1, NOW - rng.integers(0, 90 * DAY, pairs)),
    }
    return context, columns, asked


def rows_of(asked: dict[str, Any], rows: NDArray[np.int64]) -> dict[str, Any]:
    return {name: values[rows] for name, values in asked.items()}


def same_bits(left: Columns, right: Columns) -> bool:
    return all(left[name].tobytes() == right[name].tobytes() for name in CROSS_COLUMNS)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_training_and_serving_ask_alike(seed: int) -> None:
    """All at once (training), request by request (serving) and pair by pair: the same bits in the same rows."""
    context, items, asked = random_world(seed)
    whole = cross_columns(context, items, **asked)
    for parts in (
        [np.flatnonzero(asked["request_of_pair"] == request) for request in range(len(context.time_us))],
        [np.array([pair]) for pair in range(len(asked["item_of_pair"]))],
    ):
        for rows in parts:
            alone = cross_columns(context, items, **rows_of(asked, rows))
            assert same_bits(alone, {name: values[rows] for name, values in whole.items()})


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_a_request_answers_alike_without_the_other_requests(seed: int) -> None:
    """Serving builds its context for one request only."""
    context, items, asked = random_world(seed)
    whole = cross_columns(context, items, **asked)
    request = int(asked["request_of_pair"][0])
    rows = np.flatnonzero(asked["request_of_pair"] == request)
    only = RequestColumns(**{name: column[[request]] for name, column in vars(context).items()})
    alone = cross_columns(only, items, **{**rows_of(asked, rows), "request_of_pair": np.zeros(len(rows), np.int64)})
    assert same_bits(alone, {name: values[rows] for name, values in whole.items()})


def test_slices_of_bounded_memory_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    context, items, asked = random_world(3)
    whole = cross_columns(context, items, **asked)
    for name, value in (("_SMALL", 0), ("_PAIRS_AT_ONCE", 7), ("_TABLE_CELLS", 20)):
        monkeypatch.setattr(crosses, name, value)
    assert same_bits(cross_columns(context, items, **asked), whole)


def test_similarity_is_the_cosine_within_the_grid() -> None:
    context, items, asked = random_world(11)
    columns = cross_columns(context, items, **asked)
    assert items.vectors is not None
    for pair, (request, item) in enumerate(zip(asked["request_of_pair"], asked["item_of_pair"], strict=True)):
        newest = [row for row in context.history[request] if row >= 0][-crosses.SIMILAR_HISTORY :]
        if newest:
            cosines = items.vectors[newest].astype(np.float64) @ items.vectors[item].astype(np.float64)
            assert columns["similarity_max"][pair] == pytest.approx(cosines.max(), abs=3e-4)
            assert columns["similarity_mean"][pair] == pytest.approx(cosines.mean(), abs=3e-4)


def test_columns_of_different_length_are_refused() -> None:
    context, items = by_hand()
    with pytest.raises(InputError, match="different lengths"):
        cross_columns(
            context, items, np.array([0]), np.array([0, 1]), item_first_time=np.array([1]), item_last_time=np.array([1])
        )
    with pytest.raises(InputError, match="different lengths"):
        replace(context, time_us=np.array([NOW]))
    with pytest.raises(InputError, match="one shape"):
        replace(context, history_times=np.zeros((2, 9), np.int64))


# --- what a workspace declares ----------------------------------------------------------------------------------------------


def test_a_decayed_sum_halves_once_per_half_life_and_never_grows() -> None:
    day = DAY
    found = faded(np.array([8.0, 8.0, 8.0, 0.0]), np.array([0, 4 * day, 20 * day, np.nan]), np.full(4, 10 * day), 2.0)
    assert found.tolist() == [8 / 32, 8 / 8, 8.0, 0.0]


def test_a_missing_value_stays_missing_however_old() -> None:
    assert np.isnan(faded(np.array([np.nan]), np.array([np.nan]), np.array([5]), 1.0)).all()


def test_declared_crosses_are_missing_where_a_side_is_or_nothing_divides() -> None:
    columns = {"left": np.array([6.0, 6.0, np.nan, 0.0]), "right": np.array([3.0, 0.0, 1.0, 0.0])}
    declared = {"r": Cross("left", "right"), "d": Cross("left", "right", "difference"), "p": Cross("right", "left", "product")}
    found = combined(columns, declared)
    nan = np.nan
    np.testing.assert_array_equal(found["r"], [2.0, nan, nan, nan])
    np.testing.assert_array_equal(found["d"], [3.0, 6.0, nan, 0.0])
    np.testing.assert_array_equal(found["p"], [18.0, 0.0, nan, 0.0])
