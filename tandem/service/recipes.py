"""The offline spine, one function per command:

import -> split -> aggregate -> apply / materialise -> train towers -> build index -> train ranker -> calibrate -> evaluate
-> release -> gate -> promote
"""

from __future__ import annotations

import dataclasses
import getpass
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from tandem.core.errors import ConflictError, GateRefusedError, InputError, NotFoundError, UnavailableError
from tandem.core.folders import content_hash, file_hash, held, read_json, sweep_partials, whole_folder, write_json
from tandem.service.outcome import Cell, Outcome, Table
from tandem.service.settings import FILE, Settings, write_default

if TYPE_CHECKING:
    from feature_repo.store import ImportCounts
    from registry.store import ReleaseStore
    from registry.tracking import Tracker
    from tandem.service.evaluation import Evaluation

Progress = Callable[[str, int, int], None]
Part = Literal["all", "towers", "ranker"]

RETRIEVAL: Final = "retrieval"
RANKER: Final = "ranker"
EVALUATION: Final = "evaluation"
_TRACED: Final = ("faiss-cpu", "faiss-gpu", "feast", "mlflow", "numpy", "polars", "tandem-recommender", "torch", "transformers")


def quiet(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


# ---------------------------------------------------------------------------------------------------------------- events


def import_source(settings: Settings, kind: str, path: Path, replace: bool = False) -> Outcome:
    """Read a source into the workspace; append by event_id, or start over with `replace`."""
    from feature_repo.sources import read_source
    from feature_repo.sources.table import TableMapping
    from feature_repo.store import save_raw

    mapping = TableMapping.parse(settings.table) if kind == "table" else None
    raw = read_source(kind, path, mapping, settings.split.seed)
    with _held(settings, "import"):
        counts = save_raw(raw, settings.data, replace)
        _forget_online(settings, replace)
        write_default(settings.workspace)
    return _imported(settings, counts, f"{kind} data from {path.name}")


def simulate(settings: Settings, users: int, items: int, days: int, seed: int) -> Outcome:
    """Fill the workspace with the built-in world; what is true of it goes to `data/truth/`."""
    from feature_repo.sources.world import simulate as make_world
    from feature_repo.store import save_raw

    world = make_world(users, items, days, seed)
    with _held(settings, "simulate"):
        counts = save_raw(world.raw, settings.data, replace=True)
        _forget_online(settings, True)
        with whole_folder(settings.data / "truth") as folder:
            world.truth.save(folder)
        write_default(settings.workspace)
    return _imported(settings, counts, f"a world of {users:,} users, {items:,} items and {days} days")


def _forget_online(settings: Settings, replaced: bool) -> None:
    """After starting over, empty the online store: otherwise newer rows of the old data would win for ever."""
    if replaced and (settings.state / "online.db").exists():
        from feature_repo.materialize import forget

        forget(settings.workspace)


def _imported(settings: Settings, counts: ImportCounts, what: str) -> Outcome:
    data = {"read": counts.read, "appended": counts.appended, "duplicates": counts.duplicates, "rejected": counts.rejected}
    rows = tuple((name, _count(value)) for name, value in data.items())
    made = f"{what}: {_count(counts.appended):,} new events; rejected rows are in data/rejected.parquet with their reasons"
    return Outcome(made, data, Table("Import", ("what", "rows"), rows), "tandem features build")


def _count(value: Any) -> int:
    return sum(value.values()) if isinstance(value, dict) else int(value)


# -------------------------------------------------------------------------------------------------------------- features


def features_build(settings: Settings) -> Outcome:
    """Aggregate events into timestamped feature tables."""
    from feature_repo.aggregates import build_tables, write_tables
    from feature_repo.store import load_events, load_items, load_source, load_users
    from tandem.service.clock import make_clock

    with _held(settings, "features build"):
        tables = build_tables(
            load_events(settings.data),
            load_items(settings.data),
            load_users(settings.data),
            load_source(settings.data),
            dataclasses.replace(settings.features, until=make_clock(settings)()),
        )
        views = write_tables(tables, settings.feature_tables)
    rows = tuple((view.name, view.entity, len(tables[view.name]), len(view.fields)) for view in views)
    data = {view.name: {"rows": len(tables[view.name]), "features": len(view.fields)} for view in views}
    return Outcome(
        f"{len(views)} feature tables",
        data,
        Table("Features", ("view", "entity", "rows", "features"), rows),
        "tandem features apply",
    )


def features_apply(settings: Settings) -> Outcome:
    """Tell Feast what the views are."""
    from feature_repo.offline import apply

    if not (settings.feature_tables / "schema.json").is_file():
        features_build(settings)
    views = apply(settings.workspace)
    table = Table("Feast views", ("view",), tuple((name,) for name in views))
    return Outcome(f"{len(views)} feature views applied", {"views": list(views)}, table, "tandem features materialize")


def features_materialize(settings: Settings, since: datetime | None = None) -> Outcome:
    """Copy the newest rows to the online store and write the item snapshot."""
    from feature_repo.materialize import materialize
    from tandem.service.clock import make_clock

    counts = materialize(settings.workspace, until=make_clock(settings)(), since=since)
    rows = tuple((name, each.written, each.late, each.quarantined) for name, each in counts.views.items())
    data = {
        "views": {name: vars(each) for name, each in counts.views.items()},
        "snapshot": counts.snapshot,
        "until": counts.until.isoformat(),
    }
    made = f"{counts.written:,} rows online, {counts.quarantined:,} quarantined, snapshot {counts.snapshot}"
    return Outcome(made, data, Table("Materialised", ("view", "written", "late", "quarantined"), rows), "tandem train")


def features_check(settings: Settings) -> Outcome:
    """Leakage on a sample of training rows, parity of the online store, freshness. Raises GateRefusedError when one fails."""
    from tandem.service.health import feature_checks

    results = feature_checks(settings)
    rows = tuple((each.name, "passed" if each.passed else "FAILED", each.rows, each.detail) for each in results)
    data = {each.name: {"passed": each.passed, "rows": each.rows, "detail": each.detail} for each in results}
    failed = [each for each in results if not each.passed]
    if failed:
        raise GateRefusedError("; ".join(f"{each.name}: {each.detail}" for each in failed))
    return Outcome(
        "features are sound", data, Table("Feature checks", ("check", "verdict", "rows", "detail"), rows), "tandem train"
    )


# -------------------------------------------------------------------------------------------------------------- training


def train(settings: Settings, what: Part = "all", progress: Progress = quiet) -> Outcome:
    """Train towers and index, the ranker, or both; every run is in MLflow."""
    outcomes = []
    if what in ("all", "towers"):
        outcomes.append(_train_towers(settings, progress))
    if what in ("all", "ranker"):
        outcomes.append(_train_ranker(settings, progress))
    data = {key: value for outcome in outcomes for key, value in outcome.items()}
    table = Table("Training", ("what", "value"), tuple((key, value) for key, value in data.items()))
    return Outcome(f"trained {'towers and ranker' if what == 'all' else what}", data, table, "tandem evaluate")


def _train_towers(settings: Settings, progress: Progress) -> dict[str, Any]:
    from tandem.service.learn import Dataset, train_retriever

    data = Dataset.load(settings)
    with _held(settings, "train"), _run(settings, "towers") as log:
        retriever = train_retriever(settings, data, log.metrics, progress)
        log.params({"towers": vars(settings.towers), "encoder": vars(settings.encoder), "items": len(data.items)})
        with whole_folder(settings.models / RETRIEVAL) as folder:
            retriever.save(folder)
            write_json(folder / "encoder.json", _encoder_facts(settings))
            write_json(folder / "popular.json", _popular(retriever))
            write_json(folder / "window.json", {name: moment.isoformat() for name, moment in data.split.cutoffs.items()})
    return {
        "validation_recall_at_100": retriever.towers.facts["validation_recall_at_100"],
        "best_epoch": retriever.towers.facts["best_epoch"],
        "index": retriever.index.kind,
        "index_recall": retriever.index.recall,
    }


def _train_ranker(settings: Settings, progress: Progress) -> dict[str, Any]:
    from feature_repo.offline import open_store
    from retrieval.retriever import Retriever
    from tandem.service.learn import Dataset, Offline, train_ranking

    data = Dataset.load(settings)
    retriever = Retriever.load(settings.models / RETRIEVAL)
    progress("train ranker", 0, 1)
    with _held(settings, "train"), _run(settings, "ranker") as log:
        ranker = train_ranking(settings, data, Offline(settings, data, retriever, open_store(settings.workspace)), log.metrics)
        log.params({"ranker": vars(settings.ranker)})
        with whole_folder(settings.models / RANKER) as folder:
            ranker.save(folder)
            write_json(folder / "link.json", {"towers": retriever.towers.fingerprint})
    progress("train ranker", 1, 1)
    return {"ranker_features": len(ranker.names), "ranker_tasks": ", ".join(task.name for task in data.source.tasks)}


def _encoder_facts(settings: Settings) -> dict[str, Any]:
    """What serving needs to open the same encoder; `dtype` as it was resolved here, since "auto" differs between machines."""
    from tandem.service.learn import open_encoder

    encoder = open_encoder(settings)
    facts = {"model": encoder.model, "max_tokens": settings.encoder.max_tokens, "dtype": encoder.dtype}
    return facts | {"fingerprint": encoder.fingerprint}


def _popular(retriever: Any, k: int = 200) -> dict[str, list[str]]:
    """The last fallback: item ids by training popularity."""
    order = (-retriever.counts).argsort(kind="stable")[:k]
    return {"item_ids": [retriever.item_ids[row] for row in order]}


# ------------------------------------------------------------------------------------------------------------ evaluation


def evaluate(settings: Settings, progress: Progress = quiet) -> Outcome:
    """The funnel report, printed, kept in `models/evaluation` and written to MLflow."""
    from feature_repo.offline import open_store
    from ranking.train import Ranker
    from retrieval.retriever import Retriever
    from tandem.service.evaluation import evaluate_funnel
    from tandem.service.learn import Dataset, Offline

    data = Dataset.load(settings)
    retriever = Retriever.load(settings.models / RETRIEVAL)
    _check_ranker_link(settings, retriever.towers.fingerprint)
    ranker = Ranker.load(settings.models / RANKER)
    with _held(settings, "evaluate"), _run(settings, "evaluate") as log:
        found = evaluate_funnel(
            settings, data, Offline(settings, data, retriever, open_store(settings.workspace)), ranker, progress
        )
        figures = _figures(found)
        with whole_folder(settings.models / EVALUATION) as folder:
            found.report.users.write_parquet(folder / "users.parquet")
            write_json(
                folder / "report.json",
                figures
                | {"towers": retriever.towers.fingerprint, "ranker": file_hash(settings.models / RANKER / "ranker.safetensors")},
            )
        log.metrics(_headline(figures))
        log.table(found.report.rows, "funnel.json")
    return Outcome(_evaluated(figures), figures, funnel_table(figures), "tandem release create")


def _figures(found: Evaluation) -> dict[str, Any]:
    report = found.report
    return {
        "funnel": _clean(report.rows.to_dicts()),
        "intervals": _clean(report.intervals.to_dicts()),
        "tasks": _clean(report.tasks.to_dicts()),
        "world": found.world,
    }


def _clean(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """NaN has no place in JSON; it becomes null."""
    return [{key: None if isinstance(value, float) and value != value else value for key, value in row.items()} for row in rows]


def _headline(figures: dict[str, Any]) -> dict[str, float]:
    keys = ("recall@10", "recall@50", "recall@100", "ndcg@10", "coverage@10")
    rows = [row for row in figures["funnel"] if row["slice"] == "all users"]
    metrics = {f"{_plain(row['system'])}/{key}": row[key] for row in rows for key in keys if row[key] is not None}
    metrics |= {
        f"task/{row['task']}/{key}": row[key] for row in figures["tasks"] for key in ("auc", "ece") if row[key] is not None
    }
    return metrics | {f"world/{_plain(name)}": value for name, value in figures["world"].items()}


def _plain(name: str) -> str:
    return name.replace(" + ", "_").replace(" ", "_")


def _evaluated(figures: dict[str, Any]) -> str:
    rows = {row["system"]: row for row in figures["funnel"] if row["slice"] == "all users"}
    towers, ranked = rows["towers"], rows["towers + ranker"]
    said = f"{towers['users']:,} test users: towers find {towers['recall@100']:.1%} in 100, "
    said += f"the ranker takes NDCG@10 from {towers['ndcg@10']:.4f} to {ranked['ndcg@10']:.4f}"
    if figures["world"]:
        said += f"; the slate reaches {_share(figures['world'], 'slate'):.0%} of the way from popularity to the best possible"
    return said


def _share(world: dict[str, float], system: str) -> float:
    return (world[system] - world["popularity"]) / (world["best possible"] - world["popularity"])


def funnel_table(figures: dict[str, Any]) -> Table:
    """The funnel for people: one row per slice and system; on the world also the share of the best possible."""
    world = figures["world"]
    columns = ("slice", "system", "users", "recall@10", "recall@50", "recall@100", "ndcg@10", "coverage@10")
    rows = []
    for row in figures["funnel"]:
        cells = tuple(row[name] for name in columns)
        if world:
            own = row["slice"] == "all users" and row["system"] in world
            cells += (_share(world, row["system"]) if own else None,)
        rows.append(cells)
    return Table("Funnel on the test requests", columns + (("of best possible",) if world else ()), tuple(rows))


def _check_ranker_link(settings: Settings, towers: str) -> None:
    path = settings.models / RANKER / "link.json"
    if not path.is_file():
        raise NotFoundError("no ranker is trained; run `tandem train ranker`")
    built = read_json(path)["towers"]
    if built != towers:
        raise ConflictError(
            f"the ranker learned from towers {built[:12]}, but the towers are {towers[:12]}; run `tandem train ranker`"
        )


# -------------------------------------------------------------------------------------------------------------- releases


def release_create(settings: Settings, name: str | None = None) -> Outcome:
    """Bundle what was trained and evaluated into one immutable folder, and register it in MLflow."""
    from registry.release import create_release, default_name, release_folder, release_hash

    with _held(settings, "release create"):
        with whole_folder(settings.models / "release") as folder:
            _write_feature_versions(settings, folder / "features.json")
        parts = _release_parts(settings)
        facts = _release_facts(settings)
        chosen = name or default_name(release_hash(parts, facts), facts.created_at)
        manifest = create_release(parts, release_folder(settings.releases, chosen), facts)
        with _store(settings) as store:
            store.add(manifest, settings.releases / manifest.name)
            registered, note = _register(settings, store, manifest.name)
    size = sum(path.stat().st_size for path in (settings.releases / manifest.name).rglob("*") if path.is_file())
    data: dict[str, Cell] = {
        "release": manifest.name,
        "content_hash": manifest.content_hash,
        "files": len(manifest.files),
        "bytes": size,
        "mlflow_version": registered,
    }
    rows = tuple(data.items())
    return Outcome(
        f"release {manifest.name}{note}",
        data,
        Table("Release", ("what", "value"), rows),
        f"tandem release promote {manifest.name}",
    )


def _release_parts(settings: Settings) -> dict[str, Path]:
    retrieval, report = settings.models / RETRIEVAL, settings.models / EVALUATION / "report.json"
    if not report.is_file():
        raise NotFoundError("nothing is evaluated yet; run `tandem train`, then `tandem evaluate`")
    evaluated, facts = read_json(report), read_json(retrieval / "retriever.json")
    ranker = settings.models / RANKER
    if evaluated["towers"] != facts["towers"] or evaluated["ranker"] != file_hash(ranker / "ranker.safetensors"):
        raise ConflictError("towers or ranker were trained after the evaluation; run `tandem evaluate` again")
    _check_ranker_link(settings, facts["towers"])
    files = ("items.parquet", "covisit.safetensors", "retriever.json", "encoder.json", "popular.json", "window.json")
    return (
        {name: retrieval / name for name in files}
        | {
            "towers": retrieval / "towers",
            "index": retrieval / "index",
            "ranker": ranker,
            "evaluation": settings.models / EVALUATION,
        }
        | {"features.json": settings.models / "release" / "features.json"}
    )


def _release_facts(settings: Settings) -> Any:
    from feature_repo.store import load_source
    from registry.release import ReleaseFacts

    retrieval = settings.models / RETRIEVAL
    facts = read_json(retrieval / "retriever.json")
    window = read_json(retrieval / "window.json")
    source = load_source(settings.data)
    with _store(settings) as store:
        parent = store.champion().name
    return ReleaseFacts(
        created_at=datetime.now(UTC),
        fingerprints={
            "towers": facts["towers"],
            "items": facts["items"],
            "encoder": read_json(retrieval / "encoder.json")["fingerprint"],
        },
        links={
            "index.towers": facts["towers"],
            "index.items": facts["items"],
            "ranker.towers": read_json(settings.models / RANKER / "link.json")["towers"],
        },
        window=window,
        seeds={"towers": settings.towers.seed, "ranker": settings.ranker.seed, "split": settings.split.seed},
        versions=_versions(),
        source={
            "kind": source.kind,
            "positive": source.positive,
            "exclude_seen": source.exclude_seen,
            "tasks": [task.name for task in source.tasks],
        },
        settings={
            "towers": _jsonable(settings.towers),
            "ranker": _jsonable(settings.ranker),
            "rerank": _jsonable(settings.rerank),
        },
        metrics=_headline(read_json(settings.models / EVALUATION / "report.json")),
        parent=parent,
    )


def _jsonable(section: Any) -> Any:
    return json.loads(json.dumps(vars(section), default=dict))


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError

    found = {}
    for name in _TRACED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _write_feature_versions(settings: Settings, path: Path) -> None:
    from feature_repo.views import read_views

    views = read_views(settings.feature_tables)
    write_json(path, {view.name: {"version": view.version, "features": [each.name for each in view.fields]} for view in views})


def _register(settings: Settings, store: ReleaseStore, name: str) -> tuple[str | None, str]:
    """MLflow's version of the release; when MLflow does not answer the release stands all the same, and says so."""
    release = store.get(name)
    try:
        registered = _tracker(settings).register(release.manifest, release.folder)
    except UnavailableError as error:
        return None, f" (not registered: {error}; `tandem release promote` tries again)"
    store.registered(name, registered)
    return registered, f", version {registered} in MLflow"


def release_list(settings: Settings) -> Outcome:
    with _store(settings) as store:
        champion = store.champion().name
        rows = tuple(
            (
                each.name,
                "champion" if each.name == champion else "",
                each.created_at.isoformat(timespec="seconds"),
                each.model_version,
                each.manifest.metrics.get("towers_ranker/ndcg@10"),
            )
            for each in store.list()
        )
    data = {"champion": champion, "releases": [row[0] for row in rows]}
    table = Table("Releases", ("release", "", "created", "mlflow", "ndcg@10"), rows)
    return Outcome(f"{len(rows)} releases", data, table, "tandem release show NAME")


def release_show(settings: Settings, name: str) -> Outcome:
    from registry.release import verify_release

    with _store(settings) as store:
        release = store.get(name)
    manifest = verify_release(release.folder, release.content_hash)
    facts = (("content hash", manifest.content_hash), ("parent", manifest.parent), ("source", str(manifest.source.get("kind"))))
    rows = (*facts, *sorted(manifest.metrics.items()))
    return Outcome(
        f"release {name} is whole", manifest.to_dict(), Table(name, ("what", "value"), rows), f"tandem release promote {name}"
    )


def release_gate(settings: Settings, name: str) -> Outcome:
    """Hold a release against the champion, paired on the same test users. Raises GateRefusedError with the sentences."""
    with _store(settings) as store:
        _, verdict = _judge(store, name)
    rows = tuple(tuple(row.values()) for row in verdict.table().to_dicts())
    table = Table("Gate", tuple(verdict.table().columns), rows)
    if not verdict.passed:
        raise GateRefusedError("; ".join(verdict.sentences))
    return Outcome(
        f"{name} may be promoted: " + "; ".join(verdict.sentences), verdict.to_dict(), table, f"tandem release promote {name}"
    )


def _judge(store: ReleaseStore, name: str) -> tuple[int, Any]:
    """The stored number of a verdict on `name` against the champion, and the verdict."""
    import polars as pl

    from registry.gates import Gate, judge

    challenger, champion = store.get(name), store.champion().name

    def rows(folder: Path) -> pl.DataFrame:
        return pl.read_parquet(folder / "evaluation" / "users.parquet").filter(pl.col("system") == "towers + ranker")

    gates = [Gate("ndcg@10", margin=0.01, minimum_users=30), Gate("recall@100", margin=0.02, minimum_users=30)]
    old = rows(store.get(champion).folder) if champion and champion != name else None
    verdict = judge(old, rows(challenger.folder), gates)
    record = store.judged(name, champion, verdict.passed, verdict.to_dict())
    return record.number, verdict


def release_promote(settings: Settings, name: str, because: str = "", force: bool = False) -> Outcome:
    """Make a release the champion, if it is whole and the gate lets it; `force` needs a reason and is recorded."""
    from registry.release import verify_release

    if force and not because:
        raise InputError('a forced promotion needs a reason; add --because "…"')
    with _store(settings) as store:
        release, champion = store.get(name), store.champion()
        verify_release(release.folder, release.content_hash)
        if champion.name == name:
            return Outcome(f"{name} is already the champion", {"champion": name}, None, "tandem serve")
        number, verdict = _judge(store, name)
        if not verdict.passed and not force:
            raise GateRefusedError(
                "; ".join(verdict.sentences) + f'; to promote all the same: tandem release promote {name} --force --because "…"'
            )
        why = because or ("first release" if champion.name is None else "passed the gate")
        promotion = store.promote(name, expected=champion.name, who=_who(), why=why, gate=number if verdict.passed else None)
        note = _mirror(settings, store)
    data = {"champion": name, "before": champion.name, "why": why, "at": promotion.at.isoformat(), "forced": force}
    return Outcome(f"{name} is live (before: {champion.name or 'nothing'}){note}", data, None, "tandem serve")


def release_rollback(settings: Settings, to: str | None = None, because: str = "") -> Outcome:
    """Back to the champion before, or to a named earlier one, in one step."""
    from registry.release import verify_release

    with _store(settings) as store:
        before = store.champion().name
        target = to or store.previous()
        verify_release(store.get(target).folder, store.get(target).content_hash)
        promotion = store.rollback(target, expected=before, who=_who(), why=because or "rollback")
        note = _mirror(settings, store)
    data = {"champion": promotion.name, "before": before, "at": promotion.at.isoformat()}
    return Outcome(f"{promotion.name} is live again (before: {before}){note}", data, None, "tandem release history")


def release_history(settings: Settings) -> Outcome:
    with _store(settings) as store:
        lines = store.history()
    rows = tuple(
        (line.at.isoformat(timespec="seconds"), line.kind, line.previous, line.name, line.who, line.why) for line in lines
    )
    keys = ("at", "kind", "from", "to", "who", "why")
    data = {"history": [dict(zip(keys, row, strict=True)) for row in rows]}
    return Outcome(f"{len(rows)} changes of champion", data, Table("History", keys, rows), "tandem release rollback")


def release_diff(settings: Settings, a: str, b: str) -> Outcome:
    from registry.release import diff

    with _store(settings) as store:
        changes = diff(store.get(a).manifest, store.get(b).manifest)
    rows = tuple((each.section, each.key, str(each.before), str(each.after)) for each in changes)
    return Outcome(
        f"{len(rows)} differences",
        {"changes": [list(row) for row in rows]},
        Table(f"{a} → {b}", ("section", "what", a, b), rows),
        "",
    )


def _mirror(settings: Settings, store: ReleaseStore) -> str:
    """Let MLflow's alias follow our table; ours is the truth, so MLflow's absence is reported and no failure."""
    try:
        report = _tracker(settings).mirror(store)
    except UnavailableError as error:
        return f"; MLflow's alias is not set yet: {error}"
    return "; " + "; ".join(report.sentences)


# ---------------------------------------------------------------------------------------------------------------- status


def status(settings: Settings) -> Outcome:
    """What the workspace holds, and what to do next."""
    steps = (
        ("events", settings.data / "events.parquet", "tandem import KIND PATH"),
        ("feature tables", settings.feature_tables / "schema.json", "tandem features build"),
        ("snapshot", settings.workspace / "snapshot" / "CURRENT", "tandem features materialize"),
        ("towers", settings.models / RETRIEVAL / "retriever.json", "tandem train"),
        ("ranker", settings.models / RANKER / "ranker.json", "tandem train ranker"),
        ("evaluation", settings.models / EVALUATION / "report.json", "tandem evaluate"),
    )
    rows = [(what, _age(path)) for what, path, _ in steps]
    following = next((command for _, path, command in steps if not path.exists()), "tandem release create")
    champion = None
    if (settings.state / "tandem.db").exists() or settings.registry.url:
        with _store(settings) as store:
            champion = store.champion().name
    rows.append(("champion", champion or "none"))
    table = Table(f"Workspace {settings.workspace}", ("what", "state"), tuple(rows))
    data = dict(rows) | {"workspace": str(settings.workspace), "settings": FILE, "champion": champion}
    return Outcome(f"workspace {settings.workspace}", data, table, "tandem serve" if champion else following)


def _age(path: Path) -> str:
    if not path.exists():
        return "missing"
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")


# --------------------------------------------------------------------------------------------------------- the whole loop


def run_all(settings: Settings, progress: Progress = quiet) -> Outcome:
    """Everything from imported events to a promoted release. A step whose inputs and settings are unchanged is skipped.

    A step is marked as done only after it is whole, so a run that was killed goes on where it stopped.
    """
    steps: tuple[tuple[str, Callable[[], Outcome]], ...] = (
        ("build", lambda: features_build(settings)),
        ("apply", lambda: features_apply(settings)),
        ("materialize", lambda: features_materialize(settings)),
        ("train towers", lambda: train(settings, "towers", progress)),
        ("train ranker", lambda: train(settings, "ranker", progress)),
        ("evaluate", lambda: evaluate(settings, progress)),
        ("release", lambda: _release_and_promote(settings)),
    )
    inputs = _inputs_hash(settings)
    marks = settings.state / "run_all.json"
    done = read_json(marks) if marks.is_file() else {}
    for number, (name, step) in enumerate(steps):
        progress("run", number, len(steps))
        if done.get(name) == inputs:
            continue
        step()
        done = {key: value for key, value in done.items() if key in [each for each, _ in steps[:number]]} | {name: inputs}
        write_json(marks, done)
    progress("run", len(steps), len(steps))
    figures = read_json(settings.models / EVALUATION / "report.json")
    with _store(settings) as store:
        champion = store.champion().name
    return Outcome(_evaluated(figures), figures | {"champion": champion}, funnel_table(figures), "tandem recommend USER")


def _release_and_promote(settings: Settings) -> Outcome:
    made = release_create(settings)
    try:
        return release_promote(settings, made.data["release"], because="run_all")
    except GateRefusedError:
        return made


def _inputs_hash(settings: Settings) -> str:
    files = [settings.data / name for name in ("events.parquet", "items.parquet", "users.parquet", "source.json")]
    sections = ("features", "split", "encoder", "towers", "index", "candidates", "ranker", "evaluation", "rerank")
    return content_hash([[file_hash(path) for path in files], [repr(getattr(settings, name)) for name in sections]])


# ----------------------------------------------------------------------------------------------------------------- wiring


@contextmanager
def _held(settings: Settings, who: str) -> Iterator[None]:
    """One writer per workspace; leftovers of a crashed one are swept."""
    with held(settings.state / "workspace.lock", who):
        for folder in (settings.models, settings.data):
            sweep_partials(folder)
        yield


@contextmanager
def _store(settings: Settings) -> Iterator[ReleaseStore]:
    from registry.store import ReleaseStore

    settings.state.mkdir(parents=True, exist_ok=True)
    store = ReleaseStore(settings.registry_url)
    try:
        yield store
    finally:
        store.close()


def _tracker(settings: Settings) -> Tracker:
    from registry.tracking import Tracker

    settings.state.mkdir(parents=True, exist_ok=True)
    root = None if settings.registry.mlflow_uri else settings.workspace / "mlruns"
    return Tracker(settings.mlflow_uri, settings.registry.experiment, root, settings.registry.model)


class _RunLog:
    """Figures of a run; they wait here until it ends, so that a slow MLflow never slows training."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.settings: dict[str, Any] = {}
        self.tables: list[tuple[Any, str]] = []

    def metrics(self, values: dict[str, float]) -> None:
        self.steps.append(dict(values))

    def params(self, values: dict[str, Any]) -> None:
        self.settings |= values

    def table(self, frame: Any, file: str) -> None:
        self.tables.append((frame, file))


@contextmanager
def _run(settings: Settings, name: str) -> Iterator[_RunLog]:
    """An MLflow run around a block, written after it; without MLflow the work stands, and the run is missing."""
    log = _RunLog()
    yield log
    try:
        with _tracker(settings).run(name, {"workspace": settings.workspace.name}) as run:
            run.params(log.settings)
            for step, values in enumerate(log.steps):
                run.metrics({key.replace("@", "_at_"): value for key, value in values.items() if value == value}, step)
            for frame, file in log.tables:
                run.table(frame, file)
    except UnavailableError:
        return


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
