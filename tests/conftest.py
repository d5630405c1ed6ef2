"""One small world, taken through the whole offline spine once per test run, for every test that needs a live release."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SETTINGS = """\
[towers]
dimension = 48
epochs = 2

[ranker]
rounds = 6
requests = 400
candidates = 60

[evaluation]
requests = 200
resamples = 100

[service]
max_k = 150
budget_ms = 30_000  # a busy machine must not change answers
"""


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a developer has exported must not reach a test."""
    for name in [name for name in os.environ if name.startswith("TANDEM_") and name != "TANDEM_SHARED_DATA"]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def tiny_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a promoted release on a world of 150 users, 200 items and 20 days. Read it; to change it, copy it first.

    Workers of one run share it: the first one builds it behind a file lock.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    workspace, done = shared / "tiny-workspace", shared / "tiny-workspace.done"
    with _locked(shared / "tiny-workspace.lock"):
        if not done.exists():
            _build(workspace)
            done.touch()
    return workspace


def _build(workspace: Path) -> None:
    from tandem.service import recipes
    from tandem.service.settings import FILE, load_settings

    workspace.mkdir(parents=True)
    (workspace / FILE).write_text(SETTINGS)
    settings = load_settings(workspace, {})
    recipes.simulate(settings, users=150, items=200, days=20, seed=1)
    recipes.run_all(settings)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for an exclusive lock on a file; `tandem.core.folders.held` would refuse at once."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
