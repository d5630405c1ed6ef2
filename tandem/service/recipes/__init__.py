"""The offline spine, one function per command:

import -> split -> aggregate -> apply / materialise -> train towers -> build index -> train ranker -> calibrate -> evaluate
-> release -> gate -> promote

`data` brings events and features, `models` learns and judges, `releases` decides what is live; `run_all` is all of it in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from feature_repo.store import compact
from tandem.core.errors import GateRefusedError
from tandem.core.folders import content_hash, file_hash, read_json, write_json
from tandem.service.outcome import Outcome
from tandem.service.recipes.changes import items_delete, items_put
from tandem.service.recipes.data import (
    features_apply,
    features_build,
    features_check,
    features_materialize,
    features_prune,
    features_push,
    import_source,
    simulate,
    users_erase,
)
from tandem.service.recipes.experiments import (
    experiment_check,
    experiment_list,
    experiment_report,
    experiment_set,
    experiment_start,
    experiment_stop,
)
from tandem.service.recipes.gate import release_gate
from tandem.service.recipes.models import evaluate, evaluated, funnel_table, train
from tandem.service.recipes.overview import status
from tandem.service.recipes.releases import (
    release_at,
    release_create,
    release_delete,
    release_diff,
    release_history,
    release_list,
    release_promote,
    release_prune,
    release_rollback,
    release_show,
)
from tandem.service.recipes.shown import feature_show
from tandem.service.recipes.workspace import EVALUATION, Progress, open_releases, quiet
from tandem.service.settings import Settings

__all__ = [
    "Progress",
    "evaluate",
    "experiment_check",
    "experiment_list",
    "experiment_report",
    "experiment_set",
    "experiment_start",
    "experiment_stop",
    "feature_show",
    "features_apply",
    "features_build",
    "features_check",
    "features_materialize",
    "features_prune",
    "features_push",
    "import_source",
    "items_delete",
    "items_put",
    "quiet",
    "release_at",
    "release_create",
    "release_delete",
    "release_diff",
    "release_gate",
    "release_history",
    "release_list",
    "release_promote",
    "release_prune",
    "release_rollback",
    "release_show",
    "retrain",
    "run_all",
    "simulate",
    "status",
    "train",
    "users_erase",
]


def run_all(settings: Settings, progress: Progress = quiet, because: str = "run_all") -> Outcome:
    """Everything from events to a promoted release. A step whose inputs and settings are unchanged is skipped.

    A step is marked as done only after it is whole, so a run that was killed goes on where it stopped. A release that the gate
    refuses is kept, and the refusal is in the answer.
    """
    steps: tuple[tuple[str, Callable[[], Outcome]], ...] = (
        ("build", lambda: features_build(settings)),
        ("apply", lambda: features_apply(settings)),
        ("materialize", lambda: features_materialize(settings, None, progress)),
        ("train towers", lambda: train(settings, "towers", progress)),
        ("train ranker", lambda: train(settings, "ranker", progress)),
        ("evaluate", lambda: evaluate(settings, progress)),
        ("release", lambda: _release_and_promote(settings, because)),
    )
    compact(settings.data)  # events that came one by one are inputs, too
    inputs = _inputs_hash(settings)
    marks = settings.state / "run_all.json"
    done = read_json(marks) if marks.is_file() else {}
    for number, (name, step) in enumerate(steps):
        progress("run", number, len(steps))
        if done.get(name) == inputs:
            continue
        made = step()
        done = {key: value for key, value in done.items() if key in [each for each, _ in steps[:number]]} | {name: inputs}
        done |= {"refused": made.data["refused"]} if "refused" in made.data else {}
        write_json(marks, done)
    progress("run", len(steps), len(steps))
    figures = read_json(settings.models / EVALUATION / "report.json")
    with open_releases(settings) as store:
        champion = store.champion().name
    data = figures | {"champion": champion, "refused": done.get("refused")}
    return Outcome(evaluated(figures), data, funnel_table(figures), "tandem recommend USER")


def retrain(settings: Settings, because: str, keep: int, progress: Progress = quiet) -> Outcome:
    """What cron calls: everything that new events or settings ask for, then the gate, then pruning. Nothing new: nothing is done.

    Raises GateRefusedError, after all of it, when the new release is not better enough to go live; the old one stays.
    """
    before = status(settings).data["champion"]
    ran = run_all(settings, progress, because)
    pruned = release_prune(settings, keep)
    if ran.data["refused"]:
        raise GateRefusedError(ran.data["refused"])
    champion = ran.data["champion"]
    made = f"{champion} is live, because {because} (before: {before or 'nothing'})"
    if champion == before:
        made = f"{champion} stays live: no events or settings are new"
    return Outcome(f"{made}; {pruned.made}", ran.data | {"before": before} | pruned.data, ran.table, "tandem release history")


def _release_and_promote(settings: Settings, because: str) -> Outcome:
    made = release_create(settings, because=because)
    try:
        return release_promote(settings, made.data["release"], because=because)
    except GateRefusedError as refusal:
        return replace(made, data={**made.data, "refused": str(refusal)})


def _inputs_hash(settings: Settings) -> str:
    files = [settings.data / name for name in ("events.parquet", "items.parquet", "users.parquet", "source.json")]
    files += [settings.workspace / each.path for each in settings.features.tables.values()]
    sections = ("features", "split", "encoder", "tuning", "towers", "index", "candidates", "ranker", "evaluation", "rerank")
    hashes = [file_hash(path) if path.is_file() else None for path in files]
    return content_hash([hashes, [repr(getattr(settings, name)) for name in sections]])
