"""Metarank's event format: impressions with positions, clicks, item fields, and broken lines."""

import gzip
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from feature_repo.sources import Raw, read_source
from tandem.core.errors import InputError

NOW = datetime(2026, 1, 1, tzinfo=UTC)
T0 = 1_636_993_800_000


def _item(item: str, **fields: Any) -> dict[str, Any]:
    named = [{"name": name, "value": value} for name, value in fields.items()]
    return {"event": "item", "id": f"e-{item}", "item": item, "timestamp": str(T0 - 1000), "fields": named}


def _ranking(ranking: str, user: str, items: list[str], at: int) -> dict[str, Any]:
    shown = [{"id": item, "fields": [{"name": "relevancy", "value": 0.0}]} for item in items]
    return {"event": "ranking", "id": ranking, "user": user, "items": shown, "timestamp": str(T0 + at), "fields": []}


def _click(ranking: str | None, user: str, item: str, at: int, kind: str = "click") -> dict[str, Any]:
    event = {"event": "interaction", "id": f"c-{at}", "user": user, "item": item, "type": kind, "timestamp": str(T0 + at)}
    return {**event, "ranking": ranking} if ranking else event


FILM = {
    "title": "Toy Story",
    "popularity": 9.9,
    "vote_avg": 7.0,
    "budget": 0.0,
    "runtime": 81.0,
    "release_date": 8.195904e8,
    "genres": ["animation", "family"],
    "description": "A cowboy doll is threatened.",
    "director": "john lasseter",
    "actors": ["tom hanks", "tim allen"],
    "tags": ["pixar"],
}
EVENTS = [
    _item("1", **FILM),
    _item("2", title="Jumanji"),
    _ranking("r1", "u1", ["2", "1"], 0),
    _click("r1", "u1", "1", 5_000),
    _ranking("r2", "u2", ["1", "2", "99"], 1_000),
    _click("r2", "u2", "2", 9_000),
]


def _read(folder: Path, events: list[Any], seed: int = 1) -> Raw:
    lines = [each if isinstance(each, str) else json.dumps(each) for each in events]
    with gzip.open(folder / "events.jsonl.gz", "wt", encoding="utf-8") as handle:
        handle.write("\n".join(lines) + "\n")
    return read_source("metarank", folder, None, seed, now=NOW)


def test_impressions_and_clicks_know_their_position(tmp_path: Path) -> None:
    events = _read(tmp_path, EVENTS).events
    rows = events.select("request_id", "item_id", "action", "position").sort("request_id", "action", "position").rows()
    assert rows == [
        ("r1", "1", "click", 2),
        ("r1", "2", "impression", 1),
        ("r1", "1", "impression", 2),
        ("r2", "2", "click", 2),
        ("r2", "1", "impression", 1),
        ("r2", "2", "impression", 2),
    ]


def test_unknown_items_are_rejected_and_counted(tmp_path: Path) -> None:
    assert _read(tmp_path, EVENTS).reasons == {"events: unknown item": 1}


def test_synthetic_clock_keeps_distances_within_a_user_and_separates_users(tmp_path: Path) -> None:
    raw = _read(tmp_path, EVENTS)
    assert raw.source.split == "users"
    for user, seconds in (("u1", 5), ("u2", 8)):
        own = raw.events.filter(pl.col("user_id") == user)
        shown = own.filter(pl.col("action") == "impression")["timestamp"].unique()
        assert shown.len() == 1
        assert (own["timestamp"].max() - shown[0]).total_seconds() == seconds
    ends = (
        raw.events.group_by("user_id").agg(pl.col("timestamp").min().alias("a"), pl.col("timestamp").max().alias("b")).sort("a")
    )
    assert ends["a"][1] > ends["b"][0]


def test_longer_data_keeps_its_clock(tmp_path: Path) -> None:
    raw = _read(tmp_path, [*EVENTS, _click("r2", "u2", "1", 3 * 86_400_000)])
    assert raw.source.split == "time"
    assert raw.events["timestamp"].min() == datetime.fromtimestamp(T0 / 1000, UTC)


def test_item_words_and_numbers_without_leaks(tmp_path: Path) -> None:
    item = _read(tmp_path, EVENTS).items.to_dicts()[0]
    assert item["categories"] == ["animation", "family"]
    assert item["text"] == (
        "Toy Story. Genres: animation, family. A cowboy doll is threatened. Director: john lasseter. "
        "Actors: tom hanks, tim allen. Tags: pixar."
    )
    assert (item["runtime"], item["budget"], item["year"]) == (81.0, None, 1995.0)
    assert not {"popularity", "vote_avg"} & set(item)


def test_broken_lines_cost_only_themselves(tmp_path: Path) -> None:
    raw = _read(tmp_path, [*EVENTS, "{not json", '{"event": "party"}', '{"event": "interaction", "item": "1"}', "[1]"])
    assert raw.events.height == 6
    broken = raw.rejected.filter(pl.col("reason") != "unknown item")
    assert broken["row"].to_list() == [6, 7, 8, 9]
    assert broken["reason"][0] == "not JSON"
    assert broken["reason"].str.starts_with("not a Metarank event").sum() == 3


def test_other_interactions_are_tasks_too(tmp_path: Path) -> None:
    source = _read(tmp_path, [*EVENTS, _click(None, "u1", "2", 10_000, "purchase")]).source
    assert [task.name for task in source.tasks] == ["click", "purchase"]
    assert (source.positive, source.history, source.impression) == ("click", ("click",), "impression")


def test_user_events_give_users_words_and_numbers(tmp_path: Path) -> None:
    fields = [{"name": "city", "value": "Łódź"}, {"name": "age", "value": 31}]
    user = {"event": "user", "id": "x", "user": "u1", "timestamp": str(T0), "fields": fields}
    users = _read(tmp_path, [user, *EVENTS]).users
    assert users.sort("user_id").rows() == [("u1", "City: Łódź.", 31.0), ("u2", None, None)]


def test_folder_without_events_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none"):
        read_source("metarank", tmp_path, None, 0, now=NOW)


@pytest.mark.real
def test_real_ranklens_cut_to_600_items(tmp_path: Path) -> None:
    shared = Path(os.environ.get("TANDEM_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data"))
    path = shared / "ranklens" / "events.jsonl.gz"
    if not path.is_file():
        pytest.skip("RankLens is not there")
    items, others = [], []
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        for line in handle:
            if line.startswith('{"event":"item"'):
                items.append(line.rstrip("\n"))
            elif len(others) < 6000:
                others.append(line.rstrip("\n"))
    raw = _read(tmp_path, [*items[:600], *others])
    assert raw.items.height == 600
    assert set(raw.reasons) == {"events: unknown item"}
    shown = raw.events.filter(pl.col("action") == "impression")
    assert raw.events.filter(pl.col("action") == "click").height > 500
    assert shown["position"].min() == 1
    assert shown["position"].max() == 24
    assert raw.items["text"].str.len_chars().median() > 200
