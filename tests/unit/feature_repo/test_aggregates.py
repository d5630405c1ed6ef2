"""Aggregates against a slow plain-Python oracle on small random worlds, and by hand where a rule is easy to get wrong."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo import histories
from feature_repo.aggregates import AggregateConfig, build_tables
from feature_repo.counts import exact_in_any_order
from feature_repo.versions import Filled, write_versions
from feature_repo.views import read_views
from tandem.core.errors import InputError
from tandem.core.schema import EVENTS, ITEMS, USERS, Source, Task

MIDNIGHT = datetime(2026, 3, 1, tzinfo=UTC)
CONFIG = AggregateConfig(history_length=3, windows=(1, 2, 5), top_categories=2)
RATINGS = Source("ratings", (Task("rated", "rating"), Task("liked", "rating", 4)), "liked", ("rating",), True, "users")
CLICKS = Source(
    "clicks",
    (Task("click", "click"), Task("purchase", "purchase")),
    "click",
    ("click",),
    True,
    "time",
    impression="impression",
)
CATEGORIES = {"x": ["b", "a", "a"], "y": ["b"], "z": [], "w": None}
"""Doubled, single, none, unknown; item "v" is in no catalogue at all."""


@dataclass(frozen=True)
class Event:
    user: str
    item: str
    action: str
    time: datetime
    value: float | None


def frame_of(events: Sequence[Event]) -> pl.DataFrame:
    rows = [
        dict.fromkeys(EVENTS)
        | {"event_id": f"e{place:04d}", "user_id": event.user, "item_id": event.item, "action": event.action}
        | {"value": event.value, "timestamp": event.time}
        for place, event in enumerate(events)
    ]
    return pl.DataFrame(rows, schema=EVENTS)


def catalogue() -> pl.DataFrame:
    rows = [{"item_id": item, "title": item, "text": item, "categories": names} for item, names in CATEGORIES.items()]
    return pl.DataFrame(rows, schema=ITEMS)


def nobody() -> pl.DataFrame:
    return pl.DataFrame(schema=USERS)


def filled(tables: dict[str, pl.DataFrame]) -> dict[str, Filled]:
    return {name: Filled(table) for name, table in tables.items()}


def tables_of(events: Sequence[Event], source: Source = RATINGS, config: AggregateConfig = CONFIG) -> dict[str, pl.DataFrame]:
    return build_tables(frame_of(events), catalogue(), nobody(), source, config)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Source, list[Event]]:
    """Few users, items and instants, so that ties, midnights and empty windows are common. Events come in no order."""
    source = draw(st.sampled_from([RATINGS, CLICKS]))
    actions = ["rating", "tag"] if source is RATINGS else ["impression", "click", "purchase", "hide"]
    instants = st.one_of(st.integers(0, 9).map(lambda day: day * 86_400), st.integers(0, 9 * 8).map(lambda third: third * 10_799))
    event = st.builds(
        Event,
        st.sampled_from(["ann", "bob", "cat"]),
        st.sampled_from(["x", "y", "z", "w", "v"]),
        st.sampled_from(actions),
        instants.map(lambda seconds: MIDNIGHT + timedelta(seconds=seconds)),
        st.sampled_from([None, float("nan"), 1.0, 3.0, 4.0, 5.0]),
    )
    return source, draw(st.lists(event, max_size=30))


# --- the oracle --------------------------------------------------------------------------------------------------------


def is_task(event: Event, task: Task) -> bool:
    hit = event.action == task.action
    return hit and (task.at_least is None or (event.value is not None and event.value >= task.at_least))


def known_values(events: Sequence[Event]) -> list[float]:
    return [event.value for event in events if event.value is not None and event.value == event.value]


def micro(time: datetime) -> int:
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def counts_at(events: Sequence[Event], entity: str, time: datetime, source: Source, config: AggregateConfig) -> dict[str, Any]:
    """What `<entity>_stats` must know at `time` about the owner of `events`, without the smoothed rates."""
    past = [event for event in events if event.time <= time]
    history = [event for event in past if event.action in source.history]
    midnight = time.replace(hour=0, minute=0, second=0, microsecond=0)
    row: dict[str, Any] = {f"{entity}_events": len(history)}
    for window in config.windows:
        since = midnight - timedelta(days=window - 1)
        row[f"{entity}_events_{window}d"] = sum(event.time >= since for event in history)
    if source.impression:
        row[f"{entity}_impressions"] = sum(event.action == source.impression for event in past)
    for task in source.tasks:
        row[f"{entity}_{task.name}"] = sum(is_task(event, task) for event in past)
    if entity == "item":
        row["item_first_time"] = min((micro(event.time) for event in history), default=None)
    row[f"{entity}_last_time"] = max((micro(event.time) for event in history), default=None)
    values = known_values(history)
    row[f"{entity}_mean_value"] = sum(values) / len(values) if values else None
    return row


def rates_at(own: Sequence[Event], everybody: Sequence[Event], entity: str, time: datetime, source: Source) -> dict[str, float]:
    rates = {}
    for task in source.tasks:
        per_impression = source.impression is not None and task.action in source.history
        trial_actions = (source.impression,) if per_impression else source.history

        def tally(events: Sequence[Event], task: Task = task, trials: Sequence[str | None] = trial_actions) -> tuple[int, int]:
            past = [event for event in events if event.time <= time]
            return sum(is_task(event, task) for event in past), sum(event.action in trials for event in past)

        hits, trials = tally(own)
        all_hits, all_trials = tally(everybody)
        mean = all_hits / all_trials if all_trials else 0.0
        rates[f"{entity}_{task.name}_rate"] = (hits + 20 * mean) / (trials + 20)
    return rates


def counted(events: Sequence[Event], source: Source) -> list[Event]:
    """Events that say anything: in the history, an impression, or a label."""
    marks = {*source.history, source.impression, *(task.action for task in source.tasks)}
    return [event for event in events if event.action in marks]


def as_of(rows: Sequence[dict[str, Any]], time: datetime) -> dict[str, Any] | None:
    """The newest of one owner's rows at or before `time`."""
    past = [row for row in rows if row["event_timestamp"] <= time]
    return past[-1] if past else None


def rows_of(table: pl.DataFrame, key: str, owner: str) -> list[dict[str, Any]]:
    return table.filter(pl.col(key) == owner).rows(named=True)


def of_owner(events: Sequence[Event], entity: str, owner: str) -> list[Event]:
    return [event for event in events if (event.user if entity == "user" else event.item) == owner]


def interesting_times(events: Sequence[Event]) -> list[datetime]:
    """Events' instants, the microseconds around them, and all midnights until the last window has run out."""
    instants = {event.time for event in events}
    around = {time + timedelta(microseconds=shift) for time in instants for shift in (-1, 0, 1)}
    midnights = {MIDNIGHT + timedelta(days=day, microseconds=shift) for day in range(17) for shift in (-1, 0)}
    return sorted(around | midnights)


@settings(max_examples=25, deadline=None)
@given(worlds())
def test_counts_and_windows_are_exact_at_every_instant(world: tuple[Source, list[Event]]) -> None:
    """Not only where rows stand: an as-of read at any time gives what a recount gives."""
    source, events = world
    tables = tables_of(events, source)
    for entity in ("user", "item"):
        table = tables[f"{entity}_stats"]
        for owner in {event.user if entity == "user" else event.item for event in counted(events, source)}:
            own = of_owner(counted(events, source), entity, owner)
            rows = rows_of(table, f"{entity}_id", owner)
            for time in interesting_times(own):
                row = as_of(rows, time)
                if row is None:
                    assert all(event.time > time for event in own)
                    continue
                expected = counts_at(own, entity, time, source, CONFIG)
                assert {name: row[name] for name in expected} == expected


@settings(max_examples=25, deadline=None)
@given(worlds())
def test_smoothed_rates_start_from_the_mean_as_it_was_known_then(world: tuple[Source, list[Event]]) -> None:
    source, events = world
    tables = tables_of(events, source)
    for entity in ("user", "item"):
        for row in tables[f"{entity}_stats"].iter_rows(named=True):
            own = of_owner(events, entity, row[f"{entity}_id"])
            expected = rates_at(own, events, entity, row["event_timestamp"], source)
            assert {name: row[name] for name in expected} == pytest.approx(expected)


@settings(max_examples=25, deadline=None)
@given(worlds())
def test_histories_hold_the_last_events_oldest_first(world: tuple[Source, list[Event]]) -> None:
    source, events = world
    table = tables_of(events, source)["user_history"]
    expected = []
    for user, time in sorted({(event.user, event.time) for event in events if event.action in source.history}):
        own = [event for event in of_owner(events, "user", user) if event.action in source.history and event.time <= time]
        last = sorted(own, key=lambda event: event.time)[-CONFIG.history_length :]
        values = [(known_values([event]) or [0.0])[0] for event in last]
        expected.append((user, time, [event.item for event in last], [micro(event.time) for event in last], values))
    assert table.rows() == expected


@settings(max_examples=25, deadline=None)
@given(worlds())
def test_category_shares_are_shares_of_the_history_so_far(world: tuple[Source, list[Event]]) -> None:
    source, events = world
    table = tables_of(events, source)["user_categories"]
    expected = []
    for user, time in sorted({(event.user, event.time) for event in events if event.action in source.history}):
        own = [event for event in of_owner(events, "user", user) if event.action in source.history and event.time <= time]
        counts = Counter(name for event in own for name in set(CATEGORIES.get(event.item) or []))
        top = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[: CONFIG.top_categories]
        expected.append((user, time, [name for name, _ in top], [count / len(own) for _, count in top]))
    assert table.rows() == expected


@settings(max_examples=25, deadline=None)
@given(worlds(), st.integers(0, 9 * 24))
def test_no_row_knows_the_future(world: tuple[Source, list[Event]], hours: int) -> None:
    """Without the events after t, all rows up to t are the same bit for bit."""
    source, events = world
    time = MIDNIGHT + timedelta(hours=hours)
    whole = tables_of(events, source)
    past = build_tables(frame_of(events).filter(pl.col("timestamp") <= time), catalogue(), nobody(), source, CONFIG)
    for view, table in whole.items():
        upto = pl.col("event_timestamp") <= time
        assert table.filter(upto).equals(past[view].filter(upto)), view


@settings(max_examples=15, deadline=None)
@given(worlds(), st.integers(1, 12))
def test_key_blocks_cut_anywhere_give_one_answer(world: tuple[Source, list[Event]], events: int) -> None:
    source, rows = world
    with pytest.MonkeyPatch.context() as small:
        small.setattr("feature_repo.counts._BLOCK", events)
        blocks = tables_of(rows, source)
    for view, table in tables_of(rows, source).items():
        assert table.equals(blocks[view]), view


def test_values_that_are_no_whole_numbers_are_summed_key_by_key() -> None:
    """A key's sums must not depend on what other keys there are: 1e12 beside 0.1 would cost it its digits."""
    alone = tables_of([rating("x", 1, 0.1), rating("x", 2, 0.2)])["user_stats"]
    beside = tables_of([rating("x", 1, 0.1), rating("x", 2, 0.2), rating("a", 1, 1e12, "abe")])["user_stats"]
    assert beside.filter(user_id="ann")["user_mean_value"].equals(alone["user_mean_value"])


def test_fractions_of_one_instant_are_added_in_the_order_of_their_ids() -> None:
    """0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1: the order of the events table must not decide."""
    frame = frame_of([rating("x", 1, value) for value in (0.1, 0.2, 0.3)])
    means = [
        build_tables(frame[order], catalogue(), nobody(), RATINGS, CONFIG)["item_stats"]["item_mean_value"][0]
        for order in ([0, 1, 2], [2, 1, 0])
    ]
    assert means == [(0.1 + 0.2 + 0.3) / 3] * 2 != [(0.3 + 0.2 + 0.1) / 3] * 2


@pytest.mark.parametrize(
    ("values", "exact"),
    [([], True), ([3.5, -80_995.0, 0.0], True), ([0.1], False), ([2.0**43], False), ([float("inf")], False)],
)
def test_sums_that_no_order_changes(values: list[float], exact: bool) -> None:
    assert exact_in_any_order(np.array(values, np.float64)) is exact


@settings(max_examples=15, deadline=None)
@given(worlds(), st.randoms(use_true_random=False))
def test_the_order_of_the_events_table_changes_nothing(world: tuple[Source, list[Event]], random: Any) -> None:
    source, events = world
    frame = frame_of(events)
    shuffled = frame[random.sample(range(len(frame)), len(frame))]
    again = build_tables(shuffled, catalogue(), nobody(), source, CONFIG)
    for view, table in build_tables(frame, catalogue(), nobody(), source, CONFIG).items():
        assert table.equals(again[view]), view


@settings(max_examples=25, deadline=None)
@given(worlds())
def test_tables_are_sorted_and_have_one_row_per_instant(world: tuple[Source, list[Event]]) -> None:
    for table in tables_of(world[1], world[0]).values():
        keys = table.select(table.columns[:2])
        assert not keys.is_duplicated().any()
        assert keys.equals(keys.sort(keys.columns))


@pytest.mark.parametrize("cells", [1, 7, 40])
def test_category_blocks_cut_anywhere_give_one_answer(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users are cut in mid-history by small blocks."""
    rng = np.random.default_rng(cells)
    time = [MIDNIGHT + timedelta(minutes=minute) for minute in range(200)]
    events = [Event(f"u{rng.integers(5)}", f"i{rng.integers(30)}", "rating", when, None) for when in time]
    names = [[f"c{code}" for code in rng.integers(0, 12, rng.integers(0, 4))] for _ in range(30)]
    items = pl.DataFrame([{"item_id": f"i{row}", "categories": names[row]} for row in range(30)], schema=ITEMS)
    whole = build_tables(frame_of(events), items, nobody(), RATINGS, CONFIG)["user_categories"]
    monkeypatch.setattr(histories, "_BLOCK_CELLS", cells)
    assert build_tables(frame_of(events), items, nobody(), RATINGS, CONFIG)["user_categories"].equals(whole)


# --- by hand -----------------------------------------------------------------------------------------------------------


def rating(item: str, hours: float, value: float | None = 5.0, user: str = "ann") -> Event:
    return Event(user, item, "rating", MIDNIGHT + timedelta(hours=hours), value)


def test_rows_stand_at_events_and_at_the_midnights_that_change_a_window() -> None:
    table = tables_of([rating("x", 23), rating("y", 25)])["user_stats"]
    day = [time.day + time.hour / 24 for time in table["event_timestamp"]]
    assert day == [1 + 23 / 24, 2, 2 + 1 / 24, 3, 4, 6, 7]
    assert table["user_events_1d"].to_list() == [1, 0, 1, 0, 0, 0, 0]
    assert table["user_events_2d"].to_list() == [1, 1, 2, 1, 0, 0, 0]
    assert table["user_events_5d"].to_list() == [1, 1, 2, 2, 2, 1, 0]
    assert table["user_events"].to_list() == [1, 1, 2, 2, 2, 2, 2]


def test_events_of_one_instant_stand_in_the_order_of_their_ids() -> None:
    frame = frame_of([rating("x", 1), rating("y", 1), rating("z", 1)])
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        table = build_tables(frame[order], catalogue(), nobody(), RATINGS, CONFIG)["user_history"]
        assert table["history_items"].to_list() == [["x", "y", "z"]]


def test_until_stops_the_midnights_of_the_future_but_no_event() -> None:
    config = AggregateConfig(windows=(1, 2, 5), until=MIDNIGHT + timedelta(days=1))
    times = tables_of([rating("x", 23), rating("y", 49)], config=config)["user_stats"]["event_timestamp"]
    assert times.to_list() == [MIDNIGHT + timedelta(hours=hours) for hours in (23, 24, 49)]


def test_a_click_rate_is_per_impression_and_a_purchase_rate_per_click() -> None:
    actions = ["impression"] * 4 + ["click"] * 2 + ["purchase"]
    events = [Event("ann", "x", action, MIDNIGHT + timedelta(minutes=place), None) for place, action in enumerate(actions)]
    events.append(Event("bob", "y", "impression", MIDNIGHT, None))
    row = tables_of(events, CLICKS)["item_stats"].filter(pl.col("item_purchase") == 1).row(0, named=True)
    assert (row["item_impressions"], row["item_click"], row["item_events"], row["item_purchase"]) == (4, 2, 2, 1)
    assert row["item_click_rate"] == pytest.approx((2 + 20 * 2 / 5) / (4 + 20))
    assert row["item_purchase_rate"] == pytest.approx((1 + 20 * 1 / 2) / (2 + 20))


STAT_COLUMNS = "{0}_events {0}_events_1d {0}_events_2d {0}_events_5d {0}_rated {0}_rated_rate {0}_liked {0}_liked_rate"


def test_views_and_columns_are_the_contract() -> None:
    tables = tables_of([rating("x", 1)])
    assert {view: " ".join(table.columns) for view, table in tables.items()} == {
        "user_stats": f"user_id event_timestamp {STAT_COLUMNS.format('user')} user_last_time user_mean_value",
        "user_history": "user_id event_timestamp history_items history_times history_values",
        "user_categories": "user_id event_timestamp top_categories category_shares",
        "item_stats": f"item_id event_timestamp {STAT_COLUMNS.format('item')} item_first_time item_last_time item_mean_value",
        "item_attributes": "item_id event_timestamp item_available_from",
    }


def test_an_empty_events_table_gives_empty_tables_of_the_same_types() -> None:
    full, empty = tables_of([rating("x", 1)], CLICKS), tables_of([], CLICKS)
    assert {view: table.schema for view, table in full.items()} == {view: table.schema for view, table in empty.items()}
    assert all(empty[view].is_empty() for view in empty if view != "item_attributes")


def test_item_attributes_are_stamped_when_the_item_became_available() -> None:
    items = pl.DataFrame(
        {"item_id": ["new", "old"], "title": "t", "text": "t", "categories": [["a"], ["a"]], "available_from": [MIDNIGHT, None]}
        | {
            "price": [1.5, float("nan")],
            "pages": [3, None],
            "in_stock": [True, False],
            "brand": ["猫", None],
            "tags": [["x"], ["y"]],
        },
        schema_overrides={"available_from": ITEMS["available_from"]},
    )
    table = build_tables(frame_of([]), items, nobody(), RATINGS, CONFIG)["item_attributes"]
    assert table.rows() == [
        ("new", MIDNIGHT, 1.5, 3, 1, "猫", micro(MIDNIGHT)),
        ("old", datetime(1970, 1, 1, tzinfo=UTC), None, None, 0, None, None),
    ]
    assert table.columns[2:] == ["price", "pages", "in_stock", "brand", "item_available_from"]


def test_user_attributes_are_a_view_only_when_there_are_any() -> None:
    users = pl.DataFrame({"user_id": ["bob", "ann"], "text": [None, "hi"], "age": [30, None]})
    table = build_tables(frame_of([]), catalogue(), users, RATINGS, CONFIG)["user_attributes"]
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    assert table.rows() == [("ann", epoch, None), ("bob", epoch, 30)]
    assert "user_attributes" not in tables_of([])


def test_one_name_in_two_views_is_refused() -> None:
    users = pl.DataFrame({"user_id": ["ann"], "text": ["hi"], "price": [3]})
    items = catalogue().with_columns(price=pl.lit(1.0))
    with pytest.raises(InputError, match="'price' stands in both item_attributes and user_attributes"):
        build_tables(frame_of([]), items, users, RATINGS, CONFIG)


def test_a_window_of_no_days_is_refused() -> None:
    with pytest.raises(InputError, match="positive"):
        AggregateConfig(windows=(0, 7))


# --- files and real data -----------------------------------------------------------------------------------------------


def test_tables_are_read_back_as_the_schema_describes_them(tmp_path: Path) -> None:
    tables = tables_of([rating("x", 1), rating("y", 2, None)])
    written = write_versions(filled(tables), tmp_path / "features")
    assert read_views(tmp_path / "features") == written
    assert [view.name for view in written] == list(tables)
    for view in written:
        stored = pl.read_parquet(tmp_path / view.path)
        assert stored.equals(tables[view.name])
        assert dict(stored.schema) == view.columns
    assert not list((tmp_path / "features").glob(".partial-*"))


def test_a_failed_write_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_versions(filled(tables_of([rating("x", 1)])), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_versions(filled(tables_of([rating("y", 2)])), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before


RETAIL = Source("retail", (Task("purchase", "purchase"), Task("return", "return")), "purchase", ("purchase",), False, "time")


def retail_events(path: Path, items: int = 300) -> list[Event]:
    lines = pl.read_parquet(path).with_columns(pl.col("InvoiceDate").dt.replace_time_zone("UTC"))
    kept = lines["ItemKey"].value_counts(sort=True)["ItemKey"].head(items)
    lines = (
        lines.filter(pl.col("ItemKey").is_in(kept.implode()))
        .sort("InvoiceDate", "Customer ID", "ItemKey", "Quantity")
        .head(60_000)
    )
    columns = lines.select("Customer ID", "ItemKey", "Quantity", "InvoiceDate", "Price").rows()
    return [Event(user, item, "purchase" if count > 0 else "return", time, price) for user, item, count, time, price in columns]


@pytest.mark.real
def test_retail_tables_agree_with_a_recount() -> None:
    """Real invoices: dozens of lines share one minute, users return goods, items repeat."""
    shared = Path(os.environ.get("TANDEM_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data"))
    path = shared / "online-retail" / "online_retail.parquet"
    if not path.is_file():
        pytest.skip(f"no online-retail data at {shared}; set TANDEM_SHARED_DATA")
    events, config = retail_events(path), AggregateConfig()
    tables = tables_of(events, RETAIL, config)
    users = sorted({event.user for event in events})[::150]
    for user in users:
        own = of_owner(events, "user", user)
        stats, histories = (rows_of(tables[view], "user_id", user) for view in ("user_stats", "user_history"))
        for time in sorted({event.time for event in own})[::5]:
            row = as_of(stats, time)
            assert row is not None
            expected = counts_at(own, "user", time, RETAIL, config)
            assert {name: row[name] for name in expected} == pytest.approx(expected)
            history = as_of(histories, time)
            bought = [event.item for event in own if event.action == "purchase" and event.time <= time]
            assert (history["history_items"] if history else []) == bought[-50:]
