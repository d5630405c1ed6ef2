"""MLflow as it really is, on SQLite: runs, model versions without pickle, an alias that mirrors our tables, and no hanging."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from registry.release import Manifest, ReleaseFacts, create_release
from registry.store import ReleaseStore
from registry.tracking import POINTER, DataInput, Tracker
from tandem.core.errors import InputError, IntegrityError, NotFoundError, UnavailableError

LOADER = "tandem_test_loader"
LOADER_SOURCE = """
import json
from pathlib import Path

class Model:
    def __init__(self, path):
        self.path = Path(path)

    def predict(self, frame, params=None):
        return [f"{self.path.name}:{user}:{params['k']}" for user in frame["user_id"]]

def _load_pyfunc(path):
    return Model(path)
"""


QUIET = """
import os, sys
from pathlib import Path
from registry.tracking import Tracker
tracker = Tracker(f"sqlite:///{sys.argv[1]}/state/mlflow.db", artifact_root=Path(sys.argv[1]) / "mlruns")
assert "mlflow" not in sys.modules, "building a tracker must not import MLflow"
with tracker.run("first") as run:
    run.metrics({"loss": 1.0})
assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One MLflow database for all tests here (making one takes seconds); each test has a model and an experiment of its own."""
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="module", autouse=True)
def first_use(home: Path) -> subprocess.CompletedProcess[str]:
    """Makes that database in a fresh process, and keeps what the process said."""
    return subprocess.run([sys.executable, "-c", QUIET, str(home)], check=False, capture_output=True, text=True, cwd=home)


@pytest.fixture
def tracker(home: Path, request: pytest.FixtureRequest) -> Tracker:
    name = request.node.name.lower().replace("[", "-").replace("]", "")[:60]
    return Tracker(f"sqlite:///{home}/state/mlflow.db", name, home / "mlruns", model=name)


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A loader module as the service has one, importable by its name."""
    (tmp_path / f"{LOADER}.py").write_text(LOADER_SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield LOADER
    sys.modules.pop(LOADER, None)


def make_release(root: Path, name: str) -> tuple[Manifest, Path]:
    source = root / "models" / name / "popular.json"
    source.parent.mkdir(parents=True)
    source.write_text(json.dumps([name]))
    facts = ReleaseFacts(
        created_at=datetime(2026, 11, 20, tzinfo=UTC), metrics={"recall@100": 0.25, "auc/click": None}, seeds={"towers": 7}
    )
    folder = root / "releases" / name
    return create_release({"popular.json": source}, folder, facts), folder


def client_of(tracker: Tracker) -> Any:
    with tracker.client() as (client, _):
        return client


def run_of(tracker: Tracker, run_id: str) -> Any:
    return client_of(tracker).get_run(run_id)


def test_a_run_keeps_what_it_was_told(tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "funnel.json").write_text('{"rows": []}')
    with tracker.run("evaluate", {"stage": "funnel"}) as run:
        run.params({"towers": {"width": 64, "long": "x" * 10_000}, "source": {"history": ["rating"]}})
        run.metrics({"recall@100": 0.25, "all": {"ndcg@10": 0.125}, "undefined": None})
        log = run.logger("train/")
        for loss in (2.0, 1.0):
            log({"loss": loss})
        run.table(pl.DataFrame({"system": ["popularity", "towers"], "recall": [0.1, None]}), "funnel.json")
        run.text("popularity  0.1", "funnel.txt")
        run.tags({"towers": "t1"})
        run.inputs(
            [DataInput("events", "f" * 64, "data/events.parquet", 7, {"user_id": "string", "value": "double"}, "training")]
        )
        run.folder(tmp_path / "evaluation", "evaluation")
    found = run_of(tracker, run.id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["stage"] == "funnel"
    assert found.data.tags["towers"] == "t1"
    (data,) = found.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest, data.tags[0].value) == ("events", "f" * 36, "training")
    assert json.loads(data.dataset.profile)["num_rows"] == 7
    assert [each["name"] for each in json.loads(data.dataset.schema)["mlflow_colspec"]] == ["user_id", "value"]
    assert json.loads(data.dataset.source) == {"uri": "data/events.parquet"}
    assert found.data.params["towers.width"] == "64"
    assert len(found.data.params["towers.long"]) == 500
    assert found.data.metrics == {"recall_at_100": 0.25, "all.ndcg_at_10": 0.125, "train/loss": 1.0}
    steps = client_of(tracker).get_metric_history(run.id, "train/loss")
    assert [(one.step, one.value) for one in steps] == [(0, 2.0), (1, 1.0)]
    files = Path(client_of(tracker).download_artifacts(run.id, "", str(tmp_path)))
    assert json.loads((files / "funnel.json").read_text()) == {
        "columns": ["system", "recall"],
        "data": [["popularity", 0.1], ["towers", None]],
    }
    assert (files / "funnel.txt").read_text() == "popularity  0.1"
    assert (files / "evaluation" / "funnel.json").read_text() == '{"rows": []}'


@pytest.mark.parametrize(("error", "status"), [(ZeroDivisionError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_that_breaks_says_so(tracker: Tracker, error: type[BaseException], status: str) -> None:
    def breaks(name: str) -> None:
        with tracker.run(name):
            raise error

    with pytest.raises(error):
        breaks("train")
    experiment = client_of(tracker).get_experiment_by_name(tracker._experiment)
    (run,) = client_of(tracker).search_runs([experiment.experiment_id])
    assert run.info.status == status


def test_more_params_and_metrics_than_mlflow_takes_at_once(tracker: Tracker) -> None:
    with tracker.run("many") as run:
        run.params({f"p{number}": number for number in range(250)})
        run.metrics({f"m{number}": number for number in range(1500)})
    found = run_of(tracker, run.id).data
    assert (len(found.params), len(found.metrics)) == (250, 1500)


def test_people_never_reach_mlflow(tracker: Tracker) -> None:
    with tracker.run("train") as run:
        with pytest.raises(InputError, match="name people"):
            run.params({"split": {"user_ids": ["ada"]}})
        with pytest.raises(InputError, match="name people"):
            run.table(pl.DataFrame({"user_id": ["ada"], "recall": [1.0]}), "rows.json")
    with pytest.raises(InputError, match="name people"), tracker.run("train", {"user_id": "ada"}):
        pass
    found = run_of(tracker, run.id)
    assert found.data.params == {}
    assert client_of(tracker).list_artifacts(run.id) == []


def test_a_release_is_one_model_version_loaded_without_pickle(tracker: Tracker, tmp_path: Path, loader: str, home: Path) -> None:
    import mlflow.pyfunc
    import pandas as pd

    manifest, folder = make_release(tmp_path, "first")
    version = tracker.register(manifest, folder, loader=loader)
    tracker.set_alias("champion", version)
    assert (version, tracker.champion_alias(), tracker.version_of(manifest)) == ("1", "1", "1")
    name = tracker._model
    mlflow.set_tracking_uri(client_of(tracker).tracking_uri)
    model = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    asked = pd.DataFrame({"user_id": ["ada", "nobody"]})
    assert model.predict(asked, params={"k": 3}) == ["release.json:ada:3", "release.json:nobody:3"]
    found = client_of(tracker).get_model_version(name, version)
    assert found.tags == {"release": "first", "content_hash": manifest.content_hash}
    data = run_of(tracker, found.run_id).data
    assert (data.params["seeds.towers"], data.metrics) == ("7", {"recall_at_100": 0.25})
    suffixes = {path.suffix for path in home.rglob("*") if path.is_file() and "models" in path.parts}
    assert not suffixes & {".pkl", ".pickle", ".cloudpickle", ".pt"}
    (pointer,) = [one for one in home.rglob(POINTER) if json.loads(one.read_text())["content_hash"] == manifest.content_hash]
    assert json.loads(pointer.read_text()) == {"release": "first", "content_hash": manifest.content_hash, "folder": str(folder)}


def test_mlflow_s_own_address_is_left_as_it_was(tracker: Tracker, tmp_path: Path, loader: str) -> None:
    import mlflow

    elsewhere = f"sqlite:///{tmp_path}/elsewhere.db"
    for address in (elsewhere, None):
        mlflow.set_tracking_uri(address)  # type: ignore[arg-type]
        tracker.register(*make_release(tmp_path, "whole" if address else "again"), loader=loader)
        assert mlflow.is_tracking_uri_set() == (address is not None)
        assert address is None or mlflow.get_tracking_uri() == address


def test_the_whole_release_can_travel(tracker: Tracker, tmp_path: Path, loader: str, home: Path) -> None:
    manifest, folder = make_release(tmp_path, "whole")
    tracker.register(manifest, folder, whole=True, loader=loader)
    carried = [one.parent for one in home.rglob("manifest.json") if one.parent.name == "whole"]
    assert [(one / "popular.json").read_text() for one in carried] == ['["whole"]']


def test_registering_again_gives_the_same_version_and_another_release_the_next(
    tracker: Tracker, tmp_path: Path, loader: str
) -> None:
    first, second = make_release(tmp_path, "first"), make_release(tmp_path, "second")
    versions = [tracker.register(*release, loader=loader) for release in (first, first, second, first)]
    assert versions == ["1", "1", "2", "1"]


def test_a_damaged_release_is_not_registered(tracker: Tracker, tmp_path: Path, loader: str) -> None:
    manifest, folder = make_release(tmp_path, "broken")
    (folder / "popular.json").chmod(0o644)
    (folder / "popular.json").write_text("[]")
    with pytest.raises(IntegrityError):
        tracker.register(manifest, folder, loader=loader)
    assert tracker.version_of(manifest) is None


def test_the_alias_mirrors_our_tables(tracker: Tracker, tmp_path: Path, loader: str) -> None:
    store = ReleaseStore(f"sqlite:///{tmp_path}/tandem.db")
    nothing = tracker.mirror(store, loader=loader)
    assert (nothing.champion, nothing.changed, nothing.sentences) == (
        None,
        False,
        ("nothing is live, so MLflow has no champion",),
    )
    for name in ("a", "b"):
        manifest, folder = make_release(tmp_path, name)
        store.add(manifest, folder)
        store.registered(name, tracker.register(manifest, folder, loader=loader))
    store.promote("a", expected=None, who="ada", why="the first")
    tracker.mirror(store, loader=loader)
    assert tracker.champion_alias() == store.get("a").model_version == "1"

    store.promote("b", expected="a", who="ada", why="better")  # and here the process died: the alias still says a
    report = tracker.mirror(store, loader=loader)
    assert report.sentences == ("alias champion: version 1 -> 2 (b)",)
    assert tracker.champion_alias() == "2"
    assert not tracker.mirror(store, loader=loader).changed
    store.close()


def test_a_live_version_deleted_in_mlflow_is_registered_again(tracker: Tracker, tmp_path: Path, loader: str) -> None:
    store = ReleaseStore(f"sqlite:///{tmp_path}/tandem.db")
    for name in ("a", "b"):
        store.add(*make_release(tmp_path, name))
    store.promote("a", expected=None, who="ada", why="the first")
    assert tracker.mirror(store, loader=loader).registered
    client_of(tracker).delete_model_version(tracker._model, "1")
    assert tracker.champion_alias() is None
    report = tracker.mirror(store, loader=loader)
    assert report.registered
    assert (report.version_before, report.version_after, report.missing) == (None, "2", ("b",))
    assert report.sentences[0] == "a was not in MLflow; registered it as version 2"
    assert tracker.champion_alias() == store.get("a").model_version == "2"
    store.close()


def test_what_mlflow_does_not_know_is_said(tracker: Tracker) -> None:
    assert tracker.champion_alias() is None
    with pytest.raises((NotFoundError, InputError)):
        tracker.set_alias("champion", "7")


@pytest.fixture
def mute() -> Iterator[str]:
    """The address of a server that takes calls and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("scheme", ["http", "https", "postgresql+psycopg"])
def test_a_server_that_is_away_is_told_within_ten_seconds(scheme: str) -> None:
    """MLflow's own client waits four minutes; ten seconds are the promise, and the margin is what keeps this test honest."""
    before = time.monotonic()
    with pytest.raises(UnavailableError, match=r"\*\*\*@127.0.0.1:\d+/x does not answer") as caught:
        Tracker(f"{scheme}://ada:secret@127.0.0.1:{free_port()}/x").check()
    assert "secret" not in str(caught.value)
    assert time.monotonic() - before < 10


def test_a_mute_server_leaves_promotion_and_tables_alone(mute: str, tmp_path: Path) -> None:
    store = ReleaseStore(f"sqlite:///{tmp_path}/tandem.db")
    manifest, folder = make_release(tmp_path, "a")
    store.add(manifest, folder)
    store.promote("a", expected=None, who="ada", why="the first")
    tracker = Tracker(mute)
    before = time.monotonic()
    with pytest.raises(UnavailableError):
        tracker.mirror(store)
    with pytest.raises(UnavailableError), tracker.run("x"):
        pass
    assert time.monotonic() - before < 20
    assert store.champion().name == "a"
    store.close()


def test_a_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(UnavailableError, match="file is not a database"):
        Tracker(f"sqlite:///{tmp_path}/mlflow.db").check()


@pytest.mark.parametrize("uri", ["", "mlruns", "file:///tmp/x", "databricks", "ftp://x/y"])
def test_addresses_that_are_none_are_refused(uri: str) -> None:
    with pytest.raises(InputError, match="MLflow's address"):
        Tracker(uri)


@pytest.mark.parametrize("model", ["", "A", "../x", "a b", "a'; DROP", "x" * 65])
def test_hostile_model_names_are_refused(model: str) -> None:
    with pytest.raises(InputError, match="model name"):
        Tracker("sqlite:///x.db", model=model)


def test_mlflow_is_imported_late_and_says_nothing(home: Path, first_use: subprocess.CompletedProcess[str]) -> None:
    """Standard output belongs to `--json`; making the database must not fill standard error with migrations either."""
    assert (first_use.returncode, first_use.stdout, first_use.stderr) == (0, "", "")
    assert {path.name for path in home.iterdir()} <= {"state", "mlruns"}
