"""What a feature view is made of: the `features/schema.json` that ties offline tables, Feast and readers together.

In: the schemas that `versions.py` derives from the tables. Out: `features/schema.json`, read back by `definitions.py`
(which turns each entry into a Feast view), `offline.py`, `materialize.py` and `online.py`. No Feast here.

A view whose definition changes gets another version, which is a view of its own: `user_stats`, then `user_stats__v2`. Versions
that are not built from today's settings, but that a release still reads, are kept beside the current ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import polars as pl

from tandem.core.errors import InputError, NotFoundError
from tandem.core.folders import read_json, write_json
from tandem.core.schema import TIME

SCHEMA_FILE: Final = "schema.json"
TIMESTAMP: Final = "event_timestamp"
"""Column of every offline table: when the row became known."""

ENTITIES: Final[dict[str, str]] = {"user": "user_id", "item": "item_id"}
"""Feast entity -> its join key, which is the table's column."""

RANKING_SERVICE: Final = "ranking_v1"
"""The Feast feature service with all that the ranker learns from: what a release names as its features."""

MAX_AHEAD: Final = timedelta(minutes=5)
"""How far a clock may run ahead; rows stamped later than now plus this are quarantined."""

DTYPES: Final[dict[str, pl.DataType]] = {
    "Int64": pl.Int64(),
    "Float64": pl.Float64(),
    "String": pl.String(),
    "List(String)": pl.List(pl.String()),
    "List(Int64)": pl.List(pl.Int64()),
    "List(Float64)": pl.List(pl.Float64()),
}
"""The only types a feature may have, by their name in `schema.json`."""


@dataclass(frozen=True)
class FieldSchema:
    """One feature: its column name and one of the names in `DTYPES`."""

    name: str
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"feature {self.name!r} has dtype {self.dtype!r}; use one of {sorted(DTYPES)}")

    @property
    def polars(self) -> pl.DataType:
        """The Polars type of the column."""
        return DTYPES[self.dtype]

    @property
    def is_numeric(self) -> bool:
        """Is it one number per row (and so a column of the snapshot)?"""
        return self.dtype in ("Int64", "Float64")


@dataclass(frozen=True)
class ViewSchema:
    """One version of a feature view; `path`, a Parquet file or a folder of them, starts from the workspace.

    `ttl_days` None never expires. `made_by` is what fills it (see `made.py`), plain values; {} where nobody wrote it down.
    """

    name: str
    entity: str
    fields: tuple[FieldSchema, ...] = field(default=())
    version: int = 1
    ttl_days: float | None = None
    path: str = ""
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.entity not in ENTITIES:
            raise InputError(f"view {self.name!r} has entity {self.entity!r}; use one of {sorted(ENTITIES)}")
        if not self.fields:
            raise InputError(f"view {self.name!r} has no features; leave the view out")
        if not self.path:
            object.__setattr__(self, "path", f"features/{self.name}.parquet")

    @property
    def key(self) -> str:
        """The entity's join key: "user_id" or "item_id"."""
        return ENTITIES[self.entity]

    @property
    def base(self) -> str:
        """The name that all versions of the view have in common."""
        return self.name.removesuffix(f"__v{self.version}")

    @property
    def definition(self) -> dict[str, Any]:
        """All that makes a version what it is, in plain values; another definition is another version."""
        features = {each.name: each.dtype for each in self.fields}
        return {"entity": self.entity, "ttl_days": self.ttl_days, "features": features, "made_by": dict(self.made_by)}

    def __str__(self) -> str:
        return f"{self.base} version {self.version}: {json.dumps(self.definition)}"

    def snapshot_column(self, feature: str) -> str:
        """What the snapshot calls one of its features: two versions of a view may have one of the same name."""
        return feature if self.version == 1 else f"{self.name}:{feature}"

    @property
    def feature_names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.fields)

    @property
    def columns(self) -> dict[str, pl.DataType]:
        """Columns of the offline table in order: key, event_timestamp, features."""
        head: dict[str, pl.DataType] = {self.key: pl.String(), TIMESTAMP: TIME}
        return head | {each.name: each.polars for each in self.fields}

    @classmethod
    def of_table(
        cls,
        name: str,
        entity: str,
        table: pl.DataFrame,
        *,
        version: int = 1,
        ttl_days: float | None = None,
        path: str = "",
        made_by: Mapping[str, Any] | None = None,
    ) -> ViewSchema:
        """Describe a table [key, event_timestamp, features...]; raises InputError for a column type that no feature may have."""
        names = {dtype: text for text, dtype in DTYPES.items()}
        features = {column: dtype for column, dtype in table.schema.items() if column not in (ENTITIES.get(entity), TIMESTAMP)}
        fields = tuple(FieldSchema(column, names.get(dtype, str(dtype))) for column, dtype in features.items())
        return cls(name, entity, fields, version, ttl_days, path, made_by or {})


def versioned(base: str, version: int) -> str:
    """The name of one version of a view, which never changes: other versions come and go beside it."""
    return base if version == 1 else f"{base}__v{version}"


def same_definition(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Are two definitions one? What fills a view may not have been written down; then its shape decides."""
    if one["made_by"] and other["made_by"]:
        return dict(one) == dict(other)
    return {**one, "made_by": {}} == {**other, "made_by": {}}


def write_views(features_folder: Path, views: tuple[ViewSchema, ...], kept: tuple[ViewSchema, ...] = ()) -> None:
    """Write `schema.json` atomically, views in the order given; `kept` are versions that only releases still read."""
    names = [view.name for view in (*views, *kept)]
    if len(set(names)) < len(names):
        raise InputError(f"two feature views have one name in {names}; rename one")
    written = {"views": [asdict(view) for view in views]}
    write_json(features_folder / SCHEMA_FILE, written | ({"kept": [asdict(view) for view in kept]} if kept else {}))


def read_views(features_folder: Path) -> tuple[ViewSchema, ...]:
    """The current views of `schema.json`; raises NotFoundError when nothing was aggregated yet."""
    return _read(features_folder, "views")


def kept_views(features_folder: Path) -> tuple[ViewSchema, ...]:
    """The versions that are kept for releases alone; raises NotFoundError when nothing was aggregated yet."""
    return _read(features_folder, "kept")


def all_views(features_folder: Path) -> tuple[ViewSchema, ...]:
    """The current views, then those that are kept."""
    return read_views(features_folder) + kept_views(features_folder)


def _read(features_folder: Path, part: str) -> tuple[ViewSchema, ...]:
    path = features_folder / SCHEMA_FILE
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist; run `tandem features build` first")
    return tuple(view_of(raw) for raw in read_json(path).get(part, ()))


def view_named(views: tuple[ViewSchema, ...], name: str) -> ViewSchema:
    """The view called `name`, or NotFoundError naming those there are."""
    for view in views:
        if view.name == name:
            return view
    raise NotFoundError(f"no feature view {name!r}; there are {[view.name for view in views]}")


def view_of(raw: Mapping[str, Any]) -> ViewSchema:
    """A view from the plain values that `dataclasses.asdict` makes of it."""
    fields = tuple(FieldSchema(**each) for each in raw["fields"])
    return ViewSchema(**{**raw, "fields": fields})
