"""Which releases stay and which go: rows are marked first, folders removed after, so that a crash leaves nothing half-known.

In: the store and the folder that releases lie in. Out: what stays and why, what went. A folder goes aside under a hidden name
before it is removed, so nobody ever opens half of one; what a crash left behind, the next call removes.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from registry.artifacts import Artifacts
from registry.store import ReleaseStore
from registry.work import Release
from tandem.core.errors import InputError
from tandem.core.folders import held, sweep_partials

DELETE_STEPS: Final = ("marked", "committed", "aside", "removed")
"""Moments in deleting one release that `after` is told of, the first two by the store. From `committed` on it is gone."""

_ASIDE: Final = ".partial-deleted-"


@dataclass(frozen=True)
class Pruned:
    """`kept`: name -> why. `deleted`: names. `freed`: bytes. `left`: folders outside of the releases folder, not touched."""

    kept: Mapping[str, str]
    deleted: tuple[str, ...]
    freed: int
    left: tuple[Path, ...]


def reasons_to_keep(
    newest_first: Sequence[str], pinned: Sequence[str], challenger: str | None, keep: int, in_experiment: str | None = None
) -> dict[str, str]:
    """Name -> why it stays: the champion, those before it, the one in an experiment, the challenger, the newest `keep` others."""
    reasons = {name: "live" if number == 0 else "live before" for number, name in enumerate(pinned)}
    if in_experiment is not None:
        reasons.setdefault(in_experiment, "in an experiment")
    if challenger is not None:
        reasons.setdefault(challenger, "challenger")
    others = [name for name in newest_first if name not in reasons]
    return reasons | dict.fromkeys(others[:keep], "new")


def prune(
    store: ReleaseStore,
    releases: Path,
    keep: int,
    after: Callable[[str], None] = lambda step: None,
    artifacts: Artifacts | None = None,
) -> Pruned:
    """Delete all releases but those that `reasons_to_keep` names, their copies in `artifacts` too.

    BusyError while a release is being created.
    """
    if keep < 0:
        raise InputError(f"keep = {keep}; it must be 0 or more")
    with held(releases / ".create.lock", "release prune"):
        with store.work() as work:
            work.champion(held=True)
            newest_first = [release.name for release in reversed(work.list())]
            stage = work.experiments.open(held=True)
            tried = stage.experiment.challenger if stage else None
            kept = reasons_to_keep(newest_first, work.pinned(), work.challenger(), keep, tried)
            gone = tuple(work.delete(name).name for name in newest_first if name not in kept)
            work.commit()
        return _removed(store, releases, kept, gone, after, artifacts)


def delete(
    store: ReleaseStore,
    releases: Path,
    name: str,
    after: Callable[[str], None] = lambda step: None,
    artifacts: Artifacts | None = None,
) -> Pruned:
    """Delete one release. ConflictError for the live one and those a rollback may need, NotFoundError for an unknown one."""
    with held(releases / ".create.lock", "release delete"):
        store.delete(name)
        return _removed(store, releases, {}, (name,), after, artifacts)


def _removed(
    store: ReleaseStore,
    releases: Path,
    kept: Mapping[str, str],
    gone: tuple[str, ...],
    after: Callable[[str], None],
    artifacts: Artifacts | None,
) -> Pruned:
    """Remove the folders and copies of everything deleted, now or in a call that was cut off."""
    sweep_partials(releases)
    with store.look() as work:
        deleted = work.deleted()
    there = [release for release in deleted if release.folder.is_dir()]
    inside = [release for release in there if _is_own(release, releases)]
    freed = sum(_remove(release, after) for release in inside)
    if artifacts:
        copied = artifacts.names()
        for release in (release for release in deleted if release.name in copied):
            artifacts.delete(release.name, release.content_hash)
    return Pruned(kept, gone, freed, tuple(release.folder for release in there if release not in inside))


def _is_own(release: Release, releases: Path) -> bool:
    """Only what creating a release makes: a folder of its name, right below the releases folder."""
    folder = release.folder
    return folder.parent.resolve() == releases.resolve() and folder.name == release.name and not folder.is_symlink()


def _remove(release: Release, after: Callable[[str], None]) -> int:
    """Take a folder out of sight, then remove it; gives its bytes. Who has it open or mapped keeps what they have."""
    size = sum(path.stat().st_size for path in release.folder.rglob("*") if path.is_file())
    aside = release.folder.with_name(f"{_ASIDE}{release.name}-{uuid.uuid4().hex[:8]}")
    release.folder.rename(aside)
    after("aside")
    shutil.rmtree(aside, ignore_errors=True)
    after("removed")
    return size
