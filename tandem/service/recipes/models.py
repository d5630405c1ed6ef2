"""Recipes for what is learned: towers and index, the ranker, and the funnel report that judges both."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, Literal

from tandem.core.errors import ConflictError, IncompatibleError, IntegrityError, NotFoundError
from tandem.core.folders import file_hash, read_json, whole_folder, write_json
from tandem.service.outcome import Outcome, Table
from tandem.service.recipes.workspace import (
    EVALUATION,
    RANKER,
    RETRIEVAL,
    Progress,
    numbers,
    open_artifacts,
    open_releases,
    quiet,
    tracked_run,
    writing,
)
from tandem.service.settings import Settings

if TYPE_CHECKING:
    from registry.work import Release
    from retrieval.encoder import TextEncoder
    from retrieval.index import VectorIndex
    from tandem.service.evaluation import Evaluation, Rival
    from tandem.service.learn import Dataset

Part = Literal["all", "towers", "ranker"]


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
    from tandem.service.texts import ADAPTER

    data = Dataset.load(settings)
    with writing(settings, "train"), tracked_run(settings, "towers") as log:
        retriever, reader = train_retriever(settings, data, log.metrics, progress)
        sections = {name: vars(getattr(settings, name)) for name in ("towers", "encoder", "tuning")}
        log.params({**sections, "items": len(data.items)})
        log.inputs(settings, "training")
        with whole_folder(settings.models / RETRIEVAL) as folder:
            retriever.save(folder)
            log.tags({"towers": read_json(folder / "retriever.json")["towers"]})
            write_json(folder / "encoder.json", encoder_facts(settings, reader.encoder))
            reader.words.save(folder)
            if reader.encoder.adapter is not None:
                shutil.copytree(reader.encoder.adapter, folder / ADAPTER)
            write_json(folder / "popular.json", _popular(retriever))
            write_json(folder / "window.json", {name: moment.isoformat() for name, moment in data.split.cutoffs.items()})
    return {
        "validation_recall_at_100": retriever.towers.facts["validation_recall_at_100"],
        "best_epoch": retriever.towers.facts["best_epoch"],
        "index": retriever.index.kind,
        "index_recall": retriever.index.recall,
        **_budgeted(retriever.index),
    }


def _budgeted(index: VectorIndex) -> dict[str, Any]:
    """What a budget of milliseconds came to, where there was one."""
    if index.milliseconds is None:
        return {}
    return {"index_ms": index.milliseconds, "index_budget_ms": index.config.budget_ms, "index_in_budget": bool(index.in_budget)}


def _train_ranker(settings: Settings, progress: Progress) -> dict[str, Any]:
    from feature_repo.offline import open_store
    from feature_repo.pins import FEATURES_FILE
    from feature_repo.views import RANKING_SERVICE
    from retrieval.retriever import Retriever
    from tandem.service.learn import Dataset, Offline, train_ranking

    retriever = Retriever.load(settings.models / RETRIEVAL)
    data = Dataset.load(settings).over(retriever)
    progress("train ranker", 0, 1)
    with writing(settings, "train"), tracked_run(settings, "ranker") as log:
        offline = Offline(settings, data, retriever, open_store(settings.workspace))
        ranker = train_ranking(settings, data, offline, log.metrics)
        log.params({"ranker": vars(settings.ranker)})
        log.inputs(settings, "training")
        log.tags({"towers": retriever.towers.fingerprint, "feast.feature_service": RANKING_SERVICE})
        with whole_folder(settings.models / RANKER) as folder:
            ranker.save(folder)
            write_json(folder / "link.json", {"towers": retriever.towers.fingerprint})
            offline.pins.write(folder / FEATURES_FILE)
    progress("train ranker", 1, 1)
    return {"ranker_features": len(ranker.names), "ranker_tasks": ", ".join(task.name for task in data.source.tasks)}


def encoder_facts(settings: Settings, encoder: TextEncoder) -> dict[str, Any]:
    """What serving needs to open the same encoder; `dtype` as it was resolved here, since "auto" differs between machines."""
    own = {name: value for name, value in vars(settings.encoder).items() if name not in ("device", "words")}
    return own | {"dtype": encoder.dtype, "fingerprint": encoder.fingerprint}


def _popular(retriever: Any, k: int = 200) -> dict[str, list[str]]:
    """The last fallback: item ids by training popularity."""
    order = (-retriever.counts).argsort(kind="stable")[:k]
    return {"item_ids": [retriever.item_ids[row] for row in order]}


def evaluate(settings: Settings, progress: Progress = quiet) -> Outcome:
    """The funnel report, printed, kept in `models/evaluation` and written to MLflow."""
    from feature_repo.offline import open_store
    from ranking.ranker import Ranker
    from retrieval.retriever import Retriever
    from tandem.service.evaluation import evaluate_funnel
    from tandem.service.learn import Dataset, Offline
    from tandem.service.measured import MEASURED, measure
    from tandem.service.pinned import pinned_by

    retriever = Retriever.load(settings.models / RETRIEVAL)
    data = Dataset.load(settings).over(retriever)
    check_ranker_link(settings, retriever.towers.fingerprint)
    ranker = Ranker.load(settings.models / RANKER)
    store = open_store(settings.workspace)
    with writing(settings, "evaluate"), tracked_run(settings, "evaluate") as log:
        champion, rival = _rival(settings, data, store, retriever.towers.fingerprint)
        pins = pinned_by(settings, settings.models / RANKER)
        found = evaluate_funnel(settings, data, Offline(settings, data, retriever, store, pins), ranker, progress, rival)
        figures = _figures(found) | {"champion": champion}
        with whole_folder(settings.models / EVALUATION) as folder:
            found.report.users.write_parquet(folder / "users.parquet")
            measured = measure(settings, retriever, ranker, found.report.users["user_id"].unique().sort().to_list())
            write_json(folder / MEASURED, measured)
            write_json(
                folder / "report.json",
                figures
                | {"towers": retriever.towers.fingerprint, "ranker": file_hash(settings.models / RANKER / "ranker.safetensors")},
            )
        log.metrics(headline(figures) | numbers(measured, "measured/"))
        log.params({"evaluation": vars(settings.evaluation), "champion": champion or ""})
        log.inputs(settings, "evaluation")
        log.tags({"towers": retriever.towers.fingerprint})
        log.table(found.report.rows, "funnel.json")
    return Outcome(evaluated(figures), figures, funnel_table(figures), "tandem release create")


def _rival(settings: Settings, data: Dataset, store: Any, towers: str) -> tuple[str | None, Rival | None]:
    """The live release, to be held against the new parts on the same requests; none where it cannot answer these features."""
    from registry.release import verify_release
    from tandem.service.evaluation import Rival

    if not settings.knows_releases:
        return None, None
    with open_releases(settings) as releases:
        name = releases.champion().name
        champion = releases.get(name) if name else None
    if champion is None or _is_these_parts(settings, champion, towers):
        return None, None
    try:
        champion = open_artifacts(settings).here(champion)
        verify_release(champion.folder, champion.content_hash)
        return champion.name, Rival.open(settings, data, champion.folder, store)
    except (IncompatibleError, IntegrityError, NotFoundError):
        return None, None


def _is_these_parts(settings: Settings, release: Release, towers: str) -> bool:
    """Was the release made of the very parts that are evaluated?"""
    ranker = file_hash(settings.models / RANKER / "ranker.safetensors")
    return release.manifest.fingerprints["towers"] == towers and release.manifest.files["ranker/ranker.safetensors"] == ranker


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


def headline(figures: dict[str, Any]) -> dict[str, float]:
    keys = ("recall@10", "recall@50", "recall@100", "ndcg@10", "ild@10", "coverage@10")
    rows = [row for row in figures["funnel"] if row["slice"] == "all users" and row["system"] != "champion"]
    metrics = {f"{_plain(row['system'])}/{key}": row[key] for row in rows for key in keys if row[key] is not None}
    metrics |= {
        f"task/{row['task']}/{key}": row[key] for row in figures["tasks"] for key in ("auc", "ece") if row[key] is not None
    }
    return metrics | {f"world/{_plain(name)}": value for name, value in figures["world"].items()}


def _plain(name: str) -> str:
    return name.replace(" + ", "_").replace(" ", "_")


def evaluated(figures: dict[str, Any]) -> str:
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
    """The funnel for people: one row per slice and system, categories for the ranked order only; on the world also the share
    of the best possible.
    """
    world = figures["world"]
    columns = ("slice", "system", "users", "recall@10", "recall@50", "recall@100", "ndcg@10", "ild@10", "coverage@10")
    rows = []
    for row in figures["funnel"]:
        if row["slice"].startswith("category=") and row["system"] not in ("towers + ranker", "champion"):
            continue
        cells = tuple(row[name] for name in columns)
        if world:
            own = row["slice"] == "all users" and row["system"] in world
            cells += (_share(world, row["system"]) if own else None,)
        rows.append(cells)
    return Table("Funnel on the test requests", columns + (("of best possible",) if world else ()), tuple(rows))


def check_ranker_link(settings: Settings, towers: str) -> None:
    path = settings.models / RANKER / "link.json"
    if not path.is_file():
        raise NotFoundError("no ranker is trained; run `tandem train ranker`")
    built = read_json(path)["towers"]
    if built != towers:
        raise ConflictError(
            f"the ranker learned from towers {built[:12]}, but the towers are {towers[:12]}; run `tandem train ranker`"
        )
