"""Recipe for one question: may this release replace the champion? And the verdict as a person reads it.

In: two releases that the registry knows, verified as far as they are read. Out: the stored verdict, and an `Outcome` with a
table, a sentence for each refusal, and the same for programs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from tandem.core.folders import read_json, verify_files
from tandem.service.outcome import Cell, Outcome, RefusedError, Table
from tandem.service.recipes.workspace import numbers, open_releases, release_here
from tandem.service.settings import Settings

if TYPE_CHECKING:
    import polars as pl

    from registry.gates import GateResult, Interval, Verdict
    from registry.policy import Evidence
    from registry.store import ReleaseStore
    from registry.work import Release

USERS: Final = "evaluation/users.parquet"
REPORT: Final = "evaluation/report.json"
_INDEX: Final = "index/index.json"
_COLUMNS: Final = (
    "metric", "slice", "challenger", "champion", "difference", "interval", "asked", "users", "verdict",
)  # fmt: skip


def release_gate(settings: Settings, name: str) -> Outcome:
    """Hold a release against the champion, paired on the same test users. Raises RefusedError with the verdict to show."""
    with open_releases(settings) as store:
        champion = store.champion().name
        _, verdict = judge(settings, store, name)
    outcome = told(name, champion, verdict)
    if not verdict.passed:
        raise RefusedError("; ".join(verdict.refusals), outcome)
    return outcome


def judge(settings: Settings, store: ReleaseStore, name: str) -> tuple[int, Verdict]:
    """The stored number of a verdict on `name` against the champion, by `[gates]` of the settings, and the verdict."""
    from registry.policy import judge_release

    challenger, champion = release_here(settings, store, name), store.champion().name
    old = _evidence(release_here(settings, store, champion)) if champion and champion != name else None
    if old is not None and (rows := _champion_rows(challenger, str(champion))) is not None:
        old = replace(old, rows=rows)
    verdict = judge_release(settings.gates, old, _evidence(challenger))
    record = store.judged(name, champion, verdict.passed, verdict.to_dict())
    return record.number, verdict


def told(name: str, champion: str | None, verdict: Verdict) -> Outcome:
    """A verdict as people and programs read it: what was asked, of how many users, what was found, and why not."""
    demands = len(verdict.results) + len(verdict.guardrails)
    if verdict.passed:
        made, following = f"{name} may be promoted: all {demands} demands are met", f"tandem release promote {name}"
    else:
        made = f"{name} is refused: {len(verdict.refusals)} of {demands} demands are not met"
        following = f'tandem release promote {name} --force --because "…"'
    title = f"{name} against {champion or 'nothing'}: {verdict.level:.0%} intervals of the paired difference"
    data = {"release": name, "champion": champion} | verdict.to_dict() | {"table": verdict.table().to_dicts()}
    return Outcome(
        made, data, Table(title, _COLUMNS, _rows(verdict)), following, notes=verdict.refusals, refused=not verdict.passed
    )


def _rows(verdict: Verdict) -> tuple[tuple[Cell, ...], ...]:
    gates = [_gate_row(result) for result in verdict.results]
    guarded: list[tuple[Cell, ...]] = []
    for each in verdict.guardrails:
        both = each.challenger is not None and each.champion is not None
        moved = each.challenger - each.champion if both else None  # type: ignore[operator]
        guarded.append((each.figure, None, each.challenger, each.champion, moved, None, each.asked, None, _said(each.passed)))
    return (*gates, *guarded)


def _gate_row(result: GateResult) -> tuple[Cell, ...]:
    gate, found = result.gate, result.interval
    numbers: tuple[Cell, ...] = (None, None, None) if found is None else (found.mean_b, found.mean_a, found.difference)
    asked = f"better by > {gate.margin:g}" if gate.kind == "superiority" else f"worse by < {gate.margin:g}"
    return (gate.metric, gate.where, *numbers, _spread(found), asked, _users(result), _said(result.passed))


def _spread(found: Interval | None) -> str | None:
    return None if found is None else f"{found.low:+.4f} to {found.high:+.4f}"


def _users(result: GateResult) -> str | None:
    """How many users were compared, beside how many the gate asks for: the check of the sample's size."""
    return None if result.users is None else f"{result.users:,} of ≥ {result.gate.minimum_users:,}"


def _said(passed: bool) -> str:
    return "passed" if passed else "REFUSED"


def _champion_rows(challenger: Release, champion: str) -> pl.DataFrame | None:
    """The champion's rows on the challenger's own test requests; None where it was evaluated beside another champion, or none."""
    import polars as pl

    files = challenger.manifest.files
    if REPORT not in files:
        return None
    verify_files(challenger.folder, {REPORT: files[REPORT]})
    if read_json(challenger.folder / REPORT).get("champion") != champion:
        return None
    return pl.read_parquet(challenger.folder / USERS).filter(pl.col("system") == "champion")


def _evidence(release: Release) -> Evidence:
    """What a release is judged on, read from its folder once the bytes are what its manifest says."""
    import polars as pl

    from registry.policy import Evidence

    files = release.manifest.files
    verify_files(release.folder, {name: files[name] for name in (USERS, _INDEX) if name in files})
    rows = pl.read_parquet(release.folder / USERS).filter(pl.col("system") == "towers + ranker")
    return Evidence(rows, _figures(release))


def _figures(release: Release) -> dict[str, float | None]:
    """A release's figures by name: its metrics, the index's recall, its size, and what `measured.json` has in numbers."""
    from registry.release import MEASURED

    measured = read_json(release.folder / MEASURED) if (release.folder / MEASURED).is_file() else {}
    figures = dict(release.manifest.metrics) | numbers(measured, "measured/")
    figures["bytes"] = float(sum((release.folder / name).stat().st_size for name in release.manifest.files))
    if _INDEX in release.manifest.files:
        card = read_json(release.folder / _INDEX)
        figures["index/recall"] = card["recall"]
        if "milliseconds" in card:
            figures["index/ms"] = card["milliseconds"]
    return figures
