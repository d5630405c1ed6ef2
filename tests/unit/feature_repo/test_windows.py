"""Declared features against brute force: every event is asked again at every row."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from feature_repo.aggregates import AggregateConfig, build_tables, rows_since
from feature_repo.crosses import faded
from feature_repo.features import Declared
from feature_repo.views import ENTITIES, TIMESTAMP
from feature_repo.windows import decayed_sums
from tandem.core.schema import EVENTS, ITEMS, MICROSECONDS_PER_DAY, TIME, USERS, Source, Task

START = datetime(2026, 3, 1, tzinfo=UTC)
SHOP = Source("shop", (Task("click", "click"), Task("big", "buy", at_least=10)), "click", ("click", "buy"), False, "time", "view")
DECLARED = {
    "item_buys_2d": Declared("item", action="buy", window_days=2),
    "item_spent_3d": Declared("item", action="buy", window_days=3, what="sum"),
    "item_paid": Declared("item", action="buy", what="mean"),
    "item_big_ever": Declared("item", task="big"),
    "user_views_1d": Declared("user", action="view", window_days=1),
    "user_faded": Declared("user", half_life_days=0.5),
    "user_faded_spent": Declared("user", action="buy", half_life_days=2.0, what="sum"),
    "user_faded_paid": Declared("user", action="buy", half_life_days=2.0, what="mean"),
}
Event = tuple[int, int, str, int, float | None]
"""User, item, action, minutes after the start, value."""

SOME = settings(max_examples=25, deadline=None)
EVENT = st.tuples(
    st.integers(0, 2),
    st.integers(0, 2),
    st.sampled_from(["click", "buy", "view"]),
    st.integers(0, 8 * 1440),
    st.floats(1, 20) | st.none(),
)


def events_of(rows: list[Event]) -> pl.DataFrame:
    frame = pl.DataFrame(
        [
            {
                "event_id": f"e{number:03d}",
                "user_id": f"u{user}",
                "item_id": f"i{item}",
                "action": action,
                "value": value,
                "timestamp": START + timedelta(minutes=minutes),
            }
            for number, (user, item, action, minutes, value) in enumerate(rows)
        ],
        schema={name: EVENTS[name] for name in ("event_id", "user_id", "item_id", "action", "value", "timestamp")},
    )
    return frame.with_columns(pl.lit(None, dtype).alias(name) for name, dtype in EVENTS.items() if name not in frame.columns)


def items() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "item_id": ["i0", "i1", "i2"],
            "title": ["a"] * 3,
            "text": ["a"] * 3,
            "categories": [["c"]] * 3,
            "available_from": [None] * 3,
        },
        schema=ITEMS,
    )


def config(until: datetime | None = None) -> AggregateConfig:
    return AggregateConfig(declared=DECLARED, until=until)


def tables(rows: list[Event], until: datetime | None = None) -> dict[str, pl.DataFrame]:
    return build_tables(events_of(rows), items(), pl.DataFrame(schema=USERS), SHOP, config(until))


def counted(rows: list[Event], declared: Declared, key: str, when: datetime) -> list[tuple[float, float | None]]:
    """(days before `when`, value) of the events that a feature counts then, by reading its declaration aloud."""
    first = datetime.min.replace(tzinfo=UTC)
    if declared.window_days is not None:
        first = when.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=declared.window_days - 1)
    found = []
    for user, item, action, minutes, value in rows:
        moment = START + timedelta(minutes=minutes)
        wanted = {"big": action == "buy" and value is not None and value >= 10}.get(
            declared.task or "", action in ("click", "buy")
        )
        wanted = action == declared.action if declared.action else wanted
        wanted = wanted and (declared.what == "count" or value is not None)
        if wanted and key == (f"u{user}" if declared.entity == "user" else f"i{item}") and first <= moment <= when:
            found.append(((when - moment) / timedelta(days=1), value))
    return found


def expected(rows: list[Event], declared: Declared, key: str, when: datetime) -> float | None:
    known = counted(rows, declared, key, when)
    weights = [0.5 ** (age / declared.half_life_days) if declared.half_life_days else 1.0 for age, _ in known]
    if declared.what == "count":
        return sum(weights)
    total = sum(weight * (value or 0.0) for weight, (_, value) in zip(weights, known, strict=True))
    return total if declared.what == "sum" else (total / sum(weights) if known else None)


@SOME
@given(st.lists(EVENT, max_size=25))
def test_every_row_holds_what_its_declaration_says(rows: list[Event]) -> None:
    found = tables(rows)
    for name, declared in DECLARED.items():
        table = found[f"{declared.entity}_declared"]
        for row in table.iter_rows(named=True):
            value, now = row[name], row[TIMESTAMP]
            if declared.decays:
                then = np.array([np.nan if row[f"{name}_time"] is None else row[f"{name}_time"]])
                now_us = np.array([int((now - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1))])
                assert declared.half_life_days is not None
                value = float(faded(np.array([value]), then, now_us, declared.half_life_days)[0])
            wanted = expected(rows, declared, row[ENTITIES[declared.entity]], now)
            assert value == (None if wanted is None else pytest.approx(wanted, rel=1e-9, abs=1e-9)), (name, row)


@SOME
@given(st.lists(EVENT, min_size=1, max_size=25))
def test_the_newest_row_is_exact_at_every_later_moment(rows: list[Event]) -> None:
    """A window empties without events: at each midnight there is a row when it does."""
    table = tables(rows)["item_declared"]
    for minutes in range(0, 12 * 1440, 700):
        now = START + timedelta(minutes=minutes)
        for key in ("i0", "i1", "i2"):
            known = table.filter(pl.col("item_id") == key, pl.col(TIMESTAMP) <= now)
            for name in ("item_buys_2d", "item_spent_3d"):
                value = known[name][-1] if len(known) else 0
                assert value == pytest.approx(expected(rows, DECLARED[name], key, now), abs=1e-9)


@SOME
@given(st.lists(EVENT, min_size=2, max_size=25), st.integers(1, 5))
def test_rows_that_new_events_change_are_those_of_a_build(rows: list[Event], new: int) -> None:
    """To the last bit: pushed rows lie beside built ones in one table."""
    until = START + timedelta(days=30)
    built, events = tables(rows, until), events_of(rows)
    touched = events.tail(new).select("user_id", "item_id", "timestamp")
    pushed = rows_since(events.lazy(), items(), SHOP, config(until), touched)
    for entity, key in ENTITIES.items():
        since = touched.group_by(key).agg(pl.col("timestamp").min().alias("since"))
        view = f"{entity}_declared"
        wanted = built[view].join(since, on=key).filter(pl.col(TIMESTAMP) >= pl.col("since")).drop("since")
        assert_frame_equal(pushed[view], wanted.sort(key, TIMESTAMP), check_exact=True)


@SOME
@given(st.lists(EVENT, min_size=1, max_size=25), st.integers(0, 8 * 1440))
def test_no_row_knows_a_later_event(rows: list[Event], minutes: int) -> None:
    """Tables made from the events up to a moment are the tables up to that moment, to the last bit."""
    cut = START + timedelta(minutes=minutes)
    early = tables([row for row in rows if row[3] <= minutes], until=cut)
    for name, table in tables(rows, until=cut).items():
        if name.endswith("_declared"):
            assert_frame_equal(table.filter(pl.col(TIMESTAMP) <= cut), early[name], check_exact=True)


def test_a_long_history_neither_overflows_nor_vanishes() -> None:
    """Ten thousand half-lives: powers of two of that size are far outside of float64."""
    days = np.arange(0, 10_000, 2, dtype=np.int64)
    found = decayed_sums(np.zeros(len(days), np.int64), days * MICROSECONDS_PER_DAY, np.ones(len(days)), 1.0)
    assert found[-1] == pytest.approx(1 / (1 - 0.25), rel=1e-12)
    assert np.isfinite(found).all()


def test_types_and_columns_are_the_declared_ones() -> None:
    found = tables([(0, 0, "buy", 10, 3.0)])
    assert dict(found["user_declared"].schema) == {
        "user_id": pl.String(),
        TIMESTAMP: TIME,
        "user_views_1d": pl.Int64(),
        "user_faded": pl.Float64(),
        "user_faded_time": pl.Int64(),
        "user_faded_spent": pl.Float64(),
        "user_faded_spent_time": pl.Int64(),
        "user_faded_paid": pl.Float64(),
    }
    assert found["item_declared"].drop("item_id", TIMESTAMP).row(0) == (1, 3.0, 3.0, 0)


def test_without_declarations_there_are_no_such_views() -> None:
    assert "user_declared" not in build_tables(events_of([(0, 0, "buy", 1, None)]), items(), pl.DataFrame(schema=USERS), SHOP)
