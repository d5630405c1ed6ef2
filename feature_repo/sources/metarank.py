"""Metarank's event format: JSON lines of item, user, ranking and interaction events (RankLens is published in it).

In: the file, or the folder that holds one .jsonl(.gz). Out: `Raw` with action "impression" (request_id, position from 1) and
one action per type of interaction. Where everything happened within a day there is no before and after between users: they get
a synthetic clock.

Popularity, votes and relevancy fields are left out: they were counted after the clicks that a recommender should predict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import polars as pl

from feature_repo.sources.clean import clean_events, clean_items, clean_users, with_event_ids
from feature_repo.sources.clock import end_to_end
from feature_repo.sources.files import lines_of, require
from feature_repo.sources.raw import REJECTED, Raw, require_events
from tandem.core.errors import InputError
from tandem.core.schema import MICROSECONDS_PER_DAY, Source, Split, Task

IMPRESSION: Final = "impression"
RANKLENS: Final = "Metarank Labs. RankLens (msrd). CC BY-SA 4.0."
"""Credit of the data set that is published in this format."""

LEAKS: Final = frozenset({"popularity", "vote_avg", "vote_cnt", "vote_average", "vote_count", "relevancy"})
"""Item fields that were counted after the fact."""

_CATEGORY_FIELDS: Final = ("genres", "categories", "category")
_TITLE_FIELDS: Final = ("title", "name")
_UNKNOWN_ZERO: Final = frozenset({"budget", "runtime"})
"""Fields whose 0 means that nobody knows."""

_TEXT_ORDER: Final = ("description", "director", "actors", "writer", "tags")

Row = dict[str, Any]


@dataclass
class _Drafts:
    """Rows sorted by what they become, in file order."""

    items: list[Row] = field(default_factory=list)
    users: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    broken: list[Row] = field(default_factory=list)
    places: dict[tuple[str, str], int] = field(default_factory=dict)
    """(ranking, item) -> position, for the interactions that follow."""


def read(path: Path, now: datetime, seed: int) -> Raw:
    """Read Metarank events; `seed` orders the users of a synthetic clock. Raises InputError when the file holds none."""
    drafts = _sort_lines(lines_of(_events_file(require(path))))
    items, bad_items = clean_items(_item_draft(drafts.items))
    events, bad_events = clean_events(_event_draft(drafts.events), known_items=items["item_id"], now=now, unit="ms")
    users, bad_users = clean_users(_user_draft(drafts.users), events["user_id"])
    broken = pl.DataFrame(drafts.broken, schema=REJECTED)
    timed, is_synthetic = _timed(with_event_ids(events), seed)
    rejected = pl.concat([bad_events, bad_items, bad_users, broken])
    credit = RANKLENS if "ranklens" in str(path).lower() else ""
    source = _source(events, "users" if is_synthetic else "time", credit)
    return require_events(Raw(timed, items, users, source, rejected))


def _timed(events: pl.DataFrame, seed: int) -> tuple[pl.DataFrame, bool]:
    times = events["timestamp"].cast(pl.Int64)
    first, last = times.min(), times.max()
    within_a_day = isinstance(first, int) and isinstance(last, int) and last - first < MICROSECONDS_PER_DAY
    return (end_to_end(events, seed), True) if within_a_day else (events.sort("timestamp", "event_id"), False)


def _source(events: pl.DataFrame, split: Split, credit: str) -> Source:
    """Every type of interaction is a task; "click" is what retrieval should find, or else the most frequent type."""
    counts = (
        events.filter(pl.col("action") != IMPRESSION).group_by("action").len().sort(["len", "action"], descending=[True, False])
    )
    actions: list[str] = counts["action"].to_list() or ["click"]
    positive = "click" if "click" in actions else actions[0]
    ordered = [positive, *[action for action in actions if action != positive]]
    return Source(
        kind="metarank",
        tasks=tuple(Task(action, action) for action in ordered),
        positive=positive,
        history=(positive,),
        exclude_seen=True,
        split=split,
        impression=IMPRESSION,
        credit=credit,
    )


def _sort_lines(lines: Sequence[str]) -> _Drafts:
    drafts = _Drafts()
    for row, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            _sort_line(drafts, row, line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = "not JSON" if isinstance(error, ValueError) else f"not a Metarank event: {type(error).__name__} {error}"
            drafts.broken.append({"table": "events", "row": row, "reason": reason, "content": json.dumps(line[:4096])})
    return drafts


def _sort_line(drafts: _Drafts, row: int, line: str) -> None:
    event = json.loads(line)
    match event["event"]:
        case "item":
            drafts.items.append({"row": row, "item_id": str(event["item"]), "fields": _fields(event)})
        case "user":
            drafts.users.append({"row": row, "user_id": str(event["user"]), "fields": _fields(event)})
        case "ranking":
            _add_impressions(drafts, row, event)
        case "interaction":
            drafts.events.append(_interaction(drafts, row, event))
        case other:
            raise KeyError(f"unknown event {other!r}")


def _add_impressions(drafts: _Drafts, row: int, event: Mapping[str, Any]) -> None:
    ranking = str(event["id"])
    shared = {"row": row, "user_id": event.get("user"), "timestamp": str(event["timestamp"]), "request_id": ranking}
    for position, item in enumerate(event["items"], start=1):
        drafts.places[ranking, str(item["id"])] = position
        drafts.events.append({**shared, "item_id": str(item["id"]), "action": IMPRESSION, "position": position})


def _interaction(drafts: _Drafts, row: int, event: Mapping[str, Any]) -> Row:
    ranking = event.get("ranking")
    item = str(event["item"])
    return {
        "row": row,
        "user_id": event.get("user"),
        "item_id": item,
        "action": event["type"],
        "timestamp": str(event["timestamp"]),
        "request_id": ranking,
        "position": drafts.places.get((ranking, item)) if ranking is not None else None,
    }


def _fields(event: Mapping[str, Any]) -> dict[str, Any]:
    return {each["name"]: each["value"] for each in event.get("fields", []) if each["name"] not in LEAKS}


def _event_draft(rows: list[Row]) -> pl.DataFrame:
    schema = {
        "row": pl.Int64,
        "user_id": pl.String,
        "item_id": pl.String,
        "action": pl.String,
        "timestamp": pl.String,
        "request_id": pl.String,
        "position": pl.Int32,
    }
    return pl.DataFrame(rows, schema=schema, strict=False)


def _item_draft(rows: list[Row]) -> pl.DataFrame:
    drafts = [
        {"row": row["row"], "item_id": row["item_id"], **_item_words(row["fields"]), **_numbers(row["fields"])} for row in rows
    ]
    head = {"row": pl.Int64, "item_id": pl.String, "title": pl.String, "text": pl.String, "categories": pl.List(pl.String)}
    return _frame(drafts, head)


def _user_draft(rows: list[Row]) -> pl.DataFrame | None:
    drafts = [
        {"row": row["row"], "user_id": row["user_id"], "text": _sentences(row["fields"], ()), **_numbers(row["fields"])}
        for row in rows
    ]
    return _frame(drafts, {"row": pl.Int64, "user_id": pl.String, "text": pl.String}) if drafts else None


def _frame(rows: list[Row], head: Mapping[str, Any]) -> pl.DataFrame:
    numbers = sorted({name for row in rows for name in row} - set(head))
    return pl.DataFrame(rows, schema={**head, **dict.fromkeys(numbers, pl.Float64)}, strict=False)


def _item_words(fields: Mapping[str, Any]) -> Row:
    title = next((str(fields[name]) for name in _TITLE_FIELDS if fields.get(name)), None)
    categories = next((_as_list(fields[name]) for name in _CATEGORY_FIELDS if name in fields), [])
    genres = f"Genres: {', '.join(categories)}." if categories else ""
    rest = _sentences(fields, (*_TITLE_FIELDS, *_CATEGORY_FIELDS))
    text = " ".join(part for part in (f"{title}." if title else "", genres, rest) if part)
    return {"title": title, "text": text or None, "categories": categories}


def _sentences(fields: Mapping[str, Any], without: Sequence[str]) -> str:
    """All words among the fields: free text as it stands, lists and names as "Actors: a, b."."""
    names = [name for name in _TEXT_ORDER if name in fields] + [name for name in fields if name not in _TEXT_ORDER]
    texts = {name: ", ".join(_as_list(fields[name])) for name in names if name not in without and _is_words(fields[name])}
    return " ".join(text if name == "description" else f"{name.capitalize()}: {text}." for name, text in texts.items() if text)


def _is_words(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def _as_list(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


def _numbers(fields: Mapping[str, Any]) -> Row:
    """Numeric fields as attributes; `release_date` (epoch seconds) becomes `year`."""
    numbers = {name: float(value) for name, value in fields.items() if isinstance(value, int | float)}
    released = numbers.pop("release_date", None)
    if released is not None:
        numbers["year"] = float(datetime.fromtimestamp(released, UTC).year)
    return {name: None if value == 0 and name in _UNKNOWN_ZERO else value for name, value in numbers.items()}


def _events_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(each for each in path.iterdir() if each.name.endswith((".jsonl", ".jsonl.gz", ".ndjson", ".json.gz")))
    if len(found) != 1:
        names = [each.name for each in found] or "none"
        raise InputError(f"{path} holds the JSON-lines files {names}; name the one with the events")
    return found[0]
