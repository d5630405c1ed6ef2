"""Recipes for a challenger beside the champion: start, give it more users, read out, stop, and the check that cron calls."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from tandem.core.errors import ConflictError, InputError
from tandem.service.outcome import Outcome, Table
from tandem.service.recipes.workspace import open_releases, release_here, who_am_i
from tandem.service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from registry.experiments import ExperimentStory, Stage
    from registry.readout import Contrast
    from registry.work import Work
    from tandem.service.experiment import Report

PERCENT: Final = {"shadow": 100.0, "canary": 5.0, "ab": 50.0}
"""The share of users by kind, where nobody says another."""

_METRICS: Final = ("metric", "champion", "challenger", "difference", "low", "high", "always low", "always high", "users")


def experiment_start(
    settings: Settings, release: str, kind: str, percent: float | None, because: str, name: str | None = None
) -> Outcome:
    """Let a release answer beside the champion. Raises ConflictError naming an open experiment, and what verifying raises."""
    from registry.experiments import check_kind
    from registry.release import verify_release
    from tandem.service.pinned import pinned_by

    chosen = check_kind(kind)
    share = PERCENT[chosen] if percent is None else percent
    with open_releases(settings) as store:
        found = release_here(settings, store, release)
        verify_release(found.folder, found.content_hash)
        pinned_by(settings, found.folder)
        with store.work() as work:
            stage = work.start_experiment(release, chosen, share, who=who_am_i(), why=because, name=name)
            work.commit()
    said = f"{_told(stage)}; services follow within seconds"
    return Outcome(said, _facts(stage), None, "tandem experiment report")


def experiment_set(settings: Settings, percent: float, because: str) -> Outcome:
    """Give the open canary or shadow another share; who is in it stays in when it grows."""
    with _changing(settings) as work:
        stage = work.experiments.set_percent(percent, who_am_i(), because)
    return Outcome(f"{_told(stage)}; the report starts anew", _facts(stage), None, "tandem experiment report")


def experiment_stop(settings: Settings, because: str) -> Outcome:
    """End the open experiment; the champion answers everybody."""
    with _changing(settings) as work:
        stage = _open(work)
        work.experiments.end(stage.experiment.number, "stopped", who_am_i(), because)
    said = f"experiment {stage.experiment.name} is over; the champion answers everybody"
    return Outcome(said, _facts(stage), None, "tandem experiment report")


def experiment_list(settings: Settings) -> Outcome:
    """All experiments: what, since when, and how they ended, by whom and why."""
    with open_releases(settings) as store, store.look() as work:
        stories = work.experiments.stories()
    rows = tuple(_row(story) for story in stories)
    columns = ("experiment", "kind", "challenger", "champion", "percent", "since", "until", "outcome", "who", "why")
    data = {"experiments": [{**asdict(story), "open": story.ended is None} for story in stories]}
    return Outcome(f"{len(rows)} experiments", data, Table("Experiments", columns, rows), "tandem experiment report NAME")


def experiment_report(settings: Settings, name: str | None = None) -> Outcome:
    """The arms beside each other. Refused, without metrics, when the split is not the declared one."""
    from tandem.service.experiment import measure

    with open_releases(settings) as store:
        report = measure(settings, store, name)
    return Outcome(
        _sentence(report),
        _report_data(report),
        _metric_table(report),
        "tandem experiment stop",
        (_arm_table(report),),
        refused=report.split is not None and report.split.broken,
    )


def experiment_check(settings: Settings) -> Outcome:
    """End the open experiment when its outcome metric is surely lower than the champion's by more than the margin.

    Judged by the interval that stands any number of looks, since cron looks often. Raises ConflictError for a broken split.
    """
    from tandem.service.experiment import measure, outcome_metric

    with open_releases(settings) as store:
        with store.look() as work:
            stage = work.experiments.open()
        if stage is None or stage.experiment.kind == "shadow":
            said = "no experiment is open" if stage is None else f"{stage.experiment.name} is a shadow: nobody sees it"
            return Outcome(f"{said}; nothing to check", {"ended": False}, None, "tandem experiment list")
        report = measure(settings, store, stage.experiment.name)
        if report.split is not None and report.split.broken:
            raise ConflictError(_sentence(report))
        metric = outcome_metric(settings)
        lost, said = _verdict(settings, report, metric)
        if lost:
            with store.work() as work:
                work.experiments.end(stage.experiment.number, "lost", who_am_i(), f"automatic: {said}")
                work.commit()
    ended = f"; experiment {stage.experiment.name} is over, the champion answers everybody" if lost else ""
    data = {"ended": lost, "metric": metric, **_report_data(report)}
    return Outcome(said + ended, data, None, "tandem experiment report", refused=lost)


def _verdict(settings: Settings, report: Report, metric: str) -> tuple[bool, str]:
    """Has the challenger lost on `metric`, and why."""
    wanted = settings.rollout.outcome
    found = report.metrics.get(metric)
    if found is None and report.metrics:
        raise InputError(f"rollout.outcome.metric = {metric!r} is not in the report, which has {sorted(report.metrics)}")
    if found is None or min(found.users_a, found.users_b) < wanted.minimum_users:
        users = 0 if found is None else min(found.users_a, found.users_b)
        return False, f"{metric}: too early to say, {users} users in the smaller arm are fewer than {wanted.minimum_users}"
    lost = found.always_high < -wanted.margin
    return lost, (
        f"{metric}: challenger {found.mean_b:.4f}, champion {found.mean_a:.4f}, difference {found.difference:+.4f} "
        f"({found.always_low:+.4f} to {found.always_high:+.4f} at any look); "
        f"{'surely' if lost else 'not shown to be'} worse by more than {wanted.margin:g}"
    )


@contextmanager
def _changing(settings: Settings) -> Iterator[Work]:
    """A unit of work that is committed at the end of the block."""
    with open_releases(settings) as store, store.work() as work:
        yield work
        work.commit()


def _open(work: Work) -> Stage:
    stage = work.experiments.open(held=True)
    if stage is None:
        raise ConflictError("no experiment is open; see `tandem experiment list`")
    return stage


def _told(stage: Stage) -> str:
    own = stage.experiment
    return f"experiment {own.name}: {own.kind} of {own.challenger} beside {own.champion}, {stage.percent:g}% of the users"


def _facts(stage: Stage) -> dict[str, Any]:
    own = asdict(stage.experiment)
    return {"experiment": own.pop("name"), **own, "percent": stage.percent, "stage": stage.number}


def _row(story: ExperimentStory) -> tuple[str | float | None, ...]:
    own, first, last, ended = story.experiment, story.changes[0], story.changes[-1], story.ended
    return (
        own.name, own.kind, own.challenger, own.champion, last.percent, first.at.isoformat(timespec="seconds"),
        ended.at.isoformat(timespec="seconds") if ended else None, ended.outcome if ended else "open", last.who, last.why,
    )  # fmt: skip


def _sentence(report: Report) -> str:
    own, drawn = report.story.experiment, report.split
    begun = f"{own.name} ({own.kind} of {own.challenger} beside {own.champion}, {report.story.last_stage.percent:g}%)"
    if report.shadow is not None:
        return f"{begun}: {report.shadow.requests:,} requests answered by both"
    if drawn is None:
        return f"{begun}: no request was answered by both yet"
    if drawn.broken:
        return (
            f"{begun}: the split is broken, {drawn.champion:,} and {drawn.challenger:,} users came where "
            f"{drawn.expected_champion:,.1f} and {drawn.expected_challenger:,.1f} should have (p = {drawn.p:.1g}); something "
            "loses users of one arm, so nothing is read out: look for slates that come back empty, and for logs that are missing"
        )
    return f"{begun}: {drawn.champion:,} and {drawn.challenger:,} users since the percentage last changed"


def _metric_table(report: Report) -> Table:
    if report.shadow is not None:
        found = report.shadow
        rows: tuple[tuple[str | float | None, ...], ...] = (
            ("overlap@10", found.overlap), ("rank-biased overlap", found.agreement), ("same first item", found.same_first),
            *((f"mean score, {arm}", score) for arm, score in found.scores.items()),
        )  # fmt: skip
        return Table("Slates of the same requests", ("what", "value"), rows)
    return Table("Users of both arms", _METRICS, tuple(_metric_row(name, found) for name, found in report.metrics.items()))


def _metric_row(name: str, found: Contrast) -> tuple[str | float | None, ...]:
    numbers = (found.mean_a, found.mean_b, found.difference, found.low, found.high, found.always_low, found.always_high)
    return (name, *numbers, found.users_a + found.users_b)


def _arm_table(report: Report) -> Table:
    """What the services answered, from the start to the end; `dropped` is a shadow's."""
    rows = tuple(
        (
            arm, counts.requests, _share(counts.failed, counts.requests), _share(counts.degraded, counts.requests),
            counts.quantile_ms(0.5), counts.quantile_ms(0.95), counts.dropped,
        )
        for arm, counts in sorted(report.arms.items())
    )  # fmt: skip
    return Table("Requests by arm", ("arm", "requests", "failed", "degraded", "p50 ms", "p95 ms", "dropped"), rows)


def _share(count: int, total: int) -> float | None:
    return count / total if total else None


def _report_data(report: Report) -> dict[str, Any]:
    arms = _arm_table(report)
    return {
        "experiment": asdict(report.story.experiment),
        "changes": [asdict(change) for change in report.story.changes],
        "split": None if report.split is None else {**asdict(report.split), "broken": report.split.broken},
        "metrics": {name: asdict(found) for name, found in report.metrics.items()},
        "arms": [dict(zip(arms.columns, row, strict=True)) for row in arms.rows],
        "shadow": None if report.shadow is None else asdict(report.shadow),
    }
