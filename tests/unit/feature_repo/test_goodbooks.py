"""goodbooks-10k: repeated ratings, the synthetic clock, and what the text of a book says."""

import os
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from feature_repo.sources import Raw, read_source
from feature_repo.sources.goodbooks import DUPLICATE
from feature_repo.splits import user_order

NOW = datetime(2026, 1, 1, tzinfo=UTC)
BOOKS = """id,book_id,authors,original_publication_year,original_title,title,language_code,average_rating,ratings_count
1,277,"A One, B Two, C Three, D Four",2008.0,The First,"The First (Series, #1)",eng,4.3,100
2,3,Jane Solo,-750.0,The Second,The Second,en-US,4.4,5
3,4,Nobody,,,Third,,4.4,5
"""


def _folder(path: Path, ratings: list[tuple[object, ...]], marks: list[tuple[object, ...]]) -> Path:
    (path / "books.csv").write_text(BOOKS)
    (path / "ratings.csv").write_text("\n".join(["book_id,user_id,rating", *[",".join(map(str, row)) for row in ratings]]) + "\n")
    (path / "to_read.csv").write_text("\n".join(["user_id,book_id", *[",".join(map(str, row)) for row in marks]]) + "\n")
    return path


def _read(path: Path, seed: int = 3) -> Raw:
    return read_source("goodbooks", path, None, seed, now=NOW)


def test_last_rating_of_a_book_is_kept_and_the_others_are_counted(tmp_path: Path) -> None:
    raw = _read(_folder(tmp_path, [(1, 9, 2), (1, 9, 2), (1, 9, 5), (2, 9, 4)], [(9, 1)]))
    kept = raw.events.filter(pl.col("action") == "rating").select("item_id", "value").sort("item_id").rows()
    assert kept == [("1", 5.0), ("2", 4.0)]
    assert raw.reasons == {f"events: {DUPLICATE}": 2}
    assert raw.events.filter(pl.col("action") == "to_read").height == 1


def test_clock_puts_users_end_to_end_in_the_order_of_the_split(tmp_path: Path) -> None:
    marks = [(user, book) for user in range(40) for book in (1, 2, 3)]
    raw = _read(_folder(tmp_path, [], marks))
    spans = raw.events.group_by("user_id").agg(pl.col("timestamp").min().alias("first"), pl.col("timestamp").max().alias("last"))
    ordered = spans.join(user_order(raw.events["user_id"], 3), on="user_id").sort("rank")
    assert (ordered["first"][1:] > ordered["last"][:-1]).all()
    assert ordered["part"].to_list()[-6:] == ["test"] * 6
    assert raw.events["timestamp"].max() < NOW
    assert not _read(tmp_path, seed=4).events["timestamp"].equals(raw.events["timestamp"]) or (
        _read(tmp_path, seed=4).events["user_id"].to_list() != raw.events["user_id"].to_list()
    )


def test_ids_come_from_content_and_not_from_the_clock(tmp_path: Path) -> None:
    _folder(tmp_path, [(1, 9, 2)], [(8, 1), (7, 2)])
    one, two = _read(tmp_path, seed=3), _read(tmp_path, seed=4)
    assert set(one.events["event_id"]) == set(two.events["event_id"])


def test_books_carry_authors_year_and_language(tmp_path: Path) -> None:
    raw = _read(_folder(tmp_path, [(1, 9, 2)], []))
    books = {row["item_id"]: row for row in raw.items.to_dicts()}
    assert books["1"]["categories"] == ["A One", "B Two", "C Three"]
    assert books["1"]["text"] == (
        "The First (Series, #1), by A One, B Two, C Three. Original title: The First. First published in 2008. Language: eng."
    )
    assert (books["2"]["year"], books["2"]["language"]) == (-750, "eng")
    assert books["3"]["year"] is None
    assert books["3"]["text"].startswith("Third, by Nobody.")
    assert not {"average_rating", "ratings_count"} & set(raw.items.columns)


@pytest.mark.real
def test_real_goodbooks_cut_to_800_books(tmp_path: Path) -> None:
    shared = Path(os.environ.get("TANDEM_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data")) / "goodbooks-10k"
    if not shared.is_dir():
        pytest.skip("goodbooks-10k is not there")
    sizes = {}
    for name, column in (("books", "id"), ("ratings", "book_id"), ("to_read", "book_id")):
        data = zipfile.ZipFile(shared / f"{name}.csv.zip").read(f"{name}.csv")
        frame = pl.read_csv(data, infer_schema=False).filter(pl.col(column).cast(pl.Int64) <= 800)
        if name != "books":
            frame = frame.filter(pl.col("user_id").cast(pl.Int64) % 10 == 0)
        sizes[name] = frame.height
        with zipfile.ZipFile(tmp_path / f"{name}.csv.zip", "w") as archive:
            archive.writestr(f"{name}.csv", frame.write_csv())
    raw = _read(tmp_path)
    assert raw.items.height == 800
    assert raw.events.height + raw.rejected.height == sizes["ratings"] + sizes["to_read"]
    assert set(raw.rejected["reason"]) <= {DUPLICATE}
    assert raw.events.select("user_id", "item_id", "action").is_duplicated().sum() == 0
