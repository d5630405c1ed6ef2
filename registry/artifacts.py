"""Releases beyond this machine: whole folders under one URL, that every machine with the same registry fetches from.

In: an fsspec URL ("s3://bucket/prefix", "gs://…", "file:///share/releases"), or "" for none; release folders and content hashes.
Out: copies there, whole (manifest last) or not taken for a release; and here, verified by hash before anybody sees them.

Credentials come from where the URL's library looks for them (environment, profile, machine role), never from settings, tables or
the URL. Every method may raise UnavailableError.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import urlsplit

from registry.release import MEASURED, Manifest, release_folder, verify_release
from registry.work import Release
from tandem.core.errors import ConflictError, InputError, IntegrityError, NotFoundError, TandemError, UnavailableError
from tandem.core.folders import MANIFEST, held, sweep_partials, whole_folder

_STAGING: Final = ".fetching"
_LOCK: Final = ".fetch.lock"
_WAIT_S: Final = 600.0
"""How long one process waits while another one fetches."""

_FOLDERS: Final = frozenset({"file", "local", "sftp", "ssh", "smb", "hdfs", "webhdfs"})
"""Protocols where a folder must be made before a file; elsewhere a name with slashes is enough."""

_SECRET: Final = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL", re.IGNORECASE)


class Artifacts:
    """The releases under `url`. With "" all releases are on this machine: nothing is copied, and nothing can be fetched."""

    def __init__(self, url: str, releases: Path) -> None:
        """`releases` is the local folder that copies are fetched into. InputError for a URL that is none, or has credentials."""
        self._url = url.rstrip("/")
        self._releases = releases
        if url:
            _check_url(url)

    def __bool__(self) -> bool:
        return bool(self._url)

    def upload(self, folder: Path, manifest: Manifest) -> bool:
        """Copy a release there, its manifest last; returns whether anything was missing.

        The same content again is fine, and finishes what a crash cut off; other content under the name is a ConflictError.
        """
        if not self:
            return False
        with self._files() as (fs, root):
            there = _manifest_there(fs, root, manifest.name)
            if there is not None and there.content_hash == manifest.content_hash:
                return False
            if there is not None:
                raise ConflictError(
                    f"{self._url} has a release {manifest.name!r} with content {there.content_hash[:12]}, this one has "
                    f"{manifest.content_hash[:12]}; choose another name, or another prefix in [registry] artifacts"
                )
            for name in [*sorted(manifest.files), MEASURED]:
                _put(fs, folder / name, f"{root}/{manifest.name}/{name}")
            _put(fs, folder / MANIFEST, f"{root}/{manifest.name}/{MANIFEST}")
        return True

    def here(self, release: Release) -> Release:
        """The release with a folder on this machine, fetched if there is none yet. Verify it before you load it, as always."""
        if not self or (release.folder / MANIFEST).is_file():
            return release
        return replace(release, folder=self.fetch(release.name, release.content_hash))

    def fetch(self, name: str, content_hash: str) -> Path:
        """Copy release `name` below the local releases folder and return where; once, however many ask at the same time.

        NotFoundError when it is not there whole, IntegrityError when it has other content or came damaged.
        """
        target = release_folder(self._releases, name)
        self._releases.mkdir(parents=True, exist_ok=True)
        with held(self._releases / _LOCK, "release fetch", _WAIT_S):
            if not (target / MANIFEST).is_file():
                self._fetch(target, content_hash)
        return target

    def delete(self, name: str, content_hash: str) -> bool:
        """Remove release `name` there, its manifest first; says whether there was one. Other content is not ours: it stays."""
        if not self:
            return False
        with self._files() as (fs, root):
            there = _manifest_there(fs, root, name)
            if there is not None and there.content_hash != content_hash:
                return False
            if there is not None:
                fs.rm_file(f"{root}/{name}/{MANIFEST}")
            fs.invalidate_cache()
            if not fs.exists(f"{root}/{name}"):
                return there is not None
            fs.rm(f"{root}/{name}", recursive=True)
        return True

    def names(self) -> frozenset[str]:
        """What lies there by name, half uploads too."""
        if not self:
            return frozenset()
        with self._files() as (fs, root):
            fs.invalidate_cache()
            try:
                return frozenset(PurePosixPath(path).name for path in fs.ls(root, detail=False))
            except FileNotFoundError:
                return frozenset()

    def _fetch(self, target: Path, content_hash: str) -> None:
        """Into a folder of our own beside the releases, verified there, then moved into its place."""
        staging = self._releases / _STAGING
        sweep_partials(staging)
        try:
            with self._files() as (fs, root):
                manifest = _manifest_there(fs, root, target.name)
                if manifest is None:
                    raise NotFoundError(
                        f"release {target.name!r} is neither here nor whole at {self._url}; create it again on the machine that "
                        "has it: `tandem release create`"
                    )
                _check_content(manifest, content_hash, self._url)
                with whole_folder(staging / target.name) as partial:
                    _get(fs, f"{root}/{target.name}", partial, manifest)
            verify_release(staging / target.name, content_hash)
            (staging / target.name).rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @contextmanager
    def _files(self) -> Iterator[tuple[Any, str]]:
        """The file system and our root in it; its troubles leave in our words, without secrets."""
        try:
            opened = _open(self._url)
        except (ImportError, ValueError) as error:
            raise InputError(f"[registry] artifacts = {self._url!r}: {_said(error)}") from None
        try:
            yield opened
        except TandemError:
            raise
        except Exception as error:
            raise UnavailableError(
                f"{self._url} failed ({type(error).__name__}: {_said(error)}); check the address, the network and the credentials"
            ) from None


def _open(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    options = {"auto_mkdir": True} if urlsplit(url).scheme in ("file", "local") else {}
    fs, root = url_to_fs(url, **options)
    return fs, str(root).rstrip("/")


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if not parts.scheme or "://" not in url:
        raise InputError(f"[registry] artifacts = {url!r} is no URL; write s3://bucket/prefix, gs://…, or file:///folder")
    if "@" in parts.netloc or parts.query:
        raise InputError(
            f"[registry] artifacts: the {parts.scheme}:// URL holds credentials or options; leave them to the environment "
            "(AWS_ACCESS_KEY_ID and the like, or FSSPEC_S3 with JSON)"
        )


def _manifest_there(fs: Any, root: str, name: str) -> Manifest | None:
    """The manifest of a release that was uploaded whole, or None. One that is cut off or damaged is none."""
    try:
        raw = json.loads(fs.cat_file(f"{root}/{name}/{MANIFEST}"))
        return Manifest.from_dict(raw, name)
    except (FileNotFoundError, ValueError, RecursionError, IntegrityError):
        return None


def _check_content(manifest: Manifest, content_hash: str, url: str) -> None:
    if manifest.content_hash != content_hash:
        raise IntegrityError(
            f"{url} has {manifest.name!r} with content {manifest.content_hash[:12]}, the registry knows {content_hash[:12]}; "
            "upload it again from the machine that has it"
        )
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise IntegrityError(f"{url}: {manifest.name} names a file outside of itself ({name[:80]!r})")


def _put(fs: Any, file: Path, place: str) -> None:
    if _protocols(fs) & _FOLDERS:
        fs.makedirs(place.rpartition("/")[0], exist_ok=True)
    fs.put_file(str(file), place)
    fs.invalidate_cache()
    size = fs.size(place)
    if size != file.stat().st_size:
        raise OSError(f"{file.name} has {file.stat().st_size} bytes here and {size} there")


def _get(fs: Any, source: str, folder: Path, manifest: Manifest) -> None:
    need, free = int(fs.du(source)), shutil.disk_usage(folder).free
    if free < 2 * need:
        raise UnavailableError(f"disk of {folder.parent}: {free / 1e6:,.0f} MB free, the release needs {2 * need / 1e6:,.0f}")
    for name in [*manifest.files, MEASURED, MANIFEST]:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            fs.get_file(f"{source}/{name}", str(place))
        except FileNotFoundError:
            raise IntegrityError(f"the copy of {manifest.name} lacks {name}; delete it there and upload it again") from None
        os.chmod(place, 0o444)


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def _said(error: BaseException, environment: Mapping[str, str] = os.environ) -> str:
    """An error's first line, with what the environment calls secret taken out."""
    text = (str(error).strip() or "no reason given").splitlines()[0][:300]
    for name, value in environment.items():
        if _SECRET.search(name) and len(value) >= 6:
            text = text.replace(value, "***")
    return text
