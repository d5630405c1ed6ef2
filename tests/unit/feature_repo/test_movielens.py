"""MovieLens: the official zip to events, items and users, and what happens to bad rows."""

import json
import os
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from feature_repo.sources import Raw, read_source
from tandem.core.errors import InputError, NotFoundError
from tandem.core.schema import EVENTS, ITEMS, USERS

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MOVIES = """movieId,title,genres
1,Toy Story (1995),Adventure|Animation
2,"Matrix, The (1999)",Action|Sci-Fi
3,Untitled,(no genres listed)
3,Untitled again (2001),Drama
"""
TAGS = "userId,movieId,tag,timestamp\n1,2,Dystopia,1\n2,2,dystopia,2\n2,2,neo,3\n"
RATINGS = """userId,movieId,rating,timestamp
1,1,4.0,964982703
1,2,3.5,964982704
2,2,5.0,964982703
2,99,5.0,964982703
,1,5.0,964982703
2,1,nan,964982703
2,1,five,964982703
2,1,5.0,yesterday
2,1,5.0,32000000000
"""


def _zip(folder: Path, ratings: str = RATINGS) -> Path:
    path = folder / "ml-tiny.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (("movies.csv", MOVIES), ("tags.csv", TAGS), ("ratings.csv", ratings)):
            archive.writestr(f"ml-tiny/{name}", text)
    return path


def _read(path: Path) -> Raw:
    return read_source("movielens", path, None, 0, now=NOW)


def test_good_rows_become_events(tmp_path: Path) -> None:
    events = _read(_zip(tmp_path)).events
    assert dict(events.schema) == EVENTS
    rows = events.select("user_id", "item_id", "action", "value").sort("user_id", "item_id").rows()
    assert rows == [("1", "1", "rating", 4.0), ("1", "2", "rating", 3.5), ("2", "2", "rating", 5.0)]
    assert events["timestamp"].min() == datetime.fromtimestamp(964982703, UTC)


def test_every_bad_row_is_kept_with_its_reason(tmp_path: Path) -> None:
    raw = _read(_zip(tmp_path))
    reasons = {row: reason for table, row, reason in raw.rejected.select("table", "row", "reason").rows() if table == "events"}
    assert reasons == {
        3: "unknown item",
        4: "no user id",
        5: "value is not finite",
        6: "value is not a number",
        7: "timestamp cannot be read",
        8: "timestamp in the future",
    }
    assert raw.events.height + len(reasons) == RATINGS.count("\n") - 1
    assert raw.reasons["items: duplicate item (the last one is kept)"] == 1
    content = json.loads(raw.rejected.filter(pl.col("row") == 7)["content"].item())
    assert content["timestamp"] == "yesterday"
    assert content["user_id"] == "2"


def test_items_carry_words_genres_and_year(tmp_path: Path) -> None:
    raw = _read(_zip(tmp_path))
    assert list(raw.items.columns) == [*ITEMS, "year"]
    items = {row["item_id"]: row for row in raw.items.to_dicts()}
    assert items["2"]["title"] == "The Matrix (1999)"
    assert items["2"]["text"] == "The Matrix (1999). Genres: Action, Sci-Fi. Tags: dystopia, neo."
    assert items["2"]["categories"] == ["Action", "Sci-Fi"]
    assert items["1"]["year"] == 1995
    assert items["3"]["title"] == "Untitled again (2001)"


def test_users_come_from_events(tmp_path: Path) -> None:
    users = _read(_zip(tmp_path)).users
    assert dict(users.schema) == USERS
    assert users["user_id"].to_list() == ["1", "2"]


def test_folder_and_zip_give_the_same_events(tmp_path: Path) -> None:
    path = _zip(tmp_path)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "unpacked")
    assert _read(path).events.equals(_read(tmp_path / "unpacked").events)
    assert _read(path).events.equals(_read(tmp_path).events)


def test_equal_rows_get_different_ids(tmp_path: Path) -> None:
    twice = "userId,movieId,rating,timestamp\n1,1,4.0,964982703\n1,1,4.0,964982703\n"
    events = _read(_zip(tmp_path, twice)).events
    assert events["event_id"].n_unique() == 2


def test_ids_do_not_hang_on_row_order(tmp_path: Path) -> None:
    lines = RATINGS.strip().split("\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    forth = _read(_zip(tmp_path / "a"))
    back = _read(_zip(tmp_path / "b", "\n".join([lines[0], *reversed(lines[1:])]) + "\n"))
    assert forth.events.equals(back.events)


def test_missing_path_and_wrong_zip_say_so(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        _read(tmp_path / "nowhere.zip")
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    with pytest.raises(InputError, match=r"holds no ratings\.csv"):
        _read(other)


def test_no_usable_event_is_an_error_with_reasons(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 events: unknown item"):
        _read(_zip(tmp_path, "userId,movieId,rating,timestamp\n1,77,4.0,964982703\n"))
    with pytest.raises(InputError, match="no rows"):
        _read(_zip(tmp_path, "userId,movieId,rating,timestamp\n").rename(tmp_path / "empty.zip"))


def test_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column 'rating'"):
        _read(_zip(tmp_path, "userId,movieId,stars,timestamp\n1,1,4.0,964982703\n"))


@pytest.mark.real
def test_real_movielens_reads_whole(tmp_path: Path) -> None:
    shared = Path(os.environ.get("TANDEM_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data"))
    path = shared / "movielens-latest-small" / "ml-latest-small.zip"
    if not path.is_file():
        pytest.skip("MovieLens latest-small is not there")
    cut = tmp_path / "cut.zip"
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(cut, "w") as archive:
        films = whole.read("ml-latest-small/movies.csv").decode().splitlines()[:1001]
        kept = {film.split(",")[0] for film in films}
        ratings = whole.read("ml-latest-small/ratings.csv").decode().splitlines()
        ratings = [ratings[0], *[line for line in ratings[1:] if line.split(",")[1] in kept]]
        archive.writestr("movies.csv", "\n".join(films))
        archive.writestr("ratings.csv", "\n".join(ratings))
        archive.writestr("tags.csv", whole.read("ml-latest-small/tags.csv"))
    raw = _read(cut)
    assert raw.items.height == 1000
    assert raw.rejected.is_empty()
    assert raw.events.height == len(ratings) - 1
    assert raw.items["year"].null_count() < 10
    assert raw.items["title"].str.contains(r", The \(").sum() == 0
