"""Which versions of feature views releases pin, and whether the workspace still has them as they were.

In: the workspace's `schema.json`, its releases and the trained ranker. Out: the pins of one release, checked; and the names of
all versions that must stay built, applied and materialised.
"""

from __future__ import annotations

from pathlib import Path

from feature_repo.pins import FEATURES_FILE, Pins, check_pins
from feature_repo.views import all_views
from registry.store import ReleaseStore
from registry.work import Release
from tandem.core.errors import NotFoundError
from tandem.service.recipes.workspace import RANKER, open_artifacts
from tandem.service.settings import Settings


def pinned_by(settings: Settings, folder: Path) -> Pins:
    """What the release in `folder` was built on. Raises IncompatibleError, with both definitions, where the workspace differs."""
    if not (folder / FEATURES_FILE).is_file():
        raise NotFoundError(
            f"{folder.name} has no {FEATURES_FILE}, so its views are not known; train the ranker and create the release again"
        )
    pins = Pins.read(folder / FEATURES_FILE)
    check_pins(pins, all_views(settings.feature_tables) if pins.views else (), folder.name)
    return pins


def pinned_views(settings: Settings) -> frozenset[str]:
    """Names of the versions that the champion, the two before it, a challenger or the trained ranker read."""
    folders = [settings.models / RANKER, *(_live_folders(settings) if settings.knows_releases else ())]
    paths = [folder / FEATURES_FILE for folder in folders]
    return frozenset(view.name for path in paths if path.is_file() for view in Pins.read(path).views)


def _live_folders(settings: Settings) -> tuple[Path, ...]:
    store = ReleaseStore(settings.registry_url, settings.releases)
    try:
        with store.look() as work:
            running = work.experiments.open()
            waiting = (work.challenger(), running.experiment.challenger if running else None)
            names = dict.fromkeys((*work.pinned(), *(name for name in waiting if name)))
            releases = [work.get(name) for name in names]
    finally:
        store.close()
    return tuple(folder for release in releases if (folder := _folder_here(settings, release)) is not None)


def _folder_here(settings: Settings, release: Release) -> Path | None:
    """The release's folder, fetched if need be; None where nobody has it any more: there is no going back to it then."""
    try:
        return open_artifacts(settings).here(release).folder
    except NotFoundError:
        return None
