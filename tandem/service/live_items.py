"""Items put and deleted while a release answers: from the workspace's journal into the release's retriever, and back.

In: the journal of the data folder, which all workers and processes share, and a loaded release. Out: a retriever that knows what
was put since it was trained. Texts are read by the release's encoder; where another process has done so already, its vectors are
taken. Requests look at most every `every_s` seconds; a change that comes through this process is seen at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from feature_repo.item_changes import Change, ItemChanges, checked_items
from feature_repo.store import items_schema, load_items_until
from retrieval.fresh import card_of
from retrieval.retriever import Retriever
from tandem.core.errors import InputError, NotFoundError, TandemError
from tandem.core.schema import ITEMS
from tandem.service.problems import log_line
from tandem.service.texts import item_texts

LOOK_EVERY_S: Final = 0.25
_AT_ONCE: Final = 256


class ItemEncoder(Protocol):
    """Item texts -> (n, T) float32; `fingerprint` says by which model."""

    @property
    def fingerprint(self) -> str: ...

    def items(self, texts: Sequence[str]) -> NDArray[np.float32]: ...


class LiveItems:
    """Keeps one retriever up to date; shared between threads: one looks, the others go on meanwhile."""

    def __init__(
        self,
        data_folder: Path,
        retriever: Retriever,
        encoder: ItemEncoder,
        every_s: float = LOOK_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes in what the journal holds; what cannot be read then is tried again at every look."""
        self._data, self._retriever, self._encoder = data_folder, retriever, encoder
        self._every_s, self._clock = every_s, clock
        self._changes = ItemChanges(data_folder)
        self._waiting: list[Change] = []
        self._looking = threading.Lock()
        self._next_look = 0.0
        self._sound = True
        self.look()

    def look(self) -> bool:
        """Take in what is new; says whether the journal could be read. What is damaged leaves the items as they were."""
        if self._clock() >= self._next_look and self._looking.acquire(blocking=False):
            try:
                self._take_in()
            finally:
                self._looking.release()
        return self._sound

    def put(self, draft: pl.DataFrame) -> bool:
        """Keep one item (a row of the items table) and list it; says whether it is new. InputError as in `checked_items`."""
        items = checked_items(draft, items_schema(self._data))
        self._take_in_now()
        new = not self._listed(items["item_id"][0])
        self._changes.put(items, self._encoder.items(item_texts(items)), self._encoder.fingerprint)
        self._take_in_now()
        return new

    def delete(self, item_id: str) -> None:
        """Keep that an item is gone, and list it no more. Raises NotFoundError for one that nobody has."""
        self._take_in_now()
        if not self._listed(item_id) and item_id not in load_items_until(self._data, self._changes)[0]["item_id"]:
            raise NotFoundError(f"no item {item_id!r}, neither in the data nor in the release that answers; nothing was deleted")
        self._changes.delete([item_id])
        self._take_in_now()

    def _listed(self, item_id: str) -> bool:
        listing = self._retriever.listing
        row = listing.row(item_id)
        return row is not None and bool(listing.listed[row])

    def _take_in_now(self) -> None:
        with self._looking:
            self._take_in()

    def _take_in(self) -> None:
        self._next_look = self._clock() + self._every_s
        try:
            self._waiting += self._changes.read()
            while self._waiting:
                self._list_sound(self._waiting[0])
                del self._waiting[0]
        except (OSError, TandemError, ValueError, RuntimeError) as error:
            if self._sound:
                log_line("item_changes_unavailable", reason=type(error).__name__)
            self._sound = False
        else:
            self._sound = True

    def _list_sound(self, change: Change) -> None:
        """List a change; one that this release cannot take is passed over, for it would hold up all that came after it."""
        try:
            self._list(change)
        except InputError as error:
            log_line("item_change_refused", items=len(change.item_ids), reason=type(error).__name__)

    def _list(self, change: Change) -> None:
        if change.at_us <= self._retriever.items_until:
            return
        if change.rows is None:
            self._retriever.delete(change.item_ids)
            return
        for start in range(0, len(change.item_ids), _AT_ONCE):
            part = change.only(range(start, min(start + _AT_ONCE, len(change.item_ids))))
            self._retriever.put([card_of(_whole(row)) for row in part.rows or ()], self._vectors(part))

    def _vectors(self, change: Change) -> NDArray[np.float32]:
        if change.vectors is not None and change.encoder == self._encoder.fingerprint:
            return change.vectors
        titles = pl.DataFrame([(row["title"], row["text"]) for row in change.rows or ()], schema=["title", "text"], orient="row")
        return self._encoder.items(item_texts(titles))


def _whole(row: dict[str, object]) -> dict[str, object]:
    """A row with the columns that every item has."""
    return {**dict.fromkeys(ITEMS), **row}
