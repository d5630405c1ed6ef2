"""MLflow, and nothing else of ours knows it: runs with their figures, and each release as one registered model version.

In: an address (SQLite file or server), figures, texts, Polars tables, release folders. Out: runs and model versions to look at,
and `mlflow.pyfunc.load_model("models:/tandem@champion")`. Our own tables decide what is live; MLflow's alias mirrors them.

MLflow is imported on first use (seconds) and blocks for minutes when its server is away, so every call here first knocks at the
server's port and then works under short limits: a missing server is an UnavailableError within ten seconds. Nobody's user id goes
into params, tags or tables; per-user rows stay in the release's `evaluation/`.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import logging
import os
import re
import socket
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import polars as pl
from sqlalchemy import create_engine, inspect, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from registry.release import NAME, Manifest, verify_release
from registry.store import ReleaseStore
from registry.work import Release
from tandem.core.errors import InputError, NotFoundError, TandemError, UnavailableError
from tandem.core.folders import write_json

CHAMPION_ALIAS: Final = "champion"
LOADER: Final = "tandem.service.batch"
POINTER: Final = "release.json"
"""What a model version carries by default: {release, content_hash, folder, artifacts?}, not a second copy of the release."""

_ENVIRONMENT: Final = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
_KNOCK_SECONDS: Final = 2.0
_PORTS: Final = {"postgresql": 5432, "mysql": 3306}
_BACKENDS: Final = frozenset({"sqlite", "http", "https", *_PORTS})
_PARAM_LENGTH: Final = 500
_PARAMS_AT_ONCE: Final = 100
_METRICS_AT_ONCE: Final = 1000
_DIGEST: Final = 36
_FEATURES: Final = "features.json"
_PEOPLE: Final = frozenset({"user_id", "user_ids", "email"})
_fluent = threading.Lock()


@dataclass(frozen=True)
class MirrorReport:
    """What `Tracker.mirror` found and did. Versions are MLflow's; None where there is none."""

    champion: str | None
    version_before: str | None
    version_after: str | None
    registered: bool
    missing: tuple[str, ...]

    @property
    def changed(self) -> bool:
        return self.registered or self.version_before != self.version_after

    @property
    def sentences(self) -> tuple[str, ...]:
        """What to tell a person, alarms included."""
        if self.champion is None:
            return ("nothing is live, so MLflow has no champion",)
        said = []
        if self.registered:
            said.append(f"{self.champion} was not in MLflow; registered it as version {self.version_after}")
        if self.version_before != self.version_after:
            said.append(f"alias {CHAMPION_ALIAS}: version {self.version_before} -> {self.version_after} ({self.champion})")
        said += [f"release {name} is not in MLflow (never registered, or deleted there)" for name in self.missing]
        return tuple(said) or (f"alias {CHAMPION_ALIAS} already names version {self.version_after} ({self.champion})",)


@dataclass(frozen=True)
class DataInput:
    """A table that a run read: `digest` of its bytes, its place within the workspace, its size and column types by name.

    `context`: what for ("training", "evaluation").
    """

    name: str
    digest: str
    place: str
    rows: int
    columns: Mapping[str, str]
    context: str


class Run:
    """One MLflow run that is going on. Made by `Tracker.run`."""

    def __init__(self, tracker: Tracker, run_id: str) -> None:
        self._tracker = tracker
        self.id = run_id

    def params(self, values: Mapping[str, Any]) -> None:
        """Settings of the run; nested ones become `a.b`. InputError for keys that name people."""
        flat = _flat(values)
        _refuse_people(flat, "params")
        with self._tracker.client() as (client, mlflow):
            params = [mlflow.entities.Param(key, _short(value)) for key, value in flat.items()]
            for start in range(0, len(params), _PARAMS_AT_ONCE):
                client.log_batch(self.id, params=params[start : start + _PARAMS_AT_ONCE])

    def metrics(self, values: Mapping[str, float | None], step: int = 0) -> None:
        """Figures at `step`; `recall@100` is written `recall_at_100`, since MLflow refuses `@`. None is left out."""
        with self._tracker.client() as (client, mlflow):
            now = mlflow.utils.time.get_current_time_millis()
            metrics = [
                mlflow.entities.Metric(key.replace("@", "_at_"), float(value), now, step)
                for key, value in _flat(values).items()
                if value is not None
            ]
            for start in range(0, len(metrics), _METRICS_AT_ONCE):
                client.log_batch(self.id, metrics=metrics[start : start + _METRICS_AT_ONCE])

    def logger(self, prefix: str = "") -> Callable[[Mapping[str, float]], None]:
        """The `log` that training functions take: each call writes its figures one step further, under `prefix`."""
        step = 0

        def log(values: Mapping[str, float]) -> None:
            nonlocal step
            self.metrics({f"{prefix}{key}": value for key, value in values.items()}, step)
            step += 1

        return log

    def tags(self, values: Mapping[str, str]) -> None:
        """Words to find the run by. InputError for keys that name people."""
        _refuse_people(values, "tags")
        with self._tracker.client() as (client, mlflow):
            client.log_batch(self.id, tags=[mlflow.entities.RunTag(key, value) for key, value in values.items()])

    def inputs(self, data: Sequence[DataInput]) -> None:
        """The data sets that the run read, as MLflow shows and compares them; their rows stay where they are."""
        with self._tracker.client() as (client, mlflow):
            client.log_inputs(self.id, [_input(mlflow, each) for each in data])

    def table(self, frame: pl.DataFrame, file: str) -> None:
        """A table that MLflow shows (`file` ends in .json). InputError when it has a column of people."""
        _refuse_people(frame.columns, f"table {file}")
        with self._tracker.client() as (client, _):
            client.log_table(self.id, data=frame.to_dict(as_series=False), artifact_file=file)

    def text(self, text: str, file: str) -> None:
        """A text file beside the run."""
        with self._tracker.client() as (client, _):
            client.log_text(self.id, text, file)

    def folder(self, path: Path, name: str) -> None:
        """All files of a folder, under `name`."""
        with self._tracker.client() as (client, _):
            client.log_artifacts(self.id, str(path), name)


class Tracker:
    """The experiment `experiment` and the registered model `model` at `uri`. Building one neither imports MLflow nor connects.

    `uri`: "sqlite:///<file>", "postgresql+psycopg://…" or "http(s)://…". `artifact_root` is where a new experiment keeps its
    files; None leaves that to the server. `artifacts`: where releases are copied to, for pointers that are read elsewhere.
    Every method may raise UnavailableError, within ten seconds.
    """

    def __init__(
        self,
        uri: str,
        experiment: str = "tandem",
        artifact_root: Path | None = None,
        model: str = "tandem",
        artifacts: str = "",
    ) -> None:
        if not NAME.fullmatch(model):
            raise InputError(f"{model[:80]!r} is not a model name: 1-64 of a-z, 0-9, '.', '_', '-'")
        _check_address(uri)
        self._uri = uri
        self._shown = re.sub(r"://[^@/]*@", "://***@", uri)
        self._experiment = experiment
        self._artifact_root = artifact_root
        self._model = model
        self._artifacts = artifacts
        self._client: Any = None

    @contextmanager
    def client(self) -> Iterator[tuple[Any, Any]]:
        """MLflow's client and module, once the server has been seen; MLflow's errors leave in our words."""
        _knock(self._uri, self._shown)
        mlflow = _import_mlflow()
        try:
            if self._client is None:
                _try_database(self._uri)
                self._client = mlflow.MlflowClient(self._uri, self._uri)
            yield self._client, mlflow
        except mlflow.exceptions.MlflowException as error:
            raise self._translated(error) from error
        except (OSError, SQLAlchemyError) as error:
            raise UnavailableError(f"MLflow at {self._shown} failed: {_first_line(error)}") from error

    def check(self) -> None:
        """Return if MLflow answers, else raise UnavailableError. Ask before a step that needs it."""
        with self.client() as (client, _):
            client.search_experiments(max_results=1)

    @contextmanager
    def run(self, name: str, tags: Mapping[str, str] | None = None) -> Iterator[Run]:
        """A run around a block: finished after it, failed when it raises, killed when it is interrupted."""
        _refuse_people(tags or {}, "tags")
        with self.client() as (client, _):
            experiment = self._experiment_id(client)
            run = Run(self, client.create_run(experiment, run_name=name, tags=dict(tags or {})).info.run_id)
        try:
            yield run
        except BaseException as error:
            with suppress(TandemError):  # the block's own error matters more than a run left open
                self._end(run, "FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        self._end(run, "FINISHED")

    def register(self, manifest: Manifest, folder: Path, *, whole: bool = False, loader: str = LOADER) -> str:
        """Make the release one version of the model and return that version; doing it again returns the same one.

        The version carries a pointer to the folder and its hash, or the `whole` release, for servers on other machines. It is
        loaded by `loader`'s `_load_pyfunc(path)` (path of release.json, or of the release), so nothing in it is a pickle.
        """
        verify_release(folder, manifest.content_hash)
        known = self.version_of(manifest)
        if known is not None:
            return known
        with self.run(f"release {manifest.name}", {"release": manifest.name}) as run:
            run.params({"source": manifest.source.get("kind", ""), "window": manifest.window, "seeds": manifest.seeds})
            run.params(manifest.settings)
            run.metrics(manifest.metrics)
            return self._add_version(run, manifest, folder.resolve(), whole, loader)

    def version_of(self, release: Manifest | Release) -> str | None:
        """The model version of a release with this name and content, or None."""
        query = f"name='{self._model}' and tag.release='{release.name}' and tag.content_hash='{release.content_hash}'"
        with self.client() as (client, _):
            found = client.search_model_versions(query)
        return str(max(int(one.version) for one in found)) if found else None

    def set_alias(self, alias: str, version: str) -> None:
        """Let `models:/<model>@<alias>` mean `version`."""
        with self.client() as (client, _):
            client.set_registered_model_alias(self._model, alias, version)

    def champion_alias(self) -> str | None:
        """The version that MLflow's champion alias names, or None."""
        with self.client() as (client, mlflow):
            try:
                aliases = client.get_registered_model(self._model).aliases
            except mlflow.exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None
        version = aliases.get(CHAMPION_ALIAS)
        return None if version is None else str(version)

    def mirror(self, store: ReleaseStore, *, loader: str = LOADER) -> MirrorReport:
        """Bring MLflow's champion alias to what our tables say, registering the live release again where it was deleted.

        Safe to repeat, and the way to finish a promotion that was cut off. Other releases that MLflow lacks are reported only.
        """
        live, before = store.champion(), self.champion_alias()
        releases = {release.name: release for release in store.list()}
        versions = {name: self.version_of(release) for name, release in releases.items()}
        missing = tuple(name for name, version in versions.items() if version is None and name != live.name)
        if live.name is None:
            self._drop_alias(before)
            return MirrorReport(None, before, None, False, missing)
        release, known = releases[live.name], versions[live.name]
        version = known or self.register(release.manifest, release.folder, loader=loader)
        if version != before:
            self.set_alias(CHAMPION_ALIAS, version)
        if version != release.model_version:
            store.registered(release.name, version)
        return MirrorReport(release.name, before, version, known is None, missing)

    def _drop_alias(self, version: str | None) -> None:
        if version is not None:
            with self.client() as (client, _):
                client.delete_registered_model_alias(self._model, CHAMPION_ALIAS)

    def _experiment_id(self, client: Any) -> str:
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is not None:
            return str(experiment.experiment_id)
        root = self._artifact_root.resolve().as_uri() if self._artifact_root else None
        return str(client.create_experiment(self._experiment, artifact_location=root))

    def _end(self, run: Run, status: str) -> None:
        with self.client() as (client, _):
            client.set_terminated(run.id, status)

    def _add_version(self, run: Run, manifest: Manifest, folder: Path, whole: bool, loader: str) -> str:
        with self.client() as (client, mlflow), tempfile.TemporaryDirectory() as scratch:
            data = folder
            if not whole:
                data = Path(scratch) / POINTER
                pointer = {"release": manifest.name, "content_hash": manifest.content_hash, "folder": str(folder)}
                pointer |= {"artifacts": self._artifacts} if self._artifacts else {}
                write_json(data, pointer)
            with _addressed(mlflow, self._uri):
                uri, model_id = self._log_model(mlflow, run, data, loader)
                with suppress(mlflow.exceptions.MlflowException):  # it exists already, or the next call says what is wrong
                    client.create_registered_model(self._model)
                version = client.create_model_version(
                    self._model,
                    source=uri,
                    run_id=run.id,
                    model_id=model_id,
                    tags={"release": manifest.name, "content_hash": manifest.content_hash} | _lineage(manifest, folder),
                    await_creation_for=0,
                )
        return str(version.version)

    def _log_model(self, mlflow: Any, run: Run, data: Path, loader: str) -> tuple[str, str]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with mlflow.start_run(run_id=run.id):
                info = mlflow.pyfunc.log_model(
                    name=self._model,
                    loader_module=loader,
                    data_path=str(data),
                    signature=_signature(mlflow),
                    pip_requirements=[_requirement()],
                )
        return info.model_uri, info.model_id

    def _translated(self, error: Any) -> TandemError:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return NotFoundError(f"MLflow at {self._shown}: {_first_line(error)}")
        if error.error_code == "INVALID_PARAMETER_VALUE":
            return InputError(f"MLflow at {self._shown}: {_first_line(error)}")
        return UnavailableError(f"MLflow at {self._shown} failed: {_first_line(error)}")


@contextmanager
def _addressed(mlflow: Any, uri: str) -> Iterator[None]:
    """MLflow's own address, one per process, is ours for a while: nobody else's meanwhile, and afterwards what it was."""
    with _fluent:
        before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
        mlflow.set_tracking_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)


def _check_address(uri: str) -> None:
    try:
        known = make_url(uri).get_backend_name() in _BACKENDS
    except ArgumentError:
        known = False
    if not known:
        raise InputError("MLflow's address is not one Tandem knows; use sqlite:///<file>, postgresql+psycopg://… or http(s)://…")


def _import_mlflow() -> Any:
    """MLflow with its telemetry, progress bars, pickles and chatter off. What an operator has set in the environment stays."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import mlflow
    import mlflow.pyfunc

    warnings.filterwarnings("ignore", module="mlflow")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow


def _knock(uri: str, shown: str) -> None:
    """Raise UnavailableError within seconds when nobody answers at the address; files need no knocking."""
    address = make_url(uri)
    if address.host is None:
        return
    try:
        if address.drivername in {"http", "https"}:
            _ask(re.sub(r"://[^@/]*@", "://", uri).rstrip("/") + "/health")
        else:
            port = address.port or _PORTS[address.get_backend_name()]
            socket.create_connection((address.host, port), timeout=_KNOCK_SECONDS).close()
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(f"MLflow at {shown} does not answer ({error}); start it, or correct its address") from error


def _ask(url: str) -> None:
    """Any answer will do, a refusal too: then it is MLflow's own client that has more to say."""
    try:
        urllib.request.urlopen(url, timeout=_KNOCK_SECONDS).close()
    except urllib.error.HTTPError as answer:
        answer.close()


def _try_database(uri: str) -> None:
    """Connect once ourselves: MLflow repeats a refused connection for a minute and a half before it says so."""
    address = make_url(uri)
    backend = address.get_backend_name()
    if backend in {"http", "https"}:
        return
    if backend == "sqlite" and address.database:
        Path(address.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(address, connect_args={"connect_timeout": 5} if backend == "postgresql" else {})
    try:
        inspect(engine).has_table("experiments")
    finally:
        engine.dispose()


def _input(mlflow: Any, data: DataInput) -> Any:
    """MLflow's own words for a data set, without a copy of it: its digests are 36 characters at most."""
    columns = [{"type": kind, "name": name, "required": False} for name, kind in data.columns.items()]
    found = mlflow.entities.Dataset(
        name=data.name,
        digest=data.digest[:_DIGEST],
        source_type="local",
        source=json.dumps({"uri": data.place}),
        schema=json.dumps({"mlflow_colspec": columns}),
        profile=json.dumps({"num_rows": data.rows, "num_elements": data.rows * len(columns)}),
    )
    return mlflow.entities.DatasetInput(found, [mlflow.entities.InputTag("mlflow.data.context", data.context)])


def _lineage(manifest: Manifest, folder: Path) -> dict[str, str]:
    """Tags that lead from a model version to what it was made from: parts, feature service, feature views and their versions."""
    tags = {part: print_ for part in ("towers", "encoder") if (print_ := manifest.fingerprints.get(part))}
    if service := manifest.source.get("feature_service"):
        tags["feast.feature_service"] = str(service)
    if _FEATURES in manifest.files:
        pins = json.loads((folder / _FEATURES).read_text(encoding="utf-8"))
        tags["feast.feature_views"] = ", ".join(f"{view}:{version}" for view, version in sorted(_versions(pins).items()))
    return tags


def _versions(pins: Mapping[str, Any]) -> dict[str, int]:
    """View -> version from `features.json`, whose views are a list, or in older releases its keys."""
    if isinstance(pins.get("views"), list):
        return {view["name"]: view["version"] for view in pins["views"]}
    return {name: facts["version"] for name, facts in pins.items()}


def _signature(mlflow: Any) -> Any:
    """What batch scoring takes and gives: requests by user or words, `k` items each; slates as rows."""
    schema = mlflow.types.schema
    columns = [schema.ColSpec("string", name, required=False) for name in ("user_id", "query")]
    slate = (("string", "user_id"), ("string", "item_id"), ("long", "position"), ("double", "score"))
    return mlflow.models.ModelSignature(
        inputs=schema.Schema(columns),
        outputs=schema.Schema([schema.ColSpec(kind, name) for kind, name in slate]),
        params=schema.ParamSchema([schema.ParamSpec("k", "long", 10)]),
    )


def _requirement() -> str:
    return f"tandem-recommender=={importlib.metadata.version('tandem-recommender')}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _PARAM_LENGTH else f"{text[: _PARAM_LENGTH - 1]}…"


def _refuse_people(keys: Sequence[str] | Mapping[str, Any], what: str) -> None:
    named = sorted(key for key in keys if key.rpartition(".")[2].lower() in _PEOPLE)
    if named:
        raise InputError(f"{what} for MLflow name people ({', '.join(named)}); leave them out, or give counts")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
