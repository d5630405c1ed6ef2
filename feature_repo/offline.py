"""The workspace's Feast store: open it, apply the definitions, and build training frames that see no event at or after their own.

In: a workspace with `features/schema.json` and the offline tables; entity frames [user_id?, item_id?, event_timestamp].
Out: Feast's registry and online store (by default `state/registry.db` and `state/online.db`), a `feature_store.yaml` and a
`definitions.py` of the workspace's own (so that Feast's commands work there), and point-in-time frames. Feast is imported when a
function needs it: that costs seconds.
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
from urllib.parse import parse_qsl, urlsplit

import polars as pl

from feature_repo.online_config import OnlineConfig, registry_path, sqlite_section
from feature_repo.owner import claim
from feature_repo.views import TIMESTAMP, ViewSchema, all_views, kept_views, read_views, view_named
from tandem.core.errors import IncompatibleError, InputError, UnavailableError
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
    online, registry = _expanded(_online_section(home)), _expanded(_registry_section(home))
    if read_timeout_ms is not None and online["type"] != sqlite_section(home)["type"]:
        online |= {"read_timeout_ms": read_timeout_ms}
    store = FeatureStore(config=RepoConfig(**_settings(home, online, registry), repo_path=home))
    with reaching_registry(workspace):
        _ = store.registry  # Feast connects at the first look
    return store


def open_own(workspace: Path) -> FeatureStore:
    """`open_store` for whoever writes. Raises IncompatibleError when a server that it would write to is another workspace's."""
    store = open_store(workspace)
    with reaching_registry(workspace):
        claim(store, workspace)
    return store


@contextlib.contextmanager
def reaching_registry(workspace: Path) -> Iterator[None]:
    """Raise UnavailableError when Feast's registry does not answer within the block."""
    from sqlalchemy.exc import OperationalError

    try:
        yield
    except OperationalError as error:
        where = urlsplit(_registry_section(workspace.resolve())["path"]).hostname or "state/registry.db"
        raise UnavailableError(f"Feast's registry ({where}) does not answer; try again later") from error


def is_applied(workspace: Path) -> bool:
    """Were definitions ever applied, here or by Feast's own command?"""
    return (workspace / _YAML).is_file() or (workspace / "state" / "registry.db").is_file()


def apply(workspace: Path, online: OnlineConfig | None = None) -> tuple[str, ...]:
    """Make the registry and the online tables equal to `features/schema.json`; returns the names of the views.

    `online` says where online features lie from now on; None leaves it as it is. What `schema.json` no longer names is deleted,
    as `feast apply` does; the versions that it keeps for releases stay. Raises NotFoundError before the first build and BusyError
    while another run applies or materialises.
    """
    from feast.repo_operations import apply_total_with_repo_instance

    views, kept = read_views(workspace / "features"), kept_views(workspace / "features")
    with held(workspace / LOCK, "features apply"), quiet(), reaching_registry(workspace):
        write_feast_files(workspace, online)
        _make_registry_schema(workspace)
        store = open_own(workspace)
        apply_total_with_repo_instance(store, PROJECT, store.registry, _contents(views, kept), skip_source_validation=False)
    return tuple(view.name for view in (*views, *kept))


def historical(store: FeatureStore, entities: pl.DataFrame, views: Sequence[str]) -> pl.DataFrame:
    """Add every feature of `views` to each entity row, as known 1 µs before its `event_timestamp`; same rows, same order.

    `entities` is [user_id?, item_id?, event_timestamp, ...]; its other columns pass through, and features nobody knew are
    null. Raises InputError when a key is missing, NotFoundError for an unknown view and IncompatibleError for one that was
    built anew but not applied.
    """
    schemas = all_views(Path(store.config.repo_path) / "features")
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
    registry = _registry_section(home) if online is None else _registry(home, registry_path(online.registry))
    write_text(home / _YAML, _YAML_HEAD + yaml.safe_dump(_settings(home, section, registry), sort_keys=False))
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


def _applied_with(home: Path, section: str) -> dict[str, Any]:
    """A section of the workspace's own `feature_store.yaml`; empty before the first apply."""
    import yaml

    path = home / _YAML
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")).get(section, {}) if path.is_file() else {}
    return found


def _registry_section(home: Path) -> dict[str, Any]:
    """`registry` as the workspace was applied with it; a SQLite file moves with the workspace."""
    path = str(_applied_with(home, "registry").get("path", ""))
    return _registry(home, "" if path.startswith("sqlite") else path)


def _registry(home: Path, path: str) -> dict[str, Any]:
    return {
        "registry_type": "sql",
        "path": path or f"sqlite:///{home / 'state' / 'registry.db'}",
        "cache_ttl_seconds": 60,
        "serve_features_while_materializing": True,
    } | ({"sqlalchemy_config_kwargs": {"echo": False, "pool_pre_ping": True}} if path else {})


def _make_registry_schema(workspace: Path) -> None:
    """Feast makes its tables, but not the schema that they lie in."""
    path = _expanded(_registry_section(workspace.resolve()))["path"]
    if path.startswith("sqlite"):
        return
    from sqlalchemy import create_engine, text

    schema = dict(parse_qsl(urlsplit(path).query))["options"].removeprefix("-csearch_path=")
    engine = create_engine(path)
    try:
        with engine.begin() as conn:
            conn.execute(text(f'CREATE SCHEMA IF NOT EXISTS "{schema}"'))
    finally:
        engine.dispose()


def _online_section(home: Path) -> dict[str, Any]:
    """`online_store` as the workspace was applied with it; a SQLite file moves with the workspace."""
    chosen = _applied_with(home, "online_store")
    default = sqlite_section(home)
    return default if chosen.get("type", default["type"]) == default["type"] else chosen


def _expanded(section: dict[str, Any]) -> dict[str, Any]:
    """With `${NAME}` replaced from the environment, as Feast's own commands do it."""
    found = {name: os.path.expandvars(value) if isinstance(value, str) else value for name, value in section.items()}
    unset = [name for name, value in found.items() if isinstance(value, str) and "${" in value]
    if unset:
        raise InputError(f"online: {unset} name an environment variable that is not set; set it, or write the value")
    return found


def _settings(home: Path, online: dict[str, Any], registry: dict[str, Any]) -> dict[str, Any]:
    """What `feature_store.yaml` says, for the workspace at the absolute path `home`."""
    return {
        "project": PROJECT,
        "provider": "local",
        "registry": registry,
        "online_store": online,
        "offline_store": {"type": "feature_repo.polars_store.PolarsOfflineStore", "root": str(home)},
        "batch_engine": {"type": "feature_repo.engine.PolarsComputeEngine"},
        "entity_key_serialization_version": 3,
    }


def _contents(views: Sequence[ViewSchema], kept: Sequence[ViewSchema]) -> Any:
    """The definitions in the form in which `feast apply` collects them from a repository."""
    from feast import Entity, FeatureService, FeatureView, Project
    from feast.feature_view import DUMMY_ENTITY
    from feast.repo_contents import RepoContents

    from feature_repo.definitions import define

    objects = list(define(views, kept).values())
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
from feature_repo.views import kept_views, read_views

_features = Path(__file__).parent / "features"
globals().update(define(read_views(_features), kept_views(_features)))
'''
