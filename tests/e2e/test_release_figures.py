"""What a release records of itself, measured at evaluation, and what a gate makes of it."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest

from tandem.core.errors import GateRefusedError
from tandem.core.folders import read_json
from tandem.service import recipes
from tandem.service.recipes.workspace import open_releases
from tandem.service.settings import Settings, load_settings

CHECKS = {"leakage", "tables_in_time", "online_parity", "served_users", "served_items"}
STAGES = {"user", "query", "candidates", "items", "predict", "rerank", "explain", "total"}


@pytest.fixture
def settings(tmp_path: Path, tiny_workspace: Path) -> Settings:
    return load_settings(Path(shutil.copytree(tiny_workspace, tmp_path / "workspace")), {})


def live(settings: Settings) -> str:
    name: str = recipes.status(settings).data["champion"]
    return name


def test_a_release_knows_its_latency_its_diversity_and_the_state_of_its_features(tiny_workspace: Path) -> None:
    settings = load_settings(tiny_workspace, {})
    folder = settings.releases / live(settings)
    measured, manifest = read_json(folder / "measured.json"), read_json(folder / "manifest.json")
    assert set(measured["latency_ms"]) == STAGES
    assert all(0 <= each["p50"] <= each["p95"] for each in measured["latency_ms"].values())
    stages = sum(each["p50"] for stage, each in measured["latency_ms"].items() if stage != "total")
    assert 0 < stages <= measured["latency_ms"]["total"]["p95"] * 1.5
    assert measured["slates"] == {"asked": 200, "degraded": 0}
    assert set(measured["checks"]) == CHECKS
    assert [measured["checks"][name]["wrong"] for name in sorted(CHECKS)] == [0] * 5
    assert measured["checks"]["leakage"]["rows"] >= 1000
    assert "not_measured" not in measured
    shown = recipes.release_show(settings, live(settings))
    assert shown.data["measured"] == measured
    assert shown.table is not None
    assert ("measured/checks/leakage/wrong", 0) in shown.table.rows
    assert ("made because", "run_all") in shown.table.rows
    assert 0 < manifest["metrics"]["slate/ild@10"] <= 1
    assert manifest["metrics"]["slate/ild@10"] >= manifest["metrics"]["towers_ranker/ild@10"], "the rerank spreads categories"
    with open_releases(settings) as store, store.look() as work:
        sentences = work.gates(live(settings))[0].verdict["sentences"]
    assert "measured/checks/leakage/wrong: challenger 0, champion none; within its limits" in sentences


def test_measuring_again_changes_no_content_hash(settings: Settings) -> None:
    name = live(settings)
    first = read_json(settings.models / "evaluation" / "measured.json")
    recipes.evaluate(settings)
    again = read_json(settings.models / "evaluation" / "measured.json")
    assert again["latency_ms"] != first["latency_ms"]
    report = read_json(settings.models / "evaluation" / "report.json")
    assert report["champion"] is None, "these are the champion's own parts"
    with open_releases(settings) as store:
        before = store.get(name).content_hash
    assert recipes.release_create(settings, "again").data["content_hash"] == before


def test_a_leak_stops_the_release_at_the_gate(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training frames that see their own event make every metric look better; the figure beside them says why."""
    with monkeypatch.context() as leaking:
        leaking.setattr("feature_repo.offline.JUST_BEFORE", timedelta(0))
        recipes.evaluate(settings)
    made = recipes.release_create(settings, "leaky").data["release"]
    wrong = read_json(settings.releases / made / "measured.json")["checks"]["leakage"]["wrong"]
    assert wrong > 0
    with pytest.raises(GateRefusedError, match=r"measured/checks/leakage/wrong: refused, .*; it must be at most 0"):
        recipes.release_gate(settings, made)


def test_before_anything_is_materialised_what_cannot_be_measured_is_said(settings: Settings) -> None:
    shutil.rmtree(settings.workspace / "snapshot")
    recipes.evaluate(settings)
    measured = read_json(settings.models / "evaluation" / "measured.json")
    assert "latency_ms" not in measured
    assert "slates" in measured["not_measured"]
    made = recipes.release_create(settings, "unmeasured").data["release"]
    verdict = recipes.release_gate(settings, made).data
    assert "measured/latency_ms/total/p50: not measured, and not required" in verdict["sentences"]


def test_rows_have_the_slices_that_gates_can_name(tiny_workspace: Path) -> None:
    settings = load_settings(tiny_workspace, {})
    rows = pl.read_parquet(settings.releases / live(settings) / "evaluation" / "users.parquet")
    ranked = rows.filter(pl.col("system") == "towers + ranker")
    assert {"cold_user", "heavy_user", "cold_item", "cold_share", "category", "ild@10"} <= set(rows.columns)
    assert 0 < ranked["heavy_user"].sum() <= len(ranked) / 10 + 1
    assert ranked.filter(~pl.col("cold_user"))["category"].null_count() == 0
    assert ((ranked["cold_share"] > 0) == ranked["cold_item"]).all()
    shown = {row["slice"] for row in read_json(settings.models / "evaluation" / "report.json")["funnel"]}
    assert {"all users", "cold users", "heavy users", "cold items"} <= shown
