"""`tandem features check`: leakage, parity and freshness of a workspace's features."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

import polars as pl

from feature_repo.checks import CheckResult, freshness, leakage, parity
from feature_repo.offline import historical, open_store
from feature_repo.online import UserReader
from feature_repo.snapshot import Snapshot
from feature_repo.store import load_events
from feature_repo.views import ViewSchema, read_views
from tandem.service.clock import make_clock
from tandem.service.settings import Settings

_SAMPLE: Final = 2000
_USERS: Final = 200
FRESH: Final = timedelta(days=2)


def feature_checks(settings: Settings, now: datetime | None = None) -> list[CheckResult]:
    """Every check, each on a seeded sample."""
    views = read_views(settings.feature_tables)
    tables = {view.name: pl.read_parquet(settings.workspace / view.path) for view in views}
    snapshot = Snapshot.load(settings.workspace / "snapshot")
    return [
        leakage(training_sample(settings, views), tables),
        _online_parity(settings.workspace, [view for view in views if view.entity == "user"], tables),
        freshness(snapshot.as_of, FRESH, now or make_clock(settings)()),
    ]


def training_sample(settings: Settings, views: tuple[ViewSchema, ...]) -> pl.DataFrame:
    """Training rows as the ranker would get them: real (user, item, time) triples with every feature as of that time."""
    events = load_events(settings.data).sort("event_id")
    sample = events.sample(min(_SAMPLE, len(events)), seed=0).select("user_id", "item_id", event_timestamp="timestamp")
    return historical(open_store(settings.workspace), sample, [view.name for view in views])


def _online_parity(workspace: Path, views: list[ViewSchema], tables: dict[str, pl.DataFrame]) -> CheckResult:
    """Do users' online rows equal the newest rows of the offline tables?"""
    users = tables[views[0].name]["user_id"].unique().sort().head(_USERS)
    newest = pl.DataFrame({"user_id": users})
    for view in views:
        last = (
            tables[view.name].filter(pl.col("user_id").is_in(users.to_list())).sort("event_timestamp").group_by("user_id").last()
        )
        newest = newest.join(last.drop("event_timestamp"), on="user_id", how="left")
    rows = UserReader(workspace).rows(users.to_list())
    served = pl.DataFrame(rows, schema={name: kind for name, kind in newest.schema.items() if name != "user_id"})
    return parity(served.with_columns(users), newest, ["user_id"])
