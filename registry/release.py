"""The release: one folder that holds everything which answers together, and the manifest that proves it.

In: the folders that training made (`towers/`, `index/`, `ranker/`, …) and the facts about them. Out: one immutable folder whose
`manifest.json`, written last, names the hash of every file and ties each part to the parts it was built against.

    <name>/  manifest.json  items.parquet  features.json  popular.json  measured.json
             encoder/  towers/  index/  ranker/  evaluation/

`measured.json` (creation time and timings) lies outside the hash, so that the same data and seed give the same content hash.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, Final, cast

from tandem.core.errors import ConflictError, IncompatibleError, InputError, IntegrityError, NotFoundError, UnavailableError
from tandem.core.folders import (
    MANIFEST,
    content_hash,
    file_hash,
    held,
    read_json,
    sweep_partials,
    verify_files,
    whole_folder,
    write_json,
)

SCHEMA_VERSION: Final = 1
MEASURED: Final = "measured.json"
NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
SUFFIXES: Final = frozenset({".safetensors", ".json", ".parquet", ".faiss", ".txt", ".model"})
"""What a release may hold: weights, JSON, tables, indexes, and tokenizer vocabularies. Nothing that is executed when read."""

LINKS: Final = ("index.towers", "index.items", "ranker.towers")
"""`a.b`: where a release has both parts, `a` must say with which `b` it was built."""

CREATE_STEPS: Final = ("copied", "measured", "manifest", "published")
"""Moments in `create_release` that `after` is told of; a crash at any of them leaves the whole release or none."""

_UPGRADE: Final = "pip install --upgrade tandem-recommender"
_RECREATE: Final = "tandem release create"


@dataclass(frozen=True)
class ReleaseFacts:
    """What only the caller knows about a release. All but `parent`, `created_at` and `timings` goes into the content hash.

    `fingerprints` name parts ("towers") by what made them; a part without one gets the hash of its files. `links` say which
    fingerprint a part was built against ("index.towers"). `window` is the training data's, `seeds` and `versions` what ran.
    """

    created_at: datetime
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    window: Mapping[str, str | None] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    timings: Mapping[str, Any] = field(default_factory=dict)
    parent: str | None = None


@dataclass(frozen=True)
class Manifest:
    """What a release is. `content_hash` covers everything here but `name` and `parent`, which a rerun may change."""

    schema_version: int
    name: str
    content_hash: str
    files: Mapping[str, str]
    fingerprints: Mapping[str, str]
    links: Mapping[str, str]
    window: Mapping[str, str | None]
    seeds: Mapping[str, int]
    versions: Mapping[str, str]
    source: Mapping[str, Any]
    settings: Mapping[str, Any]
    metrics: Mapping[str, float | None]
    parent: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in `manifest.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Any, where: str) -> Manifest:
        """The manifest in `raw`; `where` names it in errors. IntegrityError unless all fields are there with their types."""
        if not isinstance(raw, dict):
            raise IntegrityError(f"{where}: {MANIFEST} is not an object; fetch or create the release again")
        _check_schema(raw.get("schema_version"), where)
        names = {one.name for one in fields(cls)}
        if set(raw) != names:
            odd = ", ".join(sorted(set(raw) ^ names))
            raise IntegrityError(f"{where}: {MANIFEST} lacks or adds {odd}; fetch or create the release again")
        _check_types(raw, where)
        return cls(**raw)

    @classmethod
    def recorded(cls, raw: Any, where: str) -> Manifest:
        """A manifest as the tables remember it, of whatever schema: what we do not know is left out, what is missing is empty.

        It tells what a release is, in lists and comparisons. Whether it can be loaded says the folder's own (`verify_release`).
        """
        if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
            raise IntegrityError(f"{where}: the tables hold no manifest of it; restore them, or create the release again")
        empty: dict[str, Any] = {one.name: {} for one in fields(cls)}
        empty |= {"schema_version": 0, "name": where, "content_hash": "", "parent": None}
        return cls(**{name: raw.get(name, value) for name, value in empty.items()})


def release_folder(releases: Path, name: str) -> Path:
    """Where release `name` lies below `releases`. InputError when the name could not be one, or leads out of the folder."""
    if not NAME.fullmatch(name):
        raise InputError(
            f"{name[:80]!r} is not a release name: 1-64 of a-z, 0-9, '.', '_', '-', starting with a letter or digit; "
            "see `tandem release list`"
        )
    folder = releases / name
    if not folder.resolve().is_relative_to(releases.resolve()):
        raise InputError(f"release {name!r} leads out of the releases folder; remove the link and create it again")
    return folder


def default_name(hash_of_content: str, now: datetime) -> str:
    """Name of a release that was given none: its UTC day and the start of its content hash."""
    return f"{now:%Y%m%d}-{hash_of_content[:8]}"


def release_hash(parts: Mapping[str, Path], facts: ReleaseFacts) -> str:
    """The content hash that `create_release` would write for these parts and facts."""
    return _describe(_hash_sources(_collect(parts)), facts, name="").content_hash


def create_release(
    parts: Mapping[str, Path],
    target: Path,
    facts: ReleaseFacts,
    *,
    after: Callable[[str], None] = lambda step: None,
) -> Manifest:
    """Copy `parts` ({"towers": folder, "items.parquet": file, …}) into the folder `target`, whole or not at all.

    The name is `target`'s. Creating the same content again returns what is there; other content under a name in use is a
    ConflictError. `after` is called with each of CREATE_STEPS once it is done.
    """
    release_folder(target.parent, target.name)
    files = _collect(parts)
    manifest = _describe(_hash_sources(files), facts, name=target.name)
    check_links(manifest)
    target.parent.mkdir(parents=True, exist_ok=True)
    with held(target.parent / ".create.lock", "release create"):
        sweep_partials(target.parent)
        if target.exists():
            return _same_or_conflict(target, manifest)
        _check_space(files.values(), target.parent)
        with whole_folder(target) as partial:
            _copy(files, partial, manifest.files)
            after("copied")
            write_json(partial / MEASURED, {"created_at": facts.created_at.isoformat(), **_plain(facts.timings, "timings")})
            after("measured")
            write_json(partial / MANIFEST, manifest.to_dict())
            after("manifest")
        after("published")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a release, with its own hash checked but not its files'. For lists; loading needs `verify_release`."""
    if not folder.is_dir():
        raise NotFoundError(f"no release {folder.name!r}; see `tandem release list`")
    path = folder / MANIFEST
    if not path.is_file():
        raise IntegrityError(f"{folder.name}: no {MANIFEST}, so the folder is not whole; fetch or create the release again")
    try:
        raw = read_json(path)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{folder.name}: {MANIFEST} is damaged ({error}); fetch or create the release again") from None
    manifest = Manifest.from_dict(raw, folder.name)
    if manifest.content_hash != _hash_of(manifest):
        raise IntegrityError(
            f"{folder.name}: {MANIFEST} is damaged: it says content {manifest.content_hash[:12]}, its lines give "
            f"{_hash_of(manifest)[:12]}; fetch or create the release again"
        )
    return manifest


def verify_release(folder: Path, expected: str | None = None) -> Manifest:
    """Check that a release is whole, unchanged and of one piece, and return its manifest; nothing of it is loaded before.

    `expected` is the content hash that the registry knows. Raises NotFoundError, IntegrityError (bytes, extra or forbidden
    files, another hash than `expected`) or IncompatibleError (other schema version, parts that do not belong together).
    """
    manifest = read_manifest(folder)
    if manifest.name != folder.name:
        raise IntegrityError(f"{folder.name}: its manifest belongs to release {manifest.name!r}; create or fetch it again")
    if expected is not None and manifest.content_hash != expected:
        raise IntegrityError(
            f"{folder.name}: content {manifest.content_hash[:12]}, but the registry knows {expected[:12]}; fetch it again"
        )
    _check_listing(folder, manifest)
    verify_files(folder, manifest.files)
    for name in manifest.files:
        _check_kind(folder / name, f"{folder.name}: {name}")
    check_links(manifest)
    return manifest


def check_links(manifest: Manifest) -> None:
    """Raise IncompatibleError, naming both fingerprints, when a part was built against another part than the one here."""
    prints = manifest.fingerprints
    for link, built_with in manifest.links.items():
        part, _, other = link.partition(".")
        if other not in prints:
            raise IncompatibleError(f"{manifest.name}: {part} was built with {other} {built_with}, which the release lacks")
        if prints[other] != built_with:
            raise IncompatibleError(
                f"{manifest.name} is mixed: its {part} was built with {other} {built_with}, but its {other} is {prints[other]}; "
                f"train them together, then `{_RECREATE}`"
            )
    for link in LINKS:
        part, _, other = link.partition(".")
        if part in prints and other in prints and link not in manifest.links:
            raise IncompatibleError(f"{manifest.name}: {part} does not say with which {other} it was built; add link {link!r}")


@dataclass(frozen=True)
class Change:
    """One line of a comparison: `key` in `section` ("metric"); `before` and `after` are None where a release lacks it."""

    section: str
    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        what = f"{self.section} {self.key}"
        if self.before is None:
            return f"{what}: added ({_show(self.after)})"
        if self.after is None:
            return f"{what}: gone ({_show(self.before)})"
        if _is_number(self.before) and _is_number(self.after):
            return f"{what}: {_show(self.before)} -> {_show(self.after)} ({self.after - self.before:+.4g})"
        return f"{what}: {_show(self.before)} -> {_show(self.after)}"


def diff(a: Manifest, b: Manifest) -> tuple[Change, ...]:
    """What changed from release `a` to `b`: parts, links, window, seeds, versions, source, settings, metrics. Empty: the same."""
    sections = {
        "part": (a.fingerprints, b.fingerprints),
        "file": (a.files, b.files),
        "link": (a.links, b.links),
        "window": (a.window, b.window),
        "seed": (a.seeds, b.seeds),
        "version": (a.versions, b.versions),
        "source": (a.source, b.source),
        "setting": (a.settings, b.settings),
        "metric": (a.metrics, b.metrics),
    }
    return tuple(change for name, (old, new) in sections.items() for change in _changes(name, _flat(old), _flat(new)))


def _changes(section: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield Change(section, key, old.get(key), new.get(key))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _show(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32,}", value):
        return value[:12]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _collect(parts: Mapping[str, Path]) -> dict[str, Path]:
    """Every source file by the path that it gets in the release, sorted by that path."""
    found: dict[str, Path] = {}
    for part, path in parts.items():
        if part in {MANIFEST, MEASURED} or PurePosixPath(part).is_absolute() or ".." in PurePosixPath(part).parts:
            raise InputError(f"{part!r} cannot be a part of a release; the release writes {MANIFEST} and {MEASURED} itself")
        if path.is_file():
            found[part] = path
        elif path.is_dir():
            found |= {f"{part}/{one.relative_to(path).as_posix()}": one for one in path.rglob("*") if one.is_file()}
        else:
            raise NotFoundError(f"part {part} of the release: {path} does not exist; make it first (`tandem train`)")
    if not found:
        raise InputError("a release needs at least one part; train something first (`tandem train`)")
    return dict(sorted(found.items()))


def _hash_sources(files: Mapping[str, Path]) -> dict[str, str]:
    for name, path in files.items():
        _check_kind(path, name)
    return {name: file_hash(path) for name, path in files.items()}


def _describe(files: Mapping[str, str], facts: ReleaseFacts, name: str) -> Manifest:
    prints = {part: _part_hash(part, files) for part in {_part_of(path) for path in files}}
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        content_hash="",
        files=dict(files),
        fingerprints={**prints, **_plain(facts.fingerprints, "fingerprints")},
        links=_plain(facts.links, "links"),
        window=_plain(facts.window, "window"),
        seeds=_plain(facts.seeds, "seeds"),
        versions=_plain(facts.versions, "versions"),
        source=_plain(facts.source, "source"),
        settings=_plain(facts.settings, "settings"),
        metrics=_plain(facts.metrics, "metrics"),
        parent=facts.parent,
    )
    return Manifest(**(manifest.to_dict() | {"content_hash": _hash_of(manifest)}))


def _part_of(path: str) -> str:
    return PurePosixPath(path).parts[0].partition(".")[0]


def _part_hash(part: str, files: Mapping[str, str]) -> str:
    return content_hash({path: one for path, one in files.items() if _part_of(path) == part})


def _hash_of(manifest: Manifest) -> str:
    """Hash over all that makes a release what it is; its name and its parent's are only what people call it."""
    return content_hash(
        {key: value for key, value in manifest.to_dict().items() if key not in {"name", "parent", "content_hash"}}
    )


def _plain(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The value as JSON gives it back: string keys, lists, and None for numbers that JSON does not have (NaN, infinity)."""
    try:
        return cast(dict[str, Any], _finite(json.loads(json.dumps(dict(value)))))
    except TypeError as error:
        raise InputError(f"{what} of a release hold a value that JSON cannot: {error}; turn it into text or numbers") from None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _same_or_conflict(target: Path, manifest: Manifest) -> Manifest:
    there = verify_release(target)
    if there.content_hash != manifest.content_hash:
        raise ConflictError(
            f"release {target.name!r} exists with content {there.content_hash[:12]}, this one has "
            f"{manifest.content_hash[:12]}; releases never change: choose another name"
        )
    return there


def _check_space(files: Iterable[Path], where: Path) -> None:
    need, free = 2 * sum(path.stat().st_size for path in files), shutil.disk_usage(where).free
    if free < need:
        raise UnavailableError(
            f"disk of {where}: {free / 1e6:,.0f} MB free, the release needs {need / 1e6:,.0f}; free some space"
        )


def _copy(files: Mapping[str, Path], folder: Path, hashes: Mapping[str, str]) -> None:
    """Copies, not links: a trainer that writes over its own output must not reach into a release."""
    for name, source in files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)
        os.chmod(place, 0o444)
    verify_files(folder, hashes)


def _check_schema(version: Any, where: str) -> None:
    if not isinstance(version, int) or isinstance(version, bool):
        raise IntegrityError(f"{where}: {MANIFEST} has schema version {version!r}; fetch or create the release again")
    if version > SCHEMA_VERSION:
        raise IncompatibleError(f"{where} has schema version {version}, this Tandem reads {SCHEMA_VERSION}; run `{_UPGRADE}`")
    if version < SCHEMA_VERSION:
        raise IncompatibleError(f"{where} has schema version {version}, this Tandem reads {SCHEMA_VERSION}; run `{_RECREATE}`")


def _check_types(raw: Mapping[str, Any], where: str) -> None:
    texts = {"name", "content_hash"}
    for key, value in raw.items():
        kind: tuple[type, ...] = (int,) if key == "schema_version" else (str,) if key in texts else (dict,)
        if key == "parent":
            kind = (str, type(None))
        if not isinstance(value, kind):
            raise IntegrityError(f"{where}: {key} in {MANIFEST} is {value!r}; fetch or create the release again")


def _check_listing(folder: Path, manifest: Manifest) -> None:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise IntegrityError(f"{folder.name}: {name} is a link; a release holds its own files. Fetch or create it again")
        if path.is_file() and name not in manifest.files and name not in {MANIFEST, MEASURED}:
            raise IntegrityError(f"{folder.name}: file {name} is not in its manifest; remove it, or create the release again")


def _check_kind(path: Path, what: str) -> None:
    """Only formats that run no code when read, by suffix and by first bytes (a pickle is refused under any name)."""
    suffix = Path(what).suffix.lower()
    if suffix not in SUFFIXES:
        raise IntegrityError(
            f"{what} is of a kind that a release never holds ({suffix or 'no suffix'}); it holds {sorted(SUFFIXES)}"
        )
    with path.open("rb") as handle:
        start = handle.read(16)
    if not _looks_like(suffix, start):
        raise IntegrityError(f"{what} does not hold what {suffix} says (it starts with {start[:8]!r}); write it again")


def _looks_like(suffix: str, start: bytes) -> bool:
    match suffix:
        case ".safetensors":
            return start[8:9] == b"{"
        case ".parquet":
            return start.startswith(b"PAR1")
        case ".json":
            return start.lstrip()[:1] in {b"{", b"[", b'"', b"n", b"t", b"f", b"-", *(b"%d" % one for one in range(10))}
        case ".faiss":
            return start.startswith(b"I")
        case _:  # text and sentencepiece models have no mark of their own; pickles and zip archives do
            return not (start[:1] == b"\x80" and start[1:2] <= b"\x05") and not start.startswith(b"PK\x03\x04")
