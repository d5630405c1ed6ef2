"""The features that a workspace declares for itself, in one place: [features.declared], [features.tables], [features.crosses].

In: what `tandem.toml` says. Out: frozen declarations, checked. `windows.py` computes the declared ones from events,
`own_tables.py` reads tables, and `crosses.py` combines and fades at the moment of a request or of a training row: each of them
is one function that builds, pushes, trains and serves. Context columns are named in [features] `context`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

from feature_repo.views import ENTITIES
from tandem.core.errors import InputError
from tandem.core.schema import Source, Task

Entity = Literal["user", "item"]
What = Literal["count", "sum", "mean"]
How = Literal["ratio", "difference", "product"]

BUILT_IN: Final = ("user_stats", "user_history", "user_categories", "item_stats", "item_attributes", "user_attributes")
"""Views that every workspace has."""

DECLARED: Final = {"user": "user_declared", "item": "item_declared"}
"""Entity -> the view that holds its declared features."""

_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
_STORED_TIMES: Final = ("_time", "_from")


@dataclass(frozen=True)
class Declared:
    """One feature made of events: a count of them, or the sum or mean of their values, per user or per item.

    Which events: those of `action`, those that make `task` true, or without either the history's. How far back: `window_days`
    whole UTC days, today among them; or fading, where an event counts half as much every `half_life_days`; or for ever.
    """

    entity: Entity
    action: str | None = None
    task: str | None = None
    window_days: int | None = None
    half_life_days: float | None = None
    what: What = "count"

    @property
    def decays(self) -> bool:
        """Does the value change with time alone? A decayed mean does not: its numerator and denominator fade alike."""
        return self.half_life_days is not None and self.what != "mean"


@dataclass(frozen=True)
class OwnTable:
    """A table of features that somebody else computes: a CSV, Parquet or JSON-lines file, `path` from the workspace on.

    `key` is the id's column (default user_id or item_id), `timestamp` the one that says when a row became known. A value older
    than `ttl_days` counts as missing. Raise `revision` when the same columns mean something else from now on.
    """

    path: str
    entity: Entity
    key: str | None = None
    timestamp: str = "event_timestamp"
    ttl_days: float | None = None
    revision: int = 1


@dataclass(frozen=True)
class Cross:
    """A feature of two others, made when they are known: `left` / `right`, `left` - `right`, or their product."""

    left: str
    right: str
    how: How = "ratio"


def check_declared(declared: Mapping[str, Declared]) -> None:
    """Raise InputError, naming the feature, for what cannot be computed."""
    for name, each in declared.items():
        where = f"[features.declared.{name}]"
        _check_name(name, where)
        _check_choice(each.entity, get_args(Entity), f"{where} entity")
        if each.action is not None and each.task is not None:
            raise InputError(f"{where} names an action and a task; give one of them")
        if each.window_days is not None and each.half_life_days is not None:
            raise InputError(f"{where} has window_days and half_life_days; give one of them, or neither to count for ever")
        if each.window_days is not None and each.window_days < 1:
            raise InputError(f"{where} window_days = {each.window_days}; give 1 or more")
        if each.half_life_days is not None and not each.half_life_days > 0:
            raise InputError(f"{where} half_life_days = {each.half_life_days}; give a number above 0")


def check_tables(tables: Mapping[str, OwnTable]) -> None:
    """Raise InputError, naming the table, for one that cannot be a view."""
    for name, each in tables.items():
        where = f"[features.tables.{name}]"
        _check_name(name, where)
        _check_choice(each.entity, get_args(Entity), f"{where} entity")
        if name in (*BUILT_IN, *DECLARED.values()):
            raise InputError(f"{where} has the name of a built-in view; choose another")
        if each.ttl_days is not None and not each.ttl_days > 0:
            raise InputError(f"{where} ttl_days = {each.ttl_days}; give a number above 0, or leave it out")


def check_crosses(crosses: Mapping[str, Cross]) -> None:
    """Raise InputError for a name that a feature cannot have; whether the two sides exist is known when a ranker is trained."""
    for name in crosses:
        _check_name(name, f"[features.crosses.{name}]")


def check_sides(crosses: Mapping[str, Cross], columns: Collection[str]) -> None:
    """Raise InputError when a cross names a column that there is not, with the nearest one, or takes the name of one."""
    for name, each in crosses.items():
        if name in columns:
            raise InputError(f"[features.crosses.{name}] has the name of a feature that there is already; choose another")
        for side in (each.left, each.right):
            if side not in columns:
                near = difflib.get_close_matches(side, columns, 1, 0.0)
                raise InputError(
                    f"[features.crosses.{name}] names {side!r}, which is no number that the ranker sees; nearest: {near}"
                )


def rule_of(name: str, declared: Declared, source: Source) -> tuple[Task, ...]:
    """The events that a declared feature counts, as tasks of which one must match. Raises InputError for an unknown task."""
    if declared.task is not None:
        known = [task.name for task in source.tasks]
        _check_choice(declared.task, known, f"[features.declared.{name}] task")
        return (source.task(declared.task),)
    actions = source.history if declared.action is None else (declared.action,)
    return tuple(Task(action, action) for action in actions)


def check_actions(declared: Mapping[str, Declared], actions: Collection[str]) -> None:
    """Raise InputError when a feature counts an action that no event has, naming those there are."""
    for name, each in declared.items():
        if each.action is not None:
            _check_choice(each.action, sorted(actions), f"[features.declared.{name}] action")


def half_lives(declared: Mapping[str, Declared]) -> dict[str, float]:
    """Feature -> half-life in days, of those whose value fades between events."""
    return {name: each.half_life_days for name, each in declared.items() if each.decays and each.half_life_days is not None}


def stored_time(name: str) -> str:
    """The column beside a decayed feature that says when it had its value: UTC microseconds."""
    return f"{name}_time"


def _check_name(name: str, where: str) -> None:
    if not _NAME.fullmatch(name) or "__" in name:
        raise InputError(f"{where}: a name is a-z, 0-9 and single underscores, 64 letters at most, and begins with a letter")
    if name.endswith(_STORED_TIMES) or name in ENTITIES.values():
        raise InputError(
            f"{where}: names ending in {' or '.join(_STORED_TIMES)} are stored times, and ids are no features; choose another"
        )


def _check_choice(value: str, choices: Collection[str], where: str) -> None:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, 1, 0.0)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{where} = {value!r} is not one of {list(choices)}{hint}")
