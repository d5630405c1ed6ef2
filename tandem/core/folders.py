"""Folders that are whole or absent: write beside, sync, hash, rename; the manifest is written last.

A folder is complete when its manifest exists. A crash leaves the old folder, or a hidden `.partial-*` one that nobody reads.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from tandem.core.errors import BusyError, IntegrityError

MANIFEST: Final = "manifest.json"
_PARTIAL: Final = ".partial-"
_RETIRED: Final = f"{_PARTIAL}old-"


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def content_hash(value: Any) -> str:
    """SHA-256 of a JSON-able value in canonical form, in hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_files(folder: Path, *, skip: frozenset[str] = frozenset({MANIFEST})) -> dict[str, str]:
    """Hash of every file below `folder`, by its POSIX path relative to it, sorted; names in `skip` are left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: file_hash(path) for name, path in names.items() if name not in skip}


def verify_files(folder: Path, hashes: Mapping[str, str]) -> None:
    """Raise IntegrityError unless every named file is there with that hash."""
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{folder.name}: file {name} is missing; fetch or create the folder again")
        found = file_hash(path)
        if found != expected:
            raise IntegrityError(
                f"{folder.name}: file {name} is damaged (sha256 {found[:12]}, manifest says {expected[:12]}); "
                "fetch or create the folder again"
            )


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: after a crash it holds the old text or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{_PARTIAL}{uuid.uuid4().hex}")
    try:
        with beside.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically; keys sorted, so that equal values are equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a fresh folder to fill; on success it takes `target`'s place, on an error it vanishes and `target` stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f"{_PARTIAL}{target.name}-{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    try:
        yield partial
        for path in sorted(partial.rglob("*")):
            _sync(path)
        _sync(partial)
        _swap(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def held(lock: Path, who: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold an advisory lock for a block. The lock dies with its process.

    Raises BusyError, saying who holds it since when, if it does not get the lock within `wait_s` seconds.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as handle:
        if not _locked(handle, time.monotonic() + wait_s):
            raise BusyError(f"{lock.stem} is busy, held by {_holder(handle) or 'another run'}; wait for it")
        handle.truncate(0)
        handle.write(f"{who} (process {os.getpid()}) since {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}")
        handle.flush()
        try:
            yield
        finally:
            handle.truncate(0)  # the next holder's name takes a moment to appear, and must not be this one meanwhile


def _holder(handle: IO[str]) -> str:
    """What the holder of a lock says of itself; it has a moment to write it down."""
    for _ in range(20):
        time.sleep(0.01)
        handle.seek(0)
        if text := handle.read().strip():
            return text
    return ""


def _locked(handle: IO[str], until: float) -> bool:
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.01)
        else:
            return True


def sweep_partials(folder: Path) -> int:
    """Remove what crashed writers left in `folder`; returns how many. Call it only while holding the folder's lock.

    A folder that was set aside for a successor that never came takes its place again.
    """
    left = sorted(folder.glob(f"{_PARTIAL}*")) if folder.is_dir() else []
    for path in left:
        target = folder / path.name.removeprefix(_RETIRED).rpartition("~")[0]
        if path.name.startswith(_RETIRED) and not target.exists():
            path.rename(target)
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(left)


def _swap(partial: Path, target: Path) -> None:
    retired = target.parent / f"{_RETIRED}{target.name}~{uuid.uuid4().hex[:8]}"
    if target.exists():
        target.rename(retired)
    partial.rename(target)
    _sync(target.parent)
    shutil.rmtree(retired, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
