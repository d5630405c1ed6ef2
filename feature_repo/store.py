"""The workspace's data folder: clean tables in, the same tables out.

In: `Raw`, and single events as they come. Out: events.parquet, items.parquet, users.parquet, rejected.parquet and source.json in
the folder. Import appends by `event_id`, items and users are replaced by newer ones, and `events.parquet` is written last: a
crash leaves the import to be run again, never half of it in use. Single events are parts in `new/` until the next import or build
of features; whoever reads events reads them, too.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Final

import polars as pl

from feature_repo.erased import ErasedUsers
from feature_repo.item_changes import ItemChanges
from feature_repo.sources.clean import reject
from feature_repo.sources.raw import REJECTED, Raw
from tandem.core.errors import InputError, NotFoundError, UnavailableError
from tandem.core.folders import held, sweep_partials
from tandem.core.schema import EVENTS, ITEMS, USERS, Source

EVENTS_FILE: Final = "events.parquet"
ITEMS_FILE: Final = "items.parquet"
USERS_FILE: Final = "users.parquet"
REJECTED_FILE: Final = "rejected.parquet"
SOURCE_FILE: Final = "source.json"
TRUTH_FOLDER: Final = "truth"
NEW_FOLDER: Final = "new"
LOCK_FILE: Final = "import.lock"
UNREADABLE: Final = ".unreadable"
"""What the name of a part ends with that could not be read."""

OVER_A_DAY: Final = "more events of this user on one day than events.per_user_per_day"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_PENDING: Final = ".pending.parquet"
_WAIT_S: Final = 5.0


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
    with held(data_folder / LOCK_FILE, "import"):
        sweep_partials(data_folder)
        if replace:
            _clear(data_folder)
        _check_kind(raw.source, data_folder)
        _apply_changes(data_folder)
        return _write_all(raw, data_folder)


def load_events(data_folder: Path) -> pl.DataFrame:
    """Events sorted by (timestamp, event_id), with those that came since the last import."""
    events = _load(data_folder, EVENTS_FILE)
    parts = _parts(data_folder)
    return _appended(events, _read_parts(parts))[0] if parts else events


def scan_events(data_folder: Path) -> pl.LazyFrame:
    """All events, lazily and in no order; for questions about a few of them."""
    if not (data_folder / EVENTS_FILE).is_file():
        raise _nothing_here(data_folder)
    files = [data_folder / EVENTS_FILE, *_parts(data_folder)]
    return pl.concat([pl.scan_parquet(path) for path in files], how="diagonal_relaxed")


def append_events(
    data_folder: Path, events: pl.DataFrame, rejected: pl.DataFrame, per_user_per_day: int = 0
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Keep single events, each `event_id` once, and refused rows; returns the new ones and all that were refused.

    They are on disk when it returns. `events` have a column `row`, their number in what was sent. Of one user and UTC day at most
    `per_user_per_day` are taken, those that came first (0: all); the rest is refused.
    Raises BusyError when an import holds the folder for long, UnavailableError when the disk takes nothing.
    """
    with _disk_that_takes(data_folder), held(data_folder / LOCK_FILE, "new events", _WAIT_S):
        asked = ErasedUsers(data_folder).drop_from(events.unique("event_id", keep="first", maintain_order=True))
        known = scan_events(data_folder).select("event_id").filter(pl.col("event_id").is_in(asked["event_id"].implode()))
        new = asked.join(known.collect(), on="event_id", how="anti", maintain_order="left")
        fresh, beyond = _within_a_day(data_folder, new, per_user_per_day)
        refused = pl.concat([rejected, reject("events", beyond, pl.repeat(OVER_A_DAY, beyond.height, eager=True))])
        set_aside(data_folder, refused)
        if fresh.height:
            folder = data_folder / NEW_FOLDER
            folder.mkdir(exist_ok=True)
            write_parquet(fresh.drop("row"), folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}{_PENDING}")
        return fresh, refused


def set_aside(data_folder: Path, rejected: pl.DataFrame) -> None:
    """Add refused rows (`REJECTED`) to the others. For whoever holds the folder's lock."""
    if rejected.height:
        old = _old(data_folder, REJECTED_FILE, REJECTED)
        write_parquet(pl.concat([old, rejected]).unique(maintain_order=True), data_folder / REJECTED_FILE)


def set_aside_part(data_folder: Path, part: Path, reason: str) -> None:
    """Take a part of new events out of the data: its rows become refused ones; a file that cannot be read is renamed.

    Raises BusyError when an import holds the folder for long.
    """
    with held(data_folder / LOCK_FILE, "new events", _WAIT_S):
        try:
            rows = pl.read_parquet(part).with_row_index("row")
        except (pl.exceptions.PolarsError, OSError):
            rows = pl.DataFrame({"row": [0], "part": [part.name]})
        set_aside(data_folder, reject("events", rows, pl.repeat(reason, rows.height, eager=True)))
        part.unlink() if "user_id" in rows.columns else part.rename(part.with_name(part.name + UNREADABLE))


def pending_parts(data_folder: Path) -> list[Path]:
    """Parts of new events whose features are not updated yet, oldest first."""
    return [part for part in _parts(data_folder) if part.name.endswith(_PENDING)]


def mark_applied(part: Path) -> None:
    """Say that the features know the events of a part."""
    part.rename(part.with_name(part.name.removesuffix(_PENDING) + ".parquet"))


def compact(data_folder: Path) -> int:
    """Put new events into `events.parquet`, and items put or deleted into `items.parquet`; returns how many events there were.

    For whoever builds features from all of it next.
    """
    with held(data_folder / LOCK_FILE, "compaction", _WAIT_S):
        _apply_changes(data_folder)
        parts = _parts(data_folder)
        if not parts:
            return 0
        events, appended = _appended(_load(data_folder, EVENTS_FILE), _read_parts(parts))
        users = load_users(data_folder)
        strangers = events.select("user_id").unique().join(users, on="user_id", how="anti")
        write_parquet(_upserted(users, strangers, "user_id"), data_folder / USERS_FILE)
        write_parquet(events, data_folder / EVENTS_FILE)
        _drop(parts)
        return appended


def load_items(data_folder: Path) -> pl.DataFrame:
    """Items sorted by item_id, with what was put and deleted one by one."""
    return load_items_until(data_folder)[0]


def load_items_until(data_folder: Path, changes: ItemChanges | None = None) -> tuple[pl.DataFrame, int]:
    """`load_items`, and the moment (UTC microseconds) up to which single changes are in it; 0 where there never was one.

    Whoever asks often gives the `changes` that it holds open.
    """
    return (changes or ItemChanges(data_folder)).over(_load(data_folder, ITEMS_FILE))


def items_schema(data_folder: Path) -> dict[str, pl.DataType]:
    """The columns that items have here."""
    if not (data_folder / EVENTS_FILE).is_file():
        raise _nothing_here(data_folder)
    return dict(pl.read_parquet_schema(data_folder / ITEMS_FILE))


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
    try:
        with beside.open("wb") as handle:
            frame.write_parquet(handle)
            handle.flush()
            os.fsync(handle.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _disk_that_takes(folder: Path) -> Iterator[None]:
    """Say it plainly when the disk is full or may not be written."""
    try:
        yield
    except (OSError, pl.exceptions.PolarsError) as error:
        number = getattr(error, "errno", None) or int((re.findall(r"os error (\d+)", str(error)) or ["0"])[-1])
        if number not in _FULL:
            raise
        raise UnavailableError(f"{folder} takes no more events: {os.strerror(number)}; make room and send them again") from error


def _within_a_day(data_folder: Path, events: pl.DataFrame, limit: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """New events in two: those within the limit of their user's day, in the order of `row`, and those beyond it."""
    if not limit or events.is_empty():
        return events, events.clear()
    day = pl.col("timestamp").dt.truncate("1d").alias("day")
    asked = events.with_columns(day)
    days = asked["day"].min(), asked["day"].max() + timedelta(days=1)  # type: ignore[operator]
    earlier = scan_events(data_folder).filter(
        pl.col("timestamp").is_between(*days, closed="left"), pl.col("user_id").is_in(asked["user_id"].unique().implode())
    )
    counts = earlier.group_by("user_id", day).len("earlier").collect()
    place = pl.int_range(pl.len()).over("user_id", "day") + pl.col("earlier").fill_null(0)
    placed = asked.sort("row").join(counts, on=["user_id", "day"], how="left", maintain_order="left").with_columns(place=place)
    within = placed["place"] < limit
    fresh, beyond = (placed.filter(each).drop("day", "earlier", "place") for each in (within, ~within))
    return fresh, beyond


def _write_all(raw: Raw, folder: Path) -> ImportCounts:
    erased = ErasedUsers(folder)
    raw = replace(raw, events=erased.drop_from(raw.events), users=erased.drop_from(raw.users))
    parts = _parts(folder) if (folder / EVENTS_FILE).is_file() else []
    old = _appended(_old(folder, EVENTS_FILE, EVENTS), _read_parts(parts))[0] if parts else _old(folder, EVENTS_FILE, EVENTS)
    events, appended = _appended(old, raw.events)
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
    _drop(parts)
    refused = raw.rejected.filter(pl.col("table") == "events").height
    read = raw.events.height + refused
    sizes = {"events": events.height, "items": items.height, "users": users.height}
    return ImportCounts(read, appended, raw.events.height - appended, refused, raw.reasons, **sizes)


def _apply_changes(folder: Path) -> None:
    """Put single changes into `items.parquet`, then say so: after a crash in between they are put there again.

    Where there is no data, as when an import starts over, they are only said to be: what they changed is gone.
    """
    changes = ItemChanges(folder)
    whole = (folder / EVENTS_FILE).is_file() and (folder / ITEMS_FILE).is_file()
    old = pl.read_parquet(folder / ITEMS_FILE) if whole else pl.DataFrame(schema=ITEMS)
    items, until_us = changes.over(old)
    if not until_us or until_us == changes.applied_us:
        return
    if whole:
        write_parquet(items, folder / ITEMS_FILE)
    changes.mark_applied(until_us)


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


def _parts(folder: Path) -> list[Path]:
    return sorted((folder / NEW_FOLDER).glob("*.parquet"))


def _read_parts(parts: Sequence[Path]) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(part) for part in parts], how="diagonal_relaxed")


def _drop(parts: Sequence[Path]) -> None:
    for part in parts:
        part.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Forget everything, events first: what is left without them counts as nothing."""
    for name in (EVENTS_FILE, ITEMS_FILE, USERS_FILE, REJECTED_FILE, SOURCE_FILE):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / TRUTH_FOLDER, ignore_errors=True)
    shutil.rmtree(folder / NEW_FOLDER, ignore_errors=True)


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
