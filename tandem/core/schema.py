"""The words everyone shares: tables, tasks, parts and ids.

Tables are Polars frames (Parquet on disk). Times are UTC microseconds. Ids are strings of 1-256 UTF-8 bytes, NFC, without
control characters. Scores are higher is better.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal

import polars as pl

from tandem.core.errors import InputError

TIME: Final = pl.Datetime("us", "UTC")
MICROSECONDS_PER_DAY: Final = 86_400_000_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

EVENTS: Final[dict[str, pl.DataType]] = {
    "event_id": pl.String(),
    "user_id": pl.String(),
    "item_id": pl.String(),
    "action": pl.String(),
    "value": pl.Float64(),
    "timestamp": TIME,
    "request_id": pl.String(),
    "position": pl.Int32(),
    "propensity": pl.Float64(),
    "split": pl.String(),
}
"""Columns of `events` in order; `event_id` to `action` and `timestamp` are never null. Context columns may follow."""

ITEMS: Final[dict[str, pl.DataType]] = {
    "item_id": pl.String(),
    "title": pl.String(),
    "text": pl.String(),
    "categories": pl.List(pl.String()),
    "available_from": TIME,
}
"""Columns of `items` in order; attribute columns (numbers or strings) follow. Only `available_from` may be null."""

USERS: Final[dict[str, pl.DataType]] = {"user_id": pl.String(), "text": pl.String()}
"""Columns of `users` in order; attribute columns (numbers or strings) follow. `text` may be null."""

REQUESTS: Final[dict[str, pl.DataType]] = {
    "request_id": pl.String(),
    "user_id": pl.String(),
    "timestamp": TIME,
    "part": pl.String(),
}
"""One question that the recommender is asked offline: what would `user_id` want from `timestamp` on?"""

Part = Literal["towers", "ranker", "calibrate", "test"]
PARTS: Final[tuple[Part, ...]] = ("towers", "ranker", "calibrate", "test")
"""Who learns from what: towers, ranker, calibrators, and the test that none of them has seen."""

Split = Literal["time", "users", "leave_one_out", "fraction", "given"]


@dataclass(frozen=True)
class Task:
    """One thing the ranker predicts: an event of `action` whose value lies in [at_least, below)."""

    name: str
    action: str
    at_least: float | None = None
    below: float | None = None

    def matches(self) -> pl.Expr:
        """Boolean expression over `events`: is this event a positive label of the task?"""
        hit = pl.col("action") == self.action
        value = pl.col("value").fill_nan(None)  # Polars orders NaN above every number
        if self.at_least is not None:
            hit &= value.fill_null(float("-inf")) >= self.at_least
        if self.below is not None:
            hit &= value.fill_null(float("inf")) < self.below
        return hit


@dataclass(frozen=True)
class Source:
    """What a source's events mean: its labels, what retrieval should find, and how to split it.

    `history` names the actions that make a user's history (an impression does not); `impression` is the action that
    says an item was shown, where the source logs it.
    """

    kind: str
    tasks: tuple[Task, ...]
    positive: str
    history: tuple[str, ...]
    exclude_seen: bool
    split: Split
    impression: str | None = None
    credit: str = ""

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if self.positive not in names:
            raise InputError(f"positive = {self.positive!r} is not one of the tasks {names}; name one of them")

    def task(self, name: str) -> Task:
        """The task called `name`."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise InputError(f"no task {name!r} in source {self.kind!r}; it has {[task.name for task in self.tasks]}")

    @property
    def actions(self) -> tuple[str, ...]:
        """Every action that the source speaks of, once each."""
        shown = () if self.impression is None else (self.impression,)
        return tuple(dict.fromkeys((*self.history, *(task.action for task in self.tasks), *shown)))

    def is_history(self) -> pl.Expr:
        """Boolean expression over `events`: does this event belong to a user's history?"""
        return pl.col("action").is_in(list(self.history))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Source:
        raw = json.loads(path.read_text())
        raw["tasks"] = tuple(Task(**task) for task in raw["tasks"])
        raw["history"] = tuple(raw["history"])
        return cls(**raw)


MAX_ID_BYTES: Final = 256

MAX_CATEGORIES: Final = 32
"""Of an item that is put by itself."""


def id_problem(value: str) -> str | None:
    """Why `value` cannot be an id, or None when it can."""
    if not value:
        return "empty"
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        return "holds a lone surrogate"
    if size > MAX_ID_BYTES:
        return f"{size} bytes, more than {MAX_ID_BYTES}"
    if any(unicodedata.category(letter) == "Cc" for letter in value):
        return "holds a control character"
    if unicodedata.normalize("NFC", value) != value:
        return "not in Unicode form NFC"
    return None


def check_id(value: str, what: str) -> str:
    """Return `value` in NFC, or raise InputError naming `what` ("user_id") and the reason."""
    try:
        value = unicodedata.normalize("NFC", value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} {value!r} is not text: {error}") from None
    problem = id_problem(value)
    if problem:
        raise InputError(f"{what} {value[:40]!r} is not an id: {problem}; ids are 1-{MAX_ID_BYTES} bytes of plain text")
    return value


def to_us(moment: datetime) -> int:
    """UTC microseconds of a time with a zone."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def from_us(us: int) -> datetime:
    """The time of UTC microseconds."""
    return _EPOCH + timedelta(microseconds=us)
