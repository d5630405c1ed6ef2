"""Single items in the data folder: read over the imported ones, put into them by imports and builds, the newer wins."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from feature_repo import item_changes
from feature_repo.item_changes import ItemChanges, checked_items
from feature_repo.sources.raw import Raw, no_rejections
from feature_repo.store import ITEMS_FILE, compact, items_schema, load_items, load_items_until, save_raw
from tandem.core.errors import InputError
from tandem.core.schema import EVENTS, ITEMS, TIME, USERS, Source, Task

SOURCE = Source("table", (Task("click", "click"),), "click", ("click",), True, "time")


def table(**titles: str) -> pl.DataFrame:
    """Items of these ids and titles, with a price and a colour."""
    rows = {"item_id": list(titles), "title": list(titles.values()), "text": list(titles.values())}
    frame = pl.DataFrame(rows).with_columns(
        categories=pl.lit([], pl.List(pl.String)), available_from=pl.lit(None, TIME), price=pl.lit(1.5), colour=pl.lit("red")
    )
    return frame.select(*ITEMS, "price", "colour")


def raw(items: pl.DataFrame) -> Raw:
    return Raw(pl.DataFrame(schema=EVENTS), items, pl.DataFrame(schema=USERS), SOURCE, no_rejections())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    save_raw(raw(table(a="A", b="B", c="C")), tmp_path, replace=False)
    return tmp_path


def titles(data: Path) -> dict[str, str]:
    return dict(load_items(data).select("item_id", "title").rows())


def test_what_is_put_and_deleted_is_read_by_everybody_at_once(data: Path) -> None:
    reader, writer = ItemChanges(data), ItemChanges(data)
    assert load_items_until(data)[1] == 0
    when = datetime(2026, 5, 4, 3, 2, 1, 123456, tzinfo=UTC)
    vectors = np.arange(6, dtype=np.float32).reshape(2, 3)
    put = writer.put(table(b="B2", d="D").with_columns(available_from=pl.lit(when, TIME)), vectors, "encoder 1")
    gone = writer.delete(["a", "nobody"])
    items, until = load_items_until(data)
    assert titles(data) == {"b": "B2", "c": "C", "d": "D"}
    assert (items["item_id"].is_sorted(), items.schema, until) == (True, table(a="A").schema, gone.at_us)
    assert items.filter(pl.col("item_id") == "d").row(0, named=True)["available_from"] == when
    first, second = reader.read()
    assert (first.at_us, first.item_ids, first.encoder, second.item_ids, second.rows) == (
        put.at_us, ("b", "d"), "encoder 1", ("a", "nobody"), None,
    )  # fmt: skip
    np.testing.assert_array_equal(first.vectors, vectors)
    np.testing.assert_array_equal(first.only([1]).vectors, vectors[1:])
    assert reader.read() == []
    assert ItemChanges(data).read()[0].rows == first.rows


def test_times_rise_even_when_the_clock_does_not(data: Path) -> None:
    stopped = ItemChanges(data, clock=lambda: 1_000)
    moments = [stopped.delete(["a"]).at_us for _ in range(3)]
    assert moments == [1_000, 1_001, 1_002]
    assert ItemChanges(data, clock=lambda: 5).delete(["b"]).at_us == 1_003


def test_a_build_puts_changes_into_the_items_once(data: Path) -> None:
    changes = ItemChanges(data)
    changes.put(table(a="A2", d="D"))
    until = changes.delete(["b"]).at_us
    compact(data)
    assert pl.read_parquet(data / ITEMS_FILE).select("item_id", "title").rows() == [("a", "A2"), ("c", "C"), ("d", "D")]
    assert load_items_until(data)[1] == until
    written = (data / ITEMS_FILE).stat().st_mtime_ns
    compact(data)
    assert (data / ITEMS_FILE).stat().st_mtime_ns == written
    changes.put(table(b="B again"))
    assert titles(data) == {"a": "A2", "b": "B again", "c": "C", "d": "D"}


def test_the_newer_of_an_import_and_a_change_wins(data: Path) -> None:
    changes = ItemChanges(data)
    changes.put(table(a="put before"))
    changes.delete(["b"])
    save_raw(raw(table(a="imported", b="imported")), data, replace=False)
    assert titles(data) == {"a": "imported", "b": "imported", "c": "C"}
    changes.put(table(a="put after"))
    assert titles(data) == {"a": "put after", "b": "imported", "c": "C"}
    compact(data)
    assert titles(data) == {"a": "put after", "b": "imported", "c": "C"}


def test_starting_over_forgets_what_was_put_before(data: Path) -> None:
    changes = ItemChanges(data)
    changes.put(table(d="D"))
    save_raw(raw(table(x="X").drop("colour")), data, replace=True)
    assert titles(data) == {"x": "X"}
    changes.put(table(y="Y"))  # the column `colour` is no more
    assert titles(data) == {"x": "X", "y": "Y"}
    assert "colour" not in load_items(data).columns


def test_a_crash_between_the_items_and_the_mark_is_mended(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ItemChanges(data).delete(["a"])
    with monkeypatch.context() as patched:
        patched.setattr(ItemChanges, "mark_applied", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            compact(data)
    assert titles(data) == {"b": "B", "c": "C"}
    save_raw(raw(table(a="imported")), data, replace=False)
    assert titles(data)["a"] == "imported"


def test_a_long_journal_is_rewritten_and_nobody_reads_anything_twice(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_changes, "_SPARE_BYTES", 100)
    monkeypatch.setattr(item_changes, "_ROW_BYTES", 300)
    writer, reader = ItemChanges(data), ItemChanges(data)
    seen: dict[str, int] = {}
    for number in range(80):
        writer.put(table(**{f"n{number % 5}": f"title {number}"}), np.full((1, 4), number, np.float32), "e")
        for change in reader.read() if number % 3 else []:
            for item_id in change.item_ids:
                assert seen.get(item_id, -1) < change.at_us
                seen[item_id] = change.at_us
    reader.read()
    (file,) = (data / item_changes.FOLDER).glob("journal-*.bin")
    assert file.name != "journal-00000001.bin"
    expected = {f"n{number % 5}": f"title {number}" for number in range(75, 80)}
    assert titles(data) == {"a": "A", "b": "B", "c": "C"} | expected
    late = {item_id: change.vectors for change in ItemChanges(data).read() for item_id in change.item_ids}
    assert late["n4"] is not None
    assert late["n4"].tolist() == [[79.0] * 4]


def test_items_of_a_file_get_the_columns_and_kinds_of_the_workspace(data: Path) -> None:
    known = items_schema(data)
    draft = pl.DataFrame({"item_id": ["x", "u\u0308"], "categories": ["one|two", None], "price": ["3", "4.5"]})
    items = checked_items(draft, known)
    assert items.schema == pl.Schema(known)
    assert items.select("item_id", "title", "price", "colour").rows() == [("x", "x", 3.0, None), ("ü", "ü", 4.5, None)]
    assert items["categories"].to_list() == [["one", "two"], []]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"title": ["no id"]}, "lack item_id"),
        ({"item_id": ["a"], "taste": ["sour"]}, "have \\['taste'\\]"),
        ({"item_id": ["a"], "price": ["dear"]}, "items' price are numbers"),
        ({"item_id": ["a"], "colour": [3]}, "items' colour is text"),
        ({"item_id": ["a", ""]}, "row 1 is no item: no item id"),
        ({"item_id": ["a", "a"]}, "duplicate item"),
        ({"item_id": ["a"], "categories": ["|".join(str(each) for each in range(33))]}, "more than 32 categories"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_whole(data: Path, columns: dict[str, list[object]], said: str) -> None:
    with pytest.raises(InputError, match=said):
        checked_items(pl.DataFrame(columns), items_schema(data))
