"""The batch face of a release for MLflow: `mlflow.pyfunc.load_model("models:/tandem@champion").predict(frame)`.

A loader module, no pickle: MLflow calls `_load_pyfunc` with the logged data, which points to the release folder or is one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from registry.artifacts import Artifacts
from registry.release import verify_release
from tandem.core.errors import InputError
from tandem.core.folders import MANIFEST, read_json
from tandem.service.recommend import Recommender
from tandem.service.settings import load_settings
from tandem.service.slate import Ask
from tandem.service.wiring import load_folder, open_recommender

POINTER = "release.json"


class BatchRecommender:
    """Slates for a frame of requests; `predict` is what MLflow calls."""

    def __init__(self, recommender: Recommender) -> None:
        self._recommender = recommender

    def predict(self, frame: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """[user_id?, query?] -> [user_id, item_id, position, score], `params["k"]` rows (default 10) for each request."""
        if not {"user_id", "query"} & set(frame.columns):
            raise InputError(f"the frame has columns {list(frame.columns)}; give user_id, query or both")
        k = int((params or {}).get("k", 10))
        rows = []
        for request in frame.to_dict("records"):
            ask = Ask(user_id=_text(request.get("user_id")), query=_text(request.get("query")), k=k)
            slate = self._recommender.recommend(ask)
            rows += [(ask.user_id, item.item_id, item.position, item.score) for item in slate.items]
        return pd.DataFrame(rows, columns=["user_id", "item_id", "position", "score"])


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _cache() -> Path:
    """Where releases are kept that a model version points to from another machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem" / "releases"


def _load_pyfunc(path: str) -> BatchRecommender:
    """MLflow's hook. In a workspace the users' features are read too; elsewhere requests are answered without them."""
    logged = Path(path)
    pointer = logged / POINTER if logged.is_dir() else logged
    if (logged / MANIFEST).is_file():
        return BatchRecommender(load_folder(logged))
    facts = read_json(pointer)
    folder = Path(facts["folder"])
    if not (folder / MANIFEST).is_file() and facts.get("artifacts"):
        folder = Artifacts(facts["artifacts"], _cache()).fetch(facts["release"], facts["content_hash"])
    verify_release(folder, facts["content_hash"])
    workspace = folder.parent.parent
    if (workspace / "data" / "events.parquet").is_file():
        return BatchRecommender(open_recommender(load_settings(workspace), folder.name))
    return BatchRecommender(load_folder(folder))
