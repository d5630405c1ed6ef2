"""`tandem features check` on a workspace that has served: it passes, and each injected fault ends with exit code 3."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from feature_repo.materialize import forget
from feature_repo.served import ServedLog
from tandem.core.folders import read_json, write_json
from tandem.service import cli
from tandem.service.settings import load_settings
from tandem.service.slate import Ask
from tandem.service.wiring import open_recommender

CHECKS = ["leakage", "tables in time", "online parity", "served users", "served items", "views fresh", "snapshot fresh", "drift"]


@pytest.fixture(scope="module")
def served(tiny_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose champion has answered twenty users, a stranger and a sentence."""
    workspace = tmp_path_factory.mktemp("checked") / "workspace"
    shutil.copytree(tiny_workspace, workspace)
    shutil.rmtree(workspace / "served", ignore_errors=True)
    recommender = open_recommender(load_settings(workspace, {}))
    for number in range(20):
        recommender.recommend(Ask(user_id=f"u{number:03d}", session=("i001",) if number % 2 else ()))
    recommender.recommend(Ask(user_id="nobody has this id"))
    recommender.recommend(Ask(query="a story"))
    recommender.close()
    ServedLog(workspace / "served").compact()
    return workspace


@pytest.fixture
def workspace(served: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(served, tmp_path / "workspace"))


def check(workspace: Path) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(cli.app, ["--workspace", str(workspace), "features", "check", "--json"])
    assert result.stdout, result.stderr
    return result.exit_code, json.loads(result.stdout)


def failed(answer: dict[str, Any]) -> set[str]:
    return {name for name, each in answer["checks"].items() if not each["passed"]}


def rewrite(path: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    change(pl.read_parquet(path)).write_parquet(path)


def test_a_workspace_that_served_passes_every_check(served: Path) -> None:
    code, answer = check(served)
    assert (code, answer["passed"], failed(answer)) == (0, True, set())
    assert list(answer["checks"]) == CHECKS
    assert all(set(each) == {"passed", "rows", "skipped", "detail", "found"} for each in answer["checks"].values())
    users, items = answer["checks"]["served users"], answer["checks"]["served items"]
    assert (users["rows"], users["skipped"]) == (21 * 4, 0)
    assert (items["rows"], items["skipped"]) == (22 * 2, 0)
    assert answer["next"] == "tandem train"


def test_a_row_that_sees_its_own_event_is_caught(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking one microsecond later, at the event's own time, is the classic leak."""
    monkeypatch.setattr("feature_repo.offline.JUST_BEFORE", timedelta(0))
    code, answer = check(served)
    assert (code, answer["passed"]) == (3, False)
    assert "leakage" in failed(answer)
    assert {row["kind"] for row in answer["checks"]["leakage"]["found"]} == {"leak"}
    assert answer["made"].startswith(f"{len(failed(answer))} of 8 checks failed: leakage")


def test_a_value_from_the_future_in_a_table_is_caught(workspace: Path) -> None:
    """Each row of one user gets the count of the row after it: online and training read the same wrong table, and agree."""
    users = pl.read_parquet(workspace / "data" / "events.parquet").group_by("user_id").len().sort("len", "user_id")["user_id"]
    later = pl.col("user_events").shift(-1).over("user_id").fill_null(pl.col("user_events"))

    def leaky(rows: pl.DataFrame) -> pl.DataFrame:
        return rows.with_columns(
            pl.when(pl.col("user_id").is_in(users[-20:].implode())).then(later).otherwise("user_events").alias("user_events")
        )

    rewrite(workspace / "features" / "user_stats" / "part-0.parquet", leaky)
    code, answer = check(workspace)
    assert (code, failed(answer)) == (3, {"tables in time"})
    assert {row["feature"] for row in answer["checks"]["tables in time"]["found"]} == {"user_events"}
    assert "values from the future" in answer["checks"]["tables in time"]["detail"]


def test_what_was_served_from_another_row_is_caught(workspace: Path) -> None:
    """One user was served with another number of events, one item with another price, than any table holds."""
    (part,) = (workspace / "served").glob("part-*.parquet")

    def tampered(rows: pl.DataFrame) -> pl.DataFrame:
        first = pl.col("features_read").is_not_null() & (pl.col("user_id") == "u003")
        read = json.loads(rows.filter(first)["features_read"][0])
        read["user"]["user_stats"]["values"]["user_events"] = 9_999
        read["item"]["values"]["price"] = 0.123
        return rows.with_columns(pl.when(first).then(pl.lit(json.dumps(read))).otherwise("features_read").alias("features_read"))

    rewrite(part, tampered)
    code, answer = check(workspace)
    assert (code, failed(answer)) == (3, {"served users", "served items"})
    (user,), (item,) = (answer["checks"][name]["found"] for name in ("served users", "served items"))
    assert (user["entity"], user["feature"], user["served"], user["kind"]) == ("u003", "user_events", "9999", "differs")
    assert (item["feature"], item["served"], item["kind"]) == ("price", "0.123", "differs")


def test_an_empty_online_store_is_caught_and_shown_in_one_table(workspace: Path) -> None:
    forget(workspace)
    shown = CliRunner().invoke(cli.app, ["--workspace", str(workspace), "features", "check"])
    assert shown.exit_code == 3
    assert shown.stdout.count("┏") == 1
    verdicts = {name: verdict for line in shown.stdout.splitlines() for name, verdict in [cells(line)] if verdict}
    assert verdicts == dict.fromkeys(CHECKS, "passed") | dict.fromkeys(("online parity", "views fresh"), "FAILED")
    assert "has no row online" in shown.stdout
    assert "2 of 8 checks failed: online parity, views fresh" in shown.stdout


def cells(line: str) -> tuple[str, str]:
    """Name and verdict of a line of the table; both empty for other lines."""
    parts = [part.strip() for part in line.split("│")]
    return (parts[1], parts[2]) if len(parts) > 3 else ("", "")


def test_features_that_nobody_materialised_for_days_are_caught(workspace: Path) -> None:
    """Events go on for three days, and nobody builds or materialises."""

    def later(events: pl.DataFrame) -> pl.DataFrame:
        more = events.tail(1).with_columns(event_id=pl.lit("later"), timestamp=pl.col("timestamp") + timedelta(days=3))
        return pl.concat([events, more])

    rewrite(workspace / "data" / "events.parquet", later)
    code, answer = check(workspace)
    assert code == 3
    assert {"views fresh", "snapshot fresh"} <= failed(answer)
    assert answer["checks"]["tables in time"]["skipped"] == 1
    assert "was materialised longer than 2 d 0 h ago" in answer["checks"]["views fresh"]["detail"]


def test_a_shift_of_the_newest_rows_is_caught(workspace: Path) -> None:
    """From some day on a price comes in cents: the rows stay consistent with each other, and only drift sees it."""
    path = workspace / "features" / "user_stats" / "part-0.parquet"
    newest = pl.col("event_timestamp") > pl.col("event_timestamp").quantile(0.85)
    rewrite(
        path,
        lambda rows: rows.with_columns(
            user_mean_value=pl.when(newest).then(pl.col("user_mean_value") * 100).otherwise("user_mean_value")
        ),
    )
    code, answer = check(workspace)
    assert code == 3
    assert {"drift"} <= failed(answer) <= {"drift", "online parity", "tables in time"}
    assert answer["checks"]["drift"]["found"][0]["feature"] == "user_mean_value"


def test_rows_of_a_version_that_is_no_longer_built_are_counted(workspace: Path) -> None:
    path = workspace / "features" / "schema.json"
    views = read_json(path)["views"]
    write_json(path, {"views": [view | {"version": 2} if view["name"] == "user_stats" else view for view in views]})
    code, answer = check(workspace)
    assert (code, failed(answer)) == (0, set())
    users = answer["checks"]["served users"]
    assert (users["rows"], users["skipped"]) == (21 * 3, 21)
    assert "21 skipped: user_stats version 1 is no longer built" in users["detail"]
