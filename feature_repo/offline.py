"""The workspace's Feast store: open it, apply the definitions, and build training frames that see no event at or after their own.

In: a workspace with `features/schema.json` and the offline tables; entity frames [user_id?, item_id?, event_timestamp].
Out: `state/registry.db`, `state/online.db`, a `feature_store.yaml` and `definitions.py` of the workspace's own (so that Feast's
commands work there), and point-in-time frames. Feast is imported when a function needs it: that costs seconds.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from feature_repo.online_config import OnlineConfig, sqlite_section
from feature_repo.views import TIMESTAMP, ViewSchema, read_views, view_named
from tandem.core.errors import IncompatibleError, InputError
from tandem.core.folders import held, write_text

if TYPE_CHECKING:
    from feast import FeatureStore

PROJECT: Final = "tandem"
_YAML: Final = "feature_store.yaml"
LOCK: Final = "state/materialize.lock"
"""Held while definitions are applied and while anything is written online."""

JUST_BEFORE: Final = timedelta(microseconds=1)
"""Training asks this long before the event, so that no row sees its own event."""

_log = logging.getLogger(__name__)


def open_store(workspace: Path, read_timeout_ms: int | None = None) -> FeatureStore:
    """The workspace's Feast store: SQL registry, the online store it was applied with, our offline store and engine.

    `read_timeout_ms` is for serving: how long one call to an online server may take. Creates `state/` if need be.
    """
    from feast import FeatureStore, RepoConfig

    home = workspace.resolve()
    (home / "state").mkdir(parents=True, exist_ok=True)
    online = _expanded(_online_section(home))
    if read_timeout_ms is not None and online["type"] != sqlite_section(home)["type"]:
        online |= {"read_timeout_ms": read_timeout_ms}
    return FeatureStore(config=RepoConfig(**_settings(home, online), repo_path=home))


def apply(workspace: Path, online: OnlineConfig | None = None) -> tuple[str, ...]:
    """Make the registry and the online tables equal to `features/schema.json`; returns the names of the views.

    `online` says where online features lie from now on; None leaves it as it is. What `schema.json` no longer names is deleted,
    as `feast apply` does. Raises NotFoundError before the first build and BusyError while another run applies or materialises.
    """
    from feast.repo_operations import apply_total_with_repo_instance

    views = read_views(workspace / "features")
    with held(workspace / LOCK, "features apply"), quiet():
        write_feast_files(workspace, online)
        store = open_store(workspace)
        apply_total_with_repo_instance(store, PROJECT, store.registry, _contents(views), skip_source_validation=False)
    return tuple(view.name for view in views)


def historical(store: FeatureStore, entities: pl.DataFrame, views: Sequence[str]) -> pl.DataFrame:
    """Add every feature of `views` to each entity row, as known 1 µs before its `event_timestamp`; same rows, same order.

    `entities` is [user_id?, item_id?, event_timestamp, ...]; its other columns pass through, and features nobody knew are
    null. Raises InputError when a key is missing, NotFoundError for an unknown view and IncompatibleError for one that was
    built anew but not applied.
    """
    schemas = read_views(Path(store.config.repo_path) / "features")
    chosen = [view_named(schemas, name) for name in views]
    missing = {TIMESTAMP, *(view.key for view in chosen)} - set(entities.columns)
    if missing:
        raise InputError(f"the entity frame lacks {sorted(missing)}; it has {entities.columns}")
    if not chosen:
        return entities
    check_applied(store, chosen)
    refs = [f"{view.name}:{feature}" for view in chosen for feature in view.feature_names]
    asked = entities.with_columns(pl.col(TIMESTAMP) - JUST_BEFORE)
    answer = store.get_historical_features(entity_df=asked, features=refs).to_polars()
    frame: pl.DataFrame = answer.with_columns(entities[TIMESTAMP])
    return frame


def check_applied(store: FeatureStore, views: Sequence[ViewSchema]) -> None:
    """Raise IncompatibleError unless the registry holds these views with these features."""
    applied = {view.name: {feature.name for feature in view.features} for view in store.list_feature_views()}
    stale = [view.name for view in views if applied.get(view.name) != set(view.feature_names)]
    if stale:
        raise IncompatibleError(f"feature views {stale} differ from what was applied; run `tandem features apply`")


def write_feast_files(workspace: Path, online: OnlineConfig | None = None) -> None:
    """Give the workspace its own `feature_store.yaml` and `definitions.py`, with this folder's absolute paths."""
    import yaml

    home = workspace.resolve()
    section = _online_section(home) if online is None else online.section(home)
    write_text(home / _YAML, _YAML_HEAD + yaml.safe_dump(_settings(home, section), sort_keys=False))
    write_text(home / "definitions.py", _DEFINITIONS)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Feast's progress text off standard output, where `--json` speaks alone; it goes to the debug log."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            yield
    finally:
        _log.debug("feast: %s", text.getvalue())


def _online_section(home: Path) -> dict[str, Any]:
    """`online_store` as the workspace was applied with it; a SQLite file moves with the workspace."""
    import yaml

    path = home / _YAML
    chosen = yaml.safe_load(path.read_text(encoding="utf-8")).get("online_store", {}) if path.is_file() else {}
    default = sqlite_section(home)
    return default if chosen.get("type", default["type"]) == default["type"] else chosen


def _expanded(section: dict[str, Any]) -> dict[str, Any]:
    """With `${NAME}` replaced from the environment, as Feast's own commands do it."""
    found = {name: os.path.expandvars(value) if isinstance(value, str) else value for name, value in section.items()}
    unset = [name for name, value in found.items() if isinstance(value, str) and "${" in value]
    if unset:
        raise InputError(f"online store: {unset} name an environment variable that is not set; set it, or write the value")
    return found


def _settings(home: Path, online: dict[str, Any]) -> dict[str, Any]:
    """What `feature_store.yaml` says, for the workspace at the absolute path `home`."""
    return {
        "project": PROJECT,
        "provider": "local",
        "registry": {
            "registry_type": "sql",
            "path": f"sqlite:///{home / 'state' / 'registry.db'}",
            "cache_ttl_seconds": 60,
            "serve_features_while_materializing": True,
        },
        "online_store": online,
        "offline_store": {"type": "feature_repo.polars_store.PolarsOfflineStore", "root": str(home)},
        "batch_engine": {"type": "feature_repo.engine.PolarsComputeEngine"},
        "entity_key_serialization_version": 3,
    }


def _contents(views: Sequence[ViewSchema]) -> Any:
    """The definitions in the form in which `feast apply` collects them from a repository."""
    from feast import Entity, FeatureService, FeatureView, Project
    from feast.feature_view import DUMMY_ENTITY
    from feast.repo_contents import RepoContents

    from feature_repo.definitions import define

    objects = list(define(views).values())
    feature_views = [each for each in objects if isinstance(each, FeatureView)]
    return RepoContents(
        projects=[Project(name=PROJECT)],
        data_sources=[source for view in feature_views for source in (view.batch_source, view.stream_source)],
        feature_views=feature_views,
        on_demand_feature_views=[],
        stream_feature_views=[],
        label_views=[],
        entities=[*(each for each in objects if isinstance(each, Entity)), DUMMY_ENTITY],
        feature_services=[each for each in objects if isinstance(each, FeatureService)],
        permissions=[],
    )


_YAML_HEAD: Final = "# Written by `tandem features apply`, which writes it anew after the workspace was moved.\n"

_DEFINITIONS: Final = '''"""For Feast's own commands in this workspace; written by `tandem features apply`."""

from pathlib import Path

from feature_repo.definitions import define
from feature_repo.views import read_views

globals().update(define(read_views(Path(__file__).parent / "features")))
'''
