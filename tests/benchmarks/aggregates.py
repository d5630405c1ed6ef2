"""`features.py aggregates`: count tables of online-retail, many times over, against the same figures in pandas and a mere read.

In: `data/online-retail` beside the project, copied with users of their own and times some minutes apart; items are shared, so
their histories grow. Out: seconds, memory, and the largest difference between the two answers on a sample. The table of histories
is left out: at 100 entries a row it is a hundred times the events, for anybody.
"""

from __future__ import annotations

import json
import os
import random
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pandas as pd
import polars as pl

DATA: Final = Path(os.environ.get("TANDEM_SHARED_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "online-retail"
WINDOWS: Final = (1, 7, 30)
STRENGTH: Final = 20.0
APART: Final = timedelta(minutes=7)
_SAMPLE: Final = 300
KEYS: Final = {"user": "user_id", "item": "item_id"}


def prepare(folder: Path, copies: int) -> int:
    """Write `events.parquet` with so many copies of the data set; returns the number of events."""
    import tomllib

    from feature_repo.sources import read_source
    from feature_repo.sources.table import TableMapping

    example = tomllib.loads((Path(__file__).parents[2] / "docs" / "examples" / "online-retail.toml").read_text())
    raw = read_source("table", DATA / "online_retail.parquet", TableMapping.parse(example["table"]), 0)
    raw.source.write(folder / "source.json")
    raw.items.write_parquet(folder / "items.parquet")
    events = raw.events.sort("timestamp", "event_id")
    parts = [
        events.lazy().with_columns(
            pl.format("{}-{}", "event_id", pl.lit(copy)).alias("event_id"),
            pl.format("{}-{}", "user_id", pl.lit(copy)).alias("user_id"),
            pl.col("timestamp") + copy * APART,
        )
        for copy in range(copies)
    ]
    pl.concat(parts).sort("timestamp", "event_id").sink_parquet(folder / "events.parquet")
    return copies * events.height


def read(folder: Path) -> dict[str, Any]:
    """The physical limit: every column of the file, once."""
    started = time.perf_counter(), time.process_time()
    rows = pl.scan_parquet(folder / "events.parquet").collect().height
    return _spent(started) | {"rows": rows}


def ours(folder: Path) -> dict[str, Any]:
    """`user_stats` and `item_stats`, as `build_tables` makes them."""
    from feature_repo.aggregates import AggregateConfig, count_tables, counted_events  # build_tables makes histories, too
    from tandem.core.schema import Source

    started = time.perf_counter(), time.process_time()
    source, config = Source.read(folder / "source.json"), AggregateConfig(windows=WINDOWS, prior_strength=STRENGTH)
    line = counted_events(pl.scan_parquet(folder / "events.parquet"), source, config)
    tables = count_tables(line, list(KEYS), source, config)
    spent = _spent(started)
    return spent | {"rows": sum(table.height for table in tables.values()), "sample": _sample(folder, tables)}


def in_pandas(folder: Path) -> dict[str, Any]:
    """The same tables by a good pandas user: categories for keys, sorts, cumulative sums and as-of merges; no Python per row."""
    started = time.perf_counter(), time.process_time()
    columns = ["user_id", "item_id", "action", "timestamp", "value"]
    events = pd.read_parquet(folder / "events.parquet", columns=columns)
    for name in ("user_id", "item_id", "action"):
        events[name] = events[name].astype("category")
    source = json.loads((folder / "source.json").read_text())
    tasks = {task["name"]: task for task in source["tasks"]}
    marks = pd.DataFrame({"event_timestamp": events["timestamp"].astype("datetime64[us, UTC]")})
    marks["history"] = events["action"].isin(source["history"]).astype("int64")
    for name, task in tasks.items():
        hit = events["action"] == task["action"]
        if task.get("at_least") is not None:
            hit &= events["value"] >= task["at_least"]
        marks[name] = hit.astype("int64")
    counted = ["history", *tasks]
    known = (marks[counted] > 0).any(axis=1)
    value = events["value"].where(marks["history"] > 0)
    marks["value_sum"], marks["value_count"] = value.fillna(0.0), value.notna().astype("int64")
    overall = marks[known].groupby("event_timestamp", sort=True)[counted].sum().cumsum().add_prefix("all_").reset_index()
    tables = {f"{entity}_stats": _in_pandas(events, marks, known, entity, counted, tasks, overall) for entity in KEYS}
    spent = _spent(started)
    found = {name: pl.from_pandas(table) for name, table in tables.items()}
    return spent | {"rows": sum(len(table) for table in tables.values()), "sample": _sample(folder, found)}


def _in_pandas(
    events: pd.DataFrame,
    marks: pd.DataFrame,
    known: pd.Series,
    entity: str,
    counted: list[str],
    tasks: Any,
    overall: pd.DataFrame,
) -> pd.DataFrame:
    key = KEYS[entity]
    frame = marks[known].assign(key=events.loc[known, key].cat.codes)
    sums = frame.groupby(["key", "event_timestamp"], sort=True)[[*counted, "value_sum", "value_count"]].sum().reset_index()
    when = sums["event_timestamp"].where(sums["history"] > 0)
    totals = sums[["key", "event_timestamp"]].copy()
    totals[[*counted, "value_sum", "value_count"]] = sums.groupby("key")[[*counted, "value_sum", "value_count"]].cumsum()
    totals["first_time"] = when.groupby(sums["key"]).transform("min").where(totals["history"] > 0)
    totals["last_time"] = when.groupby(sums["key"]).ffill()
    days = sums.loc[sums["history"] > 0, ["key", "event_timestamp"]].assign(
        event_timestamp=lambda rows: rows["event_timestamp"].dt.floor("D")
    )
    days = days.drop_duplicates()
    ends = [days.assign(event_timestamp=days["event_timestamp"] + pd.Timedelta(days=window)) for window in WINDOWS]
    rows = pd.concat([sums[["key", "event_timestamp"]], *ends]).drop_duplicates().sort_values("event_timestamp", kind="stable")
    rows["event_timestamp"] = rows["event_timestamp"].astype(sums["event_timestamp"].dtype)
    by_time = totals.sort_values("event_timestamp", kind="stable")
    rows = pd.merge_asof(rows, by_time, on="event_timestamp", by="key")
    before = by_time[["key", "event_timestamp", "history"]].rename(columns={"event_timestamp": "edge", "history": "earlier"})
    for window in WINDOWS:
        edge = rows["event_timestamp"].dt.floor("D") - pd.Timedelta(days=window - 1) - pd.Timedelta(microseconds=1)
        rows["edge"] = edge.astype(sums["event_timestamp"].dtype)
        rows["earlier"] = pd.merge_asof(rows[["key", "edge"]], before, on="edge", by="key")["earlier"].fillna(0).to_numpy()
        rows[f"{entity}_events_{window}d"] = (rows["history"] - rows["earlier"]).astype("int64")
    rows = pd.merge_asof(rows, overall, on="event_timestamp")
    table = rows[["event_timestamp", *(f"{entity}_events_{window}d" for window in WINDOWS)]].copy()
    table.insert(0, key, events[key].cat.categories.to_numpy()[rows["key"]])
    table[f"{entity}_events"] = rows["history"].astype("int64")
    for name in tasks:
        mean = (rows[f"all_{name}"] / rows["all_history"]).where(rows["all_history"] > 0, 0.0)
        table[f"{entity}_{name}"] = rows[name].astype("int64")
        table[f"{entity}_{name}_rate"] = (rows[name] + STRENGTH * mean) / (rows["history"] + STRENGTH)
    table[f"{entity}_mean_value"] = (rows["value_sum"] / rows["value_count"]).where(rows["value_count"] > 0)
    epoch = pd.Timestamp(0, tz="UTC")
    for name in ("first_time", "last_time") if entity == "item" else ("last_time",):
        table[f"{entity}_{name}"] = (rows[name] - epoch) // pd.Timedelta(microseconds=1)
    return table.sort_values([key, "event_timestamp"])


def differences(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two samples, relative to the larger value; infinite where rows or features differ."""
    worst = 0.0
    for left, right in zip(one["sample"], other["sample"], strict=True):
        if left.keys() != right.keys():
            return float("inf")
        for name, value in left.items():
            same = value == right[name]
            if not same and not (isinstance(value, float) and isinstance(right[name], float)):
                return float("inf")
            worst = max(worst, 0.0 if same else abs(value - right[name]) / max(1.0, abs(value)))
    return worst


def _sample(folder: Path, tables: dict[str, pl.DataFrame]) -> list[dict[str, Any]]:
    """All rows of a few keys of each table, with their columns in one order."""
    rows = []
    for entity, key in KEYS.items():
        ids = pl.scan_parquet(folder / "events.parquet").select(pl.col(key).unique().sort()).collect()[key]
        chosen = random.Random(0).sample(ids.to_list(), 3)
        found = tables[f"{entity}_stats"].filter(pl.col(key).is_in(chosen)).sort(key, "event_timestamp")
        text = found.select(sorted(found.columns)).with_columns(pl.col("event_timestamp").dt.epoch("us"))
        rows += text.gather_every(max(1, text.height // _SAMPLE)).fill_nan(None).to_dicts()
    return rows


def _spent(started: tuple[float, float]) -> dict[str, float]:
    return {"seconds": time.perf_counter() - started[0], "cpu": time.process_time() - started[1]}
