"""One split of one data set, as Parquet that every contender reads: dense ids, nothing else.

A folder holds `train.parquet` [user, item, time], what every contender may learn from, ordered by user and time; `learn.parquet`
and `valid.parquet`, the same events cut once more, for whoever chooses settings or stops early; `ask.parquet` [user], who is
asked; `truth.parquet` [user, item], which contenders never see; `facts.json` {items, exclude_seen, ordered, seed}.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from feature_repo.sources import read_source
from feature_repo.sources.raw import Raw
from feature_repo.sources.table import TableMapping
from feature_repo.splits import SplitConfig, make_requests
from retrieval.content import content_matrix
from retrieval.encoder import TextEncoder
from retrieval.words import TextReader, Words
from tandem.service.settings import EncoderSettings, _read_toml
from tandem.service.texts import item_texts

ROOT = Path(__file__).parents[3]
DATA = Path(os.environ.get("TANDEM_SHARED_DATA", ROOT.parent / "shared" / "data"))
FACTS = "facts.json"
FILES = {
    "ranklens": ("metarank", "ranklens/events.jsonl.gz"),
    "movielens": ("movielens", "movielens-latest-small/ml-latest-small.zip"),
    "goodbooks": ("goodbooks", "goodbooks-10k"),
    "online-retail": ("table", "online-retail/online_retail.parquet"),
}


@dataclass(frozen=True)
class Case:
    """One data set, split: `content` (N, C) and `text` (N, T) of its items, the encoder's part of `text` being `meaning` (N, E);
    events and truth lie in `folder`.
    """

    name: str
    folder: Path
    content: NDArray[np.float32]
    text: NDArray[np.float32]
    meaning: NDArray[np.float32]
    exclude_seen: bool
    ordered: bool

    def frame(self, name: str) -> pl.DataFrame:
        return pl.read_parquet(self.folder / f"{name}.parquet")

    @property
    def items(self) -> int:
        return len(self.content)

    def asked(self) -> list[int]:
        return self.frame("ask")["user"].to_list()

    def truth(self) -> list[NDArray[np.int64]]:
        """Dense ids wanted, in the order of `asked`."""
        return lists(self.frame("truth"), self.asked())

    def histories(self, name: str = "train") -> list[NDArray[np.int64]]:
        """Dense ids of each asked user's events in a table, oldest first."""
        return lists(self.frame(name), self.asked())


def lists(events: pl.DataFrame, users: list[int]) -> list[NDArray[np.int64]]:
    """Each user's items, in the order of the rows."""
    found = dict(events.group_by("user", maintain_order=True).agg("item").iter_rows())
    return [np.array(found.get(user, []), np.int64) for user in users]


def next_item(name: str, scratch: Path, seed: int = 0) -> Case:
    """Leave-one-out: each user's last history event is asked for, after everything before its moment."""
    folder = scratch / f"next-{name}"
    if (folder / FACTS).exists():
        return load(name, folder)
    raw, items = read(name, seed)
    anything = next(task.name for task in raw.source.tasks if task.action in raw.source.history and task.at_least is None)
    split = make_requests(raw.events, replace(raw.source, positive=anything), SplitConfig("leave_one_out", seed=seed))
    asked = split.requests.filter(pl.col("part") == "test").select("user_id", "request_id", asked="timestamp")
    history = _history(raw, items).join(asked.select("user_id", "asked"), on="user_id", how="left", maintain_order="left")
    train = history.filter(pl.col("asked").is_null() | (pl.col("timestamp") < pl.col("asked")))
    left_out = history.filter(pl.col("timestamp") >= pl.col("asked")).group_by("user_id", maintain_order=True).last()
    seen = train.select("user_id", "item")
    if raw.source.exclude_seen:
        left_out = left_out.join(seen, on=["user_id", "item"], how="anti")
    truth = left_out.join(seen.select("user_id").unique(), on="user_id", how="semi").select("user_id", "item")
    moments = pl.col("timestamp").rank("dense").over("user_id")
    last = train.with_columns(moments.alias("moment"), pl.int_range(pl.len()).over("user_id").alias("place"))
    newest = (
        (pl.col("moment") == pl.col("moment").max().over("user_id"))
        & (pl.col("moment") > 1)
        & _some(last["user_id"], 1_000, seed)
    )
    first = newest & (pl.col("place") == pl.col("place").filter(newest).min().over("user_id"))
    marked = last.with_columns(newest.alias("newest"), first.alias("valid"))
    return _write(name, folder, raw, items, marked, truth, ordered=True, seed=seed)


def unordered(name: str, scratch: Path, seed: int = 0, least: int = 5, most_asked: int = 10_000) -> Case:
    """80/20 per user: of every user with `least` positive items a fifth is asked for; the order means nothing."""
    folder = scratch / f"unordered-{name}"
    if (folder / FACTS).exists():
        return load(name, folder)
    raw, items = read(name, seed)
    positive = raw.source.task(raw.source.positive).matches()
    marks = _history(raw, items, positive)
    return _eighty_twenty(name, folder, raw, items, marks, least, most_asked, seed)


def _eighty_twenty(
    name: str, folder: Path, raw: Raw, items: pl.DataFrame, events: pl.DataFrame, least: int, most_asked: int, seed: int
) -> Case:
    marks = events.filter(pl.len().over("user_id") >= least)
    drawn = pl.Series(np.random.default_rng(seed).random(len(marks)))
    marks = marks.with_columns(drawn.alias("drawn")).with_columns(
        (pl.col("drawn").rank("ordinal").over("user_id") - 1).alias("rank"), pl.len().over("user_id").alias("size")
    )
    fifth = (pl.col("size") * 0.2).floor().clip(1)
    truth = marks.filter(pl.col("rank") < fifth).select("user_id", "item")
    chosen = truth["user_id"].unique().sort().sample(fraction=1.0, shuffle=True, seed=seed).head(most_asked)
    train = marks.filter(pl.col("rank") >= fifth)
    held = (pl.col("rank") < fifth + ((pl.col("size") - fifth) * 0.2).floor().clip(1)) & _some(train["user_id"], 2_000, seed)
    marked = train.with_columns(held.alias("newest"), held.alias("valid"))
    return _write(
        name, folder, raw, items, marked, truth.filter(pl.col("user_id").is_in(chosen.implode())), ordered=False, seed=seed
    )


def cold(name: str, scratch: Path, seed: int = 0, share: float = 0.2) -> Case:
    """As `unordered`, and a fifth of the items is unknown: none of their events is in training, all are in `cold.parquet`."""
    folder = scratch / f"cold-{name}"
    if (folder / "new.npy").exists():
        return load(name, folder)
    raw, items = read(name, seed)
    positive = raw.source.task(raw.source.positive).matches()
    marks = _history(raw, items, positive).unique(["user_id", "item"], maintain_order=True)
    new = np.random.default_rng(seed + 2).permutation(len(items))[: int(len(items) * share)]
    known = marks.filter(~pl.col("item").is_in(new.tolist()))
    case = _eighty_twenty(name, folder, raw, items, known, 5, 10_000, seed)
    asked = marks.filter(pl.col("item").is_in(new.tolist())).join(_numbers(known, 5), on="user_id", how="inner")
    asked.select("user", "item").sort("user", "item").write_parquet(case.folder / "cold.parquet")
    np.save(case.folder / "new.npy", np.sort(new))
    return case


def _some(users: pl.Series, count: int, seed: int) -> pl.Expr:
    """Is the row's user one of `count` validation users?"""
    chosen = users.unique().sort().sample(fraction=1.0, shuffle=True, seed=seed + 1).head(count)
    return pl.col("user_id").is_in(chosen.implode())


def read(name: str, seed: int = 0) -> tuple[Raw, pl.DataFrame]:
    kind, path = FILES[name]
    mapping = (
        TableMapping.parse(_read_toml(ROOT / "docs" / "examples" / "online-retail.toml")["table"]) if kind == "table" else None
    )
    raw = read_source(kind, DATA / path, mapping, seed)
    return raw, raw.items.sort("item_id")


def _history(raw: Raw, items: pl.DataFrame, which: pl.Expr | None = None) -> pl.DataFrame:
    """[user_id, timestamp, item] of the history events, by user, oldest first."""
    dense = items.select("item_id", item=pl.int_range(pl.len(), dtype=pl.Int64))
    events = raw.events.filter(raw.source.is_history() if which is None else which).sort("user_id", "timestamp", "event_id")
    return events.join(dense, on="item_id", how="inner", maintain_order="left").select("user_id", "timestamp", "item")


def _numbers(events: pl.DataFrame, least: int) -> pl.DataFrame:
    """[user_id, user]: users with at least so many events, numbered in the order of their ids."""
    users = events.filter(pl.len().over("user_id") >= least).select("user_id").unique().sort("user_id")
    return users.with_columns(user=pl.int_range(pl.len(), dtype=pl.Int64))


def _write(
    name: str, folder: Path, raw: Raw, items: pl.DataFrame, marked: pl.DataFrame, truth: pl.DataFrame, *, ordered: bool, seed: int
) -> Case:
    folder.mkdir(parents=True, exist_ok=True)
    users = _numbers(marked, 1)
    numbered = marked.join(users, on="user_id", how="left", maintain_order="left")
    columns = ["user", "item", pl.col("timestamp").dt.epoch("us").alias("time")]
    wanted = truth.join(users, on="user_id", how="inner").select("user", "item").sort("user", "item")
    numbered.select(columns).write_parquet(folder / "train.parquet")
    numbered.filter(~pl.col("newest")).select(columns).write_parquet(folder / "learn.parquet")
    numbered.filter("valid").select("user", "item").write_parquet(folder / "valid.parquet")
    wanted.write_parquet(folder / "truth.parquet")
    wanted.select("user").unique().sort("user").write_parquet(folder / "ask.parquet")
    texts = item_texts(items)
    encoder = TextEncoder(cache=folder.parent / "vectors", dtype="float32")
    text = TextReader(encoder, Words.fit(texts, EncoderSettings().words)).encode(texts)
    np.save(folder / "meaning.npy", text[:, : encoder.dimension])
    np.save(folder / "text.npy", text)
    np.save(folder / "content.npy", content_matrix(items, text))
    facts = {"items": len(items), "exclude_seen": raw.source.exclude_seen, "ordered": ordered, "seed": seed}
    (folder / FACTS).write_text(json.dumps(facts))
    return load(name, folder)


def load(name: str, folder: Path) -> Case:
    """A case that was made before; its facts are written last, so that a folder with them is whole."""
    facts = json.loads((folder / FACTS).read_text())
    content, text, meaning = (np.load(folder / f"{part}.npy") for part in ("content", "text", "meaning"))
    return Case(name, folder, content, text, meaning, facts["exclude_seen"], facts["ordered"])
