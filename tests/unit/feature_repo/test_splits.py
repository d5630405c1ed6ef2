"""The five splits: what they promise for any events (properties), and worlds small enough to check by hand."""

from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo.splits import SplitConfig, SplitResult, make_requests, user_order
from tandem.core.errors import InputError
from tandem.core.schema import EVENTS, PARTS, REQUESTS, Source, Task

T0 = datetime(2024, 1, 1, tzinfo=UTC)
TASKS = (Task("click", "click"), Task("rich", "click", at_least=3.0), Task("buy", "buy"))
KINDS = ("users", "time", "leave_one_out", "fraction", "given")


def _source(exclude_seen: bool = True, impression: str | None = None) -> Source:
    return Source("test", TASKS, "click", ("click",), exclude_seen, "time", impression)


def _events(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """Rows need user, item, at (minutes); the rest has defaults."""
    full = [
        {
            "event_id": f"e{place:05d}",
            "user_id": row["user"],
            "item_id": row["item"],
            "action": row.get("action", "click"),
            "value": row.get("value"),
            "timestamp": T0 + timedelta(minutes=row["at"]),
            "request_id": row.get("request"),
            "split": row.get("split"),
        }
        for place, row in enumerate(rows)
    ]
    return pl.DataFrame(full, schema=EVENTS)


def _chain(user: str, count: int, first: int = 0) -> list[dict[str, Any]]:
    """`count` clicks of distinct items, a minute apart."""
    return [{"user": user, "item": f"{user}-{place}", "at": first + place} for place in range(count)]


def _one(result: SplitResult, part: str, user: str) -> tuple[float, int, set[str]]:
    """(minute, n_history, true items of the positive task) of a user's only request in a part."""
    row = result.requests.filter((pl.col("part") == part) & (pl.col("user_id") == user))
    assert row.height == 1
    truth = result.truth.filter((pl.col("request_id") == row["request_id"][0]) & (pl.col("task") == "click"))
    return (row["timestamp"][0] - T0).total_seconds() / 60, row["n_history"][0], set(truth["item_id"])


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "user": st.sampled_from([f"u{place}" for place in range(9)]),
            "item": st.sampled_from([f"i{place}" for place in range(6)]),
            "at": st.integers(0, 40),
            "action": st.sampled_from(["click", "click", "click", "buy", "impression"]),
            "value": st.sampled_from([None, 1.0, 5.0]),
            "request": st.sampled_from([None, "r1", "r2"]),
            "split": st.sampled_from(["train", "ranker", "validation", "test", None]),
        }
    ),
    min_size=1,
    max_size=60,
)


@given(rows=ROWS, kind=st.sampled_from(KINDS), seed=st.integers(0, 5), exclude_seen=st.booleans(), impressions=st.booleans())
@settings(max_examples=80, deadline=None)
def test_promises_hold_for_any_events(
    rows: list[dict[str, Any]], kind: Any, seed: int, exclude_seen: bool, impressions: bool
) -> None:
    rows = [*rows, {"user": "u0", "item": "i0", "at": 3, "split": "test"}]
    events = _events(rows)
    source = _source(exclude_seen, "impression" if impressions else None)
    result = make_requests(events, source, SplitConfig(kind, seed, requests_per_user=2))
    _assert_shape(result, events)
    _assert_truth_is_real(result, events, source)
    if exclude_seen:
        _assert_nothing_seen(result, events, source)
    if kind in ("time", "leave_one_out", "fraction"):
        _assert_training_is_past(result)
    shuffled = make_requests(
        events.sample(fraction=1.0, shuffle=True, seed=1), source, SplitConfig(kind, seed, requests_per_user=2)
    )
    assert shuffled.requests.equals(result.requests)
    assert shuffled.truth.equals(result.truth)
    assert shuffled.training_events.equals(result.training_events)


def _assert_shape(result: SplitResult, events: pl.DataFrame) -> None:
    requests = result.requests
    assert dict(requests.schema) == {**REQUESTS, "n_history": pl.Int64()}
    assert requests["request_id"].n_unique() == requests.height
    assert requests.select("user_id", "part", "timestamp").is_duplicated().sum() == 0
    assert set(requests["part"]) <= {"ranker", "calibrate", "test"}
    per_user = requests.group_by("user_id", "part").len()
    assert per_user.filter((pl.col("part") != "ranker") & (pl.col("len") > 1)).is_empty()
    assert per_user.filter(pl.col("len") > 2).is_empty()
    assert result.truth.is_duplicated().sum() == 0
    assert set(result.truth["request_id"]) == set(requests["request_id"])
    answered = result.truth.filter(pl.col("task") == "click")["request_id"]
    assert set(answered) == set(requests["request_id"])
    assert result.training_events.columns == events.columns
    assert set(result.training_events["event_id"]) <= set(events["event_id"])


def _assert_truth_is_real(result: SplitResult, events: pl.DataFrame, source: Source) -> None:
    """Every truth is an event of that user, matching its task, at or after the request, that nobody trained on."""
    unseen = events.join(result.training_events.select("event_id"), on="event_id", how="anti")
    pairs = result.truth.join(result.requests, on="request_id")
    for task in source.tasks:
        done = unseen.filter(task.matches()).select("user_id", "item_id", pl.col("timestamp").alias("done"))
        wanted = pairs.filter(pl.col("task") == task.name)
        found = wanted.join(done, on=["user_id", "item_id"]).filter(pl.col("done") >= pl.col("timestamp"))
        assert set(found["request_id"] + found["item_id"]) == set(wanted["request_id"] + wanted["item_id"])


def _assert_nothing_seen(result: SplitResult, events: pl.DataFrame, source: Source) -> None:
    seen = events.filter(source.is_history()).select("user_id", "item_id", pl.col("timestamp").alias("seen"))
    pairs = result.truth.join(result.requests, on="request_id").join(seen, on=["user_id", "item_id"])
    assert pairs.filter(pl.col("seen") < pl.col("timestamp")).is_empty()


def _assert_training_is_past(result: SplitResult) -> None:
    """Nobody trained on what a user did at or after a moment at which that user is asked."""
    both = result.training_events.select("user_id", pl.col("timestamp").alias("trained")).join(result.requests, on="user_id")
    assert both.filter(pl.col("trained") >= pl.col("timestamp")).is_empty()


@given(count=st.integers(1, 60), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_users_order_is_a_partition_that_ignores_row_order(count: int, seed: int) -> None:
    ids = pl.Series("user_id", [f"user {place}" for place in range(count)])
    order = user_order(ids, seed)
    assert order["rank"].to_list() == list(range(count))
    assert set(order["user_id"]) == set(ids)
    places = [PARTS.index(part) for part in order["part"]]
    assert places == sorted(places)
    assert user_order(pl.concat([ids, ids]).sample(fraction=1.0, shuffle=True, seed=1), seed).equals(order)


def test_user_parts_follow_the_fractions_and_the_seed() -> None:
    ids = pl.Series("user_id", [str(place) for place in range(1000)])
    order = user_order(ids, 7)
    assert dict(order.group_by("part").len().rows()) == {"towers": 650, "ranker": 150, "calibrate": 50, "test": 150}
    assert order["user_id"].to_list() != user_order(ids, 8)["user_id"].to_list()


@given(rows=ROWS, seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_held_out_users_are_never_trained_on(rows: list[dict[str, Any]], seed: int) -> None:
    events = _events(rows)
    result = make_requests(events, _source(), SplitConfig("users", seed))
    parts = dict(user_order(events["user_id"], seed).select("user_id", "part").rows())
    assert {parts[user] for user in result.training_events["user_id"]} <= {"towers"}
    assert all(parts[user] == part for user, part in result.requests.select("user_id", "part").rows())
    everything = events.filter(pl.col("user_id").is_in([user for user, part in parts.items() if part == "towers"]))
    assert set(result.training_events["event_id"]) == set(everything["event_id"])


def test_users_fold_in_four_fifths() -> None:
    events = _events([row for place in range(40) for row in _chain(f"u{place}", 10)])
    result = make_requests(events, _source(), SplitConfig("users", 3))
    order = user_order(events["user_id"], 3)
    for user in order.filter(pl.col("part").is_in(["calibrate", "test"]))["user_id"]:
        part = order.filter(pl.col("user_id") == user)["part"].item()
        assert _one(result, part, user) == (8.0, 8, {f"{user}-8", f"{user}-9"})
    ranker = result.requests.filter(pl.col("part") == "ranker")
    assert dict(ranker.group_by("user_id").len().rows()) == dict.fromkeys(order.filter(pl.col("part") == "ranker")["user_id"], 4)
    assert ranker["n_history"].min() >= 1


def test_users_bulk_raters_are_asked_after_their_first_moment() -> None:
    bulk = [{"user": "u", "item": f"i{place}", "at": 0} for place in range(9)] + [{"user": "u", "item": "late", "at": 5}]
    all_test = SplitConfig("users", 0, fractions=(0.0, 0.0, 0.0, 1.0))
    assert _one(make_requests(_events(bulk), _source(), all_test), "test", "u") == (5.0, 9, {"late"})
    assert _one(make_requests(_events(bulk[:9]), _source(), all_test), "test", "u")[:2] == (0.0, 0)


def test_users_are_asked_when_the_slate_was_shown() -> None:
    rows = _chain("u", 8)
    rows += [{"user": "u", "item": f"s{place}", "at": 20, "action": "impression", "request": "r"} for place in range(3)]
    rows += [{"user": "u", "item": f"s{place}", "at": 21 + place, "request": "r"} for place in range(2)]
    all_test = SplitConfig("users", 0, fractions=(0.0, 0.0, 0.0, 1.0), fold_in=0.9)
    with_slates = make_requests(_events(rows), _source(impression="impression"), all_test)
    assert _one(with_slates, "test", "u") == (20.0, 8, {"s0", "s1"})
    without = make_requests(_events(rows), _source(), all_test)
    assert _one(without, "test", "u") == (22.0, 9, {"s1"})


def test_time_cuts_are_the_same_for_everybody() -> None:
    events = _events([*_chain("a", 100), {"user": "b", "item": "x", "at": 95}, {"user": "c", "item": "y", "at": 10}])
    result = make_requests(events, _source(), SplitConfig("time", 0, requests_per_user=2))
    cuts = {part: (when - T0).total_seconds() / 60 for part, when in result.cutoffs.items()}
    assert cuts == {"ranker": 70.0, "calibrate": 85.0, "test": 90.0}
    assert result.training_events["timestamp"].max() < result.cutoffs["ranker"]
    assert result.training_events.height == 71
    assert _one(result, "test", "a") == (90.0, 90, {f"a-{place}" for place in range(90, 100)})
    assert _one(result, "test", "b") == (95.0, 0, {"x"})
    assert _one(result, "calibrate", "a")[2] == {f"a-{place}" for place in range(85, 90)}
    assert result.requests.filter(pl.col("part") == "ranker").height == 2


def test_seen_items_are_truth_only_where_they_may_come_again() -> None:
    rows = [*_chain("a", 100), {"user": "a", "item": "a-0", "at": 99}]
    new_only = make_requests(_events(rows), _source(exclude_seen=True), SplitConfig("time", 0))
    again = make_requests(_events(rows), _source(exclude_seen=False), SplitConfig("time", 0))
    assert "a-0" not in _one(new_only, "test", "a")[2]
    assert "a-0" in _one(again, "test", "a")[2]


def test_leave_one_out_takes_the_last_three() -> None:
    events = _events(_chain("a", 6) + _chain("b", 2) + _chain("c", 1))
    result = make_requests(events, _source(), SplitConfig("leave_one_out", 0))
    assert _one(result, "test", "a") == (5.0, 5, {"a-5"})
    assert _one(result, "calibrate", "a") == (4.0, 4, {"a-4"})
    assert _one(result, "ranker", "a") == (3.0, 3, {"a-3"})
    assert _one(result, "test", "b") == (1.0, 1, {"b-1"})
    assert set(result.requests["user_id"]) == {"a", "b"}
    assert sorted(result.training_events["item_id"]) == ["a-0", "a-1", "a-2", "b-0", "c-0"]


def test_leave_one_out_leaves_exactly_one_of_a_moment() -> None:
    rows = [*_chain("a", 4), *[{"user": "a", "item": f"tied-{place}", "at": 10} for place in range(5)]]
    result = make_requests(_events(rows), _source(), SplitConfig("leave_one_out", 0))
    assert _one(result, "test", "a") == (10.0, 4, {"tied-4"})
    assert _one(result, "calibrate", "a") == (10.0, 4, {"tied-3"})
    assert sorted(result.training_events["item_id"]) == ["a-0", "a-1", "a-2", "a-3"]


def test_fraction_cuts_each_user_by_its_own_history() -> None:
    events = _events(_chain("a", 20) + _chain("b", 40, first=1000))
    result = make_requests(events, _source(), SplitConfig("fraction", 0))
    assert _one(result, "test", "a") == (18.0, 18, {"a-18", "a-19"})
    assert _one(result, "test", "b")[:2] == (1036.0, 36)
    assert sorted(result.training_events.group_by("user_id").len().rows()) == [("a", 14), ("b", 28)]


def test_given_parts_are_taken_as_they_are() -> None:
    names = ["train"] * 5 + ["ranker"] * 2 + ["validation"] + ["test"] * 2
    rows = [{**row, "split": name} for row, name in zip(_chain("a", 10), names, strict=True)]
    result = make_requests(_events([*rows, {"user": "a", "item": "outside", "at": 50}]), _source(), SplitConfig("given", 0))
    assert _one(result, "test", "a") == (8.0, 8, {"a-8", "a-9"})
    assert _one(result, "calibrate", "a") == (7.0, 7, {"a-7"})
    assert result.training_events["item_id"].to_list() == [f"a-{place}" for place in range(5)]


def test_given_needs_known_names() -> None:
    with pytest.raises(InputError, match=r"holds \['holdout'\]"):
        make_requests(_events([{"user": "a", "item": "x", "at": 0, "split": "holdout"}]), _source(), SplitConfig("given", 0))
    with pytest.raises(InputError, match="is empty"):
        make_requests(_events(_chain("a", 3)), _source(), SplitConfig("given", 0))


def test_tasks_label_the_truth() -> None:
    late = [
        {"user": "a", "item": "x", "at": 200, "value": 1.0},
        {"user": "a", "item": "y", "at": 201, "value": 4.0},
        {"user": "a", "item": "y", "at": 202, "action": "buy"},
    ]
    result = make_requests(_events([*_chain("a", 27), *late]), _source(), SplitConfig("time", 0))
    rows = result.truth.join(result.requests.filter(pl.col("part") == "test"), on="request_id").select("item_id", "task").rows()
    assert sorted(rows) == [("x", "click"), ("y", "buy"), ("y", "click"), ("y", "rich")]


def test_no_events_is_an_error_in_time_and_nothing_for_users() -> None:
    with pytest.raises(InputError, match="no events to split"):
        make_requests(_events([]), _source(), SplitConfig("time", 0))
    assert make_requests(_events([]), _source(), SplitConfig("users", 0)).requests.is_empty()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fractions": (0.5, 0.5, 0.5, 0.5)}, "add up to 1"),
        ({"quantiles": (0.9, 0.8, 0.7)}, "must rise"),
        ({"fold_in": 1.0}, "fold_in"),
        ({"requests_per_user": 0}, "requests_per_user"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SplitConfig("time", 0, **wrong)
