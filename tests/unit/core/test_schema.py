"""The shared words: what a task matches, what a source must say, and which texts are ids; and the one error tree."""

from __future__ import annotations

import unicodedata
from dataclasses import FrozenInstanceError, replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tandem.core import errors
from tandem.core.errors import InputError, TandemError
from tandem.core.schema import EVENTS, ITEMS, MAX_ID_BYTES, TIME, USERS, Source, Task, check_id, from_us, id_problem, to_us

BOOKS = Source(
    kind="goodbooks",
    tasks=(Task("to_read", "to_read"), Task("liked", "rating", at_least=4), Task("disliked", "rating", below=3)),
    positive="to_read",
    history=("to_read", "rating"),
    exclude_seen=True,
    split="users",
    credit="goodbooks-10k",
)


def events(*rows: tuple[str, float | None]) -> pl.DataFrame:
    return pl.DataFrame([dict.fromkeys(EVENTS) | {"action": action, "value": value} for action, value in rows], schema=EVENTS)


def matched(task: Task, frame: pl.DataFrame) -> list[bool | None]:
    return frame.select(task.matches().alias("hit"))["hit"].to_list()


def test_a_task_without_bounds_matches_its_action() -> None:
    assert matched(Task("click", "click"), events(("click", None), ("click", 3.0), ("view", 3.0))) == [True, True, False]


def test_bounds_are_at_least_and_below() -> None:
    frame = events(("rating", 3.9), ("rating", 4.0), ("rating", 5.0), ("to_read", 5.0), ("rating", None))
    assert matched(Task("liked", "rating", at_least=4), frame) == [False, True, True, False, False]
    assert matched(Task("low", "rating", below=4), frame) == [True, False, False, False, False]
    assert matched(Task("middle", "rating", at_least=3.9, below=5), frame) == [True, True, False, False, False]


def test_a_value_that_is_not_a_number_is_within_no_bounds() -> None:
    assert matched(Task("liked", "rating", at_least=4), events(("rating", float("nan")))) == [False]


def test_history_actions_make_a_history() -> None:
    frame = events(("to_read", None), ("rating", 1.0), ("impression", None))
    assert frame.select(BOOKS.is_history())["action"].to_list() == [True, True, False]


def test_a_source_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    for source in (BOOKS, replace(BOOKS, impression="impression", credit="猫")):
        source.write(tmp_path / "source.json")
        assert Source.read(tmp_path / "source.json") == source


def test_tasks_are_found_by_name_and_unknown_ones_are_refused() -> None:
    assert BOOKS.task("liked").at_least == 4
    with pytest.raises(InputError, match=r"no task 'loved' in source 'goodbooks'; it has \['to_read', 'liked', 'disliked'\]"):
        BOOKS.task("loved")


def test_the_positive_must_be_a_task() -> None:
    with pytest.raises(InputError, match="positive = 'loved'"):
        replace(BOOKS, positive="loved")


def test_words_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        BOOKS.tasks[0].name = "other"  # type: ignore[misc]


def test_tables_hold_utc_microseconds() -> None:
    assert EVENTS["timestamp"] == ITEMS["available_from"] == TIME == pl.Datetime("us", "UTC")
    assert list(USERS) == ["user_id", "text"]


@pytest.mark.parametrize(
    "value", ["u1", "a b", "a/b/../c", "%2e%2e", "'; DROP TABLE users", "猫", "👩‍🚀", "עברית", "x" * 256, " "]
)
def test_any_plain_text_is_an_id(value: str) -> None:
    assert id_problem(value) is None
    assert check_id(value, "user_id") == value


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "empty"),
        ("x" * 257, "257 bytes"),
        ("猫" * 86, "258 bytes"),
        ("a\x00b", "control character"),
        ("a\nb", "control character"),
        ("\x7f", "control character"),
        ("\x85", "control character"),
        ("\ud800", "lone surrogate"),
    ],
)
def test_what_is_not_an_id_is_refused_with_its_reason(value: str, problem: str) -> None:
    assert problem in (id_problem(value) or "")
    with pytest.raises(InputError, match=problem):
        check_id(value, "item_id")


def test_an_id_is_brought_into_one_unicode_form() -> None:
    decomposed = "cafe\N{COMBINING ACUTE ACCENT}"
    assert id_problem(decomposed) == "not in Unicode form NFC"
    assert check_id(decomposed, "item_id") == "café"


def test_a_refusal_names_the_field_and_repeats_little_of_the_input() -> None:
    with pytest.raises(InputError) as refused:
        check_id("x" * 50_000_000, "user_id")
    assert str(refused.value).startswith("user_id 'xxx")
    assert len(str(refused.value)) < 200


@given(st.text(max_size=300))
@example("\ud800")
def test_an_accepted_id_is_nfc_short_and_accepted_again(value: str) -> None:
    try:
        accepted = check_id(value, "user_id")
    except InputError:
        assert id_problem(unicodedata.normalize("NFC", value)) is not None
        return
    assert accepted == unicodedata.normalize("NFC", value)
    assert 1 <= len(accepted.encode()) <= MAX_ID_BYTES
    assert check_id(accepted, "user_id") == accepted


def test_every_error_hangs_on_the_one_tree_and_stands_in_its_picture() -> None:
    own = {error for error in vars(errors).values() if isinstance(error, type) and error is not TandemError}
    assert len(own) == 8
    for error in own:
        assert error.__bases__ == (TandemError,)
        assert error.__name__ in (errors.__doc__ or "")
        assert error.__doc__


def test_times_become_microseconds_and_come_back_from_any_zone() -> None:
    moment = datetime(2026, 11, 21, 12, 0, 0, 7, tzinfo=timezone(timedelta(hours=2)))
    assert to_us(moment) == 1_795_255_200_000_007
    assert from_us(to_us(moment)) == moment
    assert to_us(datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)) == -1
