"""Faults of the index plane as a caller sees them: a query vector without meaning, an index that somebody else made."""

from __future__ import annotations

import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest
from fastapi.testclient import TestClient

from retrieval.index import IndexConfig, VectorIndex
from retrieval.retriever import Retriever
from retrieval.towers import Towers
from tandem.core.errors import IntegrityError
from tandem.service.app import create_app
from tandem.service.settings import load_settings
from tandem.service.wiring import open_recommender

LOCAL = "http://127.0.0.1"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_query_vector_without_meaning_degrades_and_is_counted(
    tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    """Row 19."""
    settings = load_settings(tiny_workspace, {})
    width = Retriever.load(next((tiny_workspace / "releases").glob("2*"))).towers.shape.query
    with TestClient(create_app(settings), LOCAL, raise_server_exceptions=False) as client:
        monkeypatch.setattr(Towers, "query", lambda *_, **__: np.full((1, width), bad, np.float32))
        for route in ("recommend", "retrieve"):
            answer = client.post(f"/v1/{route}", json={"k": 20})
            assert (answer.status_code, answer.json()["returned"]) == (200, 20)
            assert answer.json()["degraded"] == ["query_vector_unusable"]
        assert 'tandem_degraded_total{reason="query_vector_unusable"} 2.0' in client.get("/v1/metrics").text


def test_a_lost_gpu_is_told_and_counted(tiny_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 40. The processor answers meanwhile."""
    settings = load_settings(tiny_workspace, {})
    with TestClient(create_app(settings), LOCAL, raise_server_exceptions=False) as client:
        before = client.post("/v1/retrieve", json={"k": 20}).json()
        monkeypatch.setattr(VectorIndex, "gpu_lost", True)
        for route in ("recommend", "retrieve"):
            answer = client.post(f"/v1/{route}", json={"k": 20})
            assert (answer.status_code, answer.json()["degraded"]) == (200, ["cpu"])
        assert before["degraded"] == []
        assert answer.json()["items"] == before["items"]
        assert 'tandem_degraded_total{reason="cpu"} 2.0' in client.get("/v1/metrics").text


def test_an_index_that_is_not_the_registrys_is_never_read(
    tiny_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 15. Its card fits it, so only the hash that the registry knows can tell."""
    shutil.copytree(tiny_workspace, tmp_path / "ws")
    (folder,) = (tmp_path / "ws" / "releases").glob("2*")
    own = VectorIndex.load(folder / "index")
    for path in (folder / "index").iterdir():
        path.chmod(0o644)
    shutil.rmtree(folder / "index")
    foreign = np.random.default_rng(0).standard_normal((own.count, own.dimension)).astype(np.float32)
    VectorIndex.build(foreign, IndexConfig("flat")).save(folder / "index")
    assert VectorIndex.load(folder / "index").count == own.count  # by itself it is sound
    read: list[str] = []
    monkeypatch.setattr(faiss, "read_index", lambda *_: read.append("read"))
    with pytest.raises(IntegrityError, match=r"index/index\.(faiss|json) is damaged"):
        open_recommender(load_settings(tmp_path / "ws", {}))
    assert read == []
