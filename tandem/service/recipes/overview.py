"""What the workspace holds, and what to do next."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from tandem.service.outcome import Outcome, Table
from tandem.service.recipes.workspace import EVALUATION, RANKER, RETRIEVAL, open_releases
from tandem.service.settings import FILE, Settings


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
    if settings.knows_releases:
        with open_releases(settings) as store:
            champion = store.champion().name
    rows.append(("champion", champion or "none"))
    table = Table(f"Workspace {settings.workspace}", ("what", "state"), tuple(rows))
    data = dict(rows) | {"workspace": str(settings.workspace), "settings": FILE, "champion": champion}
    return Outcome(f"workspace {settings.workspace}", data, table, "tandem serve" if champion else following)


def _age(path: Path) -> str:
    if not path.exists():
        return "missing"
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
