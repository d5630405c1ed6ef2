"""goodbooks-10k, first edition: books.csv, ratings.csv, to_read.csv, each plain or zipped.

In: the folder. Out: `Raw` with actions "rating" (value 1-5) and "to_read", on a synthetic clock (the data has no time).

Of several ratings by one user of one book the last in the file is kept; the others are rejected as duplicates. Average ratings
and counts of books.csv are left out: they were counted after the ratings that a recommender should predict.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Final

import polars as pl

from feature_repo.sources.clean import clean_events, clean_items, clean_users, reject, with_event_ids
from feature_repo.sources.clock import end_to_end
from feature_repo.sources.files import find_member, read_csv
from feature_repo.sources.raw import Raw, require_events
from tandem.core.schema import Source, Task

SOURCE: Final = Source(
    kind="goodbooks",
    tasks=(Task("to_read", "to_read"), Task("liked", "rating", at_least=4.0)),
    positive="to_read",
    history=("to_read", "rating"),
    exclude_seen=True,
    split="users",
    credit="Zygmunt Zajac. goodbooks-10k, first edition. CC BY-SA 4.0.",
)

DUPLICATE: Final = "duplicate rating of one user and book (the last one is kept)"
_AUTHORS: Final = 3
_BOOK_COLUMNS: Final = ("id", "authors", "original_publication_year", "original_title", "title", "language_code")


def read(path: Path, now: datetime, seed: int) -> Raw:
    """Read goodbooks-10k; `seed` orders the users of its clock. `now` is not needed: these rows carry no time."""
    del now
    books = read_csv(find_member(path, "books.csv"), "books.csv", _BOOK_COLUMNS)
    items, bad_items = clean_items(_books(books))
    events, bad_events = _events(path, items["item_id"])
    users, _ = clean_users(None, events["user_id"])
    timed = end_to_end(with_event_ids(events), seed)
    return require_events(Raw(timed, items, users, SOURCE, pl.concat([*bad_events, bad_items])))


def _events(path: Path, known: pl.Series) -> tuple[pl.DataFrame, list[pl.DataFrame]]:
    ratings = _marks(path, "ratings.csv", ("user_id", "book_id", "rating"), "rating").rename({"rating": "value"})
    to_read = _marks(path, "to_read.csv", ("user_id", "book_id"), "to_read")
    rated, bad_ratings = clean_events(ratings, known_items=known, now=None)
    rated, repeated = _last_of_each(rated, ratings)
    marked, bad_marks = clean_events(to_read, known_items=known, now=None)
    marked, remarked = _last_of_each(marked, to_read)
    after = marked.with_columns(pl.col("row") + ratings.height)
    return pl.concat([rated, after]), [bad_ratings, repeated, bad_marks, remarked]


def _marks(path: Path, name: str, columns: tuple[str, ...], action: str) -> pl.DataFrame:
    frame = read_csv(find_member(path, name), name, columns)
    return frame.rename({"book_id": "item_id"}).with_columns(pl.lit(action).alias("action"))


def _last_of_each(events: pl.DataFrame, draft: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    last = events.select(pl.struct("user_id", "item_id").is_last_distinct()).to_series()
    repeated = draft.join(events.filter(~last).select("row"), on="row", how="semi")
    reasons = pl.Series([DUPLICATE] * repeated.height, dtype=pl.String)
    return events.filter(last), reject("events", repeated, reasons)


def _books(books: pl.DataFrame) -> pl.DataFrame:
    year = pl.col("original_publication_year").cast(pl.Float64, strict=False).cast(pl.Int64)
    draft = books.with_columns(
        pl.coalesce("title", "original_title").alias("title"),
        pl.col("authors").str.split(", ").list.head(_AUTHORS).alias("categories"),
        year.alias("year"),
        # "en-US", "en-GB" and "eng" are one language.
        pl.col("language_code").str.replace("^en(-.*)?$", "eng").alias("language"),
    )
    original = pl.when(pl.col("original_title") != pl.col("title")).then(pl.format("Original title: {}.", "original_title"))
    parts = (
        pl.format("{}, by {}.", "title", pl.col("categories").list.join(", ")),
        original,
        pl.format("First published in {}.", "year"),
        pl.format("Language: {}.", "language"),
    )
    text = pl.coalesce(pl.concat_str(*parts, separator=" ", ignore_nulls=True).replace("", None), "title")
    return draft.select("row", pl.col("id").alias("item_id"), "title", text.alias("text"), "categories", "year", "language")
