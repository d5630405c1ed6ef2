"""What an index does about GPUs, on a machine without one: a stand-in faiss that counts, fails and loses its device."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import faiss
import numpy as np
import pytest

from retrieval import index as index_module
from retrieval.index import IndexConfig, VectorIndex
from tandem.core.errors import UnavailableError

VECTORS = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
HAS_GPU = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


class StandIn:
    """A GPU index: the CPU's answers, one search at a time or an error."""

    def __init__(self, index: Any) -> None:
        self.index, self.inside, self.searches, self.lost = index, threading.Lock(), 0, False

    def search(self, queries: np.ndarray, k: int, params: Any) -> Any:
        assert self.inside.acquire(blocking=False), "two searches on one GPU resource"
        try:
            if self.lost:
                raise RuntimeError("CUDA error 719 unspecified launch failure")
            self.searches += 1
            time.sleep(0.001)
            return self.index.search(queries, k, params=params)
        finally:
            self.inside.release()


def on_stand_in(kind: str, device: Any) -> tuple[VectorIndex, StandIn]:
    built = VectorIndex.build(VECTORS, IndexConfig(kind, k=5, device="cpu"))
    gpu = StandIn(built.index)
    return replace(built, config=replace(built.config, device=device), _gpu=gpu), gpu


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_without_a_gpu_auto_goes_on_and_gpu_says_what_is_missing() -> None:
    assert VectorIndex.build(VECTORS, IndexConfig("flat", k=5, device="auto")).recall == 1.0
    with pytest.raises(UnavailableError, match=r'device = "gpu", but .*GPU.*use "auto"'):
        VectorIndex.build(VECTORS, IndexConfig("flat", k=5, device="gpu"))


@pytest.mark.parametrize(
    ("gpus", "kind", "said"),
    [
        (None, "Flat", "built without GPUs"),
        (0, "Flat", "sees no GPU"),
        (1, "HNSW32,Flat", "kind HNSW32,Flat has no form"),
        (1, "IVF4,Flat", None),
    ],
)
def test_the_check_names_what_is_missing(gpus: int | None, kind: str, said: str | None) -> None:
    class Faiss:
        if gpus is not None:
            StandardGpuResources = object

            @staticmethod
            def get_num_gpus() -> int:
                return gpus or 0

    problem = index_module._gpu_problem(Faiss(), kind)
    assert problem is None if said is None else said in str(problem)


def test_several_threads_take_turns_on_one_resource() -> None:
    index, gpu = on_stand_in("ivf", "auto")
    alone = index.search(VECTORS[:4], 5)[1]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda _: index.search(VECTORS[:4], 5)[1], range(40)))
    assert all((answer == alone).all() for answer in together)
    assert gpu.searches == 41


def test_a_lost_gpu_is_done_without_or_said_by_setting() -> None:
    index, gpu = on_stand_in("ivf", "auto")
    before = index.search(VECTORS[:4], 5)
    assert not index.gpu_lost
    gpu.lost = True
    for one, other in zip(before, index.search(VECTORS[:4], 5), strict=True):
        np.testing.assert_array_equal(one, other)
    assert index.gpu_lost
    gpu.lost = False
    index.search(VECTORS[:4], 5)
    assert not index.gpu_lost
    strict, gpu = on_stand_in("ivf", "gpu")
    gpu.lost = True
    with pytest.raises(UnavailableError, match="unspecified launch failure"):
        strict.search(VECTORS[:4], 5)


def test_filters_and_very_long_answers_are_the_processors() -> None:
    index, gpu = on_stand_in("ivf", "auto")
    allowed = np.arange(300) % 2 == 0
    scores, ids = index.search(VECTORS[:4], 5, allowed)
    assert (ids % 2 == 0).all()
    assert np.isfinite(scores).all()
    assert gpu.searches == 0
