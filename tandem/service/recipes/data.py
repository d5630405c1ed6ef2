"""Recipes for what comes in: events into the workspace, features out of events."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tandem.core.folders import held, whole_folder
from tandem.service.outcome import Outcome, Table
from tandem.service.recipes.workspace import Progress, quiet, writing
from tandem.service.settings import Settings, write_default

if TYPE_CHECKING:
    from feature_repo.checks import CheckResult
    from feature_repo.store import ImportCounts

_FOUND: Final = 20
"""Rows of each check that go to programs."""


def import_source(settings: Settings, kind: str, path: Path, replace: bool = False) -> Outcome:
    """Read a source into the workspace; append by event_id, or start over with `replace`."""
    from feature_repo.sources import read_source
    from feature_repo.sources.table import TableMapping
    from feature_repo.store import save_raw

    mapping = TableMapping.parse(settings.table) if kind == "table" else None
    raw = read_source(kind, path, mapping, settings.split.seed)
    with writing(settings, "import"):
        counts = save_raw(raw, settings.data, replace)
        _forget_online(settings, replace)
        write_default(settings.workspace)
    return _imported(settings, counts, f"{kind} data from {path.name}")


def simulate(settings: Settings, users: int, items: int, days: int, seed: int) -> Outcome:
    """Fill the workspace with the built-in world; what is true of it goes to `data/truth/`."""
    from feature_repo.sources.world import simulate as make_world
    from feature_repo.store import save_raw

    world = make_world(users, items, days, seed)
    with writing(settings, "simulate"):
        counts = save_raw(world.raw, settings.data, replace=True)
        _forget_online(settings, True)
        with whole_folder(settings.data / "truth") as folder:
            world.truth.save(folder)
        write_default(settings.workspace)
    return _imported(settings, counts, f"a world of {users:,} users, {items:,} items and {days} days")


def _forget_online(settings: Settings, replaced: bool) -> None:
    """After starting over, empty the online store: otherwise newer rows of the old data would win for ever."""
    from feature_repo.offline import is_applied

    if replaced and is_applied(settings.workspace):
        from feature_repo.materialize import forget

        forget(settings.workspace)


def _imported(settings: Settings, counts: ImportCounts, what: str) -> Outcome:
    data = {"read": counts.read, "appended": counts.appended, "duplicates": counts.duplicates, "rejected": counts.rejected}
    rows = tuple((name, _count(value)) for name, value in data.items())
    made = f"{what}: {_count(counts.appended):,} new events; rejected rows are in data/rejected.parquet with their reasons"
    return Outcome(made, data, Table("Import", ("what", "rows"), rows), "tandem features build")


def _count(value: Any) -> int:
    return sum(value.values()) if isinstance(value, dict) else int(value)


def features_build(settings: Settings) -> Outcome:
    """Aggregate events into timestamped feature tables."""
    from feature_repo.build import build_features
    from feature_repo.offline import LOCK
    from feature_repo.store import compact
    from tandem.service.clock import make_clock
    from tandem.service.pinned import pinned_views

    with writing(settings, "features build"), held(settings.workspace / LOCK, "features build"):
        compact(settings.data)
        config = dataclasses.replace(settings.features, until=make_clock(settings)())
        built = build_features(settings.workspace, config, pinned_views(settings))
    rows = tuple((view.name, view.entity, built.rows[view.name], len(view.fields)) for view in built.views)
    data = {view.name: {"rows": built.rows[view.name], "features": len(view.fields)} for view in built.views}
    kept = f"; kept for releases: {', '.join(view.name for view in built.kept)}" if built.kept else ""
    return Outcome(
        f"{len(built.views)} feature tables{kept}",
        data,
        Table("Features", ("view", "entity", "rows", "features"), rows),
        "tandem features apply",
    )


def features_prune(settings: Settings) -> Outcome:
    """Drop the older versions of views that no live, waiting or earlier champion reads any more, with their tables everywhere."""
    from feature_repo.offline import LOCK, apply
    from feature_repo.versions import prune_versions
    from feature_repo.views import kept_views
    from tandem.service.pinned import pinned_views

    with writing(settings, "features prune"), held(settings.workspace / LOCK, "features prune"):
        gone = prune_versions(settings.feature_tables, pinned_views(settings))
    if gone:
        apply(settings.workspace)
    kept = [view.name for view in kept_views(settings.feature_tables)]
    rows = (*((name, "kept for a release") for name in kept), *((name, "dropped") for name in gone))
    made = f"{len(gone)} older versions of views dropped, {len(kept)} kept for releases"
    return Outcome(made, {"dropped": list(gone), "kept": kept}, Table("Older versions", ("view", ""), rows), "tandem status")


def features_apply(settings: Settings) -> Outcome:
    """Tell Feast what the views are."""
    from feature_repo.offline import apply

    if not (settings.feature_tables / "schema.json").is_file():
        features_build(settings)
    views = apply(settings.workspace, settings.online)
    table = Table("Feast views", ("view",), tuple((name,) for name in views))
    return Outcome(f"{len(views)} feature views applied", {"views": list(views)}, table, "tandem features materialize")


def features_materialize(settings: Settings, since: datetime | None = None, progress: Progress = quiet) -> Outcome:
    """Copy the newest rows to the online store and write the item snapshot."""
    from feature_repo.live import EventGate
    from feature_repo.materialize import materialize
    from tandem.service.clock import make_clock

    counts = materialize(settings.workspace, until=make_clock(settings)(), since=since, progress=progress)
    EventGate(settings.workspace, settings.features, settings.events).apply_pending(datetime.now(UTC))
    rows = tuple((name, each.written, each.late, each.quarantined) for name, each in counts.views.items())
    data = {
        "views": {name: vars(each) for name, each in counts.views.items()},
        "snapshot": counts.snapshot,
        "until": counts.until.isoformat(),
    }
    made = f"{counts.written:,} rows online, {counts.quarantined:,} quarantined, snapshot {counts.snapshot}"
    return Outcome(made, data, Table("Materialised", ("view", "written", "late", "quarantined"), rows), "tandem train")


def features_push(settings: Settings, path: Path) -> Outcome:
    """Take single events from a file: into the data, and into the features of their users and items."""
    from feature_repo.live import EventGate
    from feature_repo.sources.files import read_table

    done = EventGate(settings.workspace, settings.features, settings.events).push(read_table(path).drop("row"), datetime.now(UTC))
    data = {name: getattr(done, name) for name in ("received", "appended", "duplicates", "users", "items", "pending")}
    reasons = done.refused.group_by("reason").len().sort("reason").rows()
    rows = (*data.items(), *((f"refused: {reason}", count) for reason, count in reasons))
    made = f"{done.appended:,} new events, features of {done.users:,} users and {done.items:,} items updated"
    if done.pending:
        made = f"{done.appended:,} new events are kept; their features are updated by the next `tandem features materialize`"
    return Outcome(made, data | {"refused": dict(reasons)}, Table("Events", ("what", "count"), rows), "tandem recommend USER")


def users_erase(settings: Settings, user_id: str) -> Outcome:
    """Remove a user from everything that can be changed, prove it, and see to it that the id does not come back."""
    from feature_repo.erase import erase_user

    done = erase_user(settings.workspace, user_id)
    rows = (*done.rows.items(), *((f"online: {view}", count) for view, count in done.online.items()))
    data = {"user_hash": done.user_hash, "at": done.at.isoformat(), "rows": done.rows, "online": done.online, "kept": done.kept}
    made = "the user is erased; every place was asked again, and none names them"
    if done.kept:
        made += f" but evaluation rows, which go with their releases: {', '.join(done.kept)}"
    return Outcome(made, data, Table("Erased", ("where", "rows"), rows), "tandem release prune" if done.kept else "tandem status")


def features_check(settings: Settings) -> Outcome:
    """Leakage, parity online and as served, freshness, drift: a line per check, `refused` when one fails."""
    from tandem.service.health import feature_checks

    results = feature_checks(settings)
    failed = [each.name for each in results if not each.passed]
    rows = tuple(
        (each.name, "FAILED" if each.name in failed else "passed", each.rows, each.skipped, each.detail) for each in results
    )
    data = {"passed": not failed, "checks": {each.name: _checked(each) for each in results}}
    made = f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}" if failed else "features are sound"
    table = Table("Feature checks", ("check", "verdict", "rows", "skipped", "detail"), rows)
    return Outcome(made, data, table, "" if failed else "tandem train", refused=bool(failed))


def _checked(result: CheckResult) -> dict[str, Any]:
    """A check's verdict for programs; `found` are the first rows of what it found."""
    facts = {name: getattr(result, name) for name in ("passed", "rows", "skipped", "detail")}
    return facts | {"found": result.table.head(_FOUND).to_dicts()}
