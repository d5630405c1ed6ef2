"""`tandem features build`: events, items, users and the workspace's own tables -> the offline tables of all views in use.

In: a workspace, its settings, and the versions that releases pin. Out: `features/`. Current views are made with today's settings,
pinned older versions with those that they were defined with, by the same functions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from feature_repo.aggregates import AggregateConfig, build_tables, check_feature_names
from feature_repo.erased import ErasedUsers
from feature_repo.features import check_actions
from feature_repo.made import as_made, made_by
from feature_repo.own_tables import read_own_tables
from feature_repo.store import load_events, load_items, load_source, load_users
from feature_repo.versions import Filled, conforming, write_versions
from feature_repo.views import ViewSchema, kept_views
from tandem.core.schema import Source


@dataclass(frozen=True)
class Built:
    """The current views with the rows of their tables by name, and the older versions that stay for releases."""

    views: tuple[ViewSchema, ...]
    rows: Mapping[str, int]
    kept: tuple[ViewSchema, ...]


@dataclass(frozen=True)
class _Inputs:
    """What all tables are made from."""

    events: pl.DataFrame
    items: pl.DataFrame
    users: pl.DataFrame
    source: Source
    own: Mapping[str, pl.DataFrame]

    @classmethod
    def read(cls, workspace: Path, config: AggregateConfig) -> _Inputs:
        data = workspace / "data"
        own = {name: _without_erased(table, data) for name, table in read_own_tables(workspace, config.tables).items()}
        return cls(load_events(data), load_items(data), load_users(data), load_source(data), own)


def _without_erased(table: pl.DataFrame, data: Path) -> pl.DataFrame:
    """The table's own file may still name people who were erased here."""
    return ErasedUsers(data).drop_from(table) if "user_id" in table.columns else table


def build_features(workspace: Path, config: AggregateConfig, pinned: Collection[str] = ()) -> Built:
    """Build every view, and the older versions named in `pinned`. Raises InputError for a declaration that cannot be computed."""
    inputs = _Inputs.read(workspace, config)
    check_actions(config.declared, {*inputs.events["action"].unique(), *inputs.source.actions})
    tables = build_tables(inputs.events, inputs.items, inputs.users, inputs.source, config) | dict(inputs.own)
    check_feature_names(tables)
    filled = {name: _filled(name, table, config, inputs.source) for name, table in tables.items()}
    folder = workspace / "features"
    views = write_versions(filled, folder, pinned, lambda view: _refilled(view, inputs, config))
    return Built(views, {view.name: len(tables[view.base]) for view in views}, kept_views(folder))


def _filled(name: str, table: pl.DataFrame, config: AggregateConfig, source: Source) -> Filled:
    ttl = config.tables[name].ttl_days if name in config.tables else None
    return Filled(table, made_by(name, config, source), ttl)


def _refilled(view: ViewSchema, inputs: _Inputs, config: AggregateConfig) -> pl.DataFrame | None:
    """An older version's table from today's data; None where the code, a column or a file that it needs is gone."""
    table = inputs.own.get(view.base)
    made = as_made(view, config, inputs.source)
    if table is None and view.made_by and made is not None and "table" not in view.made_by:
        config, source = made
        table = build_tables(inputs.events, inputs.items, inputs.users, source, config, only=[view.base]).get(view.base)
    if table is None or ("table" in view.made_by and view.made_by["revision"] != config.tables[view.base].revision):
        return None
    return conforming(table, view)
