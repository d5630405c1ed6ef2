"""What was put and deleted since an index was built: a fresh tier that is searched exactly, and tombstones.

In: changes (`Record`s), one after the other. Out: `View`s, each of which is the catalogue at one moment and never changes.
Numbers: an item of the main index keeps its row there, also after an update; a new one gets the next free number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from retrieval import exact
from retrieval.checks import Floats, Mask, check_k, check_width, checked_rows
from retrieval.index import VectorIndex
from retrieval.records import Record
from retrieval.topk import pack, unpack
from tandem.core.errors import IncompatibleError

Ids = NDArray[np.int64]
Columns = Mapping[str, NDArray[Any]]

_ROOM: Final = 1_024
_ROW_OVERHEAD: Final = 64


@dataclass(frozen=True, eq=False)
class View:
    """What is listed at one moment; `version` counts the changes seen.

    `kept` (items of the main index,) bool: still listed as they are there. The fresh tier has rows (F, D) of the items `owners`
    (F,), of which those `alive` (F,) bool count; `columns` (F, ...) are what was put beside them.
    """

    main: VectorIndex
    version: int
    kept: Mask
    rows: Floats
    owners: Ids
    alive: Mask
    count: int
    columns: Columns
    _item_ids: Sequence[str] = field(repr=False)
    _new_ids: Sequence[str] = field(repr=False)
    _new_number: Mapping[str, int] = field(repr=False)

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

    def new_row(self, item_id: str) -> int | None:
        """The number of an item that the main index does not know; None if it was not there yet."""
        number = self._new_number.get(item_id)
        return None if number is None or number >= self.count else number

    def rows_of(self, numbers: Ids) -> Ids:
        """The row in the fresh tier of each number, in the shape given; -1 for an item that is as it is in the main index."""
        owners, rows = self._by_owner
        if not len(owners):
            return np.full(np.shape(numbers), -1, np.int64)
        place = np.minimum(np.searchsorted(owners, numbers), len(owners) - 1)
        return np.where(owners[place] == numbers, rows[place], -1)

    @cached_property
    def _by_owner(self) -> tuple[Ids, Ids]:
        """Numbers with a row in the fresh tier, ascending, and their newest row; a deleted new item keeps its last one."""
        last = _last_rows(self.owners)
        return self.owners[last], last

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


class FreshTier:
    """The fresh tier while it grows. Rows are only ever added, so that views can share them; updates leave dead rows behind.

    `numbers`: the row of each of `item_ids` where the caller knows them anyway. `columns` says by name what is kept beside each
    vector: an empty array of that type, (0, ...).
    """

    def __init__(
        self,
        main: VectorIndex,
        item_ids: Sequence[str],
        numbers: Mapping[str, int] | None = None,
        columns: Columns | None = None,
        version: int = 0,
    ) -> None:
        self.main, self.item_ids, self.version = main, item_ids, version
        self._main_number = {item_id: number for number, item_id in enumerate(item_ids)} if numbers is None else numbers
        self._new_number: dict[str, int] = {}
        self._new_ids: list[str] = []
        self._hidden = np.zeros(main.count, np.bool_)
        self._rows = np.empty((_ROOM, main.dimension), np.float32)
        self._owners = np.empty(_ROOM, np.int64)
        self._columns = {name: _with_room(column, _ROOM) for name, column in (columns or {}).items()}
        self._alive = np.zeros(_ROOM, np.bool_)
        self._used = 0
        self._row_of: dict[int, int] = {}

    def number(self, item_id: str) -> int | None:
        """The item's number; None for one that was never listed."""
        known = self._main_number.get(item_id)
        return self._new_number.get(item_id) if known is None else known

    def take(self, record: Record, columns: Columns | None = None) -> None:
        """One more change; with vectors come their `columns`."""
        self.version += 1
        if record.kind == "delete":
            known = [self.number(item_id) for item_id in record.ids]
            self._hide([number for number in known if number is not None])
            return
        numbers = [self._numbered(item_id) for item_id in record.ids]
        if record.vectors is not None:
            self._hide(numbers)
            self._add(numbers, record.vectors, columns or {})

    def view(self) -> View:
        used = slice(0, self._used)
        return View(
            self.main,
            self.version,
            ~self._hidden,
            self._rows[used],
            self._owners[used],
            self._alive[used].copy(),
            self._count,
            {name: column[used] for name, column in self._columns.items()},
            self.item_ids,
            self._new_ids,
            self._new_number,
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

    @property
    def _count(self) -> int:
        return self.main.count + len(self._new_ids)

    def _id(self, number: int) -> str:
        return self.item_ids[number] if number < self.main.count else self._new_ids[number - self.main.count]

    def _numbered(self, item_id: str) -> int:
        known = self.number(item_id)
        if known is not None:
            return known
        self._new_number[item_id] = number = self._count
        self._new_ids.append(item_id)
        return number

    def _hide(self, numbers: list[int]) -> None:
        self._hidden[[number for number in numbers if number < self.main.count]] = True
        self._alive[[self._row_of.pop(number) for number in numbers if number in self._row_of]] = False

    def _add(self, numbers: list[int], vectors: Floats, columns: Columns) -> None:
        if self._used + len(numbers) > len(self._rows):
            self._make_room(len(numbers))
        at = np.arange(self._used, self._used + len(numbers))
        self._rows[at], self._owners[at], self._alive[at] = vectors, numbers, True
        for name, column in self._columns.items():
            column[at] = columns[name]
        self._row_of.update(zip(numbers, at.tolist(), strict=True))
        self._used += len(numbers)

    def _make_room(self, more: int) -> None:
        """Move what is needed to new arrays, twice as long as that takes; views keep the old ones."""
        kept = self._needed()
        room = 2 * (len(kept) + more) + _ROOM
        alive = np.zeros(room, np.bool_)
        alive[: len(kept)] = self._alive[kept]
        for name, column in self._columns.items():
            self._columns[name] = _with_room(column[kept], room)
        self._rows, self._owners = _with_room(self._rows[kept], room), _with_room(self._owners[kept], room)
        self._alive, self._used = alive, len(kept)
        self._row_of = {int(self._owners[row]): row for row in np.flatnonzero(alive).tolist()}

    def _needed(self) -> Ids:
        """Rows that are alive, and the last row of each new item that was deleted: somebody may have had it."""
        used = slice(0, self._used)
        last = _last_rows(self._owners[used])
        needed = self._alive[used].copy()
        needed[last[self._owners[last] >= self.main.count]] = True
        return np.flatnonzero(needed)


def _last_rows(owners: Ids) -> Ids:
    """The newest row of each owner, by owner."""
    order = np.argsort(owners, kind="stable")
    last = np.append(owners[order][1:] != owners[order][:-1], True)[: len(order)]
    newest: Ids = order[last]
    return newest


def _with_room(column: NDArray[Any], room: int) -> NDArray[Any]:
    """The column with as many rows as there is room for."""
    longer = np.empty((room, *column.shape[1:]), column.dtype)
    longer[: len(column)] = column
    return longer


def _merged(first: tuple[Floats, Ids], second: tuple[Floats, Ids], k: int) -> tuple[Floats, Ids]:
    """The k best of two answers that share no item."""
    scores, ids = np.concatenate([first[0], second[0]], axis=1), np.concatenate([first[1], second[1]], axis=1)
    return unpack(np.sort(pack(scores, np.maximum(ids, 0)), axis=1)[:, :k])
