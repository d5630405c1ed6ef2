"""Recipes for what is live: create, promote, roll back, and the answers to who, when and why."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tandem.core.errors import ConflictError, InputError, NotFoundError, UnavailableError
from tandem.core.folders import file_hash, read_json
from tandem.service.outcome import Cell, Outcome, RefusedError, Table
from tandem.service.recipes.gate import REPORT, USERS, judge, told
from tandem.service.recipes.models import check_ranker_link, headline
from tandem.service.recipes.workspace import (
    EVALUATION,
    RANKER,
    RETRIEVAL,
    numbers,
    open_artifacts,
    open_releases,
    open_tracker,
    release_here,
    who_am_i,
    writing,
)
from tandem.service.settings import Settings

if TYPE_CHECKING:
    from registry.retention import Pruned
    from registry.store import ReleaseStore
    from registry.work import Champion

_TRACED: Final = ("faiss-cpu", "faiss-gpu", "feast", "mlflow", "numpy", "polars", "tandem-recommender", "torch", "transformers")


def release_create(settings: Settings, name: str | None = None, because: str = "") -> Outcome:
    """Bundle what was trained and evaluated into one immutable folder, copy it to the artifacts' URL, register it in MLflow.

    `because`: what asked for it; it stays in the release's `measured.json`, also when a gate refuses the release.
    """
    from registry.release import create_release, default_name, release_folder, release_hash

    with writing(settings, "release create"):
        parts = _release_parts(settings)
        facts = _release_facts(settings)
        facts = replace(facts, timings={**facts.timings, **({"because": because} if because else {})})
        chosen = name or default_name(release_hash(parts, facts), facts.created_at)
        manifest = create_release(parts, release_folder(settings.releases, chosen), facts)
        open_artifacts(settings).upload(settings.releases / manifest.name, manifest)  # first: who sees it can fetch it
        with open_releases(settings) as store:
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
    from feature_repo.pins import FEATURES_FILE
    from retrieval.words import WORDS
    from tandem.service.texts import ADAPTER

    retrieval, report = settings.models / RETRIEVAL, settings.models / EVALUATION / "report.json"
    if not report.is_file():
        raise NotFoundError("nothing is evaluated yet; run `tandem train`, then `tandem evaluate`")
    evaluated, facts = read_json(report), read_json(retrieval / "retriever.json")
    ranker = settings.models / RANKER
    if evaluated["towers"] != facts["towers"] or evaluated["ranker"] != file_hash(ranker / "ranker.safetensors"):
        raise ConflictError("towers or ranker were trained after the evaluation; run `tandem evaluate` again")
    check_ranker_link(settings, facts["towers"])
    files = ("items.parquet", "covisit.safetensors", "retriever.json", "encoder.json", WORDS, "popular.json", "window.json")
    return (
        {name: retrieval / name for name in files}
        | {
            "towers": retrieval / "towers",
            "index": retrieval / "index",
            "ranker": ranker,
            USERS: settings.models / EVALUATION / "users.parquet",
            REPORT: report,
        }
        | {FEATURES_FILE: ranker / FEATURES_FILE}
        | ({ADAPTER: retrieval / ADAPTER} if (retrieval / ADAPTER).is_dir() else {})
    )


def _release_facts(settings: Settings) -> Any:
    from feature_repo.store import load_source
    from feature_repo.views import RANKING_SERVICE
    from registry.release import ReleaseFacts

    retrieval = settings.models / RETRIEVAL
    facts = read_json(retrieval / "retriever.json")
    window = read_json(retrieval / "window.json")
    source = load_source(settings.data)
    with open_releases(settings) as store:
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
            "feature_service": RANKING_SERVICE,
        },
        settings={
            "towers": _jsonable(settings.towers),
            "ranker": _jsonable(settings.ranker),
            "rerank": _jsonable(settings.rerank),
        },
        metrics=headline(read_json(settings.models / EVALUATION / "report.json")),
        timings=_measured(settings.models / EVALUATION / "measured.json"),
        parent=parent,
    )


def _measured(path: Path) -> dict[str, Any]:
    """What `tandem evaluate` measured beside the report, on this machine: it differs from run to run, so no hash covers it."""
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    return found


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


def _register(settings: Settings, store: ReleaseStore, name: str) -> tuple[str | None, str]:
    """MLflow's version of the release; when MLflow does not answer the release stands all the same, and says so."""
    release = store.get(name)
    try:
        registered = open_tracker(settings).register(release.manifest, release.folder)
    except UnavailableError as error:
        return None, f" (not registered: {error}; `tandem release promote` tries again)"
    store.registered(name, registered)
    return registered, f", version {registered} in MLflow"


def release_list(settings: Settings) -> Outcome:
    with open_releases(settings) as store:
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
    """Facts and figures of one release, verified by hash, and what was measured beside them when it was evaluated."""
    from registry.release import verify_release

    with open_releases(settings) as store:
        release = release_here(settings, store, name)
    manifest = verify_release(release.folder, release.content_hash)
    facts = (("content hash", manifest.content_hash), ("parent", manifest.parent), ("source", str(manifest.source.get("kind"))))
    measured = _measured(release.folder / "measured.json")
    facts += (("made because", measured["because"]),) if "because" in measured else ()
    rows = (*facts, *sorted(manifest.metrics.items()), *sorted(numbers(measured, "measured/").items()))
    data = manifest.to_dict() | {"measured": measured}
    return Outcome(f"release {name} is whole", data, Table(name, ("what", "value"), rows), f"tandem release promote {name}")


def release_promote(settings: Settings, name: str, because: str = "", force: bool = False) -> Outcome:
    """Make a release the champion, if it is whole and the gate lets it; `force` needs a reason and is recorded."""
    from registry.release import verify_release
    from tandem.service.pinned import pinned_by

    if force and not because:
        raise InputError('a forced promotion needs a reason; add --because "…"')
    with open_releases(settings) as store:
        release, champion = release_here(settings, store, name), store.champion()
        verify_release(release.folder, release.content_hash)
        pinned_by(settings, release.folder)
        if champion.name == name:
            return Outcome(f"{name} is already the champion", {"champion": name}, None, "tandem serve")
        number, verdict = judge(settings, store, name)
        if not verdict.passed and not force:
            outcome = told(name, champion.name, verdict)
            raise RefusedError("; ".join(verdict.refusals) + f"; to promote all the same: {outcome.next}", outcome)
        why = because or ("first release" if champion.name is None else "passed the gate")
        against = not verdict.passed
        promotion = store.promote(
            name, expected=champion.name, version=champion.version, who=who_am_i(), why=why, gate=number, forced=against
        )
        note = _mirror(settings, store)
    data = {"champion": name, "before": champion.name, "why": why, "at": promotion.at.isoformat(), "forced": against}
    return Outcome(f"{name} is live (before: {champion.name or 'nothing'}){note}", data, None, "tandem serve")


def release_rollback(
    settings: Settings, to: str | None = None, because: str = "", *, who: str = "", expected: Champion | None = None
) -> Outcome:
    """Back to the champion before, or to a named earlier one, in one step. Refused when the workspace lacks its features.

    `expected`: the champion that is to go; ConflictError when it is not that one any more, or is so by a later promotion.
    """
    from registry.release import verify_release
    from tandem.service.pinned import pinned_by

    with open_releases(settings) as store:
        before = (expected or store.champion()).name
        target = to or store.previous()
        release = release_here(settings, store, target)
        verify_release(release.folder, release.content_hash)
        pinned_by(settings, release.folder)
        version = expected.version if expected else None
        promotion = store.rollback(target, expected=before, who=who or who_am_i(), why=because or "rollback", version=version)
        note = _mirror(settings, store)
    data = {"champion": promotion.name, "before": before, "at": promotion.at.isoformat()}
    return Outcome(f"{promotion.name} is live again (before: {before}){note}", data, None, "tandem release history")


def release_history(settings: Settings) -> Outcome:
    with open_releases(settings) as store:
        lines = store.history()
    rows = tuple(
        (line.at.isoformat(timespec="seconds"), line.kind, line.previous, line.name, line.who, line.why) for line in lines
    )
    keys = ("at", "kind", "from", "to", "who", "why")
    data = {"history": [dict(zip(keys, row, strict=True)) for row in rows]}
    return Outcome(f"{len(rows)} changes of champion", data, Table("History", keys, rows), "tandem release rollback")


def release_at(settings: Settings, moment: datetime) -> Outcome:
    """What was live at a moment, on which data it was trained, who made it so and why; a deleted release is still told of."""
    with open_releases(settings) as store, store.look() as work:
        change = work.change_at(moment)
        if change is None:
            raise NotFoundError(f"nothing was live at {moment.isoformat()}; see `tandem release history`")
        release, deleted = work.recall(change.name)
        following = work.change_after(change.version)
        verdict = work.gate(change.gate).verdict.get("sentences", []) if change.gate is not None else []
    data: dict[str, Any] = {
        "release": change.name,
        "content_hash": release.content_hash,
        "since": change.at.isoformat(timespec="seconds"),
        "until": following.at.isoformat(timespec="seconds") if following else None,
        "kind": change.kind,
        "instead_of": change.previous,
        "who": change.who,
        "why": change.why,
        "gate": verdict,
        "source": release.manifest.source.get("kind"),
        "window": dict(release.manifest.window),
        "deleted": deleted.isoformat(timespec="seconds") if deleted else None,
    }
    rows = tuple((key, value if isinstance(value, str | None) else _lines(value)) for key, value in data.items())
    said = f"{change.name} was live at {moment.isoformat()}"
    return Outcome(said, data, Table(said, ("what", "value"), rows), "tandem release history")


def _lines(value: Any) -> str:
    """Sentences, or names with values, one under the other."""
    return "\n".join(f"{key}: {each}" for key, each in value.items()) if isinstance(value, dict) else "\n".join(value)


def release_delete(settings: Settings, name: str) -> Outcome:
    """Delete one release, row and folder; the live one and those a rollback may need are refused."""
    from registry.retention import delete

    with open_releases(settings) as store:
        done = delete(store, settings.releases, name, artifacts=open_artifacts(settings))
    data = {"deleted": list(done.deleted), "freed_bytes": done.freed, "left": _names(done)}
    return Outcome(f"deleted {name}{_left(done)}", data, None, "tandem release list")


def release_prune(settings: Settings, keep: int) -> Outcome:
    """Keep the champion, the two before it, the challenger and the newest `keep` others; delete the rest."""
    from registry.retention import prune

    with open_releases(settings) as store:
        done = prune(store, settings.releases, keep, artifacts=open_artifacts(settings))
    rows = (*done.kept.items(), *((name, "deleted") for name in done.deleted))
    data = {"kept": dict(done.kept), "deleted": list(done.deleted), "freed_bytes": done.freed, "left": _names(done)}
    said = f"{len(done.deleted)} deleted, {len(done.kept)} kept, {done.freed / 1e6:,.1f} MB freed{_left(done)}"
    return Outcome(said, data, Table("Releases", ("release", ""), rows), "tandem release list")


def _left(done: Pruned) -> str:
    """What to do by hand: folders elsewhere are somebody else's."""
    return f"; not Tandem's own folders, so left in place: {', '.join(_names(done))}" if done.left else ""


def _names(done: Pruned) -> list[str]:
    return [str(folder) for folder in done.left]


def release_diff(settings: Settings, a: str, b: str) -> Outcome:
    from registry.release import diff

    with open_releases(settings) as store:
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
        report = open_tracker(settings).mirror(store)
    except UnavailableError as error:
        return f"; MLflow's alias is not set yet: {error}"
    return "; " + "; ".join(report.sentences)
