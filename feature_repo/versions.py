"""Which definition is which version of a view, and the tables of all versions that are in use.

In: today's tables with what fills them, and the names of versions that releases pin. Out: a folder `<view>/` per version,
`versions.json` with every definition that a view ever had (the first is version 1; what was once numbered keeps its number), and
`schema.json`. A view whose entity, features, types, ttl or computation changed is another version, in a folder, a Feast view and
an online table of its own; the old one stays for as long as it is pinned.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import polars as pl

from feature_repo.views import (
    ENTITIES,
    SCHEMA_FILE,
    ViewSchema,
    all_views,
    kept_views,
    read_views,
    same_definition,
    versioned,
    write_views,
)
from tandem.core.folders import read_json, whole_folder, write_json

VERSIONS_FILE: Final = "versions.json"
FIRST_PART: Final = "part-0.parquet"
"""The file of a view's folder that a build writes."""

Ledger = dict[str, list[dict[str, Any] | None]]
"""Per view its definitions, that of version 1 first; None for one that nobody knows any more."""

Refill = Callable[[ViewSchema], pl.DataFrame | None]
"""An older version's table, computed anew; None where that cannot be done any more."""


@dataclass(frozen=True)
class Filled:
    """A view's table, and what fills it."""

    table: pl.DataFrame
    made_by: Mapping[str, Any] = field(default_factory=dict)
    ttl_days: float | None = None


def write_versions(
    current: Mapping[str, Filled], features_folder: Path, pinned: Collection[str] = (), refill: Refill = lambda view: None
) -> tuple[ViewSchema, ...]:
    """Write the current tables (by view, without version) and those of `pinned` versions; returns the current views.

    A pinned version is computed by `refill`, or stays as it is. Versions that nobody pins are removed last, after `schema.json`.
    """
    features_folder.mkdir(parents=True, exist_ok=True)
    before = all_views(features_folder) if (features_folder / SCHEMA_FILE).is_file() else ()
    ledger = _ledger(features_folder, before)
    views = tuple(_versioned(base, filled, ledger) for base, filled in current.items())
    names = {view.name for view in views}
    older = [view for view in before if view.name in pinned and view.name not in names]
    kept = tuple(sorted(older, key=lambda view: (view.base, view.version)))
    for view, filled in zip(views, current.values(), strict=True):
        _write_table(features_folder, view, filled.table)
    for view in kept:
        if (table := refill(view)) is not None:
            _write_table(features_folder, view, table)
    write_json(features_folder / VERSIONS_FILE, {"views": ledger})
    write_views(features_folder, views, kept)
    _remove(features_folder, [view for view in before if view.name not in names | {each.name for each in kept}])
    return views


def prune_versions(features_folder: Path, pinned: Collection[str]) -> tuple[str, ...]:
    """Drop the older versions that nobody pins any more; returns their names. Apply afterwards, and their Feast views go, too."""
    views, kept = read_views(features_folder), kept_views(features_folder)
    gone = [view for view in kept if view.name not in pinned]
    if gone:
        write_views(features_folder, views, tuple(view for view in kept if view not in gone))
        _remove(features_folder, gone)
    return tuple(view.name for view in gone)


def conforming(table: pl.DataFrame, view: ViewSchema) -> pl.DataFrame | None:
    """The table with exactly the columns of a version; None when it lacks one, or has it in another type."""
    if any(table.schema.get(name) != dtype for name, dtype in view.columns.items()):
        return None
    return table.select(list(view.columns))


def _ledger(features_folder: Path, before: Sequence[ViewSchema]) -> Ledger:
    """What `versions.json` says; without it, what the schema knows, so that no number is given twice."""
    path = features_folder / VERSIONS_FILE
    ledger: Ledger = read_json(path)["views"] if path.is_file() else {}
    for view in before:
        known = ledger.setdefault(view.base, [])
        known += [None] * (view.version - len(known))
        known[view.version - 1] = known[view.version - 1] or view.definition
    return ledger


def _versioned(base: str, filled: Filled, ledger: Ledger) -> ViewSchema:
    """The view with its version; a definition that is new to the ledger gets the next one."""
    entity = next(name for name, key in ENTITIES.items() if key in filled.table.columns)
    made_by = json.loads(json.dumps(dict(filled.made_by)))
    plain = ViewSchema.of_table(base, entity, filled.table, ttl_days=filled.ttl_days, made_by=made_by)
    known = ledger.setdefault(base, [])
    same = (place for place, each in enumerate(known) if each is not None and same_definition(each, plain.definition))
    number = next(same, len(known))
    known[number:] = [_fuller(plain.definition, known[number:]), *known[number + 1 :]]
    name = versioned(base, number + 1)
    return ViewSchema(name, entity, plain.fields, number + 1, filled.ttl_days, f"features/{name}", made_by)


def _fuller(new: dict[str, Any], known: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    older = known[0] if known else None
    return new if new["made_by"] or older is None else older


def _write_table(features_folder: Path, view: ViewSchema, table: pl.DataFrame) -> None:
    with whole_folder(features_folder / Path(view.path).name) as folder:
        table.write_parquet(folder / FIRST_PART, compression="zstd", compression_level=1)


def _remove(features_folder: Path, views: Sequence[ViewSchema]) -> None:
    for view in views:
        shutil.rmtree(features_folder / Path(view.path).name, ignore_errors=True)
