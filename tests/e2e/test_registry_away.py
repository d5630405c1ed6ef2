"""A service whose registry does not answer when it starts: it answers from what it answered from last, verified as ever."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from tandem.core.errors import IntegrityError, UnavailableError
from tandem.core.folders import read_json
from tandem.service import recipes
from tandem.service.app import create_app
from tandem.service.settings import Settings, load_settings
from tandem.service.wiring import SERVING, open_recommender

NOBODY = "postgresql+psycopg://ada:secretsecret@127.0.0.1:9/tandem"


@pytest.fixture
def settings(tiny_workspace: Path, tmp_path: Path) -> Settings:
    return load_settings(Path(shutil.copytree(tiny_workspace, tmp_path / "workspace")), {})


def away(settings: Settings) -> Settings:
    """The same workspace while its registry, and MLflow, do not answer."""
    return replace(settings, registry=replace(settings.registry, url=NOBODY, mlflow_uri="http://127.0.0.1:9"))


def test_it_answers_from_its_last_release_and_says_so(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    live = recipes.status(settings).data["champion"]
    open_recommender(settings).close()
    before = time.monotonic()
    with (
        caplog.at_level("INFO", "tandem.service"),
        TestClient(create_app(away(settings), follow=True), "http://127.0.0.1") as client,
    ):
        assert client.get("/readyz").json()["release"] == live
        answer = client.post("/v1/recommend", json={"user_id": "u001", "k": 3})
    assert time.monotonic() - before < 60
    assert (answer.status_code, answer.json()["release"]) == (200, live)
    assert "registry_unreachable" in caplog.text
    assert "secretsecret" not in caplog.text


def test_a_service_that_follows_remembers_what_it_followed_to(settings: Settings) -> None:
    recipes.release_create(settings, "second")
    quick = replace(settings, service=replace(settings.service, follow_seconds=0.05))
    with TestClient(create_app(quick, follow=True), "http://127.0.0.1") as client:
        recipes.release_promote(settings, "second", because="newer")
        deadline = time.monotonic() + 60
        while client.get("/readyz").json()["release"] != "second" and time.monotonic() < deadline:
            time.sleep(0.05)
    assert open_recommender(away(settings)).release == "second"


def test_without_a_last_release_or_with_a_damaged_one_it_does_not_start(settings: Settings) -> None:
    (settings.state / SERVING).unlink(missing_ok=True)
    with pytest.raises(UnavailableError, match="does not answer") as caught:
        open_recommender(away(settings))
    assert "secretsecret" not in str(caught.value)
    open_recommender(settings).close()
    popular = settings.releases / read_json(settings.state / SERVING)["release"] / "popular.json"
    popular.chmod(0o644)
    popular.write_text("{}")
    with pytest.raises(IntegrityError):
        open_recommender(away(settings))
    with pytest.raises(UnavailableError):
        open_recommender(away(settings), "by-name")
