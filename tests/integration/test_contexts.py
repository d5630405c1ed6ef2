"""A ranker learns from requests with and without a context, and is judged on requests as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from feature_repo.offline import open_store
from retrieval.retriever import Retriever
from tandem.service.learn import Dataset, Offline
from tandem.service.settings import load_settings


@pytest.mark.parametrize(("part", "learn", "least", "most"), [("ranker", True, 0.2, 0.3), ("calibrate", False, 0.0, 0.0)])
def test_a_quarter_of_the_learned_requests_say_nothing_about_themselves(
    tiny_workspace: Path, part: str, learn: bool, least: float, most: float
) -> None:
    settings = load_settings(tiny_workspace, {})
    offline = Offline(
        settings, Dataset.load(settings), Retriever.load(settings.models / "retrieval"), open_store(settings.workspace)
    )
    examples, requests = offline.examples(part, 100, learn=learn)
    columns = [place for place, name in enumerate(examples.names) if name.startswith("device=")]
    first = np.unique(examples.request, return_index=True)[1]
    unknown = np.isnan(examples.features[first][:, columns])
    assert len(columns) > 1
    assert len(requests) > 20
    assert (unknown.all(1) == unknown.any(1)).all()
    assert least <= unknown.all(1).mean() <= most
