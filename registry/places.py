"""Where a release's folder lies: kept relative to the workspace's releases folder, so that a workspace can be moved as a whole.

A folder outside of it (a share, another disk) is kept as an absolute path.
"""

from __future__ import annotations

from pathlib import Path

from registry.release import read_manifest
from tandem.core.errors import InputError, TandemError


def stored(folder: Path, releases: Path | None) -> str:
    """A folder as the tables keep it."""
    place = folder.resolve()
    if releases is not None and place.is_relative_to(releases.resolve()):
        return place.relative_to(releases.resolve()).as_posix()
    return str(folder.absolute())


def located(kept: str, releases: Path | None) -> Path:
    """The folder that the tables mean. InputError when that hangs on the releases folder and nobody said which it is."""
    path = Path(kept)
    if path.is_absolute():
        return path
    if releases is None:
        raise InputError(f"release folder {kept!r} is kept relative to the releases folder; open the store with releases=…")
    return releases / path


def moved_here(folder: Path, name: str, content_hash: str, releases: Path | None) -> Path:
    """Release `name` below `releases` where that one has the same content, else `folder`: a workspace was moved, or copied."""
    if releases is None:
        return folder
    try:
        same = read_manifest(releases / name).content_hash == content_hash
    except TandemError:
        return folder
    return releases / name if same else folder
