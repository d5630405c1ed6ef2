"""`tandem features show NAME`: one feature at each of its places: definition, training rows, online store, snapshot, releases."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from tandem.core.errors import NotFoundError
from tandem.service.outcome import Cell, Outcome, Table
from tandem.service.settings import Settings

if TYPE_CHECKING:
    import polars as pl

    from feature_repo.views import ViewSchema

_SHOWN: Final = 5


def feature_show(settings: Settings, name: str, entity: str | None = None) -> Outcome:
    """Where a feature stands, for one user or item, or for those of the newest events.

    Raises NotFoundError for a feature that no current view has, with the nearest name.
    """
    from feature_repo.offline import open_store

    view = _view_of(settings, name)
    asked = _newest_events(settings, view, name, entity)
    store = open_store(settings.workspace)
    ids = asked[view.key].to_list()
    data: dict[str, Any] = {
        "feature": name,
        "view": view.name,
        "definition": view.definition,
        "training": _training(store, view, name, asked),
        "online": _online(store, view, name, ids),
        "snapshot": _in_snapshot(settings, view, name, ids),
        "releases": _releases(settings, view, name),
    }
    rows: list[tuple[Cell, ...]] = [("view", view.name, "", _defined(view, name))]
    for place in ("training", "online", "snapshot"):
        rows += [(place, each["id"], each["at"] or "", _spoken(each["value"])) for each in data[place]]
    rows += [("release", each, "", f"reads {view.name}") for each in data["releases"]]
    table = Table(f"Feature {name}", ("place", "whose", "as of", "value"), tuple(rows))
    following = "tandem train ranker" if not data["releases"] else f"tandem why USER ITEM --feature {name}"
    return Outcome(f"{name} is a feature of {view.name}, read by {len(data['releases'])} releases", data, table, following)


def _defined(view: ViewSchema, name: str) -> str:
    """What the feature is, in the words of `tandem.toml`, or which table or built-in view it comes from."""
    declared = view.made_by.get("declared", {}).get(name)
    what = (
        view.base if declared is None else ", ".join(f"{key} = {value}" for key, value in declared.items() if value is not None)
    )
    dtype = next(each.dtype for each in view.fields if each.name == name)
    return f"version {view.version}, {dtype}: {what}"


def _view_of(settings: Settings, name: str) -> ViewSchema:
    from feature_repo.views import read_views

    views = read_views(settings.feature_tables)
    for view in views:
        if name in view.feature_names:
            return view
    if name in settings.features.crosses or name.partition("=")[0] in settings.features.context:
        raise NotFoundError(f"{name!r} is made at the request; `tandem why USER ITEM --feature {name}` shows it")
    near = difflib.get_close_matches(name, [each for view in views for each in view.feature_names], 1, 0.0)
    raise NotFoundError(f"no view has a feature {name!r}; the nearest is {near}. A new one needs `tandem features build` first")


def _newest_events(settings: Settings, view: ViewSchema, name: str, entity: str | None) -> pl.DataFrame:
    """[key, event_timestamp] of the newest event of the user or item, or of each of a few that have the feature, newest first."""
    import polars as pl

    from feature_repo.store import load_events

    events = load_events(settings.data).select(view.key, pl.col("timestamp").alias("event_timestamp"))
    path = settings.workspace / view.path
    table = pl.scan_parquet(path / "*.parquet" if path.is_dir() else path).filter(pl.col(name).is_not_null())
    known = table.select(pl.col(view.key).unique()).collect().to_series() if entity is None else pl.Series([entity])
    events = events.filter(pl.col(view.key).is_in(known.implode()))
    newest = events.group_by(view.key).agg(pl.col("event_timestamp").max())
    return newest.sort(["event_timestamp", view.key], descending=[True, False]).head(_SHOWN)


def _training(store: Any, view: ViewSchema, name: str, asked: pl.DataFrame) -> list[dict[str, Any]]:
    """What a training row at the event gets: the value just before it."""
    from feature_repo.offline import historical

    found = historical(store, asked, [view.name])
    rows = found.select(view.key, "event_timestamp", name).iter_rows()
    return [{"id": key, "at": moment.isoformat(), "value": value} for key, moment, value in rows]


def _online(store: Any, view: ViewSchema, name: str, ids: Sequence[str]) -> list[dict[str, Any]]:
    from feature_repo.online import read_feature

    answers = read_feature(store, view, name, ids)
    return [
        {"id": key, "at": None if when is None else when.isoformat(), "value": value}
        for key, (when, value) in zip(ids, answers, strict=True)
    ]


def _in_snapshot(settings: Settings, view: ViewSchema, name: str, ids: Sequence[str]) -> list[dict[str, Any]]:
    """What ranking reads of items; users and texts are not in it."""
    import numpy as np

    from feature_repo.live_snapshot import LiveSnapshot

    numeric = next(each for each in view.fields if each.name == name).is_numeric
    if view.entity != "item" or not numeric or not ids:
        return []
    live = LiveSnapshot(settings.workspace / "snapshot", ids, features={name: view.snapshot_column(name)})
    values = live.gather(np.arange(len(ids)))[:, 0].tolist()
    as_of = live.as_of.isoformat()
    return [{"id": key, "at": as_of, "value": None if value != value else value} for key, value in zip(ids, values, strict=True)]


def _releases(settings: Settings, view: ViewSchema, name: str) -> list[str]:
    """Releases that were built on this version."""
    from feature_repo.pins import FEATURES_FILE, Pins
    from tandem.service.recipes.workspace import open_releases

    if not settings.knows_releases:
        return []
    with open_releases(settings) as store:
        folders = {each.name: each.folder / FEATURES_FILE for each in store.list()}
    pins = {release: Pins.read(path).views for release, path in folders.items() if path.is_file()}
    return [
        release for release, views in pins.items() if any(view.name == each.name and name in each.feature_names for each in views)
    ]


def _spoken(value: Cell | list[Any]) -> Cell:
    return "missing" if value is None else str(value) if isinstance(value, list) else value
