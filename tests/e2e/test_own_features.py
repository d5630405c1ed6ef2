"""The page's ten minutes walked: a feature of one's own in a training frame, online and in a slate; what a release pins of it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from feature_repo.offline import open_store
from feature_repo.pins import Pins
from feature_repo.store import load_events
from feature_repo.views import TIMESTAMP, kept_views, read_views
from tandem.core.errors import IncompatibleError
from tandem.service import app as http
from tandem.service import cli, recipes
from tandem.service.clock import make_clock
from tandem.service.settings import load_settings
from tandem.service.slate import Ask
from tandem.service.wiring import open_recommender

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "features.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("## Your own feature in ten minutes") : PAGE.index("### What can be declared")]


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
    return [block for named, block in found if named == language]


def ran(workspace: Path, *words: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, ["--workspace", str(workspace), *words, "--json"])
    assert result.exit_code == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


@pytest.fixture(scope="module")
def walk(tiny_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A copy of the world in which every line of the page was done, in order: the workspace, and the answers by command.

    Its events say which device they came from, as an import with `[table] context` leaves them.
    """
    workspace = tmp_path_factory.mktemp("own") / "workspace"
    shutil.copytree(tiny_workspace, workspace)
    shutil.rmtree(workspace / "served", ignore_errors=True)
    events = pl.read_parquet(workspace / "data" / "events.parquet")
    device = pl.when(pl.col("user_id") < "u075").then(pl.lit("phone")).otherwise(pl.lit("desk")).alias("device")
    events.with_columns(device).write_parquet(workspace / "data" / "events.parquet")
    (toml,), (csv,) = blocks("toml"), blocks("csv")
    (workspace / "tandem.toml").write_text((workspace / "tandem.toml").read_text() + toml)
    (workspace / "margin.csv").write_text(csv)
    answers: dict[str, Any] = {}
    for line in "".join(blocks("")).splitlines():
        words = shlex.split(line)[1:]
        if "ITEM" in words:
            words[words.index("ITEM")] = answers["recommend u001"]["items"][0]["item_id"]
        answers[line.removeprefix("tandem ")] = ran(workspace, *words)
    return workspace, answers


def bought(events: pl.DataFrame, item: str, moment: datetime) -> int:
    """Purchases of an item in the seven UTC days that end at a moment, counted by hand."""
    first = moment.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=6)
    own = events.filter(pl.col("item_id") == item, pl.col("action") == "purchase")
    return own.filter(pl.col("timestamp") >= first, pl.col("timestamp") <= moment).height


def test_a_feature_stands_at_all_its_places_with_the_value_that_events_give(walk: tuple[Path, dict[str, Any]]) -> None:
    workspace, answers = walk
    events = pl.read_parquet(workspace / "data" / "events.parquet")
    shown = answers["features show item_buys_7d"]
    assert (shown["view"], len(shown["training"]), len(shown["online"]), len(shown["snapshot"])) == ("item_declared", 5, 5, 5)
    for row in shown["training"]:
        assert (row["value"] or 0) == bought(events, row["id"], datetime.fromisoformat(row["at"]) - timedelta(microseconds=1))
    for row in [*shown["online"], *shown["snapshot"]]:
        assert (row["value"] or 0) == bought(events, row["id"], make_clock(load_settings(workspace, {}))())
    margin = answers["features show margin --of i001"]
    assert (margin["view"], margin["definition"]["made_by"]) == ("item_margin", {"revision": 1, "table": "item_margin"})
    assert [row["value"] for place in ("training", "online", "snapshot") for row in margin[place]] == [0.28] * 3


def test_the_program_of_the_page_prints_the_training_frame(
    walk: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    workspace, _ = walk
    (program,) = blocks("python")
    changed = program.replace('Path("workspace")', f"Path({str(workspace)!r})")
    assert changed != program
    names: dict[str, Any] = {}
    exec(compile(changed, "features.md", "exec"), names)
    frame = names["frame"]
    assert "user_clicks_faded" in capsys.readouterr().out
    events = pl.read_parquet(workspace / "data" / "events.parquet")
    for row in frame.sample(50, seed=0).iter_rows(named=True):
        before = row[TIMESTAMP] - timedelta(microseconds=1)
        assert (row["item_buys_7d"] or 0) == bought(events, row["item_id"], before)
        margin = {"i001": 0.28 if before >= datetime(2025, 1, 9, tzinfo=UTC) else 0.31, "i002": 0.12}.get(row["item_id"])
        assert row["margin"] == (margin if before >= datetime(2025, 1, 1, tzinfo=UTC) else None)


def test_the_ranker_knew_it_when_it_made_the_slate(walk: tuple[Path, dict[str, Any]]) -> None:
    workspace, answers = walk
    settings = load_settings(workspace, {})
    assert answers["recommend u001"]["release"] == "own-features"
    assert answers["recommend u001"]["degraded"] == []
    (told,) = [answer for line, answer in answers.items() if line.startswith("why")]
    now = make_clock(settings)()
    events = pl.read_parquet(workspace / "data" / "events.parquet")
    clicks = events.filter(pl.col("user_id") == "u001", pl.col("action") == "click")["timestamp"].to_list()
    faded = sum(0.5 ** ((now - each) / timedelta(days=3)) for each in clicks)
    assert faded > 0
    assert told["features"]["user_clicks_faded"] == pytest.approx(faded, rel=1e-5)
    assert told["features"]["item_buys_7d"] == bought(events, told["item_id"], now)
    assert "margin_to_price" in told["features"]
    assert {"device=phone", "device=desk"} <= set(told["features"])


def test_every_check_holds_for_declared_features(walk: tuple[Path, dict[str, Any]]) -> None:
    answer = ran(walk[0], "features", "check")
    assert answer["passed"], {name: each["detail"] for name, each in answer["checks"].items() if not each["passed"]}
    assert answer["checks"]["served items"]["rows"] > 0
    assert answer["checks"]["served users"]["rows"] > 0


def test_context_reaches_the_ranker_and_what_it_never_saw_is_missing(walk: tuple[Path, dict[str, Any]]) -> None:
    workspace, _ = walk
    settings = load_settings(workspace, {})
    pins = Pins.read(workspace / "releases" / "own-features" / "features.json")
    assert set(pins.context["device"]) == {"phone", "desk"}
    recommender = open_recommender(settings)
    assembler = recommender._parts.assembler
    now = pl.Series([make_clock(settings)()]).dt.epoch("us").to_numpy()

    def known(context: dict[str, str]) -> dict[str, float]:
        users = assembler.users([{}], now, [context])
        values = dict(zip(users.names, users.numbers[0].tolist(), strict=True))
        return {name: values[name] for name in ("device=desk", "device=phone")}

    assert known({"device": "phone"}) == {"device=desk": 0.0, "device=phone": 1.0}
    for nothing in ({}, {"device": "fridge"}, {"surface": "phone"}):
        assert all(value != value for value in known(nothing).values())
    phone, desk = (recommender.recommend(Ask(user_id="u001", context={"device": each})) for each in ("phone", "desk"))
    assert [item.score for item in phone.items] != [item.score for item in desk.items]
    recommender.close()
    with TestClient(http.create_app(settings), f"http://{settings.service.host}") as client:
        answer = client.post("/v1/recommend", json={"user_id": "u001", "context": {"device": "phone"}}).json()
    assert {item["item_id"]: round(item["score"], 3) for item in answer["items"]} == {
        item.item_id: round(item.score, 3) for item in phone.items
    }


# --- what a release pins ----------------------------------------------------------------------------------------------------


@pytest.fixture
def changed(walk: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy in which two declarations changed after the release, and everything was built, applied and materialised anew."""
    workspace = Path(shutil.copytree(walk[0], tmp_path / "workspace"))
    toml = (workspace / "tandem.toml").read_text().replace("window_days = 7", "window_days = 3")
    (workspace / "tandem.toml").write_text(toml + "\n[features]\nwindows = [1, 5]\n")
    for command in ("build", "apply", "materialize"):
        ran(workspace, "features", command)
    return workspace


def views(workspace: Path) -> tuple[set[str], set[str]]:
    folder = workspace / "features"
    return {view.name for view in read_views(folder)}, {view.name for view in kept_views(folder)}


def test_a_changed_view_stands_beside_the_one_that_releases_read(changed: Path) -> None:
    current, kept = views(changed)
    assert {"user_stats__v2", "item_stats__v2", "item_declared__v2", "user_declared", "item_margin"} <= current
    assert kept == {"user_stats", "item_stats", "item_declared"}
    settings = load_settings(changed, {})
    recommender = open_recommender(settings)
    slate = recommender.recommend(Ask(user_id="u001"))
    assert (slate.release, slate.degraded) == ("own-features", ())
    told = recommender.why("u001", slate.items[0].item_id)
    recommender.close()
    events, now = pl.read_parquet(changed / "data" / "events.parquet"), make_clock(settings)()
    assert told.features["item_buys_7d"] == bought(events, told.item_id, now)  # seven days, as the release knows it
    assert {"user_events_30d"} <= set(told.features)
    assert ran(changed, "features", "check")["passed"]


def test_events_reach_the_versions_that_releases_read(changed: Path) -> None:
    events = pl.read_parquet(changed / "data" / "events.parquet")
    last = events["timestamp"].max()
    assert isinstance(last, datetime)
    rows = pl.DataFrame(
        {
            "user_id": ["u001"] * 2,
            "item_id": ["i003"] * 2,
            "action": ["purchase", "click"],
            "timestamp": [last] * 2,
            "device": ["watch", None],
        }
    )
    rows.write_parquet(changed / "new.parquet")
    ran(changed, "features", "push", str(changed / "new.parquet"))
    assert load_events(changed / "data").filter(pl.col("device") == "watch")["action"].to_list() == ["purchase"]
    for name in ("item_declared", "item_declared__v2"):
        table = pl.read_parquet(changed / "features" / name / "*.parquet").filter(
            pl.col("item_id") == "i003", pl.col(TIMESTAMP) == last
        )
        days = {"item_declared": 7, "item_declared__v2": 3}[name]
        first = last.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=days - 1)
        own = events.filter(pl.col("item_id") == "i003", pl.col("action") == "purchase", pl.col("timestamp") >= first)
        assert table["item_buys_7d"].to_list() == [own.height + 1]


def test_feasts_own_apply_and_pruning_keep_what_is_pinned(changed: Path) -> None:
    program = "from feast.cli.cli import cli; cli(['apply'], standalone_mode=False)"
    done = subprocess.run([sys.executable, "-c", program], cwd=changed, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    applied = {view.name for view in open_store(changed).list_feature_views()}
    current, kept = views(changed)
    assert applied == current | kept
    assert ran(changed, "features", "prune")["dropped"] == []
    ran(changed, "release", "rollback")
    recommender = open_recommender(load_settings(changed, {}))
    slate = recommender.recommend(Ask(user_id="u001"))
    assert slate.degraded == ()
    assert slate.release != "own-features"
    recommender.close()


def test_a_release_whose_view_is_another_or_gone_is_refused_with_both_definitions(changed: Path) -> None:
    """The trained ranker and both releases forget their pins, as if they were too old to count; then they come back."""
    settings = load_settings(changed, {})
    first = next(each["from"] for each in ran(changed, "release", "history")["history"] if each["to"] == "own-features")
    (changed / "features" / "schema.json").write_text(
        (changed / "features" / "schema.json").read_text().replace('"name": "item_stats"', '"name": "item_stats__v7"')
    )
    for refused in (
        lambda: recipes.release_rollback(settings),
        lambda: recipes.release_promote(settings, str(first), because="x", force=True),
        lambda: open_recommender(settings),
    ):
        with pytest.raises(IncompatibleError) as told:
            refused()
        assert '"windows": [1, 7, 30]' in str(told.value)
        assert '"windows": [1, 5]' in str(told.value)
    assert ran(changed, "release", "history")["history"][-1]["to"] == "own-features"


def test_versions_that_nobody_reads_any_more_are_dropped_everywhere(changed: Path) -> None:
    """Two more champions on the new views, and the first releases are out of reach."""
    for command in (["train", "ranker"], ["evaluate"]):
        ran(changed, *command)
    for name in ("third", "fourth", "fifth"):
        settings = (changed / "tandem.toml").read_text()
        (changed / "tandem.toml").write_text(settings + f"\n# {name}\n")
        ran(changed, "release", "create", "--name", name)
        ran(changed, "release", "promote", name, "--force", "--because", "to push the old ones out")
    assert set(ran(changed, "features", "prune")["dropped"]) == {"user_stats", "item_stats", "item_declared"}
    assert not (changed / "features" / "item_stats").exists()
    applied = {view.name for view in open_store(changed).list_feature_views()}
    assert applied == views(changed)[0]
    assert views(changed)[1] == set()
