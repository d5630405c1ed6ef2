"""What a person finds in MLflow after the whole loop: runs with data, settings, curves and tables; a release to score with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest

from feature_repo.offline import open_store
from registry.tracking import Tracker
from tandem.core.folders import file_hash, read_json
from tandem.service import recipes
from tandem.service.recipes.workspace import open_releases, open_tracker
from tandem.service.settings import Settings, load_settings


@pytest.fixture(scope="module")
def settings(tiny_workspace: Path) -> Settings:
    return load_settings(tiny_workspace, {})


@pytest.fixture(scope="module")
def tracker(settings: Settings) -> Tracker:
    return open_tracker(settings)


def client_of(tracker: Tracker) -> Any:
    with tracker.client() as (client, _):
        return client


def runs(tracker: Tracker) -> dict[str, Any]:
    """The first run of each name."""
    client = client_of(tracker)
    experiment = client.get_experiment_by_name("tandem")
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])
    return {run.info.run_name: run for run in found}


def test_every_training_run_has_settings_curves_and_the_digests_of_its_data(settings: Settings, tracker: Tracker) -> None:
    found = runs(tracker)
    digests = {name: file_hash(settings.data / f"{name}.parquet")[:36] for name in ("events", "items")}
    for name, context in (("towers", "training"), ("ranker", "training"), ("evaluate", "evaluation")):
        inputs = {each.dataset.name: each for each in found[name].inputs.dataset_inputs}
        assert {key: each.dataset.digest for key, each in inputs.items()} == digests
        assert {each.tags[0].value for each in inputs.values()} == {context}
        columns = [each["name"] for each in json.loads(inputs["events"].dataset.schema)["mlflow_colspec"]]
        assert {"user_id", "item_id", "timestamp"} <= set(columns)
        assert found[name].data.tags["towers"] == found["towers"].data.tags["towers"]
    assert found["towers"].data.params["towers.dimension"] == "48"
    assert found["ranker"].data.params["ranker.rounds"] == "6"
    client = client_of(tracker)
    losses = client.get_metric_history(found["towers"].info.run_id, "towers/loss")
    assert [each.step for each in losses] == sorted({each.step for each in losses})
    assert len(losses) == 2, "one per epoch"
    assert len(client.get_metric_history(found["ranker"].info.run_id, "ndcg")) > 2


def test_the_evaluation_has_the_funnel_as_a_table_and_its_figures(settings: Settings, tracker: Tracker) -> None:
    run = runs(tracker)["evaluate"]
    client = client_of(tracker)
    mlflow.set_tracking_uri(client.tracking_uri)
    table = client.load_table(run.info.experiment_id, "funnel.json", [run.info.run_id])
    report = read_json(settings.models / "evaluation" / "report.json")["funnel"]
    assert table["system"].to_list() == [row["system"] for row in report]
    assert run.data.metrics["towers_ranker/ndcg_at_10"] == pytest.approx(
        next(row["ndcg@10"] for row in report if (row["slice"], row["system"]) == ("all users", "towers + ranker"))
    )
    assert run.data.metrics["measured/latency_ms/total/p95"] > 0
    assert "user_id" not in table.columns


def test_a_release_is_a_model_version_that_leads_to_its_parts_and_features(settings: Settings, tracker: Tracker) -> None:
    client = client_of(tracker)
    version = client.get_model_version_by_alias("tandem", "champion")
    name = recipes.status(settings).data["champion"]
    manifest = read_json(settings.releases / name / "manifest.json")
    assert (version.tags["release"], version.tags["content_hash"]) == (name, manifest["content_hash"])
    assert version.tags["towers"] == runs(tracker)["towers"].data.tags["towers"]
    service = open_store(settings.workspace).get_feature_service(version.tags["feast.feature_service"])
    views = dict(each.split(":") for each in version.tags["feast.feature_views"].split(", "))
    assert {each.name for each in service.feature_view_projections} == set(views)
    run = client.get_run(version.run_id)
    assert run.data.params["towers.dimension"] == "48"
    assert run.data.metrics["slate/ndcg_at_10"] == pytest.approx(manifest["metrics"]["slate/ndcg@10"])


def test_batch_scoring_by_alias(tiny_workspace: Path, tmp_path: Path) -> None:
    """`mlflow.pyfunc.load_model("models:/tandem@champion")`: known users, a stranger and a sentence, as the signature says."""
    unseen = shutil.ignore_patterns("mlflow.db*", "mlruns", "served")
    settings = load_settings(Path(shutil.copytree(tiny_workspace, tmp_path / "workspace", ignore=unseen)), {})
    with open_releases(settings) as store:
        assert open_tracker(settings).mirror(store).registered
    mlflow.set_tracking_uri(client_of(open_tracker(settings)).tracking_uri)
    model = mlflow.pyfunc.load_model("models:/tandem@champion")
    signature = model.metadata.signature
    assert {each.name for each in signature.inputs.inputs} == {"user_id", "query"}
    assert [each.name for each in signature.outputs.inputs] == ["user_id", "item_id", "position", "score"]
    asked = pd.DataFrame({"user_id": ["u001", "u002", "nobody has this id"], "query": [None, None, None]})
    slates = model.predict(asked, params={"k": 5})
    assert list(slates.columns) == ["user_id", "item_id", "position", "score"]
    assert slates.groupby("user_id")["position"].apply(list).to_dict() == {user: [1, 2, 3, 4, 5] for user in asked["user_id"]}
    assert not slates.duplicated(["user_id", "item_id"]).any()
    words = model.predict(pd.DataFrame({"query": ["a story"]}), params={"k": 3})
    assert len(words) == 3
    assert not list((settings.workspace / "mlruns").rglob("*.pkl"))


def test_without_mlflow_training_stands_and_the_run_is_missing(tiny_workspace: Path, tmp_path: Path) -> None:
    workspace = Path(shutil.copytree(tiny_workspace, tmp_path / "workspace"))
    away = load_settings(workspace, {"TANDEM_REGISTRY__MLFLOW_URI": "http://127.0.0.1:9"})
    assert recipes.evaluate(away).data["funnel"]
