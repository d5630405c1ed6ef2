"""The report of an experiment: what each arm's users did, how the arms differ, and whether the split can be trusted.

In: the served-log, the shadow's log, events, and counts of live traffic. Out: a `Report`. What is compared is what was served
since the percentage last changed: before, other people were in the arms. Users are the unit; arms are read out as they were
drawn, so that a request in which the challenger failed and the champion answered counts for the challenger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from feature_repo.served import ServedLog, join_events
from feature_repo.store import load_events, load_source
from registry.assignment import CHALLENGER, CHAMPION
from registry.experiments import ExperimentStory
from registry.readout import Contrast, Split, contrast, split
from registry.traffic import TOTAL, Counts
from tandem.service.wiring import SERVED_LOG, SHADOW_LOG

if TYPE_CHECKING:
    from registry.store import ReleaseStore
    from tandem.service.settings import Settings

K: Final = 10
"""How much of two slates is compared."""

_PERSISTENCE: Final = 0.9
_MINIMUM: Final = 2


@dataclass(frozen=True)
class Shadowed:
    """A shadow's slates beside the champion's on the same requests, over the first K places.

    `overlap`: share of items in both. `agreement`: rank-biased overlap, 1 for the same order. `scores`: mean score by arm.
    """

    requests: int
    overlap: float
    agreement: float
    same_first: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Report:
    """`metrics`: by name, none for a shadow or with fewer than two users in an arm. `arms`: all requests so far, by arm."""

    story: ExperimentStory
    split: Split | None
    metrics: dict[str, Contrast]
    arms: dict[str, Counts]
    shadow: Shadowed | None = None


def measure(settings: Settings, store: ReleaseStore, name: str | None = None) -> Report:
    """The experiment called `name`, else the newest. Raises NotFoundError when there is none.

    A broken split has no metrics: what is left in the arms cannot be compared.
    """
    with store.look() as work:
        story = work.experiments.story(name)
        arms = work.traffic.of_experiment(story.experiment.number, TOTAL)
    served = ServedLog(settings.workspace / SERVED_LOG).read(story.last_stage.at)
    if story.experiment.kind == "shadow":
        hidden = ServedLog(settings.workspace / SHADOW_LOG).read(story.last_stage.at)
        return Report(story, None, {}, arms, compare_slates(_of_stage(served, story), _of_stage(hidden, story)))
    joined = join_events(served, load_events(settings.data))
    tasks = {task.name: task.matches().fill_null(False) for task in load_source(settings.data).tasks}
    users = per_user(_of_stage(joined, story), tasks)
    counted = dict(users.group_by("arm").len().iter_rows())
    drawn = split(counted.get(CHAMPION, 0), counted.get(CHALLENGER, 0), story.last_stage.percent)
    return Report(story, drawn, {} if drawn.broken else contrasts(users, list(tasks)), arms)


def outcome_metric(settings: Settings) -> str:
    """The metric that `[rollout] outcome` names: what the source calls positive, per slate, unless it names one."""
    return settings.rollout.outcome.metric or f"{load_source(settings.data).positive}/slate"


def per_user(rows: pl.DataFrame, tasks: dict[str, pl.Expr]) -> pl.DataFrame:
    """One row per unit: arm, slates, and by task in how many slates it happened. `rows` are served rows joined to events."""
    slates = rows.group_by("unit", "arm", "request_id").agg(expression.any().alias(task) for task, expression in tasks.items())
    summed = slates.group_by("unit", "arm").agg(pl.len().alias("slates"), *(pl.col(task).sum() for task in tasks))
    return summed.sort("unit", "arm")


def contrasts(users: pl.DataFrame, tasks: Sequence[str]) -> dict[str, Contrast]:
    """`task/slate`: share of slates in which it happened; `task/user`: share of users; `slates/user`."""
    arms = [users.filter(pl.col("arm") == arm) for arm in (CHAMPION, CHALLENGER)]
    if min(arm.height for arm in arms) < _MINIMUM:
        return {}
    slates = [arm["slates"].to_numpy() for arm in arms]
    ones = [np.ones(arm.height) for arm in arms]
    found = {}
    for task in tasks:
        hits = [arm[task].to_numpy() for arm in arms]
        found[f"{task}/slate"] = contrast((hits[0], slates[0]), (hits[1], slates[1]))
        found[f"{task}/user"] = contrast(((hits[0] > 0) * 1.0, ones[0]), ((hits[1] > 0) * 1.0, ones[1]))
    return found | {"slates/user": contrast((slates[0], ones[0]), (slates[1], ones[1]))}


def compare_slates(champion: pl.DataFrame, challenger: pl.DataFrame) -> Shadowed | None:
    """The two slates of each request that both answered; None where there is none. Both are served rows."""
    both = _slates(champion).join(_slates(challenger), on="request_id", suffix="_b")
    if both.is_empty():
        return None
    pairs = [(row["items"], row["items_b"]) for row in both.iter_rows(named=True)]
    return Shadowed(
        requests=both.height,
        overlap=float(np.mean([overlap(a, b) for a, b in pairs])),
        agreement=float(np.mean([rank_biased_overlap(a, b) for a, b in pairs])),
        same_first=float(np.mean([a[0] == b[0] for a, b in pairs])),
        scores={
            CHAMPION: float(np.mean(both["score"].to_numpy())),
            CHALLENGER: float(np.mean(both["score_b"].to_numpy())),
        },
    )


def overlap(a: Sequence[str], b: Sequence[str]) -> float:
    """Items in both, as a share of the longer list's length."""
    return len(set(a) & set(b)) / max(len(a), len(b))


def rank_biased_overlap(a: Sequence[str], b: Sequence[str], persistence: float = _PERSISTENCE) -> float:
    """How alike two rankings are, the top weighing most: Webber, Moffat and Zobel 2010 (doi:10.1145/1852102.1852106), (32).

    1: the same order; 0: nothing in common. Lists of different length are compared as far as the shorter one goes.
    """
    depth = min(len(a), len(b))
    seen_a, seen_b, agreed, total = set[str](), set[str](), 0, 0.0
    for place in range(depth):
        new_a, new_b = a[place], b[place]
        agreed += (new_a == new_b) + (new_a in seen_b) + (new_b in seen_a)
        seen_a.add(new_a)
        seen_b.add(new_b)
        total += agreed / (place + 1) * persistence ** (place + 1)
    return agreed / depth * persistence**depth + (1 - persistence) / persistence * total


def _slates(rows: pl.DataFrame) -> pl.DataFrame:
    """[request_id, items, score]: the first K items in order and their mean score."""
    first = rows.filter(pl.col("position") <= K).sort("request_id", "position")
    return first.group_by("request_id", maintain_order=True).agg(pl.col("item_id").alias("items"), pl.col("score").mean())


def _of_stage(rows: pl.DataFrame, story: ExperimentStory) -> pl.DataFrame:
    """What was served in the experiment since its percentage last changed, until it ended."""
    own = (pl.col("experiment") == story.experiment.name) & (pl.col("stage") == story.last_stage.version)
    return rows.filter(own if story.ended is None else own & (pl.col("timestamp") <= story.ended.at))
