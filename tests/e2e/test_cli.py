"""The commands: what they print for people and for programs, how they fail, and the demo from nothing to slates."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from tandem.core.folders import file_hash, read_json, write_json
from tandem.service import cli, command, demo, recipes
from tandem.service.outcome import Outcome, Table
from tandem.service.settings import load_settings
from tandem.service.terminal import cell, plain, print_outcome, spoken, watched

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def _libraries_as_they_were() -> Iterator[None]:
    """Commands quieten libraries for the rest of their process; here that process goes on."""
    root, level = logging.getLogger(), logging.getLogger().level
    with warnings.catch_warnings():
        yield
    root.setLevel(level)


@pytest.fixture(scope="module")
def workspace(tiny_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that commands may write to."""
    copied = tmp_path_factory.mktemp("cli") / "workspace"
    shutil.copytree(tiny_workspace, copied)
    return copied


def run(*arguments: str) -> Any:
    return RUNNER.invoke(cli.app, list(arguments))


def answer(workspace: Path, *arguments: str) -> dict[str, Any]:
    """The JSON answer of a command that must succeed, alone on standard output."""
    result = run("--workspace", str(workspace), *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    parsed: dict[str, Any] = json.loads(result.stdout)
    assert parsed["made"]
    assert parsed["took_s"] >= 0
    return parsed


def failure(code: int, *arguments: str) -> str:
    """The one line on standard error of a command that must fail."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    line: str
    (line,) = [line for line in result.stderr.splitlines() if not line.endswith("…")]
    assert line.startswith("error: ")
    return line


def champion(workspace: Path) -> str:
    name: str = answer(workspace, "status")["champion"]
    return name


def item(workspace: Path, row: int) -> str:
    found: str = pl.read_parquet(workspace / "data" / "items.parquet")["item_id"][row]
    return found


# ------------------------------------------------------------------------------------------------------------ starting


def test_help_loads_nothing_heavy() -> None:
    heavy = {
        "polars",
        "numpy",
        "torch",
        "feast",
        "mlflow",
        "faiss",
        "transformers",
        "pydantic",
        "fastapi",
        "sqlalchemy",
        "pandas",
    }
    code = f"""
import sys
from tandem.service.cli import app
try:
    app(["--help"])
except SystemExit:
    print(sorted({heavy!r} & set(sys.modules)))
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]"
    assert "recommend" in printed


def test_every_command_of_the_design_is_there() -> None:
    shown = {name: run(*name.split(), "--help") for name in COMMANDS}
    assert {name: result.exit_code for name, result in shown.items()} == dict.fromkeys(COMMANDS, 0)
    assert [name for name, result in shown.items() if "--json" not in result.output] == []


COMMANDS = [
    "demo", "import", "simulate", "train", "evaluate", "retrain", "recommend", "similar", "search", "why", "serve", "status",
    "features apply", "features build", "features materialize", "features push", "features check", "users erase",
    "release create", "release list", "release show", "release gate", "release promote", "release rollback", "release history",
    "release diff", "release at", "release delete", "release prune",
]  # fmt: skip


def test_version() -> None:
    assert run("--version").stdout.strip() == "0.1.0"


# ----------------------------------------------------------------------------------------------------------- questions


def test_recommend_answers_with_titles_for_people_and_for_programs(workspace: Path) -> None:
    slate = answer(workspace, "recommend", "u001", "-k", "4")
    assert [each["position"] for each in slate["items"]] == [1, 2, 3, 4]
    assert slate["release"] == champion(workspace)
    shown = run("--workspace", str(workspace), "recommend", "u001", "-k", "4")
    assert slate["items"][0]["title"].split()[0] in shown.stdout
    assert f"next: tandem why u001 {slate['items'][0]['item_id']}" in shown.stdout


def test_recommend_takes_words_session_category_and_exclusions(workspace: Path) -> None:
    out = item(workspace, 0)
    category = pl.read_parquet(workspace / "data" / "items.parquet")["categories"][0][0]
    arguments = [
        "recommend",
        "--query",
        "中文 🙂",
        "--session",
        item(workspace, 1),
        "--category",
        category,
        "--exclude",
        out,
        "-k",
        "50",
    ]
    slate = answer(workspace, *arguments)
    assert slate["items"]
    assert all(category in each["categories"] for each in slate["items"])
    assert {out, item(workspace, 1)} & {each["item_id"] for each in slate["items"]} == set()


def test_a_user_with_spaces_slashes_and_emoji_is_answered(workspace: Path) -> None:
    slate = answer(workspace, "recommend", "a b/c 🙂")
    assert slate["cold_start"] is True
    assert slate["next"].startswith("tandem why 'a b/c 🙂' ")


def test_search_similar_and_why(workspace: Path) -> None:
    title = pl.read_parquet(workspace / "data" / "items.parquet")["title"][3]
    assert item(workspace, 3) in [each["item_id"] for each in answer(workspace, "search", title, "-k", "20")["items"]]
    alike = answer(workspace, "similar", item(workspace, 3), "-k", "5")
    assert alike["returned"] == 5
    first = answer(workspace, "recommend", "u001", "-k", "1")["items"][0]["item_id"]
    told = answer(workspace, "why", "u001", first)
    assert told["verdict"] == "shown at position 1"
    assert told["stages"][-1]["stage"] == "slate"


# ----------------------------------------------------------------------------------------------- features and releases


def test_feature_commands(workspace: Path) -> None:
    assert answer(workspace, "features", "build")["user_stats"]["rows"] > 0
    assert {"user_stats", "item_stats"} <= set(answer(workspace, "features", "apply")["views"])
    views = answer(workspace, "features", "materialize", "--since", "2025-01-10")["views"]
    assert sum(each["quarantined"] for each in views.values()) == 0
    assert answer(workspace, "features", "check")["passed"] is True


def test_a_release_is_made_judged_promoted_and_rolled_back(workspace: Path) -> None:
    first = champion(workspace)
    made = answer(workspace, "release", "create", "--name", "challenger")
    assert made["release"] == "challenger"
    assert set(answer(workspace, "release", "list")["releases"]) == {first, "challenger"}
    assert answer(workspace, "release", "show", "challenger")["name"] == "challenger"
    assert isinstance(answer(workspace, "release", "diff", first, "challenger")["changes"], list)
    assert answer(workspace, "release", "gate", "challenger")["passed"] is True
    promoted = answer(workspace, "release", "promote", "challenger", "--because", "a test")
    assert (promoted["champion"], promoted["before"]) == ("challenger", first)
    assert answer(workspace, "recommend", "u001")["release"] == "challenger"
    assert answer(workspace, "release", "rollback", "--because", "enough")["champion"] == first
    history = answer(workspace, "release", "history")["history"]
    assert [(line["kind"], line["to"], line["why"]) for line in history[-2:]] == [
        ("promote", "challenger", "a test"),
        ("rollback", first, "enough"),
    ]


def test_a_worse_release_is_refused_with_code_3_and_the_champion_stays(workspace: Path) -> None:
    """The gate reads the per-user rows that a release carries: a challenger with bad ones must not pass."""
    before, evaluation = champion(workspace), workspace / "models" / "evaluation" / "users.parquet"
    good = evaluation.read_bytes()
    users = pl.read_parquet(evaluation)
    users.with_columns(pl.col("ndcg@10", "recall@100") * 0.1).write_parquet(evaluation)
    answer(workspace, "release", "create", "--name", "worse")
    evaluation.write_bytes(good)
    refused = run("--workspace", str(workspace), "release", "gate", "worse", "--json")
    verdict = json.loads(refused.stdout)
    assert (refused.exit_code, verdict["passed"]) == (command.REFUSED, False)
    assert [sentence.split(":")[0] for sentence in verdict["refusals"]] == ["ndcg@10", "recall@100"]
    assert {row["passed"] for row in verdict["table"] if row["metric"] in ("ndcg@10", "recall@100")} == {False}
    shown = run("--workspace", str(workspace), "release", "promote", "worse")
    assert shown.exit_code == command.REFUSED
    assert all(f"- {sentence[:60]}" in shown.stdout for sentence in verdict["refusals"])
    assert re.search(r"ndcg@10 .*│ -0\.\d+ to -0\.\d+ │ worse by < 0\.01 +│ \d+ of ≥ 30 │ REFUSED", shown.stdout)
    assert "--force --because" in shown.stdout
    failure(command.USAGE, "--workspace", str(workspace), "release", "promote", "worse", "--force")
    assert champion(workspace) == before


def test_what_was_live_at_a_moment_is_told_with_its_data_and_reason(workspace: Path) -> None:
    first, last = (answer(workspace, "release", "history")["history"][number] for number in (0, -1))
    told = answer(workspace, "release", "at", "2999-01-01T12:00")
    assert (told["release"], told["why"], told["until"]) == (last["to"], last["why"], None)
    assert told["source"] == "world"
    assert told["window"]
    earlier = answer(workspace, "release", "at", first["at"].replace("+00:00", ".999999+00:00"))
    assert (earlier["release"], earlier["who"], earlier["instead_of"]) == (first["to"], first["who"], None)
    assert earlier["gate"][0].startswith("ndcg@10: no champion")
    assert "nothing was live" in failure(command.FAILED, "--workspace", str(workspace), "release", "at", "2020-01-01")
    assert "'noon' is no time" in failure(command.USAGE, "--workspace", str(workspace), "release", "at", "noon")
    assert first["to"] in run("--workspace", str(workspace), "release", "at", "2999-01-01").stdout


def test_old_releases_go_and_the_champion_and_what_a_rollback_needs_stay(workspace: Path) -> None:
    answer(workspace, "release", "create", "--name", "old")
    before = champion(workspace)
    answer(workspace, "release", "promote", "old", "--because", "a test")
    answer(workspace, "release", "rollback", "--because", "enough")
    answer(workspace, "release", "create", "--name", "spare")
    assert "is live since" in failure(command.FAILED, "--workspace", str(workspace), "release", "delete", before)
    assert answer(workspace, "release", "delete", "spare")["freed_bytes"] > 0
    assert not (workspace / "releases" / "spare").exists()
    assert "'spare' (deleted" in failure(command.FAILED, "--workspace", str(workspace), "release", "show", "spare")
    pruned = answer(workspace, "release", "prune", "--keep", "0")
    assert pruned["kept"][before] == "live"
    assert "old" in pruned["deleted"], "it was rolled back from"
    assert {path.name for path in (workspace / "releases").iterdir() if path.is_dir()} == set(pruned["kept"])
    assert set(answer(workspace, "release", "list")["releases"]) == set(pruned["kept"])
    assert answer(workspace, "recommend", "u001", "-k", "3")["release"] == before
    assert run("--workspace", str(workspace), "release", "prune", "--keep", "-1").exit_code == command.USAGE


def test_train_and_evaluate(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = workspace / "models" / "ranker" / "ranker.safetensors"
    before = file_hash(weights)
    assert answer(workspace, "train", "ranker")["ranker_tasks"] == "click, like, purchase"
    assert file_hash(weights) == before, "same data, same seed: same weights"
    monkeypatch.setenv("TANDEM_RANKER__SEED", "1")
    answer(workspace, "train", "ranker")
    assert file_hash(weights) != before
    assert "run `tandem evaluate`" in failure(command.FAILED, "--workspace", str(workspace), "release", "create")
    report = answer(workspace, "evaluate")
    assert {"popularity", "item-kNN", "EASE", "towers", "towers + ranker"} <= {row["system"] for row in report["funnel"]}
    assert {row["task"] for row in report["tasks"]} == {"click", "like", "purchase"}


# ------------------------------------------------------------------------------------------------------------ failures


def test_usage_is_code_2(workspace: Path) -> None:
    for arguments in (["recommend", "-k", "0"], ["train", "everything"], ["nonsense"], ["simulate", "--days", "1"], ["similar"]):
        result = run("--workspace", str(workspace), *arguments)
        assert (result.exit_code, result.stdout) == (command.USAGE, "")
        assert "Traceback" not in result.stderr
    assert "k = 1000000000" in failure(command.USAGE, "--workspace", str(workspace), "recommend", "u001", "-k", "1000000000")
    assert "not an id" in failure(command.USAGE, "--workspace", str(workspace), "recommend", "a\x00b")


def test_unknown_things_are_named(workspace: Path) -> None:
    assert "'no item'" in failure(command.FAILED, "--workspace", str(workspace), "similar", "no item")
    assert "'no-release'" in failure(command.FAILED, "--workspace", str(workspace), "release", "show", "no-release")
    assert "no-file.zip" in failure(command.FAILED, "--workspace", str(workspace), "import", "movielens", "no-file.zip")
    assert "'ratings'" in failure(command.USAGE, "--workspace", str(workspace), "import", "ratings", str(workspace))


def test_an_empty_workspace_says_what_to_do_first(tmp_path: Path) -> None:
    assert "tandem import" in answer(tmp_path / "new", "status")["next"]
    for arguments in (
        ["features", "build"],
        ["train"],
        ["evaluate"],
        ["recommend", "u"],
        ["release", "create"],
        ["release", "rollback"],
    ):
        failure(command.FAILED, "--workspace", str(tmp_path / "new"), *arguments)


def test_an_unknown_setting_is_refused_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "tandem.toml").write_text("[service]\nbudget = 5\n")
    assert "'budget_ms'" in failure(command.USAGE, "--workspace", str(tmp_path), "status")


def test_tandem_home_names_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "elsewhere"))
    assert json.loads(run("status", "--json").stdout)["workspace"] == str(tmp_path / "elsewhere")


def test_an_unexpected_error_is_one_line_and_a_traceback_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Outcome:
        raise ZeroDivisionError("injected")

    monkeypatch.setattr(recipes, "status", broken)
    assert "unexpected ZeroDivisionError: injected" in failure(command.FAILED, "--workspace", str(tmp_path), "status")
    monkeypatch.setenv(command.DEBUG, "1")
    assert isinstance(run("--workspace", str(tmp_path), "status").exception, ZeroDivisionError)


# ---------------------------------------------------------------------------------------------- data in, and the demo


def test_simulate_and_a_table_of_ones_own(tmp_path: Path) -> None:
    assert answer(tmp_path / "world", "simulate", "--users", "20", "--items", "30", "--days", "5")["appended"] > 0
    workspace = tmp_path / "own"
    workspace.mkdir()
    (workspace / "tandem.toml").write_text(MAPPING)
    csv = tmp_path / "own.csv"
    csv.write_text(
        "who,what,when,many\nu 1,a/b,2026-01-01T00:00:00Z,1\n,a/b,2026-01-02T00:00:00Z,1\nü🙂,中文,2026-01-03T00:00:00Z,2\n"
    )
    counts = answer(workspace, "import", "table", str(csv))
    assert (counts["appended"], counts["rejected"]) == (2, 1)
    assert answer(workspace, "import", "table", str(csv))["appended"] == 0
    csv.write_text("who,when,many\nu,2026-01-01T00:00:00Z,1\n")
    assert "'what'" in failure(command.USAGE, "--workspace", str(workspace), "import", "table", str(csv))


MAPPING = """\
[table]
user_id = "who"
item_id = "what"
timestamp = "when"
title = "what"
text = ["what"]
history = ["bought"]
positive = "bought"
exclude_seen = false
split = "users"

[[table.actions]]
name = "bought"
column = "many"
at_least = 1

[[table.tasks]]
name = "bought"
action = "bought"
"""


def test_the_demo_goes_on_after_a_crash_is_not_done_twice_and_spares_other_data(
    tmp_path: Path, tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = tmp_path / "demo"
    workspace.mkdir()
    shutil.copy(tiny_workspace / "tandem.toml", workspace)
    monkeypatch.setitem(demo.SIZES, "small", (150, 200, 20))
    with monkeypatch.context() as crashing:
        crashing.setattr(recipes, "evaluate", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
        assert "power cut" in failure(command.FAILED, "--workspace", str(workspace), "demo")
    assert "no release is live" in failure(command.FAILED, "--workspace", str(workspace), "recommend", "u001")
    towers = (workspace / "models" / "retrieval" / "retriever.json").stat().st_mtime_ns

    shown = run("--workspace", str(workspace), "demo")
    assert shown.exit_code == 0, shown.stderr
    assert (workspace / "models" / "retrieval" / "retriever.json").stat().st_mtime_ns == towers
    assert "Funnel" in shown.stdout
    assert shown.stdout.count("history, newest first") == 3
    assert "/v1/recommend -H 'content-type: application/json' -d" in shown.stdout

    first = champion(workspace)
    again = answer(workspace, "demo")
    assert again["champion"] == first
    assert [(len(each["history"]), len(each["slate"])) for each in again["people"]] == [(8, 8)] * 3
    assert not any(set(each["history"]) & set(each["slate"]) for each in again["people"])
    assert "another folder" in failure(command.USAGE, "--workspace", str(workspace), "demo", "--size", "medium")


def test_the_demo_spares_data_that_are_not_its_own(tmp_path: Path) -> None:
    answer(tmp_path, "simulate", "--users", "5", "--items", "9", "--days", "3")
    before = (tmp_path / "data" / "events.parquet").read_bytes()
    assert "not the demo's" in failure(command.USAGE, "--workspace", str(tmp_path), "demo")
    assert "both its kind and its files" in failure(command.USAGE, "--workspace", str(tmp_path), "demo", "--kind", "movielens")
    assert (tmp_path / "data" / "events.parquet").read_bytes() == before


def test_a_demo_that_was_killed_while_making_data_makes_them_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo.SIZES, "small", (20, 30, 5))
    settings = load_settings(tmp_path, {})
    write_json(settings.state / "demo.json", {"wanted": "the small world", "whole": False})
    (tmp_path / "data").mkdir()
    demo._fill(settings, "world", "small", None, recipes.quiet)
    assert read_json(settings.state / "demo.json")["whole"] is True
    assert len(pl.read_parquet(tmp_path / "data" / "items.parquet")) == 30


# ------------------------------------------------------------------------------------------------------------ printing


def test_cells_durations_and_plain_values() -> None:
    assert [cell(value) for value in (None, float("nan"), 1234567, 0.12345, 12.34, "x", True)] == [
        "–", "–", "1,234,567", "0.1235", "12.3", "x", "True",
    ]  # fmt: skip
    assert (spoken(3.14), spoken(125)) == ("3.1 s", "2 min 5 s")
    assert plain({"a": (float("nan"), float("inf"), 1), 2: Path("x")}) == {"a": [None, None, 1], "2": "x"}


def test_titles_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("[bold]T[/bold]", ("title",), (("[red]wine[/red] :smile:",),))
    print_outcome(Outcome("made [it]", {}, table, "", (table,)), 1.0, False, sys.stdout)
    printed = capsys.readouterr().out
    assert printed.count("[red]wine[/red] :smile:") == 2
    assert "[bold]T[/bold]" in printed
    assert "made [it] (1.0 s)" in printed


def test_progress_without_a_terminal_is_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    with watched(sys.stderr) as progress:
        for done in range(3):
            progress("encode", done, 2)
            progress("train", done, 2)
    assert capsys.readouterr().err.splitlines() == ["encode …", "train …"]
