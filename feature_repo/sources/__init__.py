"""Raw files to events, items and users: one reader per kind of source, all giving `Raw`.

In: the kind, the path and a seed (for synthetic clocks). Out: `Raw`. The built-in world is made by `world.simulate`, not read.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from feature_repo.sources import goodbooks, metarank, movielens, table
from feature_repo.sources.files import require
from feature_repo.sources.raw import Raw
from feature_repo.sources.table import TableMapping
from tandem.core.errors import InputError

KINDS: Final = ("movielens", "goodbooks", "metarank", "table")
"""What `tandem import` reads."""

__all__ = ["KINDS", "Raw", "TableMapping", "read_source"]


def read_source(kind: str, path: Path, mapping: TableMapping | None, seed: int, *, now: datetime | None = None) -> Raw:
    """Read one source of `kind` at `path`.

    `mapping` is needed by "table" only. `now` (default: the clock) is what "in the future" is measured against. Raises
    InputError for an unknown kind or files that are not of that kind, NotFoundError for a missing path.
    """
    now = now or datetime.now(UTC)
    if kind not in KINDS:
        hint = "run `tandem simulate` for the built-in world" if kind == "world" else f"use one of {', '.join(KINDS)}"
        raise InputError(f"there is nothing to import for kind {kind!r}; {hint}")
    require(path)
    if kind == "movielens":
        return movielens.read(path, now)
    if kind == "goodbooks":
        return goodbooks.read(path, now, seed)
    if kind == "metarank":
        return metarank.read(path, now, seed)
    if mapping is None:
        raise InputError(
            "kind 'table' needs to know which column is what; "
            "add a [table] section to tandem.toml, as docs/examples/online-retail.toml shows"
        )
    return table.read(path, mapping, now)
