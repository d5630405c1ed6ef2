"""The small world as most tests of the service read it; a test that changes it takes a copy of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from tandem.service.recommend import Recommender
from tandem.service.settings import Settings, load_settings
from tandem.service.wiring import open_recommender, users_with_history


@pytest.fixture(scope="module")
def settings(tiny_workspace: Path) -> Settings:
    return load_settings(tiny_workspace, {})


@pytest.fixture(scope="module")
def recommender(settings: Settings) -> Iterator[Recommender]:
    opened = open_recommender(settings)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def user(settings: Settings) -> str:
    """Somebody with a history."""
    return users_with_history(settings.data, 8, 1)[0]


@pytest.fixture(scope="module")
def catalogue(settings: Settings) -> pl.DataFrame:
    return pl.read_parquet(settings.data / "items.parquet")
