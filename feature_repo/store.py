"""The workspace's data folder: clean tables in, the same tables out.

In: `Raw`. Out: events.parquet, items.parquet, users.parquet, rejected.parquet and source.json in the folder. Import appends by
`event_id`, items and users are replaced by newer ones, and `events.parquet` is written last: a crash leaves the import to be
run again, never half of it in use.
"""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import polars as pl

from feature_repo.sources.raw import REJECTED, Raw
from tandem.core.errors import InputError, NotFoundError
from tandem.core.folders import held, sweep_partials
from tandem.core.schema import EVENTS, ITEMS, USERS, Source

EVENTS_FILE: Final = "events.parquet"
ITEMS_FILE: Final = "items.parquet"
USERS_FILE: Final = "users.parquet"
REJECTED_FILE: Final = "rejected.parquet"
SOURCE_FILE: Final = "source.json"
TRUTH_FOLDER: Final = "truth"


@dataclass(frozen=True)
class ImportCounts:
    """What an import did: read = appended + duplicates + rejected, all counting event rows.

    `reasons` counts the refused rows of every table by "table: reason"; `events`, `items` and `users` are what the folder holds
    now.
    """

    read: int
    appended: int
    duplicates: int
    rejected: int
    reasons: dict[str, int] = field(default_factory=dict)
    events: int = 0
    items: int = 0
    users: int = 0


def save_raw(raw: Raw, data_folder: Path, replace: bool) -> ImportCounts:
    """Append `raw` to the folder, or start over with it. Events already there (by event_id) count as duplicates.

    Raises InputError when the folder holds another kind of data and `replace` is false, BusyError while another import runs.
    """
    data_folder.mkdir(parents=True, exist_ok=True)
    with held(data_folder / "import.lock", "import"):
        sweep_partials(data_folder)
        if replace:
            _clear(data_folder)
        _check_kind(raw.source, data_folder)
        return _write_all(raw, data_folder)


def load_events(data_folder: Path) -> pl.DataFrame:
    """Events sorted by (timestamp, event_id)."""
    return _load(data_folder, EVENTS_FILE)


def load_items(data_folder: Path) -> pl.DataFrame:
    """Items sorted by item_id."""
    return _load(data_folder, ITEMS_FILE)


def load_users(data_folder: Path) -> pl.DataFrame:
    """Users sorted by user_id."""
    return _load(data_folder, USERS_FILE)


def load_rejected(data_folder: Path) -> pl.DataFrame:
    """Refused rows with their reasons."""
    return _load(data_folder, REJECTED_FILE)


def load_source(data_folder: Path) -> Source:
    """What the events mean."""
    path = data_folder / SOURCE_FILE
    if not path.is_file():
        raise _nothing_here(data_folder)
    return Source.read(path)


def write_parquet(frame: pl.DataFrame, path: Path) -> None:
    """Replace a Parquet file atomically: after a crash it holds the old rows or the new."""
    beside = path.with_name(f".partial-{uuid.uuid4().hex}")
    with beside.open("wb") as handle:
        frame.write_parquet(handle)
        handle.flush()
        os.fsync(handle.fileno())
    beside.replace(path)


def _write_all(raw: Raw, folder: Path) -> ImportCounts:
    events, appended = _appended(_old(folder, EVENTS_FILE, EVENTS), raw.events)
    items = _upserted(_old(folder, ITEMS_FILE, ITEMS), raw.items, "item_id")
    users = _upserted(_old(folder, USERS_FILE, USERS), raw.users, "user_id")
    old_rejected = _old(folder, REJECTED_FILE, REJECTED)
    write_parquet(pl.concat([old_rejected, raw.rejected]).unique(maintain_order=True), folder / REJECTED_FILE)
    write_parquet(items, folder / ITEMS_FILE)
    write_parquet(users, folder / USERS_FILE)
    partial = folder / f".partial-{uuid.uuid4().hex}"
    raw.source.write(partial)
    partial.replace(folder / SOURCE_FILE)
    write_parquet(events, folder / EVENTS_FILE)
    refused = raw.rejected.filter(pl.col("table") == "events").height
    read = raw.events.height + refused
    sizes = {"events": events.height, "items": items.height, "users": users.height}
    return ImportCounts(read, appended, raw.events.height - appended, refused, raw.reasons, **sizes)


def _appended(old: pl.DataFrame, new: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    fresh = new.unique("event_id", keep="first", maintain_order=True).join(old.select("event_id"), on="event_id", how="anti")
    both = _stacked(old, fresh).sort("timestamp", "event_id")
    return both, fresh.height


def _upserted(old: pl.DataFrame, new: pl.DataFrame, key: str) -> pl.DataFrame:
    return _stacked(old.join(new.select(key), on=key, how="anti"), new).sort(key)


def _stacked(old: pl.DataFrame, new: pl.DataFrame) -> pl.DataFrame:
    """Both frames' rows; columns that one lacks are null there.

    A context or attribute column that changed its type becomes the wider one.
    """
    if old.is_empty():
        return new
    return pl.concat([old, new], how="diagonal_relaxed")


def _old(folder: Path, name: str, schema: dict[str, pl.DataType]) -> pl.DataFrame:
    # Without events the folder holds nothing: other files are what a crash left.
    is_whole = (folder / EVENTS_FILE).is_file() and (folder / name).is_file()
    return pl.read_parquet(folder / name) if is_whole else pl.DataFrame(schema=schema)


def _clear(folder: Path) -> None:
    """Forget everything, events first: what is left without them counts as nothing."""
    for name in (EVENTS_FILE, ITEMS_FILE, USERS_FILE, REJECTED_FILE, SOURCE_FILE):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / TRUTH_FOLDER, ignore_errors=True)


def _check_kind(source: Source, folder: Path) -> None:
    if not (folder / EVENTS_FILE).is_file():
        return
    old = load_source(folder)
    if old.kind != source.kind:
        raise InputError(
            f"{folder} holds {old.kind} events, these are {source.kind}; import with --replace or into another workspace"
        )


def _load(folder: Path, name: str) -> pl.DataFrame:
    if not (folder / EVENTS_FILE).is_file() or not (folder / name).is_file():
        raise _nothing_here(folder)
    return pl.read_parquet(folder / name)


def _nothing_here(folder: Path) -> NotFoundError:
    return NotFoundError(f"{folder} holds no imported data; run `tandem import KIND PATH` or `tandem simulate` first")
