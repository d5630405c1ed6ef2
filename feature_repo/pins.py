"""What a release was built on: the versions of feature views that it reads, its crosses, and the contexts it knows.

In: the workspace at the moment a ranker is trained. Out: `features.json`, which travels with the ranker into the release; whoever
loads the release reads these versions, whatever the workspace builds today.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import polars as pl

from feature_repo.features import Cross, Declared, half_lives
from feature_repo.views import FieldSchema, ViewSchema, same_definition, view_of
from tandem.core.errors import IncompatibleError
from tandem.core.folders import read_json, write_json

FEATURES_FILE: Final = "features.json"

_MOST_VALUES: Final = 20
"""A context column's most frequent values; the others are told apart from none, but not from each other."""


@dataclass(frozen=True)
class Pins:
    """`views` in the order in which the ranker has their features; `context`: column of events -> the values that it may have."""

    views: tuple[ViewSchema, ...]
    crosses: Mapping[str, Cross] = field(default_factory=dict)
    context: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def of_entity(self, entity: str) -> tuple[ViewSchema, ...]:
        """The views of users, or of items."""
        return tuple(view for view in self.views if view.entity == entity)

    def numbers(self, entity: str) -> tuple[str, ...]:
        """The numeric features of one entity."""
        return tuple(each.name for view in self.of_entity(entity) for each in view.fields if each.is_numeric)

    @property
    def item_columns(self) -> dict[str, str]:
        """Item feature -> the snapshot's column."""
        fields = [(view, each.name) for view in self.of_entity("item") for each in view.fields if each.is_numeric]
        return {name: view.snapshot_column(name) for view, name in fields}

    @property
    def half_lives(self) -> dict[str, float]:
        """Feature that fades between events -> its half-life in days."""
        declared = {name: Declared(**each) for view in self.views for name, each in view.made_by.get("declared", {}).items()}
        return half_lives(declared)

    @property
    def history_length(self) -> int | None:
        """How many events the history holds; None where nobody wrote it down."""
        return next((view.made_by["history_length"] for view in self.views if "history_length" in view.made_by), None)

    def limited_to(self, names: Collection[str]) -> Pins:
        """With those features alone that a ranker names, as far as views do not say what they hold."""
        return replace(self, views=tuple(view if view.made_by else _limited(view, names) for view in self.views))

    def write(self, path: Path) -> None:
        """As `features.json`."""
        crosses = {name: asdict(each) for name, each in self.crosses.items()}
        views = [asdict(view) for view in self.views]
        write_json(
            path, {"views": views, "crosses": crosses, "context": {name: list(each) for name, each in self.context.items()}}
        )

    @classmethod
    def read(cls, path: Path) -> Pins:
        """From `features.json`, also one of a release that named views, versions and features only."""
        raw = read_json(path)
        if not isinstance(raw.get("views"), list):
            return cls(tuple(_of_older(name, facts) for name, facts in raw.items()))
        crosses = {name: Cross(**each) for name, each in raw["crosses"].items()}
        return cls(tuple(map(view_of, raw["views"])), crosses, {name: tuple(each) for name, each in raw["context"].items()})


def check_pins(pins: Pins, here: Sequence[ViewSchema], release: str) -> None:
    """Raise IncompatibleError, with both definitions, unless every pinned version is among `here` as the release knows it."""
    found = {view.name: view for view in here}
    for pin in pins.views:
        view = found.get(pin.name)
        if view is None:
            others = [str(each) for each in here if each.base == pin.base]
            raise IncompatibleError(
                f"{release} was built on view {pin}, but the workspace has {' and '.join(others) or 'no such view'}; {_WAY_OUT}"
            )
        if not _is_same(pin, view):
            raise IncompatibleError(f"{release} was built on view {pin}, but in the workspace it is {view}; {_WAY_OUT}")


def known_contexts(events: pl.DataFrame, columns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The most frequent values of those context columns that events have, most frequent first, ties by name."""
    found = {}
    for name in columns:
        if name in events.columns:
            counts = (
                events[name]
                .cast(pl.String)
                .drop_nulls()
                .value_counts(name="count")
                .sort(["count", name], descending=[True, False])
            )
            if counts.height:
                found[name] = tuple(counts[name].head(_MOST_VALUES).to_list())
    return found


_WAY_OUT: Final = "set [features] as it was and run `tandem features build`, `apply` and `materialize`, or create a new release"


def _is_same(pin: ViewSchema, view: ViewSchema) -> bool:
    if pin.made_by:
        return same_definition(pin.definition, view.definition)
    return (pin.version, pin.feature_names) == (view.version, view.feature_names)


def _of_older(name: str, facts: Mapping[str, Any]) -> ViewSchema:
    """Without types: a feature that the ranker names is a number."""
    entity = "user" if name.startswith("user") else "item"
    return ViewSchema(name, entity, tuple(FieldSchema(each, "Float64") for each in facts["features"]), facts["version"])


def _limited(view: ViewSchema, names: Collection[str]) -> ViewSchema:
    kept = tuple(each if each.name in names else replace(each, dtype="String") for each in view.fields)
    return replace(view, fields=kept)
