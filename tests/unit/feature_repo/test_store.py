"""The data folder: append, upsert, start over, and what a crash leaves."""

from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from feature_repo.sources.raw import Raw
from feature_repo.sources.table import TableMapping, read
from feature_repo.store import load_events, load_items, load_rejected, load_source, load_users, save_raw
from tandem.core.errors import BusyError, InputError, NotFoundError
from tandem.core.folders import held

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MAPPING = TableMapping.parse(
    {"user_id": "u", "item_id": "i", "timestamp": "t", "title": "name", "action": "click", "exclude_seen": False}
)


def _raw(folder: Path, rows: list[tuple[str, str, str, str]]) -> Raw:
    path = folder / "events.csv"
    path.write_text("u,i,t,name\n" + "".join(",".join(row) + "\n" for row in rows))
    return read(path, MAPPING, NOW)


ROWS = [
    ("a", "1", "2024-01-02", "One"),
    ("b", "2", "2024-01-01", "Two"),
    ("b", "2", "2024-01-01", "Two"),
    ("", "2", "2024-01-01", ""),
]


def test_first_import_counts_and_loads(tmp_path: Path) -> None:
    raw = _raw(tmp_path, ROWS)
    counts = save_raw(raw, tmp_path / "data", replace=False)
    assert (counts.read, counts.appended, counts.duplicates, counts.rejected) == (4, 3, 0, 1)
    assert counts.reasons == {"events: no user id": 1}
    assert (counts.events, counts.items, counts.users) == (3, 2, 2)
    assert load_events(tmp_path / "data").equals(raw.events)
    assert load_items(tmp_path / "data").equals(raw.items)
    assert load_users(tmp_path / "data").equals(raw.users)
    assert load_source(tmp_path / "data") == raw.source
    assert load_rejected(tmp_path / "data").equals(raw.rejected)


def test_second_import_of_the_same_file_adds_nothing(tmp_path: Path) -> None:
    save_raw(_raw(tmp_path, ROWS), tmp_path / "data", replace=False)
    before = load_events(tmp_path / "data")
    counts = save_raw(_raw(tmp_path, ROWS), tmp_path / "data", replace=False)
    assert (counts.read, counts.appended, counts.duplicates, counts.rejected) == (4, 0, 3, 1)
    assert load_events(tmp_path / "data").equals(before)
    assert load_rejected(tmp_path / "data").height == 1


def test_append_keeps_old_events_and_newest_items(tmp_path: Path) -> None:
    save_raw(_raw(tmp_path, ROWS), tmp_path / "data", replace=False)
    counts = save_raw(
        _raw(tmp_path, [("c", "1", "2023-05-05", "One, renamed".replace(",", ""))]), tmp_path / "data", replace=False
    )
    assert (counts.appended, counts.events) == (1, 4)
    events = load_events(tmp_path / "data")
    assert events["user_id"].to_list() == ["c", "b", "b", "a"]
    assert load_items(tmp_path / "data").select("item_id", "title").rows() == [("1", "One renamed"), ("2", "Two")]
    assert load_users(tmp_path / "data")["user_id"].to_list() == ["a", "b", "c"]


def test_new_attributes_leave_old_items_without_them(tmp_path: Path) -> None:
    save_raw(_raw(tmp_path, ROWS), tmp_path / "data", replace=False)
    raw = _raw(tmp_path, [("c", "3", "2023-05-05", "Three")])
    newer = Raw(raw.events, raw.items.with_columns(pl.lit(2.5).alias("price")), raw.users, raw.source, raw.rejected)
    save_raw(newer, tmp_path / "data", replace=False)
    assert load_items(tmp_path / "data")["price"].to_list() == [None, None, 2.5]


def test_replace_starts_over_and_forgets_the_truth(tmp_path: Path) -> None:
    data = tmp_path / "data"
    save_raw(_raw(tmp_path, ROWS), data, replace=False)
    (data / "truth").mkdir()
    counts = save_raw(_raw(tmp_path, [("z", "9", "2024-01-02", "Nine")]), data, replace=True)
    assert (counts.events, counts.items, counts.users) == (1, 1, 1)
    assert load_items(data)["item_id"].to_list() == ["9"]
    assert not (data / "truth").exists()


def test_two_kinds_do_not_mix(tmp_path: Path) -> None:
    raw = _raw(tmp_path, ROWS)
    save_raw(raw, tmp_path / "data", replace=False)
    other = type(raw.source)("movielens", raw.source.tasks, "click", ("click",), True, "users")
    with pytest.raises(InputError, match="holds table events, these are movielens"):
        save_raw(Raw(raw.events, raw.items, raw.users, other, raw.rejected), tmp_path / "data", replace=False)
    assert load_source(tmp_path / "data").kind == "table"


def test_folder_without_events_holds_nothing(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with pytest.raises(NotFoundError, match="tandem import"):
        load_events(data)
    save_raw(_raw(tmp_path, ROWS), data, replace=False)
    # What a crash before the last write leaves: everything but the events.
    (data / "events.parquet").unlink()
    (data / ".partial-left").write_text("half")
    with pytest.raises(NotFoundError):
        load_items(data)
    counts = save_raw(_raw(tmp_path, [("z", "9", "2024-01-02", "Nine")]), data, replace=False)
    assert (counts.events, counts.items) == (1, 1)
    assert not list(data.glob(".partial-*"))


def test_two_imports_at_once_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with held(data / "import.lock", "another import"), pytest.raises(BusyError, match="another import"):
        save_raw(_raw(tmp_path, ROWS), data, replace=True)
