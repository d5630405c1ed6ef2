"""A built index that takes additions, updates and deletions: immutable main index + fresh tier (`tier.py`) + a journal on disk.

In: vectors by outside id, from any process. Out: the k best of what is listed now, best first.

    live = LiveIndex(index, item_ids, folder / "journal", towers.fingerprint)
    live.put(["a new mug"], vectors)
    scores, numbers = live.search(queries, 10)

A change is durable when `put` or `delete` returns, and seen by every process at its next search. The service keeps items, not
vectors, in its own journal (`feature_repo/item_changes.py`), because those outlive a release; the tier is the same.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from retrieval.checks import Floats, Mask, check_width, checked_rows
from retrieval.index import VectorIndex
from retrieval.records import Record
from retrieval.tier import FreshTier, View
from tandem.core.errors import IncompatibleError, InputError
from tandem.core.folders import content_hash
from tandem.core.journal import Journal
from tandem.core.schema import check_id

Ids = NDArray[np.int64]

__all__ = ["LiveIndex", "View"]

_SPARE_BYTES: Final = 64 << 20


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
        self._tier = FreshTier(main, item_ids)
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
            self._journal.append(record.packed())
            self._catch_up()
            if self._journal.size > 2 * self._tier.bytes_needed() + _SPARE_BYTES:
                self._journal.rewrite([each.packed() for each in self._tier.records()])

    def _catch_up(self) -> bool:
        over, records = self._journal.read()
        if over:
            self._tier = FreshTier(self._tier.main, self._tier.item_ids, version=self._tier.version)
        for record in records:
            self._tier.take(Record.unpacked(record))
        if over or records:
            self._view = self._tier.view()
        return over or bool(records)
