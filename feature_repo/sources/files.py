"""Opening what people have: a folder, a zip, a CSV, Parquet or JSON-lines file, compressed or not.

In: a path. Out: bytes of a named member, or a loose frame with `row`. Messages name the file and the way out.
"""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import polars as pl

from tandem.core.errors import InputError, NotFoundError

TABLE_SUFFIXES: Final = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".csv.zip", ".parquet", ".jsonl", ".jsonl.gz", ".ndjson")


def require(path: Path) -> Path:
    """Return `path`, or raise NotFoundError."""
    if not path.exists():
        raise NotFoundError(f"{path} does not exist; give the file or folder that holds the data")
    return path


def find_member(path: Path, name: str) -> bytes:
    """Bytes of the file called `name` at or below `path`: plain, as `name`.zip or `name`.gz, or inside a zip found there."""
    found = _find(require(path), name)
    if found is None:
        raise InputError(
            f"{path} holds no {name} (looked for it plain, as .zip and .gz, and in zips there); name the folder or zip with it"
        )
    return found


def read_csv(data: bytes | Path, name: str, columns: Sequence[str] = (), separator: str = ",") -> pl.DataFrame:
    """A CSV as text columns plus `row`; nothing is guessed, so that a bad value costs its row and not the file.

    Raises InputError for what is no CSV in UTF-8 and for missing `columns`.
    """
    try:
        frame = pl.read_csv(data, infer_schema=False, separator=separator)
    except pl.exceptions.NoDataError:
        raise InputError(f"{name} is empty; it needs a line of column names and rows") from None
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{name} is not a CSV in UTF-8: {str(error).splitlines()[0]}") from None
    require_columns(frame, columns, name)
    return with_row(frame)


def read_table(path: Path) -> pl.DataFrame:
    """Any one table as a frame with `row`: CSV columns are text, Parquet and JSON-lines keep their types."""
    path = _the_table(require(path))
    suffixes = "".join(path.suffixes[-2:]).lower()
    separator = "\t" if ".tsv" in suffixes else ","
    try:
        if suffixes.endswith(".parquet"):
            return with_row(pl.read_parquet(path))
        if ".jsonl" in suffixes or suffixes.endswith(".ndjson"):
            return with_row(pl.read_ndjson(_unpacked(path)))
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    return read_csv(_unpacked(path), path.name, separator=separator)


def lines_of(path: Path) -> list[str]:
    """Lines of a text file, plain or gzipped, cut at line feeds alone (JSON text may hold other separators).

    Bytes that are no UTF-8 become U+FFFD, so that they cost a line and not the file.
    """
    return _unpacked(path).decode("utf-8", errors="replace").split("\n")


def with_row(frame: pl.DataFrame) -> pl.DataFrame:
    """Add `row` (0 = first data row); a column of the data with that name is kept as `row_`."""
    frame = frame.rename({"row": "row_"}) if "row" in frame.columns else frame
    return frame.with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("row"))


def require_columns(frame: pl.DataFrame, columns: Sequence[str], name: str) -> None:
    """Raise InputError unless `frame` has all `columns`, saying which ones it has."""
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        has = [column for column in frame.columns if column != "row"]
        raise InputError(f"{name} has no column {missing[0]!r}; it has {has}")


def _find(path: Path, name: str) -> bytes | None:
    if path.is_file():
        if zipfile.is_zipfile(path):
            return _from_zip(path, name)
        return path.read_bytes() if path.name == name else None
    for candidate in sorted(path.rglob(name)) + sorted(path.rglob(f"{name}.gz")):
        return _unpacked(candidate)
    archives = sorted(path.rglob(f"{name}.zip")) or sorted(path.rglob("*.zip"))
    members = (_from_zip(archive, name) for archive in archives)
    return next((member for member in members if member is not None), None)


def _from_zip(path: Path, name: str) -> bytes | None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.namelist() if member.rsplit("/", 1)[-1] == name]
            return archive.read(members[0]) if members else None
    except zipfile.BadZipFile as error:
        raise InputError(f"{path} is a damaged zip: {error}; download it again") from None


def _unpacked(path: Path) -> bytes:
    try:
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise InputError(f"{path} is a damaged gzip: {error}; download it again") from None
    if path.suffix == ".zip":
        found = _from_zip(path, path.stem)
        if found is None:
            raise InputError(f"{path} holds no {path.stem}; unpack it and name the file")
        return found
    return path.read_bytes()


def _the_table(path: Path) -> Path:
    if path.is_file():
        return path
    tables = [each for each in sorted(path.iterdir()) if each.name.lower().endswith(TABLE_SUFFIXES)]
    if len(tables) != 1:
        names = [each.name for each in tables] or "none"
        raise InputError(f"{path} is a folder with tables {names}; name the one with the events")
    return tables[0]
