"""What every recipe shares: names of model folders, the lock of a workspace, its release tables, its MLflow runs."""

from __future__ import annotations

import getpass
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from tandem.core.errors import UnavailableError
from tandem.core.folders import file_hash, held, sweep_partials
from tandem.service.settings import Settings

if TYPE_CHECKING:
    from registry.artifacts import Artifacts
    from registry.store import ReleaseStore
    from registry.tracking import DataInput, Tracker
    from registry.work import Release

Progress = Callable[[str, int, int], None]

RETRIEVAL: Final = "retrieval"
RANKER: Final = "ranker"
EVALUATION: Final = "evaluation"


def quiet(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@contextmanager
def writing(settings: Settings, who: str) -> Iterator[None]:
    """One writer per workspace; leftovers of a crashed one are swept."""
    with held(settings.state / "workspace.lock", who):
        for folder in (settings.models, settings.data):
            sweep_partials(folder)
        yield


@contextmanager
def open_releases(settings: Settings) -> Iterator[ReleaseStore]:
    from registry.store import ReleaseStore

    settings.state.mkdir(parents=True, exist_ok=True)
    store = ReleaseStore(settings.registry_url, settings.releases)
    try:
        yield store
    finally:
        store.close()


def open_artifacts(settings: Settings) -> Artifacts:
    """Where releases are copied to and fetched from."""
    from registry.artifacts import Artifacts

    return Artifacts(settings.registry.artifacts, settings.releases)


def release_here(settings: Settings, store: ReleaseStore, name: str) -> Release:
    """The release called `name` with its folder on this machine."""
    return open_artifacts(settings).here(store.get(name))


def open_tracker(settings: Settings) -> Tracker:
    from registry.tracking import Tracker

    settings.state.mkdir(parents=True, exist_ok=True)
    root = None if settings.registry.mlflow_uri else settings.workspace / "mlruns"
    own = settings.registry
    return Tracker(settings.mlflow_uri, own.experiment, root, own.model, artifacts=own.artifacts)


class RunLog:
    """Figures of a run; they wait here until it ends, so that a slow MLflow never slows training."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.settings: dict[str, Any] = {}
        self.words: dict[str, str] = {}
        self.read: list[DataInput] = []
        self.tables: list[tuple[Any, str]] = []

    def metrics(self, values: dict[str, float]) -> None:
        self.steps.append(dict(values))

    def params(self, values: dict[str, Any]) -> None:
        self.settings |= values

    def tags(self, values: dict[str, str]) -> None:
        self.words |= values

    def table(self, frame: Any, file: str) -> None:
        self.tables.append((frame, file))

    def inputs(self, settings: Settings, context: str) -> None:
        """The events and items of the workspace, as they are now."""
        self.read += [_data_input(settings, name, context) for name in ("events", "items")]


def _data_input(settings: Settings, name: str, context: str) -> DataInput:
    import polars as pl

    from registry.tracking import DataInput

    path = settings.data / f"{name}.parquet"
    table = pl.scan_parquet(path)
    columns = {column: _mlflow_type(kind) for column, kind in table.collect_schema().items()}
    rows = int(table.select(pl.len()).collect().item())
    return DataInput(name, file_hash(path), f"data/{path.name}", rows, columns, context)


def _mlflow_type(kind: Any) -> str:
    """A column's type as MLflow names it; lists and the like are shown as text."""
    if kind.is_temporal():
        return "datetime"
    if kind.is_numeric():
        return "long" if kind.is_integer() else "double"
    return "boolean" if str(kind) == "Boolean" else "string"


@contextmanager
def tracked_run(settings: Settings, name: str) -> Iterator[RunLog]:
    """An MLflow run around a block, written after it; without MLflow the work stands, and the run is missing."""
    log = RunLog()
    yield log
    try:
        with open_tracker(settings).run(name, {"workspace": settings.workspace.name}) as run:
            run.params(log.settings)
            run.tags(log.words)
            run.inputs(log.read)
            for step, values in enumerate(log.steps):
                run.metrics({key.replace("@", "_at_"): value for key, value in values.items() if value == value}, step)
            for frame, file in log.tables:
                run.table(frame, file)
    except UnavailableError:
        return


def numbers(tree: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Every number of a tree, named by its way: "measured/latency_ms/total/p95"."""
    found: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found[f"{prefix}{key}"] = value
    return found


def who_am_i() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
