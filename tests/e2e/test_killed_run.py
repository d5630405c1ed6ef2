"""kill -9 anywhere in the loop: the next run goes on, ends as an undisturbed one, and half a release is never served."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tandem.core.errors import TandemError
from tandem.core.folders import read_json
from tandem.service import recipes
from tandem.service.settings import Settings, load_settings
from tandem.service.wiring import open_recommender

SETTINGS = """\
[towers]
dimension = 16
epochs = 1
[ranker]
rounds = 2
requests = 100
candidates = 40
[evaluation]
requests = 60
resamples = 100
"""
RUN = """\
import sys
from pathlib import Path
from tandem.service import recipes
from tandem.service.settings import load_settings
recipes.run_all(load_settings(Path(sys.argv[1]), {}))
"""


def _workspace(folder: Path) -> Settings:
    folder.mkdir()
    (folder / "tandem.toml").write_text(SETTINGS)
    settings = load_settings(folder, {})
    recipes.simulate(settings, users=80, items=120, days=12, seed=3)
    return settings


def _run_and_kill(settings: Settings, after: str) -> None:
    """Kill the run half a second after it has marked the step `after` as done: in the middle of the next one."""
    run = subprocess.Popen([sys.executable, "-c", RUN, str(settings.workspace)], stderr=subprocess.DEVNULL)
    marks, deadline = settings.state / "run_all.json", time.monotonic() + 240
    while run.poll() is None and time.monotonic() < deadline:
        if marks.is_file() and after in read_json(marks):
            time.sleep(0.5)
            break
        time.sleep(0.02)
    if run.poll() is None:
        os.kill(run.pid, signal.SIGKILL)
    run.wait()


def _content_hash(settings: Settings, release: str) -> str:
    return str(read_json(settings.releases / release / "manifest.json")["content_hash"])


def test_killed_again_and_again_it_ends_with_the_same_release(tmp_path: Path) -> None:
    settings = _workspace(tmp_path / "killed")
    for step in ("build", "materialize", "train towers", "evaluate"):
        _run_and_kill(settings, step)
        with pytest.raises(TandemError):
            open_recommender(settings)
    champion = recipes.run_all(settings).data["champion"]

    undisturbed = _workspace(tmp_path / "undisturbed")
    expected = recipes.run_all(undisturbed).data["champion"]
    assert _content_hash(settings, champion) == _content_hash(undisturbed, expected)
    recommender = open_recommender(settings)
    assert recommender.release == champion
    recommender.close()


def test_a_second_run_does_nothing_twice(tiny_workspace: Path) -> None:
    settings = load_settings(tiny_workspace, {})
    manifest = tiny_workspace / "models" / "retrieval" / "towers" / "towers.safetensors"
    before = manifest.stat().st_mtime_ns
    recipes.run_all(settings)
    assert manifest.stat().st_mtime_ns == before
