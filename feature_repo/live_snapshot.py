"""The current snapshot as a running service sees it: a newer version takes its place, and rows that were pushed lie over it.

In: the snapshot folder, and the items of a release. Out: their features by row of the release. Rows pushed since a version was
written are small Parquet parts in `snapshot/fresh/<version>/`, which every process reads.
"""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from feature_repo.snapshot import CURRENT, Snapshot
from feature_repo.store import write_parquet
from feature_repo.views import TIMESTAMP, ViewSchema
from tandem.core.errors import NotFoundError, TandemError

FRESH: Final = "fresh"
LOOK_EVERY_S: Final = 0.5


def write_fresh(snapshot_folder: Path, view: ViewSchema, rows: pl.DataFrame) -> None:
    """Lay the newest of a view's rows of each item over the current snapshot; without one there is nothing to lie over."""
    current = snapshot_folder / CURRENT
    if not current.is_file():
        return
    version = current.read_text(encoding="utf-8").strip()
    folder = snapshot_folder / FRESH / version
    folder.mkdir(parents=True, exist_ok=True)
    newest = rows.sort("item_id", TIMESTAMP, maintain_order=True).unique("item_id", keep="last", maintain_order=True)
    numeric = [pl.col(each.name).alias(view.snapshot_column(each.name)) for each in view.fields if each.is_numeric]
    write_parquet(newest.select("item_id", *numeric), folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet")
    for old in (snapshot_folder / FRESH).iterdir():
        if old.name != version and not (snapshot_folder / old.name).is_dir():
            shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class _Layer:
    """What was pushed of one feature view: `values` (M, F) of `items` (M,), ascending, in the snapshot's `columns` (F,)."""

    items: NDArray[np.int64]
    values: NDArray[np.float64]
    columns: NDArray[np.int64]

    def lay_over(self, found: NDArray[np.float64], items: NDArray[np.int64]) -> None:
        """Write the pushed values into the rows `found` of those `items` that have some."""
        if len(self.items):
            place = np.minimum(np.searchsorted(self.items, items), len(self.items) - 1)
            pushed = np.flatnonzero(self.items[place] == items)
            found[pushed[:, None], self.columns] = self.values[place[pushed]]


@dataclass(frozen=True)
class _View:
    """One version of the snapshot, and the parts that lie over it.

    `rows` (N,): the snapshot's row of each item of the release. `chosen`: the snapshot's columns that are read, None for all.
    """

    snapshot: Snapshot
    rows: NDArray[np.int64]
    chosen: NDArray[np.int64] | None
    parts: tuple[str, ...] = ()
    layers: tuple[_Layer, ...] = ()


class LiveSnapshot:
    """Item features for the items of one release; looks for a newer version and new parts at most every `every_s` seconds.

    What is damaged or half there leaves the old view in use. Shared between threads: one looks, the others go on meanwhile.
    """

    def __init__(
        self,
        folder: Path,
        item_ids: Sequence[str],
        every_s: float = LOOK_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
        features: Mapping[str, str] | None = None,
    ) -> None:
        """`features`: what a release calls its features -> the snapshot's columns; None reads all, under their own names.

        Raises NotFoundError when there is no snapshot or it lacks a column, IntegrityError when it is damaged.
        """
        self._folder, self._every_s, self._clock, self._features = folder, every_s, clock, features
        self._item_ids = pl.Series("item_id", item_ids, pl.String)
        self._looking = threading.Lock()
        self._view = self._with_parts(self._opened())
        self._next_look = clock() + every_s

    @property
    def names(self) -> tuple[str, ...]:
        return self._view.snapshot.names if self._features is None else tuple(self._features)

    @property
    def as_of(self) -> datetime:
        """The moment that the version in use was written for."""
        return self._view.snapshot.as_of

    @property
    def version(self) -> str:
        return self._view.snapshot.version

    def gather(self, items: NDArray[np.int64]) -> NDArray[np.float64]:
        """Features of items given by their row in the release: `(len(items), len(names)) float64`, NaN where missing."""
        self._look()
        view = self._view
        found = view.snapshot.gather(view.rows[items])
        for layer in view.layers:
            layer.lay_over(found, items)
        return found if view.chosen is None else found[:, view.chosen]

    def _look(self) -> None:
        if self._clock() < self._next_look or not self._looking.acquire(blocking=False):
            return
        try:
            self._next_look = self._clock() + self._every_s
            current = (self._folder / CURRENT).read_text(encoding="utf-8").strip()
            view = self._view if current == self._view.snapshot.version else self._opened()
            self._view = self._with_parts(view)
        except (OSError, TandemError, pl.exceptions.PolarsError):
            return
        finally:
            self._looking.release()

    def _opened(self) -> _View:
        snapshot = Snapshot.load(self._folder)
        missing = [column for column in (self._features or {}).values() if column not in snapshot.names]
        if missing:
            raise NotFoundError(f"snapshot {snapshot.version} lacks {missing}; run `tandem features materialize`")
        places = None if self._features is None else [snapshot.names.index(column) for column in self._features.values()]
        return _View(snapshot, snapshot.rows_of(self._item_ids), None if places is None else np.array(places, np.int64))

    def _with_parts(self, view: _View) -> _View:
        """The view with all parts that lie over its version; the newest row of an item counts."""
        folder = self._folder / FRESH / view.snapshot.version
        parts = tuple(sorted(path.name for path in folder.glob("[0-9]*.parquet")))
        if parts == view.parts:
            return view
        by_view: dict[tuple[str, ...], list[pl.DataFrame]] = {}
        for part in parts:
            rows = pl.read_parquet(folder / part)
            by_view.setdefault(tuple(rows.columns), []).append(rows)
        layers = tuple(self._layer(view.snapshot, pl.concat(rows, how="vertical_relaxed")) for rows in by_view.values())
        return replace(view, parts=parts, layers=layers)

    def _layer(self, snapshot: Snapshot, rows: pl.DataFrame) -> _Layer:
        newest = rows.unique("item_id", keep="last", maintain_order=True)
        known = self._item_ids.to_frame().with_row_index("item")
        placed = newest.join(known, on="item_id").sort("item")
        names = [name for name in snapshot.names if name in rows.columns]
        values = placed.select(pl.col(name).cast(pl.Float64).fill_null(float("nan")) for name in names).to_numpy()
        columns = np.array([snapshot.names.index(name) for name in names], np.int64)
        return _Layer(placed["item"].cast(pl.Int64).to_numpy(), values, columns)
