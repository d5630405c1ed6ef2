"""The snapshot: a copy of the newest numeric item features, one row per item, read by memory map. No Feast here.

In: the item views' offline tables and a moment. Out: `snapshot/<version>/` with `features.npy` (float64, NaN = missing; an item's
features lie side by side, since ranking reads some hundred items whole), `items.parquet` (row order) and `manifest.json`;
`snapshot/CURRENT` names the version that readers take. Versions are immutable; writing one never disturbs those who read another.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl

from feature_repo.views import TIMESTAMP, ViewSchema, all_views
from tandem.core.errors import InputError, IntegrityError, NotFoundError
from tandem.core.folders import MANIFEST, content_hash, hash_files, read_json, verify_files, whole_folder, write_json, write_text

CURRENT: Final = "CURRENT"
_IDS: Final = "items.parquet"
_FEATURES: Final = "features.npy"
_KEPT: Final = 3
_LARGEST_EXACT: Final = 2**53


@dataclass(frozen=True)
class Snapshot:
    """Newest numeric item features of one moment: rows in the order of `item_ids`, columns in that of `names`."""

    folder: Path
    version: str
    as_of: datetime
    names: tuple[str, ...]
    item_ids: pl.Series

    @classmethod
    def load(cls, snapshot_folder: Path, version: str | None = None) -> Snapshot:
        """Open a version (default: CURRENT) after checking every file's hash.

        Raises NotFoundError when there is none and IntegrityError when it is damaged.
        """
        folder = snapshot_folder / (version or _current(snapshot_folder))
        if not (folder / MANIFEST).is_file():
            raise NotFoundError(f"no snapshot {folder.name!r} in {snapshot_folder}; run `tandem features materialize`")
        manifest = read_json(folder / MANIFEST)
        if _FEATURES not in manifest["files"]:
            raise NotFoundError(f"snapshot {folder.name} is of an older layout; run `tandem features materialize`")
        verify_files(folder, manifest["files"])
        ids = pl.read_parquet(folder / _IDS)["item_id"]
        return cls(folder, folder.name, datetime.fromisoformat(manifest["as_of"]), tuple(manifest["names"]), ids)

    def rows_of(self, ids: Sequence[str] | pl.Series) -> np.ndarray:
        """Row of each item, `(len(ids),) int64`; -1 where the snapshot does not know it."""
        known = pl.DataFrame({"item_id": self.item_ids}).with_row_index("row")
        asked = pl.DataFrame({"item_id": pl.Series(ids, dtype=pl.String)})
        rows = asked.join(known, on="item_id", how="left", maintain_order="left")["row"]
        return rows.cast(pl.Int64).fill_null(-1).to_numpy()

    def column(self, name: str) -> np.ndarray:
        """One feature, `(len(item_ids),) float64`, memory-mapped; NaN where it is missing. Raises NotFoundError."""
        if name not in self.names:
            raise NotFoundError(f"snapshot {self.version} has no column {name!r}; it has {list(self.names)}")
        return self._table[:, self.names.index(name)]

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """All features of some rows, `(len(rows), len(names)) float64`, in memory; a row of -1 is all NaN."""
        if not len(self.item_ids):
            return np.full((len(rows), len(self.names)), np.nan)
        found = np.take(self._table.view(np.ndarray), rows, axis=0, mode="wrap")
        found[rows < 0] = np.nan
        return found

    @cached_property
    def _table(self) -> np.ndarray:
        table: np.ndarray = np.load(self.folder / _FEATURES, mmap_mode="r", allow_pickle=False)
        return table


def write_snapshot(features_folder: Path, snapshot_folder: Path, as_of: datetime) -> str:
    """Write the newest item features known at `as_of` (aware), make that version CURRENT and return its name.

    A feature older than its view's ttl is missing. Equal content gives an equal version. The newest three versions are kept.
    """
    views = [view for view in all_views(features_folder) if view.entity == "item"]
    table = _newest_rows(features_folder.parent, views, as_of)
    names = [column for column in table.columns if column != "item_id"]
    version = f"{as_of.astimezone(UTC):%Y%m%dT%H%M%S%fZ}-{_fingerprint(table, views)}"
    if not (snapshot_folder / version / MANIFEST).is_file():
        with whole_folder(snapshot_folder / version) as folder:
            _write_table(folder, table, names)
            manifest = {"as_of": as_of.isoformat(), "names": names, "views": {view.name: view.version for view in views}}
            write_json(folder / MANIFEST, manifest | {"files": hash_files(folder)})
    write_text(snapshot_folder / CURRENT, version)
    _prune(snapshot_folder, version)
    return version


def _newest_rows(workspace: Path, views: Sequence[ViewSchema], as_of: datetime) -> pl.DataFrame:
    """[item_id, numeric features...] sorted by item_id; one row for every item that any view knows."""
    _check_names(views)
    parts = [_newest_of(workspace, view, as_of) for view in views]
    ids = pl.concat([part.select("item_id") for part in parts] or [pl.LazyFrame(schema={"item_id": pl.String})]).unique()
    for part in parts:
        ids = ids.join(part, on="item_id", how="left")
    return ids.sort("item_id").collect()


def _newest_of(workspace: Path, view: ViewSchema, as_of: datetime) -> pl.LazyFrame:
    path = workspace / view.path
    rows = pl.scan_parquet(str(path / "*.parquet") if path.is_dir() else str(path), glob=path.is_dir())
    numeric = [pl.col(each.name).alias(view.snapshot_column(each.name)) for each in view.fields if each.is_numeric]
    known = rows.filter(pl.col(TIMESTAMP) <= as_of, pl.col("item_id").is_not_null())
    if view.ttl_days:
        known = known.filter(pl.col(TIMESTAMP) >= as_of - timedelta(days=view.ttl_days))
    newest = known.select("item_id", TIMESTAMP, *numeric).sort("item_id", TIMESTAMP, maintain_order=True)
    return newest.unique("item_id", keep="last", maintain_order=True).drop(TIMESTAMP)


def _check_names(views: Sequence[ViewSchema]) -> None:
    names = [view.snapshot_column(each.name) for view in views for each in view.fields if each.is_numeric]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise InputError(f"two item views have features of one name: {double}; rename one")


def _write_table(folder: Path, table: pl.DataFrame, names: Sequence[str]) -> None:
    table.select("item_id").write_parquet(folder / _IDS)
    columns = [_as_float(table[name]) for name in names]
    whole = np.stack(columns, axis=1) if names else np.empty((table.height, 0))
    np.save(folder / _FEATURES, np.ascontiguousarray(whole), allow_pickle=False)


def _as_float(column: pl.Series) -> np.ndarray:
    """float64 with NaN for null; raises IntegrityError where an integer would lose digits."""
    if column.dtype == pl.Int64 and (column.abs() > _LARGEST_EXACT).any():
        raise IntegrityError(f"item feature {column.name!r} holds integers beyond 2^53, which float64 would round; scale it")
    return column.cast(pl.Float64).fill_null(float("nan")).to_numpy()


def _fingerprint(table: pl.DataFrame, views: Sequence[ViewSchema]) -> str:
    columns = {name: hashlib.sha256(_as_float(table[name]).tobytes()).hexdigest() for name in table.columns if name != "item_id"}
    versions = {view.name: view.version for view in views}
    return content_hash({"items": table["item_id"].to_list(), "columns": columns, "views": versions})[:8]


def _current(snapshot_folder: Path) -> str:
    path = snapshot_folder / CURRENT
    if not path.is_file():
        raise NotFoundError(f"no snapshot in {snapshot_folder}; run `tandem features materialize`")
    return path.read_text(encoding="utf-8").strip()


def _prune(snapshot_folder: Path, current: str) -> None:
    """Remove all but the newest versions; whoever has an older one mapped keeps it until done."""
    versions = [path for path in snapshot_folder.iterdir() if (path / MANIFEST).is_file() and path.name != current]
    for path in sorted(versions, key=lambda each: each.stat().st_mtime)[: -(_KEPT - 1)]:
        shutil.rmtree(path, ignore_errors=True)
