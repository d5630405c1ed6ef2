"""What cron does: new events lead to a new release, held against the champion on the same requests, or nothing happens."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from feature_repo.live import EventGate
from feature_repo.store import load_events, load_items
from tandem.core.errors import GateRefusedError
from tandem.core.folders import read_json
from tandem.service import recipes
from tandem.service.recipes.workspace import open_releases
from tandem.service.settings import Settings, load_settings


@pytest.fixture
def settings(tmp_path: Path, tiny_workspace: Path) -> Settings:
    return load_settings(Path(shutil.copytree(tiny_workspace, tmp_path / "workspace")), {})


def push_day(settings: Settings, people: int) -> None:
    """New people who click some items the day after the world ends."""
    last: Any = load_events(settings.data)["timestamp"].max()
    items = load_items(settings.data)["item_id"]
    rows = [
        {"user_id": f"new {person}", "item_id": items[(7 * person + step) % 40], "action": "click",
         "timestamp": last + timedelta(hours=1 + step, seconds=person)}
        for person in range(people) for step in range(6)
    ]  # fmt: skip
    EventGate(settings.workspace, settings.features).push(pl.DataFrame(rows), datetime.now(UTC))


def test_without_anything_new_the_champion_stays(settings: Settings) -> None:
    before = recipes.status(settings).data["champion"]
    done = recipes.retrain(settings, "a timer", keep=5)
    assert (done.data["champion"], done.data["before"]) == (before, before)
    assert "stays live" in done.made


def test_new_events_lead_to_a_new_champion_compared_on_the_same_requests(settings: Settings) -> None:
    before = recipes.status(settings).data["champion"]
    push_day(settings, people=30)
    loose = settings.workspace / "tandem.toml"
    guardrails = '[gates.guardrails]\n"bytes" = { may_rise = 4.0 }\n'  # not the latency: the machine of a test may be busy
    loose.write_text(loose.read_text() + '\n[gates.metrics]\n"ndcg@10" = { margin = 0.5 }\n' + guardrails)
    done = recipes.retrain(load_settings(settings.workspace, {}), "30 new people", keep=5)
    assert done.data["before"] == before != done.data["champion"]
    users = pl.read_parquet(settings.releases / done.data["champion"] / "evaluation" / "users.parquet")
    ours, theirs = (users.filter(pl.col("system") == name) for name in ("towers + ranker", "champion"))
    assert ours["request_id"].to_list() == theirs["request_id"].to_list()
    assert theirs["recall@100"].mean() > 0
    with open_releases(settings) as store:
        assert store.history()[-1].why == "30 new people"


def test_a_release_that_is_not_better_enough_is_kept_and_refused(settings: Settings) -> None:
    before = recipes.status(settings).data["champion"]
    push_day(settings, people=3)
    strict = settings.workspace / "tandem.toml"
    strict.write_text(strict.read_text() + '\n[gates.metrics]\n"ndcg@10" = { margin = 0.5, kind = "superiority" }\n')
    settings = load_settings(settings.workspace, {})
    for _ in range(2):  # the second finds everything done, and says the same
        with pytest.raises(GateRefusedError, match=r"ndcg@10"):
            recipes.retrain(settings, "three new people", keep=5)
        assert recipes.status(settings).data["champion"] == before
    names = recipes.release_list(settings).data["releases"]
    (refused,) = set(names) - {before}
    assert read_json(settings.releases / refused / "measured.json")["because"] == "three new people", "kept without a promotion"
