"""Items put and deleted one by one: a journal in the data folder that every process appends to and follows.

In: rows of the items table, with the vectors of their texts where somebody has made them, and ids to delete. Out: `Change`s in
one order for everybody; `load_items` of `store.py` reads them over `items.parquet`, and the next import or build of features puts
them into it. What is written stays in the journal: releases trained before it must be told of it.
"""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from feature_repo.sources.clean import clean_items
from feature_repo.sources.files import with_row
from tandem.core.errors import InputError
from tandem.core.folders import read_json, write_json
from tandem.core.journal import CARD_FILE, Journal
from tandem.core.schema import ITEMS, MAX_CATEGORIES, from_us, to_us

FOLDER: Final = "changes"
_APPLIED: Final = "applied.json"
_BOUND_TO: Final = "items"
_SPARE_BYTES: Final = 64 << 20
_ROW_BYTES: Final = 512
_TIME: Final = "available_from"


@dataclass(frozen=True, eq=False)
class Change:
    """`rows` of the items table put at `at_us` (UTC microseconds), or ids deleted then, where `rows` is None.

    `vectors` (n, T) float32 are the rows' text vectors by the encoder with that fingerprint, None where nobody made them.
    """

    at_us: int
    item_ids: tuple[str, ...]
    rows: tuple[dict[str, Any], ...] | None = None
    vectors: NDArray[np.float32] | None = None
    encoder: str = ""

    def packed(self) -> bytes:
        head = {"at": self.at_us, "ids": list(self.item_ids), "encoder": self.encoder, "rows": _plain(self.rows)}
        body = b"" if self.vectors is None else np.ascontiguousarray(self.vectors, "<f4").tobytes()
        text = json.dumps(head, ensure_ascii=False, allow_nan=False).encode()
        return struct.pack("<I", len(text)) + text + body

    @classmethod
    def unpacked(cls, record: bytes) -> Self:
        (size,) = struct.unpack_from("<I", record)
        head = json.loads(record[4 : 4 + size])
        body = np.frombuffer(record, "<f4", offset=4 + size)
        vectors = body.reshape(len(head["ids"]), -1) if len(body) else None
        return cls(head["at"], tuple(head["ids"]), _timed(head["rows"]), vectors, head["encoder"])

    def only(self, places: Sequence[int]) -> Change:
        """The change of some of its items."""
        return Change(
            self.at_us,
            tuple(self.item_ids[place] for place in places),
            None if self.rows is None else tuple(self.rows[place] for place in places),
            None if self.vectors is None else self.vectors[list(places)],
            self.encoder,
        )


class ItemChanges:
    """One process's hold of a data folder's journal; safe to share between threads."""

    def __init__(self, data_folder: Path, clock: Callable[[], int] = lambda: time.time_ns() // 1000) -> None:
        """`clock`: UTC microseconds."""
        self._folder, self._clock = data_folder / FOLDER, clock
        self._turn = threading.Lock()
        self._journal: Journal | None = None
        self._newest: dict[str, Change] = {}
        self._unread: list[Change] = []
        self._last_us = 0

    def put(self, items: pl.DataFrame, vectors: NDArray[np.float32] | None = None, encoder: str = "") -> Change:
        """Keep rows of the items table, each in the place of what the item was; on disk when it returns."""
        rows = tuple({name: value for name, value in row.items() if value is not None} for row in items.to_dicts())
        return self._write(lambda at: Change(at, tuple(items["item_id"]), rows, vectors, encoder))

    def delete(self, item_ids: Sequence[str]) -> Change:
        """Keep that items are gone; on disk when it returns."""
        return self._write(lambda at: Change(at, tuple(item_ids)))

    def read(self) -> list[Change]:
        """Changes that this object has not returned yet, oldest first. Costs some microseconds when there are none.

        Raises IntegrityError for a damaged journal.
        """
        with self._turn:
            self._catch_up()
            unread, self._unread = self._unread, []
            return unread

    def over(self, items: pl.DataFrame) -> tuple[pl.DataFrame, int]:
        """What `items` of `items.parquet` are now, and the moment of the newest change in them (UTC microseconds), or 0."""
        with self._turn:
            self._catch_up()
            applied = self.applied_us
            newest = [change for change in self._newest.values() if change.at_us > applied]
            return with_changes(items, newest), max(applied, self._last_us)

    def mark_applied(self, until_us: int) -> None:
        """Say that `items.parquet` holds every change up to this moment."""
        write_json(self._folder / _APPLIED, {"until_us": until_us})

    def _write(self, made: Callable[[int], Change]) -> Change:
        with self._turn:
            self._journal = journal = self._journal or Journal(self._folder, _BOUND_TO)
            with journal.writing():
                self._catch_up()
                change = made(max(self._clock(), self._last_us + 1))
                journal.append(change.packed())
                self._catch_up()
                if journal.size > 2 * self._bytes_needed() + _SPARE_BYTES:
                    journal.rewrite([each.packed() for each in sorted(self._newest.values(), key=lambda each: each.at_us)])
            return change

    def _catch_up(self) -> None:
        """Take in what was written since; of a journal that was rewritten, only what is newer than what was known."""
        if self._journal is None and (self._folder / CARD_FILE).is_file():
            self._journal = Journal(self._folder, _BOUND_TO)
        for record in [] if self._journal is None else self._journal.read()[1]:
            change = Change.unpacked(record)
            new = [place for place, item_id in enumerate(change.item_ids) if self._since(item_id) < change.at_us]
            self._newest |= {change.item_ids[place]: change.only([place]) for place in new}
            self._last_us = max(self._last_us, change.at_us)
            if new:
                self._unread.append(change.only(new))

    def _since(self, item_id: str) -> int:
        return self._newest[item_id].at_us if item_id in self._newest else -1

    def _bytes_needed(self) -> int:
        """About how long a journal with the newest change of each item is."""
        return sum(_ROW_BYTES + (0 if each.vectors is None else each.vectors.nbytes) for each in self._newest.values())

    @property
    def applied_us(self) -> int:
        """Up to when `items.parquet` holds every change."""
        path = self._folder / _APPLIED
        return int(read_json(path)["until_us"]) if path.is_file() else 0


def with_changes(items: pl.DataFrame, changes: Sequence[Change]) -> pl.DataFrame:
    """The items table with the newest change of each item (`changes` of one item each); both are sorted by item_id."""
    if not changes:
        return items
    touched = pl.Series("item_id", [change.item_ids[0] for change in changes], pl.String)
    kept = items.filter(~pl.col("item_id").is_in(touched.implode()))
    put = pl.DataFrame([change.rows[0] for change in changes if change.rows], schema=items.schema)
    return kept.merge_sorted(put.sort("item_id"), key="item_id")


def checked_items(draft: pl.DataFrame, known: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """Items that somebody wants to put, cleaned, in the columns that the workspace's items have; what is absent is null.

    `draft` [item_id, title?, text?, categories?, available_from?, attributes...]; categories may be text, parted by "|". Raises
    InputError for the first row that is no item, for an attribute that the items do not have, and for values of another kind.
    """
    draft = with_row(draft) if "row" not in draft.columns else draft
    unknown = [name for name in draft.columns if name not in known and name != "row"]
    if unknown or "item_id" not in draft.columns:
        odd = f"have {unknown}" if unknown else "lack item_id"
        raise InputError(f"items have the columns {list(known)}, these {odd}; leave out or add what differs")
    if draft.schema.get("categories") == pl.String:
        draft = draft.with_columns(pl.col("categories").str.split("|"))
    typed = [_typed(draft, name, kind) for name, kind in known.items() if name in draft.columns]
    items, rejected = clean_items(draft.with_columns(typed))
    crowded = items.filter(pl.col("categories").list.len() > MAX_CATEGORIES)
    if len(crowded):
        raise InputError(f"item {crowded['item_id'][0]!r} has more than {MAX_CATEGORIES} categories; leave some out")
    if len(rejected):
        row, reason = rejected.select("row", "reason").row(0)
        raise InputError(f"row {row} is no item: {reason}; {len(rejected)} of {len(draft)} rows are refused: mend them")
    missing = [pl.lit(None, kind).alias(name) for name, kind in known.items() if name not in items.columns]
    return items.with_columns(missing).select(list(known))


def _typed(draft: pl.DataFrame, name: str, kind: pl.DataType) -> pl.Series:
    """An attribute as the workspace has it: numbers may come as text from a CSV."""
    column = draft[name]
    if name in ITEMS or not (kind.is_numeric() or kind == pl.String):
        return column
    if kind == pl.String and column.dtype not in (pl.String, pl.Null):
        raise InputError(f"items' {name} is text, this is {column.dtype}; write it as text")
    try:
        return column.cast(kind, strict=True)
    except pl.exceptions.PolarsError:
        raise InputError(f"items' {name} are numbers ({kind}), and some of these values are not; mend them") from None


def _plain(rows: tuple[dict[str, Any], ...] | None) -> list[dict[str, Any]] | None:
    """Rows as JSON has them: times as UTC microseconds."""
    if rows is None:
        return None
    return [{name: to_us(value) if isinstance(value, datetime) else value for name, value in row.items()} for row in rows]


def _timed(rows: list[dict[str, Any]] | None) -> tuple[dict[str, Any], ...] | None:
    if rows is None:
        return None
    return tuple(row | ({_TIME: from_us(row[_TIME])} if _TIME in row else {}) for row in rows)
