"""A built index that takes additions, updates and deletions: immutable main index + exact fresh tier + tombstones.

In: vectors by outside id, from any process. Out: the k best of what is listed now, best first. Numbers: an item of the main index
keeps its row there, also after an update; a new one gets the next free number, the same in every process.

    live = LiveIndex(index, item_ids, folder / "journal", towers.fingerprint)
    live.put(["a new mug"], vectors)
    scores, numbers = live.search(queries, 10)

A change is durable when `put` or `delete` returns, and seen by every process at its next search. A search reads one `View`, which
never changes: it is whole, however many writers are at work.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from retrieval import exact
from retrieval.checks import Floats, Mask, check_k, check_width, checked_rows
from retrieval.index import VectorIndex
from retrieval.journal import Journal, Record
from retrieval.topk import pack, unpack
from tandem.core.errors import IncompatibleError, InputError
from tandem.core.folders import content_hash
from tandem.core.schema import check_id

Ids = NDArray[np.int64]

_ROOM: Final = 1_024
_ROW_OVERHEAD: Final = 64
_SPARE_BYTES: Final = 64 << 20


@dataclass(frozen=True, eq=False)
class View:
    """What is listed at one moment; `version` counts the changes seen.

    `kept` (items of the main index,) bool: still listed as they are there. The fresh tier has rows (F, D) of the items `owners`
    (F,), of which those `alive` (F,) bool count.
    """

    main: VectorIndex
    version: int
    kept: Mask
    rows: Floats
    owners: Ids
    alive: Mask
    count: int
    _item_ids: Sequence[str] = field(repr=False)
    _new_ids: Sequence[str] = field(repr=False)

    def search(self, queries: Floats, k: int, allowed: Mask | None = None) -> tuple[Floats, Ids]:
        """Scores (B, k) float32 and numbers (B, k) int64, best first, -inf and -1 only where fewer than k are eligible.

        Equal scores by lower number. `allowed` (count,) bool, or (items of the main index,) to leave out all new ones; errors as
        in `VectorIndex.search`.
        """
        check_k(k)
        queries = checked_rows(queries, "queries")
        check_width(queries, self.main.dimension)
        kept, alive = self._eligible(allowed)
        old = self.main.search(queries, k, kept)
        scores, places = exact.scan(self.rows, queries, k, alive)
        return _merged(old, (scores, exact.renamed(places, self.owners)), k)

    def listed(self) -> Mask:
        """(count,) bool: the numbers that a search may return."""
        listed = np.zeros(self.count, np.bool_)
        listed[: self.main.count] = self.kept
        listed[self.owners[self.alive]] = True
        return listed

    def item_ids(self, numbers: Ids) -> list[str]:
        """Outside ids of numbers that a search returned."""
        known = len(self._item_ids)
        return [self._item_ids[number] if number < known else self._new_ids[number - known] for number in numbers.tolist()]

    def _eligible(self, allowed: Mask | None) -> tuple[Mask, Mask]:
        """What is kept of the main index and what is alive in the fresh tier, of what is allowed."""
        if allowed is None:
            return self.kept, self.alive
        mask = np.asarray(allowed)
        if mask.dtype != np.bool_ or mask.shape not in ((self.count,), (self.main.count,)):
            raise IncompatibleError(
                f"allowed has shape {mask.shape} of {mask.dtype}; give ({self.count},) bool, "
                f"or ({self.main.count},) to leave out new items"
            )
        wanted = np.pad(mask, (0, self.count - len(mask)))
        return self.kept & wanted[: self.main.count], self.alive & wanted[self.owners]


class LiveIndex:
    """The view of now, and the ways to change it. Safe to share between threads; processes share the journal's folder."""

    def __init__(self, main: VectorIndex, item_ids: Sequence[str], folder: Path, towers: str) -> None:
        """`item_ids`: outside id of each row of `main`; `towers`: fingerprint of what makes vectors for it.

        Raises IncompatibleError for a journal of another index or other towers, IntegrityError for a damaged one.
        """
        if len(item_ids) != main.count:
            raise IncompatibleError(f"{len(item_ids)} item ids for an index of {main.count}; use one release's parts")
        self._journal = Journal(folder, f"{towers}/{content_hash(list(item_ids))}")
        self._turn = threading.Lock()
        self._tier = _Tier(main, item_ids)
        self._view = self._tier.view()
        self.refresh()

    def put(self, item_ids: Sequence[str], vectors: Floats) -> None:
        """Add items, or give them new vectors (n, D); on disk when it returns. InputError for bad ids, vectors or an id twice."""
        vectors = checked_rows(vectors, "vectors")
        check_width(vectors, self._tier.main.dimension)
        ids = tuple(check_id(item_id, "item id") for item_id in item_ids)
        if len(ids) != len(vectors) or len(set(ids)) < len(vectors):
            raise InputError(f"{len(ids)} ids, {len(set(ids))} of them different, for {len(vectors)} vectors; give one of each")
        self._write(Record("put", ids, vectors))

    def delete(self, item_ids: Sequence[str]) -> None:
        """Take items out of every answer; on disk when it returns. Ids that nobody has put are no error."""
        self._write(Record("delete", tuple(check_id(item_id, "item id") for item_id in item_ids)))

    def refresh(self) -> bool:
        """Take in what other processes wrote; says whether there was any. Costs some microseconds when there was none."""
        with self._turn:
            return self._catch_up()

    def view(self) -> View:
        """What is listed now."""
        if self._turn.acquire(blocking=False):  # while another thread takes changes in, the view before them is as good
            try:
                self._catch_up()
            finally:
                self._turn.release()
        return self._view

    def search(self, queries: Floats, k: int, allowed: Mask | None = None) -> tuple[Floats, Ids]:
        """`View.search` on what is listed now."""
        return self.view().search(queries, k, allowed)

    def _write(self, record: Record) -> None:
        if not record.ids:
            return
        with self._turn, self._journal.writing():
            self._journal.append(record)
            self._catch_up()
            if self._journal.size > 2 * self._tier.bytes_needed() + _SPARE_BYTES:
                self._journal.rewrite(self._tier.records())

    def _catch_up(self) -> bool:
        over, records = self._journal.read()
        if over:
            self._tier = _Tier(self._tier.main, self._tier.item_ids, self._tier.version)
        for record in records:
            self._tier.take(record)
        if over or records:
            self._view = self._tier.view()
        return over or bool(records)


class _Tier:
    """The fresh tier while it grows. Rows are only ever added, so that views can share them; updates leave dead rows behind."""

    def __init__(self, main: VectorIndex, item_ids: Sequence[str], version: int = 0) -> None:
        self.main, self.item_ids, self.version = main, item_ids, version
        self._number = {item_id: number for number, item_id in enumerate(item_ids)}
        self._new_ids: list[str] = []
        self._hidden = np.zeros(main.count, np.bool_)
        self._rows = np.empty((_ROOM, main.dimension), np.float32)
        self._owners = np.empty(_ROOM, np.int64)
        self._alive = np.zeros(_ROOM, np.bool_)
        self._used = 0
        self._row_of: dict[int, int] = {}

    def take(self, record: Record) -> None:
        """One more change."""
        self.version += 1
        if record.kind == "delete":
            self._hide([self._number[item_id] for item_id in record.ids if item_id in self._number])
            return
        numbers = [self._numbered(item_id) for item_id in record.ids]
        if record.vectors is not None:
            self._hide(numbers)
            self._add(numbers, record.vectors)

    def view(self) -> View:
        used = slice(0, self._used)
        return View(
            self.main,
            self.version,
            ~self._hidden,
            self._rows[used],
            self._owners[used],
            self._alive[used].copy(),
            len(self._number),
            self.item_ids,
            self._new_ids,
        )

    def records(self) -> list[Record]:
        """The shortest journal that leads here."""
        gone = np.flatnonzero(self._hidden).tolist()
        deleted = tuple(self.item_ids[number] for number in gone if number not in self._row_of)
        numbers, rows = list(self._row_of), list(self._row_of.values())
        put = Record("put", tuple(self._id(number) for number in numbers), self._rows[rows])
        every = [Record("name", tuple(self._new_ids)), Record("delete", deleted), put]
        return [record for record in every if record.ids]

    def bytes_needed(self) -> int:
        """About how long that journal is."""
        rows = len(self._row_of) * (4 * self.main.dimension + _ROW_OVERHEAD)
        return rows + _ROW_OVERHEAD * (len(self._new_ids) + int(np.count_nonzero(self._hidden)))

    def _id(self, number: int) -> str:
        return self.item_ids[number] if number < self.main.count else self._new_ids[number - self.main.count]

    def _numbered(self, item_id: str) -> int:
        if item_id not in self._number:
            self._number[item_id] = len(self._number)
            self._new_ids.append(item_id)
        return self._number[item_id]

    def _hide(self, numbers: list[int]) -> None:
        self._hidden[[number for number in numbers if number < self.main.count]] = True
        self._alive[[self._row_of.pop(number) for number in numbers if number in self._row_of]] = False

    def _add(self, numbers: list[int], vectors: Floats) -> None:
        if self._used + len(numbers) > len(self._rows):
            self._make_room(len(numbers))
        at = np.arange(self._used, self._used + len(numbers))
        self._rows[at], self._owners[at], self._alive[at] = vectors, numbers, True
        self._row_of.update(zip(numbers, at.tolist(), strict=True))
        self._used += len(numbers)

    def _make_room(self, more: int) -> None:
        """Move what is alive to new arrays, twice as long as that takes; views keep the old ones."""
        alive = np.flatnonzero(self._alive[: self._used])
        room = 2 * (len(alive) + more) + _ROOM
        rows, owners = np.empty((room, self.main.dimension), np.float32), np.empty(room, np.int64)
        rows[: len(alive)], owners[: len(alive)] = self._rows[alive], self._owners[alive]
        self._rows, self._owners, self._used = rows, owners, len(alive)
        self._alive = np.arange(room) < len(alive)
        self._row_of = dict(zip(owners[: len(alive)].tolist(), range(len(alive)), strict=True))


def _merged(first: tuple[Floats, Ids], second: tuple[Floats, Ids], k: int) -> tuple[Floats, Ids]:
    """The k best of two answers that share no item."""
    scores, ids = np.concatenate([first[0], second[0]], axis=1), np.concatenate([first[1], second[1]], axis=1)
    return unpack(np.sort(pack(scores, np.maximum(ids, 0)), axis=1)[:, :k])
