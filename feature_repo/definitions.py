"""All Feast objects: entities, one feature view per entry of the workspace's `features/schema.json`, and feature services.

Feast imports this file under its bare name when `feast apply` runs in this folder; the environment variable TANDEM_HOME names
the workspace then. Everything else imports it as `feature_repo.definitions` and calls `define`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, ValueType
from feast.types import Array, FeastType, Float64, Int64, String

from feature_repo.views import ENTITIES, TIMESTAMP, ViewSchema, kept_views, read_views
from tandem.core.errors import InputError

FEAST_TYPES: dict[str, FeastType] = {
    "Int64": Int64,
    "Float64": Float64,
    "String": String,
    "List(String)": Array(String),
    "List(Int64)": Array(Int64),
    "List(Float64)": Array(Float64),
}


def define(views: Sequence[ViewSchema], kept: Sequence[ViewSchema] = ()) -> dict[str, Any]:
    """Every Feast object of a workspace with these views, by a name of its own.

    `kept` are older versions, which releases read by name: views like the others, but in no service.
    """
    entities = {name: Entity(name=name, join_keys=[key], value_type=ValueType.STRING) for name, key in ENTITIES.items()}
    features = {view.name: _feature_view(view, entities[view.entity]) for view in (*views, *kept)}
    services = {
        f"{name}_v1": FeatureService(name=f"{name}_v1", features=chosen) for name, chosen in _chosen(views, features).items()
    }
    return entities | {f"view_{name}": view for name, view in features.items()} | services


def _feature_view(view: ViewSchema, entity: Entity) -> FeatureView:
    """A view on its Parquet table; the path stays relative, so that a workspace can be moved."""
    table = FileSource(name=view.name, path=view.path, timestamp_field=TIMESTAMP)
    return FeatureView(
        name=view.name,
        entities=[entity],
        ttl=timedelta(days=view.ttl_days) if view.ttl_days else timedelta(0),
        schema=[
            Field(name=view.key, dtype=String),
            *(Field(name=each.name, dtype=FEAST_TYPES[each.dtype]) for each in view.fields),
        ],
        source=PushSource(name=f"{view.name}_push", batch_source=table),
        tags={"view": view.base, "version": str(view.version)},
    )


def _chosen(views: Sequence[ViewSchema], features: dict[str, FeatureView]) -> dict[str, list[FeatureView]]:
    """Feature services by name; one without a view is left out, since Feast refuses it."""
    chosen = {name: [features[view.name] for view in views if view.entity == name] for name in ENTITIES}
    chosen["ranking"] = [features[view.name] for view in views]
    return {name: each for name, each in chosen.items() if each}


def _workspace() -> Path:
    home = os.environ.get("TANDEM_HOME")
    if not home:
        raise InputError("TANDEM_HOME is not set; set it to the workspace folder, the one with tandem.toml")
    return Path(home)


if not __package__:  # Feast's own commands: they collect the module's attributes
    _home = _workspace()
    globals().update(define(read_views(_home / "features"), kept_views(_home / "features")))
    (_home / "state").mkdir(exist_ok=True)  # Feast opens its databases there and makes no folders
