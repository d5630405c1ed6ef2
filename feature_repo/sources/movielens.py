"""MovieLens as GroupLens publishes it: ml-latest-small, ml-latest, ml-25m, ml-32m (the CSV releases).

In: the official zip, its unpacked folder, or a folder that holds either. Out: `Raw` with action "rating" (value 0.5-5).
The text of a film is its title, genres and the tags that people gave it, most frequent first.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Final

import polars as pl

from feature_repo.sources.clean import clean_events, clean_items, clean_users, finish_events
from feature_repo.sources.files import find_member, read_csv
from feature_repo.sources.raw import Raw, require_events
from tandem.core.schema import Source, Task

SOURCE: Final = Source(
    kind="movielens",
    tasks=(Task("rated", "rating"), Task("liked", "rating", at_least=4.0)),
    positive="liked",
    history=("rating",),
    exclude_seen=True,
    split="users",
    credit="F. Maxwell Harper and Joseph A. Konstan. The MovieLens Datasets: History and Context. ACM TiiS 5(4), 2015.",
)

_TAGS_PER_FILM: Final = 20
_NO_GENRES: Final = "(no genres listed)"
_ARTICLES: Final = "The|A|An|Les|La|Le|L'|El|Los|Las|Il|Der|Die|Das"


def read(path: Path, now: datetime) -> Raw:
    """Read a MovieLens release. Raises InputError for files that are not one, NotFoundError for a missing path."""
    ratings = read_csv(find_member(path, "ratings.csv"), "ratings.csv", ("userId", "movieId", "rating", "timestamp"))
    films = read_csv(find_member(path, "movies.csv"), "movies.csv", ("movieId", "title", "genres"))
    tags = read_csv(find_member(path, "tags.csv"), "tags.csv", ("movieId", "tag"))
    items, bad_items = clean_items(_films(films, tags))
    names = {"userId": "user_id", "movieId": "item_id", "rating": "value"}
    draft = ratings.rename(names).with_columns(pl.lit("rating").alias("action"))
    events, bad_events = clean_events(draft, known_items=items["item_id"], now=now, unit="s")
    users, _ = clean_users(None, events["user_id"])
    return require_events(Raw(finish_events(events), items, users, SOURCE, pl.concat([bad_events, bad_items])))


def natural_title(title: pl.Expr) -> pl.Expr:
    """ "Matrix, The (1999)" as people write it: "The Matrix (1999)"."""
    return title.str.replace(rf"^(.+), ({_ARTICLES})( \(|$)", "${2} ${1}${3}")


def _films(films: pl.DataFrame, tags: pl.DataFrame) -> pl.DataFrame:
    draft = films.join(_film_tags(tags), on="movieId", how="left", maintain_order="left")
    draft = draft.with_columns(
        natural_title(pl.col("title").str.strip_chars()),
        pl.col("title").str.extract(r"\((\d{4})\)\s*$", 1).cast(pl.Int64).alias("year"),
        pl.when(pl.col("genres") == _NO_GENRES).then(None).otherwise(pl.col("genres").str.split("|")).alias("categories"),
    )
    genres = pl.format("Genres: {}.", pl.col("categories").list.join(", "))
    text = pl.concat_str(pl.col("title") + ".", genres, pl.format("Tags: {}.", "tags"), separator=" ", ignore_nulls=True)
    return draft.select("row", pl.col("movieId").alias("item_id"), "title", text.alias("text"), "categories", "year")


def _film_tags(tags: pl.DataFrame) -> pl.DataFrame:
    """movieId -> its most frequent tags as one text; case does not matter, ties go by the alphabet."""
    tag = pl.col("tag").str.strip_chars().str.to_lowercase()
    counts = tags.with_columns(tag).filter(pl.col("tag") != "").group_by("movieId", "tag").len()
    ordered = counts.sort(["movieId", "len", "tag"], descending=[False, True, False])
    return ordered.group_by("movieId", maintain_order=True).agg(pl.col("tag").head(_TAGS_PER_FILM).str.join(", ").alias("tags"))
