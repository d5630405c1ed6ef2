"""Quarantine: whatever a draft holds, each row ends in the table or in `rejected`, once."""

from datetime import UTC, datetime

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo.sources.clean import clean_events, clean_items, clean_users, event_ids, finish_events
from feature_repo.sources.raw import REJECTED
from tandem.core.schema import id_problem

PINNED = ["85cd732645aee9bd25a73055", "b28eb86756c309f287a35124", "d01017b2ef67098d2fd979d7"]
NOW = datetime(2026, 1, 1, tzinfo=UTC)
TEXT = st.none() | st.sampled_from(["a", "b", "é", "e\u0301", "日本", "🙂 x/y", "", " ", "\x00", "x" * 300]) | st.text(max_size=5)
TIMES = st.none() | st.sampled_from(
    ["2024-01-01", "2024-01-01T00:00:00Z", "1700000000", "soon", "2999-01-01", "nan", "inf", "-1"]
)
VALUES = st.none() | st.sampled_from(["1", "2.5", "nan", "-inf", "x", "", "1e999"])
ROWS = st.lists(st.tuples(TEXT, TEXT, TIMES, VALUES), max_size=15)


@given(ROWS)
@settings(max_examples=40, deadline=None)
def test_every_event_is_kept_or_rejected_once(rows: list[tuple[str | None, ...]]) -> None:
    rows = [row for row in rows if not any(_has_surrogate(cell) for cell in row)]
    draft = pl.DataFrame(rows, schema=dict.fromkeys(["user_id", "item_id", "timestamp", "value"], pl.String), orient="row")
    draft = draft.with_row_index("row").with_columns(pl.lit("click").alias("action"))
    events, rejected = clean_events(draft, known_items=None, now=NOW)
    assert sorted([*events["row"], *rejected["row"]]) == list(range(len(rows)))
    assert dict(rejected.schema) == REJECTED
    assert rejected["reason"].null_count() == 0
    assert all(id_problem(each) is None for column in ("user_id", "item_id") for each in events[column])
    assert events["timestamp"].null_count() == 0
    assert events["value"].drop_nulls().is_finite().all()
    finished = finish_events(events)
    assert finished["event_id"].n_unique() == events.height
    assert finish_events(events.reverse().with_columns(pl.int_range(pl.len()).alias("row"))).equals(finished)


def _has_surrogate(cell: str | None) -> bool:
    return cell is not None and any(0xD800 <= ord(letter) <= 0xDFFF for letter in cell)


def test_event_ids_are_pinned() -> None:
    """An id that changed would make every later import append all events again."""
    draft = pl.DataFrame(
        {
            "row": [0, 1, 2],
            "user_id": ["u", "u", "é"],
            "item_id": ["i", "i", "日本"],
            "action": ["rating"] * 3,
            "value": [4.5, 4.5, -0.0],
            "timestamp": [1_700_000_000] * 3,
        }
    )
    events, _ = clean_events(draft, known_items=None, now=NOW)
    assert event_ids(events).to_list() == PINNED
    zero, _ = clean_events(draft.with_columns(pl.col("value") + 0.0), known_items=None, now=NOW)
    assert event_ids(zero).to_list() == PINNED


def test_an_item_available_before_1900_is_refused() -> None:
    """Year 1 for "unknown": the item snapshot holds microseconds as float64, which end in 1684."""
    times = ["0001-01-01T00:00:00Z", "1899-12-31T23:59:59Z", "1900-01-01T00:00:00Z", None]
    items, rejected = clean_items(pl.DataFrame({"row": range(4), "item_id": ["a", "b", "c", "d"], "available_from": times}))
    assert items["item_id"].to_list() == ["c", "d"]
    assert rejected["reason"].to_list() == ["available_from before 1900"] * 2


def test_items_and_users_are_kept_or_rejected_once() -> None:
    draft = pl.DataFrame(
        {
            "row": [0, 1, 2, 3],
            "item_id": ["a", None, "a", "b"],
            "title": ["first", "lost", " new\n\ttitle ", ""],
            "price": [1.0, 2.0, float("nan"), 4.0],
            "categories": [["x"], [], [" y ", "", "y", None], None],
        }
    )
    items, rejected = clean_items(draft)
    assert items.select("item_id", "title", "text", "price").rows() == [
        ("a", "new title", "new title", None),
        ("b", "b", "b", 4.0),
    ]
    assert items["categories"].to_list() == [["y"], []]
    assert rejected.select("row", "reason").rows() == [(0, "duplicate item (the last one is kept)"), (1, "no item id")]
    people = pl.DataFrame({"row": [0, 1], "user_id": ["u", "u"], "text": ["old", "new"], "age": [1, 2]})
    users, refused = clean_users(people, pl.Series(["u", "v"]))
    assert users.rows() == [("u", "new", 2), ("v", None, None)]
    assert refused["reason"].to_list() == ["duplicate user (the last one is kept)"]
