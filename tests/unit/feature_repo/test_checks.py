"""Checks are judged by what they catch: each fault is injected, and each clean frame passes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo.checks import CheckResult, freshness, leakage, parity, views_fresh
from tandem.core.errors import InputError
from tandem.core.schema import TIME

START = datetime(2026, 11, 1, tzinfo=UTC)


def at(hours: float) -> datetime:
    return START + timedelta(hours=hours)


def tables() -> dict[str, pl.DataFrame]:
    users = pl.DataFrame(
        {
            "user_id": ["ann", "ann", "ann", "bob"],
            "event_timestamp": [at(1), at(2), at(3), at(2)],
            "user_events": [1, 2, 3, 1],
            "history_items": [["x"], ["x", "y"], ["x", "y", "z"], ["z"]],
            "user_mean_value": [None, 4.0, 4.5, None],
        },
        schema_overrides={"event_timestamp": TIME},
    )
    items = pl.DataFrame(
        {"item_id": ["x", "y"], "event_timestamp": [at(1), at(2)], "colour": ["red", "blue"]},
        schema_overrides={"event_timestamp": TIME},
    )
    return {"user_history": users, "item_attributes": items}


def training(**changed: list[Any]) -> pl.DataFrame:
    """The right frame: ann at her own second and third event and later, bob before and after his first."""
    columns: dict[str, Any] = {
        "user_id": ["ann", "ann", "ann", "bob", "bob"],
        "item_id": ["x", "y", "y", "x", "never"],
        "event_timestamp": [at(2), at(3), at(9), at(2), at(2.5)],
        "user_events": [1, 2, 3, None, 1],
        "history_items": [["x"], ["x", "y"], ["x", "y", "z"], None, ["z"]],
        "user_mean_value": [None, 4.0, 4.5, None, None],
        "colour": ["red", "blue", "blue", "red", None],
        "label": [1, 0, 1, 0, 1],
    }
    return pl.DataFrame(columns | changed, schema_overrides={"event_timestamp": TIME})


def mistakes(result: CheckResult) -> list[tuple[Any, ...]]:
    return result.table.select("row", "feature", "kind").rows()


def test_a_frame_of_as_of_values_passes() -> None:
    result = leakage(training(), tables())
    assert result.passed
    assert (result.name, result.rows) == ("leakage", 5)
    assert "4 features" in result.detail


def test_a_row_that_sees_its_own_event_is_caught() -> None:
    """Asking at the event's own timestamp, one microsecond late, is the classic mistake."""
    result = leakage(training(user_events=[2, 2, 3, None, 1]), tables())
    assert not result.passed
    assert mistakes(result) == [(0, "user_events", "leak")]
    assert "1 values from the future" in result.detail
    assert result.table.select("entity", "found", "expected").row(0) == ("ann", "2", "1")


def test_leaks_in_lists_strings_and_first_rows_are_caught() -> None:
    leaky = training(
        history_items=[["x"], ["x", "y", "z"], ["x", "y", "z"], ["z"], ["z"]],
        colour=["red", "blue", "blue", "blue", None],
    )
    assert mistakes(leakage(leaky, tables())) == [
        (1, "history_items", "leak"),
        (3, "colour", "mismatch"),
        (3, "history_items", "leak"),
    ]


def test_a_stale_lost_or_invented_value_is_wrong_but_no_leak() -> None:
    wrong = training(user_events=[1, 1, None, None, 77])
    assert mistakes(leakage(wrong, tables())) == [(row, "user_events", "mismatch") for row in (1, 2, 4)]


def test_nan_and_null_are_both_missing() -> None:
    assert leakage(training(user_mean_value=[float("nan"), 4.0, 4.5, None, float("nan")]), tables()).passed


def test_an_expired_value_counts_as_missing() -> None:
    """Within four hours: ann's last row is six hours old at her last event; the edge itself is still inside."""
    ttl = {"user_history": timedelta(hours=4)}
    kept = training(
        user_events=[1, 2, None, None, 1],
        history_items=[["x"], ["x", "y"], None, None, ["z"]],
        user_mean_value=[None, 4.0, None, None, None],
    )
    assert leakage(kept, tables(), ttl).passed
    assert mistakes(leakage(training(), tables(), ttl))[0][0] == 2
    edge = {"user_history": timedelta(hours=6) - timedelta(microseconds=1)}
    assert leakage(training(), tables(), edge).passed


def test_a_frame_with_nothing_to_check_is_refused() -> None:
    with pytest.raises(InputError, match="nothing could be checked"):
        leakage(training().select("user_id", "item_id", "event_timestamp", "label"), tables())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_every_injected_future_value_is_found_and_nothing_else(seed: int) -> None:
    """A table of ever-growing counters: the as-of value by plain loops passes, and any later one is a leak."""
    rng = np.random.default_rng(seed)
    rows = sorted({(f"u{rng.integers(4)}", int(rng.integers(60))) for _ in range(40)})
    table = pl.DataFrame(
        {"user_id": [user for user, _ in rows], "event_timestamp": [at(hour) for _, hour in rows], "count": range(len(rows))},
        schema_overrides={"event_timestamp": TIME},
    )
    asked = [(f"u{rng.integers(5)}", int(rng.integers(70))) for _ in range(30)]
    known = [[place for place, (user, hour) in enumerate(rows) if user == who and hour < when] for who, when in asked]
    frame = pl.DataFrame(
        {
            "user_id": [who for who, _ in asked],
            "event_timestamp": [at(when) for _, when in asked],
            "count": [places[-1] if places else None for places in known],
        },
        schema_overrides={"event_timestamp": TIME, "count": pl.Int64},
    )
    assert leakage(frame, {"user_stats": table}).passed
    future = [[place for place, (user, hour) in enumerate(rows) if user == who and hour >= when] for who, when in asked]
    leaky = [row for row in range(len(asked)) if future[row] and rng.random() < 0.4]
    values = frame["count"].to_list()
    for row in leaky:
        values[row] = int(rng.choice(future[row]))
    found = leakage(frame.with_columns(pl.Series("count", values, pl.Int64)), {"user_stats": table})
    assert mistakes(found) == [(row, "count", "leak") for row in leaky]


def served_rows() -> pl.DataFrame:
    return pl.DataFrame(
        {"item_id": ["x", "y", "z"], "rate": [0.1, None, 2.0e9], "tags": [["a"], [], ["b", "c"]], "release": ["r"] * 3}
    )


def test_equal_rows_pass_whatever_their_order_and_precision() -> None:
    store = served_rows().with_columns(pl.col("rate").cast(pl.Float32).fill_null(float("nan"))).reverse().drop("release")
    result = parity(served_rows(), store, ["item_id"])
    assert result.passed
    assert result.rows == 3


def test_every_difference_is_shown() -> None:
    store = (
        served_rows().drop("release").with_columns(rate=pl.Series([0.1001, 0.0, 2.0e9]), tags=pl.Series([["a"], [], ["c", "b"]]))
    )
    result = parity(served_rows(), store.head(3), ["item_id"])
    assert not result.passed
    assert result.table.rows() == [
        ("x", "rate", "0.1", "0.1001", "differs"),
        ("y", "rate", None, "0.0", "differs"),
        ("z", "tags", "[b, c]", "[c, b]", "differs"),
    ]


def test_a_row_that_the_store_does_not_have_is_absent() -> None:
    result = parity(served_rows(), served_rows().head(2), ["item_id"], ["rate"])
    assert result.table.select("item_id", "kind").rows() == [("z", "absent")]
    assert "1 rows are not in the store" in result.detail


def test_a_row_of_nothing_is_still_absent_not_equal() -> None:
    assert not parity(served_rows(), served_rows().filter(pl.col("item_id") != "y"), ["item_id"], ["rate"]).passed


def test_parity_needs_unique_keys_and_common_features() -> None:
    doubled = pl.concat([served_rows(), served_rows()])
    with pytest.raises(InputError, match="one row per key"):
        parity(served_rows(), doubled, ["item_id"])
    with pytest.raises(InputError, match="share no feature"):
        parity(served_rows(), pl.DataFrame({"item_id": ["x"], "other": [1]}), ["item_id"])


@pytest.mark.parametrize(
    ("hours", "passed", "said"),
    [
        (1, True, "1 h 0 min old"),
        (24, True, "the limit is 1 d 0 h"),
        (24.1, False, "1 d 0 h old"),
        (-0.05, True, ""),
        (-1, False, "future"),
    ],
)
def test_freshness(hours: float, passed: bool, said: str) -> None:
    result = freshness(at(0), timedelta(days=1), at(hours))
    assert result.passed is passed
    assert said in result.detail


def ages(**columns: list[datetime | None]) -> pl.DataFrame:
    frame = {"view": ["user_stats", "item_stats"], "online_newest": [at(0), at(0)], "materialized_until": [at(20), at(20)]}
    return pl.DataFrame(frame | columns, schema_overrides={"online_newest": TIME, "materialized_until": TIME})


def test_views_within_their_limits_are_fresh() -> None:
    result = views_fresh(ages(), {"item_stats": timedelta(hours=30)}, at(24), timedelta(days=2))
    assert (result.passed, result.rows) == (True, 2)
    assert result.table.select("view", "age_h", "limit_h", "newest_h").rows() == [
        ("item_stats", 4, 30, 24),
        ("user_stats", 4, 48, 24),
    ]
    assert "nearest to it: item_stats, as of 4 h 0 min ago of 30 h" in result.detail


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"materialized_until": [at(20), None]}, "item_stats was never materialised"),
        ({"materialized_until": [at(20), at(2)]}, "item_stats was materialised longer than 20 h 0 min ago, as of 22 h 0 min ago"),
        ({"materialized_until": [at(20), at(25)]}, "item_stats is materialised up to a moment in the future"),
        ({"online_newest": [at(0), None]}, "item_stats has no row online"),
        ({"online_newest": [at(0), at(3.9)]}, "item_stats has only expired rows online"),
    ],
)
def test_a_view_that_is_not_fresh_is_named(columns: dict[str, list[datetime | None]], said: str) -> None:
    """One view has a ttl of twenty hours, the other takes the default of two days."""
    fresh = {"online_newest": [at(0), at(4)]}
    result = views_fresh(ages(**(fresh | columns)), {"item_stats": timedelta(hours=20)}, at(24), timedelta(days=2))
    assert not result.passed
    assert f"1 of 2 views are not: {said}" in result.detail
    assert views_fresh(ages(**fresh), {"item_stats": timedelta(hours=20)}, at(24), timedelta(days=2)).passed


def test_no_view_at_all_is_a_failure() -> None:
    assert not views_fresh(ages().clear(), {}, at(24), timedelta(days=2)).passed
