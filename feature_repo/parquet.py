"""Where a Feast file source lies, and how its Parquet is read, appended to and replaced.

A source is one file, or a folder of parts, which may lie in `name=value/` folders (Hive partitions). Parts are read in the order
of their names, so that of two rows the later written one comes later. Local paths and `file://`, `s3://`, `gs://`, `az://` are
scanned by Polars itself, in pieces; any other URL is opened through fsspec and its wanted columns are read as a whole.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import quote

import polars as pl
import pyarrow.dataset
from feast.data_source import DataSource
from feast.infra.offline_stores.file_source import FileSource
from feast.repo_config import RepoConfig

from feature_repo.store import write_parquet
from tandem.core.errors import IncompatibleError, InputError, NotFoundError
from tandem.core.folders import held

PARTS: Final = "**/*.parquet"

_SCANNED: Final = ("s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss", "adl", "http", "https", "hf")
_LENIENT: Final = pl.ScanCastOptions(
    datetime_cast=["nanosecond-downcast", "convert-timezone"], missing_struct_fields="insert", extra_struct_fields="ignore"
)


def place(config: RepoConfig, path: str) -> Path | str:
    """A local path (absolute, or below the store's `root`), or the URL of what lies elsewhere."""
    if "://" in path and not path.startswith("file://"):
        return path
    root = getattr(config.offline_store, "root", None) or config.repo_path or "."
    return Path(root, path.removeprefix("file://"))


def source_path(config: RepoConfig, source: DataSource) -> Path | str:
    """Where a file source lies; raises IncompatibleError for sources of other kinds."""
    if not isinstance(source, FileSource):
        raise IncompatibleError(f"source {source.name!r} is a {type(source).__name__}; this store reads FileSource only")
    return place(config, source.path)


def scan(config: RepoConfig, source: DataSource) -> pl.LazyFrame:
    """Lazy rows of a source, under its own column names, with times as they are stored."""
    where = source_path(config, source)
    if isinstance(where, Path):
        return _scan_local(where, source.name)
    if where.split("://", 1)[0] in _SCANNED:
        pattern = f"{where.rstrip('/')}/{PARTS}" if is_folder(where) else where
        return pl.scan_parquet(
            pattern, storage_options=_access(source), cast_options=_LENIENT, hive_partitioning=is_folder(where)
        )
    return _scan_elsewhere(where, source.name)


def is_folder(where: Path | str) -> bool:
    """Does a source consist of parts? What does not end in `.parquet` does, and so does what is a folder on this machine."""
    return where.is_dir() if isinstance(where, Path) and where.exists() else not str(where).endswith(".parquet")


def append(config: RepoConfig, source: DataSource, rows: Callable[[pl.Schema], pl.DataFrame]) -> int:
    """Add rows, made for the source's schema, as a new part of a folder or by replacing a file; returns how many.

    Raises BusyError while another run writes the same local source. One file elsewhere is refused: two writers at once would
    lose rows there in silence.
    """
    where = source_path(config, source)
    if isinstance(where, Path):
        with held(where.with_name(f".{where.name}.lock"), "an offline write"):
            return _append_local(where, scan(config, source), rows)
    if not is_folder(where):
        raise InputError(
            f"source {source.name!r}: {where} is one file, to which nothing can be added safely; use a folder of parts"
        )
    found = rows(scan(config, source).collect_schema())
    partitions = _partitions(name for name, _ in _elsewhere(where))
    for folder, part in _by_partition(found, partitions):
        _write_elsewhere(f"{where.rstrip('/')}/{folder}{part_name(time.time_ns())}", part)
    return found.height


def part_name(stamp: int) -> str:
    """A part whose name sorts by time, after those of a build (`part-…`) and all written before it."""
    return f"pushed-{stamp:020d}-{uuid.uuid4().hex}.parquet"


def replace(path: Path, frame: pl.DataFrame) -> None:
    """Write one file; after a crash it holds the old rows or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(frame, path)


def write_parts(where: Path | str, frame: pl.DataFrame, partition_by: list[str]) -> None:
    """Add a frame to a folder that may not exist yet, below `name=value/` folders of the columns in `partition_by`."""
    for folder, part in _by_partition(frame, partition_by):
        name = f"{folder}{part_name(time.time_ns())}"
        if isinstance(where, Path):
            replace(where / name, part)
        else:
            _write_elsewhere(f"{where.rstrip('/')}/{name}", part)


def exists(where: Path | str) -> bool:
    """Is there anything at this place?"""
    if isinstance(where, Path):
        return where.exists()
    import fsspec  # type: ignore[import-untyped]

    files, path = fsspec.url_to_fs(where)
    return bool(files.exists(path))


def write_file(where: Path | str, frame: pl.DataFrame) -> None:
    """Write one file here or elsewhere."""
    if isinstance(where, Path):
        replace(where, frame)
    else:
        _write_elsewhere(where, frame)


# --- on this machine --------------------------------------------------------------------------------------------------------


def _scan_local(path: Path, name: str) -> pl.LazyFrame:
    if not path.exists():
        raise NotFoundError(f"source {name!r}: {path} does not exist; run `tandem features build` first")
    if path.is_file():
        return pl.scan_parquet(path, glob=False, cast_options=_LENIENT, hive_partitioning=False)
    parts = _parts(path)
    if not parts:
        raise NotFoundError(f"source {name!r}: the folder {path} holds no .parquet file; run `tandem features build` first")
    own = _partitions(part.relative_to(path).as_posix() for part in parts)
    rows = pl.scan_parquet(parts, glob=False, cast_options=_LENIENT, hive_partitioning=bool(own))
    if not own:
        return rows
    above = _partitions([f"{path.as_posix()}/part"])
    return rows.drop([each for each in above if each not in own])


def _parts(path: Path) -> list[Path]:
    """The parts of a folder in the order of their names; hidden files are somebody's work in progress."""
    found = [part for part in path.glob(PARTS) if part.is_file()]
    return sorted(part for part in found if not any(step.startswith(".") for step in part.relative_to(path).parts))


def _append_local(path: Path, old: pl.LazyFrame, rows: Callable[[pl.Schema], pl.DataFrame]) -> int:
    new = rows(old.collect_schema())
    if not path.is_dir():
        replace(path, pl.concat([old.collect(), new]))
        return new.height
    parts = _parts(path)
    stamp = max(time.time_ns(), 1 + max((_stamp(part) for part in parts), default=0))
    for folder, part in _by_partition(new, _partitions(each.relative_to(path).as_posix() for each in parts)):
        replace(path / folder / part_name(stamp), part)
    return new.height


def _stamp(part: Path) -> int:
    """When a pushed part was written; a clock that went back must not put a new part before it."""
    words = part.name.split("-")
    return int(words[1]) if words[0] == "pushed" and len(words) == 3 and words[1].isdigit() else 0


def _partitions(paths: Iterable[str]) -> list[str]:
    """Names of the partition columns that relative paths of parts show, outermost first."""
    names = (step.split("=", 1)[0] for path in paths for step in path.split("/")[:-1] if "=" in step)
    return list(dict.fromkeys(names))


def _by_partition(frame: pl.DataFrame, names: list[str]) -> Iterator[tuple[str, pl.DataFrame]]:
    """(folder with a slash at its end, rows without the partition columns); ("", all rows) where there are no partitions."""
    if not names:
        yield "", frame
        return
    for values, part in frame.partition_by(names, include_key=False, as_dict=True, maintain_order=True).items():
        if None in values:
            raise InputError(f"rows without a value of {names} belong into no partition; fill them in")
        yield "".join(f"{name}={quote(str(value), safe='')}/" for name, value in zip(names, values, strict=True)), part


# --- elsewhere --------------------------------------------------------------------------------------------------------------


def _scan_elsewhere(url: str, name: str) -> pl.LazyFrame:
    found = _elsewhere(url)
    if not found:
        raise NotFoundError(f"source {name!r}: {url} holds no .parquet file; check the address and the rights to read it")
    import fsspec

    files, root = fsspec.url_to_fs(url)
    paths = [path for _, path in found]
    hive = pyarrow.dataset.partitioning(flavor="hive")
    table = pyarrow.dataset.dataset(paths, filesystem=files, format="parquet", partitioning=hive, partition_base_dir=root)
    return pl.scan_pyarrow_dataset(table)


def _elsewhere(url: str) -> list[tuple[str, str]]:
    """(path below the source, path for its file system) of every part, in the order of their names."""
    import fsspec

    files, root = fsspec.url_to_fs(url)
    paths = sorted(files.glob(f"{root.rstrip('/')}/{PARTS}")) if is_folder(url) else [root] * bool(files.exists(root))
    return [(path.removeprefix(root).lstrip("/"), path) for path in paths]


def _write_elsewhere(url: str, frame: pl.DataFrame) -> None:
    import fsspec

    files, path = fsspec.url_to_fs(url)
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    with files.open(path, "wb") as handle:
        frame.write_parquet(handle)


def _access(source: FileSource) -> dict[str, str]:
    """Credentials and address of an object store: the source's own, else those of the environment."""
    found: Mapping[str, str] = source.resolve_credentials() or {}
    address = {"AWS_ENDPOINT_URL": source.s3_endpoint_override, "AWS_ALLOW_HTTP": "true"} if source.s3_endpoint_override else {}
    return {**found, **address}
