"""Who was erased, by hash: asked by whatever takes in or gives out something about users.

In: `data/erased.json`. Out: yes or no for an id, and tables without those who were erased.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import polars as pl

from tandem.core.folders import read_json

ERASED_FILE: Final = "erased.json"


class ErasedUsers:
    """Who was erased, by hash; sees an erasure of another process with the next question."""

    def __init__(self, data_folder: Path) -> None:
        self._path = data_folder / ERASED_FILE
        self._written: int | None = None
        self._hashes: frozenset[str] = frozenset()

    def __contains__(self, user_id: str) -> bool:
        return user_hash(user_id) in self.hashes

    @property
    def hashes(self) -> frozenset[str]:
        written = self._path.stat().st_mtime_ns if self._path.is_file() else None
        if written != self._written:
            self._written, self._hashes = written, frozenset(read_json(self._path)["users"] if written else ())
        return self._hashes

    def drop_from(self, table: pl.DataFrame) -> pl.DataFrame:
        """A table with a column user_id, without them."""
        hashes = self.hashes
        if not hashes:
            return table
        gone = [name for name in table["user_id"].drop_nulls().unique().to_list() if user_hash(name) in hashes]
        return table.filter(~pl.col("user_id").is_in(gone).fill_null(False))


def user_hash(user_id: str) -> str:
    """SHA-256 of an id: says whether it was erased without saying whose it is, to anybody who does not know the id."""
    return hashlib.sha256(user_id.encode()).hexdigest()
