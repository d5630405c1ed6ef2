"""`make bench-features`: the feature plane against Feast's own stores on the same definitions, in the same run.

    python tests/benchmarks/features.py [join materialize read aggregates] [--repeats 5] [--rows 1000000] [--copies 20]

Every run of a rival is a process of its own, in turn with the others, so that its memory can be told; figures are medians.
DuckDB and dask are Feast's own offline stores; what is not installed is left out, and said. Redis: TANDEM_TEST_REDIS, else local.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl

START: Final = datetime(2026, 1, 1, tzinfo=UTC)
END: Final = datetime(2026, 7, 1, tzinfo=UTC)
REDIS: Final = os.environ.get("TANDEM_TEST_REDIS", "redis://127.0.0.1:6379/0").rsplit("/", 1)[0].removeprefix("redis://")
OURS: Final = "feature_repo.polars_store.PolarsOfflineStore"
ENGINE: Final = {"type": "feature_repo.engine.PolarsComputeEngine"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--copies", type=int, default=20, help="of online-retail, for aggregates; pandas needs 14 GB for twenty")
    parser.add_argument("--rival", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rival:
        print(json.dumps(RIVALS[asked.rival](asked.folder)))
        return
    print("versions:", ", ".join(f"{name} {version(name)}" for name in ("feast", "polars", "pyarrow", "redis")))
    for part in asked.parts:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[part](Path(folder), asked.copies if part == "aggregates" else asked.rows, asked.repeats)


# --- the as-of join ---------------------------------------------------------------------------------------------------------


def join(folder: Path, rows: int, repeats: int) -> None:
    """Training frames: `rows` events x 2 views (4.4 and 1 times as many rows), and a tenth of them x 5 views.

    Keys have 22 and 5 feature rows on average in `wide`, ten times as many in `long`. There dask is left out: it holds every pair
    of an event and a feature row of one key, 270 million of them, in memory.
    """
    few, many = max(1, rows // 50), max(1, rows // 5)
    two = [int(4.4 * rows), rows]
    shapes = {"wide": (rows, two, many), "long": (rows, two, few), "many": (rows // 10, [rows // 2] * 5, many)}
    for name, (events, sizes, users) in shapes.items():
        home = folder / name
        home.mkdir()
        entities(home / "entities.parquet", events, users)
        for number, size in enumerate(sizes):
            table(home / f"view{number}.parquet", size, users, {f"v{number}_f{at}": "float" for at in range(5)})
        rivals = ["join polars-bare", "join tandem", *(["join duckdb"] if importlib.util.find_spec("ibis") else [])]
        rivals += ["join dask"] if name != "long" else []
        found = alternate(home, rivals, repeats, {"join dask"} if name == "wide" else set())
        show(f"{events:,} events x views of {', '.join(f'{size:,}' for size in sizes)} rows, {users:,} keys", found, "seconds")
        agree(found)


def agree(found: Mapping[str, list[dict[str, Any]]]) -> None:
    for name, runs in found.items():
        cpu = statistics.median(run["cpu"] for run in runs)
        print(
            f"{name}: {cpu:.2f} CPU seconds, {runs[0]['rows']:,} rows back, {runs[0]['filled']:,} of them with features, "
            f"checksum {runs[0]['checksum']}"
        )


def join_bare(home: Path) -> dict[str, Any]:
    """What Polars needs for the join alone, with nothing around it."""
    since = clock()
    asked = pl.scan_parquet(home / "entities.parquet").sort("event_timestamp")
    for path in sorted(home.glob("view*.parquet")):
        view = pl.scan_parquet(path).sort("event_timestamp")
        asked = asked.join_asof(view, on="event_timestamp", by="user_id", strategy="backward", check_sortedness=False)
    frame = asked.collect()
    return facts(frame, since())


def join_with(home: Path, offline: Mapping[str, Any]) -> dict[str, Any]:
    store = feast_store(home, offline, {"type": "sqlite", "path": str(home / "unused.db")}, ENGINE)
    views = apply_views(store, home)
    asked = pl.read_parquet(home / "entities.parquet")
    refs = [f"{view.name}:{each.name}" for view in views for each in view.features]
    given = asked if offline["type"] == OURS else asked.to_pandas()
    since = clock()
    answer = store.get_historical_features(entity_df=given, features=refs).to_arrow()
    spent = since()
    return facts(pl.from_arrow(answer), spent)  # type: ignore[arg-type]


def clock() -> Callable[[], dict[str, float]]:
    """Seconds since now, by the wall and of this process's threads together; the second tells more on a busy machine."""
    wall, cpu = time.perf_counter(), time.process_time()
    return lambda: {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def facts(frame: pl.DataFrame, spent: dict[str, float]) -> dict[str, Any]:
    features = sorted(name for name in frame.columns if "_f" in name)
    sums = frame.select((pl.col(features).fill_nan(None).sum() * 1e6).round().cast(pl.Int64)).sum_horizontal()[0]
    filled = frame.select(pl.any_horizontal(pl.col(features).fill_nan(None).is_not_null()).sum()).item()
    return spent | {"rows": frame.height, "filled": filled, "checksum": sums}


def entities(path: Path, events: int, users: int) -> None:
    random = np.random.default_rng(1)
    pl.DataFrame({"user_id": names(random.integers(0, users, events)), "event_timestamp": moments(random, events)}).write_parquet(
        path
    )


# --- materialisation --------------------------------------------------------------------------------------------------------


def materialize(folder: Path, rows: int, repeats: int) -> None:
    """`FeatureStore.materialize` of `rows` entities x 10 features, ours against Feast's engine and stores."""
    kinds = {f"f{at}": "float" for at in range(8)} | {"count": "int", "word": "text"}
    table(folder / "view0.parquet", rows, rows, kinds, unique=True)
    rivals = ["materialize tandem-sqlite", "materialize tandem-redis", "materialize stock-sqlite", "materialize stock-redis"]
    found = alternate(folder, rivals, repeats, {"materialize stock-sqlite", "materialize stock-redis"})
    show(f"materialise {rows:,} entities x 10 features", found, "rows/s", lambda run: rows / run["seconds"])
    large = folder / "large"
    large.mkdir()
    table(large / "view0.parquet", 10 * rows, 10 * rows, kinds, unique=True)
    found = alternate(large, ["materialize tandem-redis" if rows > 300_000 else "materialize tandem-sqlite"], 1, set())
    show(f"the same with {10 * rows:,} entities", found, "rows/s", lambda run: 10 * rows / run["seconds"])


def materialize_with(home: Path, online: Mapping[str, Any], engine: Mapping[str, Any]) -> dict[str, Any]:
    if "path" in online:
        Path(online["path"]).unlink(missing_ok=True)
    store = feast_store(home, {"type": OURS} if engine is ENGINE else {"type": "dask"}, online, engine)
    apply_views(store, home)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    store.materialize(START - timedelta(days=1), END, disable_event_timestamp=False)
    seconds = time.perf_counter() - started
    if "connection_string" in online:
        store._get_provider().online_store._get_client(store.config.online_store).flushdb()
    return {"seconds": seconds, "before_mb": before / 1024}


def sqlite_of(home: Path, kind: str) -> dict[str, Any]:
    return {"type": kind, "path": str(home / "online.db")}


def redis_of(kind: str) -> dict[str, Any]:
    return {"type": kind, "connection_string": f"{REDIS},db=14"}


# --- reading ----------------------------------------------------------------------------------------------------------------


def read(folder: Path, rows: int, repeats: int) -> None:
    """500 items x 50 features for ranking: columns of the snapshot, and Feast's SDK on SQLite and Redis."""
    found = alternate(folder, ["read all"], 1, set())["read all"][0]
    print("\n| read 500 items x 50 features | median ms | against the snapshot |\n|---|---|---|")
    for name, milliseconds in found["ms"].items():
        print(f"| {name} | {milliseconds:.4g} | {milliseconds / found['ms']['snapshot']:,.0f} |")


def read_all(home: Path) -> dict[str, Any]:
    from feature_repo.materialize import materialize as to_online
    from feature_repo.offline import apply, open_store
    from feature_repo.online_config import OnlineConfig
    from feature_repo.snapshot import Snapshot
    from feature_repo.views import ViewSchema, write_views

    (home / "features").mkdir()
    items = 20_000
    path = home / "features" / "item_stats.parquet"
    table(path, items, items, {f"f{at}": "float" for at in range(50)}, unique=True, key="item_id")
    write_views(home / "features", (ViewSchema.of_table("item_stats", "item", pl.read_parquet(path)),))
    rivals: dict[str, Callable[[], object]] = {}
    ids = np.random.default_rng(0).choice(items, 500, replace=False)
    asked = [{"item_id": name} for name in names(ids)]
    refs = [f"item_stats:f{at}" for at in range(50)]
    for name, online in (("Feast SDK on SQLite", OnlineConfig()), ("Feast SDK on Redis", OnlineConfig(f"redis://{REDIS}/14"))):
        apply(home, online)
        to_online(home)
        store = open_store(home)
        rivals[name] = lambda store=store: store.get_online_features(features=refs, entity_rows=asked).to_dict()
    snapshot = Snapshot.load(home / "snapshot")
    rows = snapshot.rows_of(names(ids))
    rivals["snapshot"] = lambda: snapshot.gather(rows)
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(6):  # each rival ten times in a row: as a service does it all day, not with caches that others have emptied
        for name, run in rivals.items():
            started = time.perf_counter()
            for _ in range(10):
                run()
            times[name].append((time.perf_counter() - started) * 100)
    store.provider.online_store._get_client(store.config.online_store).flushdb()
    return {"seconds": 0.0, "ms": {name: statistics.median(values[1:]) for name, values in times.items()}}


# --- aggregates -------------------------------------------------------------------------------------------------------------


def aggregates(folder: Path, copies: int, repeats: int) -> None:
    """Count tables of online-retail, `copies` times over, against pandas and against reading the file."""
    import aggregates as peers

    events = peers.prepare(folder, copies)
    rivals = ["aggregates read", "aggregates ours", *(["aggregates pandas"] if copies <= 20 else [])]
    found = alternate(folder, rivals, repeats, set())
    show(f"{events:,} events, count tables of users and items", found, "CPU s", lambda run: run["cpu"])
    show("the same by the wall", found, "seconds")
    if "aggregates pandas" in found:
        worst = max(peers.differences(ours, theirs) for ours, theirs in zip(*list(found.values())[1:], strict=True))
        print(f"largest relative difference to pandas on a sample of rows: {worst}")


def aggregates_with(name: str, home: Path) -> dict[str, Any]:
    import aggregates as peers

    run: Callable[[Path], dict[str, Any]] = getattr(peers, name)
    return run(home)


# --- Feast ------------------------------------------------------------------------------------------------------------------


def feast_store(home: Path, offline: Mapping[str, Any], online: Mapping[str, Any], engine: Mapping[str, Any]) -> Any:
    from feast import FeatureStore, RepoConfig

    (home / "registry.db").unlink(missing_ok=True)
    registry = {"registry_type": "sql", "path": f"sqlite:///{home / 'registry.db'}", "cache_ttl_seconds": 60}
    return FeatureStore(
        config=RepoConfig(
            project="bench", provider="local", registry=registry, offline_store=dict(offline), online_store=dict(online),
            batch_engine=dict(engine), entity_key_serialization_version=3, repo_path=home,
        )
    )  # fmt: skip


def apply_views(store: Any, home: Path) -> list[Any]:
    from feast import Entity, FeatureView, Field, FileSource, ValueType
    from feast.types import Float64, Int64, String

    kinds = {pl.Float64: Float64, pl.Int64: Int64, pl.String: String}
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
    views = []
    for path in sorted(home.glob("view*.parquet")):
        schema = pl.read_parquet_schema(path)
        fields = [
            Field(name=name, dtype=kinds[type(kind)])
            for name, kind in schema.items()
            if name not in ("user_id", "event_timestamp")
        ]
        source = FileSource(name=path.stem, path=str(path), timestamp_field="event_timestamp")
        views.append(
            FeatureView(
                name=path.stem,
                entities=[user],
                ttl=timedelta(0),
                schema=[Field(name="user_id", dtype=String), *fields],
                source=source,
            )
        )
    store.apply([user, *views])
    return views


# --- tables and runs --------------------------------------------------------------------------------------------------------


def table(path: Path, rows: int, entities: int, kinds: Mapping[str, str], unique: bool = False, key: str = "user_id") -> None:
    """A feature table sorted by (key, time); `unique` gives every entity one row."""
    random = np.random.default_rng(len(kinds) + rows)
    ids = np.arange(rows) if unique else random.integers(0, entities, rows)
    make: dict[str, Callable[[], object]] = {
        "float": lambda: random.random(rows),
        "int": lambda: random.integers(0, 10**6, rows),
        "text": lambda: pl.Series(random.integers(0, 1000, rows)).cast(pl.String),
    }
    columns = {key: names(ids), "event_timestamp": moments(random, rows)} | {name: make[kind]() for name, kind in kinds.items()}
    pl.DataFrame(columns).sort(key, "event_timestamp").write_parquet(path)


def names(numbers: Any) -> pl.Series:
    return "u" + pl.Series(numbers).cast(pl.String).str.zfill(8)


def moments(random: np.random.Generator, count: int) -> pl.Series:
    span = int((END - START).total_seconds() * 1_000_000)
    return pl.Series(int(START.timestamp() * 1e6) + random.integers(0, span, count)).cast(pl.Datetime("us", "UTC"))


def alternate(home: Path, rivals: Sequence[str], repeats: int, once: set[str]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rivals}
    for turn in range(repeats):
        for name in rivals:
            if not (turn and name in once):
                found[name].append(run(home, name))
    return found


def run(home: Path, name: str) -> dict[str, Any]:
    """One run in a process of its own; its peak memory comes from the kernel."""
    command = [sys.executable, __file__, "--rival", name, "--folder", str(home)]
    wrapped = f"import resource, subprocess, sys; subprocess.run({command!r}, check=True); " \
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"  # fmt: skip
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", wrapped], check=True, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    answer: dict[str, Any] = json.loads(next(line for line in lines if line.startswith("{")))
    print(f"  {name}: {answer['seconds']:.2f} s", file=sys.stderr, flush=True)
    return answer | {"peak_mb": int(lines[-1]) / 1024}


def show(
    title: str,
    found: Mapping[str, list[dict[str, Any]]],
    unit: str,
    figure: Callable[[dict[str, Any]], float] = lambda run: run["seconds"],
) -> None:
    print(f"\n| {title} | runs | {unit} (median) | min | max | peak MB |\n|---|---|---|---|---|---|")
    for name, runs in found.items():
        values = [figure(each) for each in runs]
        peak = statistics.median(each["peak_mb"] for each in runs)
        print(
            f"| {name} | {len(runs)} | {statistics.median(values):,.4g} | {min(values):,.4g} | {max(values):,.4g} | {peak:,.0f} |"
        )


RIVALS: Final[dict[str, Callable[[Path], dict[str, Any]]]] = {
    "join polars-bare": join_bare,
    "join tandem": lambda home: join_with(home, {"type": OURS}),
    "join duckdb": lambda home: join_with(home, {"type": "duckdb"}),
    "join dask": lambda home: join_with(home, {"type": "dask"}),
    "materialize tandem-sqlite": lambda home: materialize_with(
        home, sqlite_of(home, "feature_repo.sqlite_store.NewestSqliteOnlineStore"), ENGINE
    ),
    "materialize tandem-redis": lambda home: materialize_with(
        home, redis_of("feature_repo.redis_store.NewestRedisOnlineStore"), ENGINE
    ),
    "materialize stock-sqlite": lambda home: materialize_with(home, sqlite_of(home, "sqlite"), {"type": "local"}),
    "materialize stock-redis": lambda home: materialize_with(home, redis_of("redis"), {"type": "local"}),
    "read all": read_all,
    "aggregates read": lambda home: aggregates_with("read", home),
    "aggregates ours": lambda home: aggregates_with("ours", home),
    "aggregates pandas": lambda home: aggregates_with("in_pandas", home),
}
PARTS: Final = {"join": join, "materialize": materialize, "read": read, "aggregates": aggregates}

if __name__ == "__main__":
    main()
