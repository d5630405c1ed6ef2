"""`tandem demo`: the whole loop in one workspace, then three people's histories beside their slates.

In: settings, and which data. Out: the funnel and the slates as an `Outcome`. A workspace that the demo did not fill is refused,
so that nobody's data is replaced.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Final

import polars as pl

from feature_repo.store import SOURCE_FILE, load_events, load_items, load_source
from tandem.core.errors import InputError
from tandem.core.folders import read_json, write_json
from tandem.service import recipes
from tandem.service.outcome import Cell, Outcome, Table
from tandem.service.recommend import Recommender
from tandem.service.settings import Settings
from tandem.service.slate import Ask
from tandem.service.wiring import open_recommender, users_with_history

WORLD: Final = "world"
SIZES: Final[dict[str, tuple[int, int, int]]] = {"small": (1200, 1500, 60), "medium": (10_000, 5000, 90)}
"""Users, items and days of the built-in world."""

SENTENCES: Final[dict[str, str]] = {
    WORLD: "a gift for somebody who likes to cook",
    "movielens": "a quiet film about music",
    "metarank": "a quiet film about music",
    "goodbooks": "a novel about the sea",
    "table": "something warm for the kitchen",
}
"""What to search for, by kind of data."""

_SHOWN: Final = 8
_PEOPLE: Final = 3
_MARK: Final = "demo.json"


@dataclass(frozen=True)
class Person:
    """Somebody's last history items and slate, by title, newest history first."""

    user_id: str
    history: tuple[str, ...]
    slate: tuple[str, ...]


def run_demo(settings: Settings, kind: str, size: str, data: Path | None, progress: recipes.Progress) -> Outcome:
    """Data, then `recipes.run_all`, then people. What an earlier run has done is not done again."""
    if kind == WORLD:
        settings = _quick(settings)
    _fill(settings, kind, size, data, progress)
    ran = recipes.run_all(settings, progress)
    progress("ask", 0, 1)
    recommender = open_recommender(settings)
    try:
        people = [_person(settings, recommender, user) for user in users_with_history(settings.data, _SHOWN, _PEOPLE)]
    finally:
        recommender.close()
    progress("ask", 1, 1)
    commands = _commands(settings, kind, people)
    figures = ran.data | {"people": [vars(each) for each in people], "commands": commands}
    return replace(ran, data=figures, more=tuple(map(_table, people)), next="\n      ".join(commands))


def _quick(settings: Settings) -> Settings:
    """A minute instead of five: the world is simple, so a part of the ranker's requests and rounds is enough."""
    return replace(settings, ranker=replace(settings.ranker, requests=2000, rounds=8), towers=replace(settings.towers, epochs=6))


def _fill(settings: Settings, kind: str, size: str, data: Path | None, progress: recipes.Progress) -> None:
    """Simulate or import, unless this demo has. Its mark is written before the data, to own them, and after them."""
    mark = settings.state / _MARK
    wanted = _wanted(kind, size, data)
    found = read_json(mark) if mark.is_file() else None
    if found is None and (settings.data / SOURCE_FILE).is_file():
        raise InputError(
            f"{settings.workspace} holds data that is not the demo's; name another folder: tandem --workspace FOLDER demo"
        )
    if found is not None and found["wanted"] != wanted:
        raise InputError(
            f"{settings.workspace} holds the demo of {found['wanted']}; name another folder: tandem --workspace FOLDER demo"
        )
    if found is not None and found["whole"]:
        return
    write_json(mark, {"wanted": wanted, "whole": False})
    progress(f"make {wanted}", 0, 0)
    if data is None:
        recipes.simulate(settings, *SIZES[size], seed=0)
    else:
        recipes.import_source(settings, kind, data, replace=True)
    write_json(mark, {"wanted": wanted, "whole": True})


def _wanted(kind: str, size: str, data: Path | None) -> str:
    if kind == WORLD and data is None:
        return f"the {size} world"
    if kind == WORLD or data is None:
        raise InputError("a demo of real data needs both its kind and its files: tandem demo --kind movielens --data FILE")
    return f"{kind} data from {data.resolve()}"


def _person(settings: Settings, recommender: Recommender, user_id: str) -> Person:
    source, titles = load_source(settings.data), load_items(settings.data).select("item_id", "title")
    own = load_events(settings.data).filter((pl.col("user_id") == user_id) & source.is_history())
    last = own.sort("timestamp", "event_id", descending=True).unique("item_id", keep="first", maintain_order=True).head(_SHOWN)
    history = last.join(titles, on="item_id", how="left", maintain_order="left")["title"].fill_null("(unknown item)")
    slate = recommender.recommend(Ask(user_id=user_id, k=_SHOWN))
    return Person(user_id, tuple(history.to_list()), tuple(item.title for item in slate.items))


def _table(person: Person) -> Table:
    rows: tuple[tuple[Cell, ...], ...] = tuple(zip_longest(person.history, person.slate))
    return Table(f"User {person.user_id}", ("history, newest first", "slate"), rows)


def _commands(settings: Settings, kind: str, people: list[Person]) -> list[str]:
    """What to type next; the curl is for `tandem serve`."""
    tandem = [_program(), "--workspace", str(_short(settings.workspace))]
    user = people[0].user_id if people else "anybody"
    body = json.dumps({"user_id": user, "k": 5}, ensure_ascii=False)
    url = f"http://{settings.service.host}:{settings.service.port}/v1/recommend"
    return [
        shlex.join([*tandem, "recommend", user]),
        shlex.join([*tandem, "search", SENTENCES.get(kind, SENTENCES[WORLD])]),
        shlex.join([*tandem, "serve"]),
        f"curl -s {url} -H 'content-type: application/json' -d {shlex.quote(body)}",
    ]


def _program() -> str:
    """How to call this program from here: by name where the shell finds it, else by its path."""
    called = Path(sys.argv[0])
    return "tandem" if called.name != "tandem" or shutil.which("tandem") == str(called) else str(_short(called.absolute()))


def _short(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
