"""Faults around an index on disk, with the real thing: a disk that fills up, a file that is taken away, a foreign metric."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

from retrieval.index import IndexConfig, VectorIndex
from retrieval.retriever import Retriever
from tandem.core.errors import IncompatibleError
from tandem.core.folders import content_hash, file_hash, read_json, write_json

VECTORS = np.random.default_rng(0).standard_normal((4_000, 16)).astype(np.float32)

_SAVE = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from retrieval.index import IndexConfig, VectorIndex
vectors = np.random.default_rng(1).standard_normal((4_000, 16)).astype(np.float32)
index = VectorIndex.build(vectors, IndexConfig("flat", k=5))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    index.save(Path(sys.argv[1]))
except OSError as error:
    print("refused", error.errno)
else:
    print("saved")
"""


@pytest.mark.parametrize("room", [1_000, 200_000, 255_000])
def test_a_full_disk_is_an_error_and_the_old_index_stays(tmp_path: Path, room: int) -> None:
    """Row 36. The kernel refuses to let the file grow; the index is 256,000 bytes and some."""
    old = VectorIndex.build(VECTORS, IndexConfig("flat", k=5))
    old.save(tmp_path / "index")
    run = [sys.executable, "-c", _SAVE, str(tmp_path / "index"), str(room)]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert said.startswith("refused")
    loaded = VectorIndex.load(tmp_path / "index")
    np.testing.assert_array_equal(loaded.search(VECTORS[:3], 5)[1], old.search(VECTORS[:3], 5)[1])
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert subprocess.run([*run[:-1], "10000000"], capture_output=True, text=True, check=True).stdout == "saved\n"


@pytest.mark.parametrize("kind", ["flat", "int8", "hnsw", "ivf"])
def test_a_loaded_index_answers_on_when_its_files_change_or_go(tmp_path: Path, kind: str) -> None:
    """Row 38. Nothing is mapped: what is loaded lies in memory."""
    VectorIndex.build(VECTORS, IndexConfig(kind, k=5)).save(tmp_path / "index")
    loaded = VectorIndex.load(tmp_path / "index")
    before = loaded.search(VECTORS[:9], 7)
    for change in (lambda path: path.write_bytes(b"\0" * 100), lambda path: path.unlink()):
        change(tmp_path / "index" / "index.faiss")
        for one, other in zip(before, loaded.search(VECTORS[:9], 7), strict=True):
            np.testing.assert_array_equal(one, other)
    shutil.rmtree(tmp_path / "index")
    np.testing.assert_array_equal(loaded.vectors(np.arange(5)), VECTORS[:5])


def test_an_index_of_another_metric_is_refused_naming_both(tmp_path: Path) -> None:
    """Row 17."""
    VectorIndex.build(VECTORS, IndexConfig("flat", k=5)).save(tmp_path / "index")
    other = faiss.IndexFlatL2(16)
    other.add(VECTORS)
    faiss.write_index(other, str(tmp_path / "index" / "index.faiss"))
    card = read_json(tmp_path / "index" / "index.json") | {"sha256": file_hash(tmp_path / "index" / "index.faiss")}
    del card["seal"]
    write_json(tmp_path / "index" / "index.json", {**card, "seal": content_hash(card)})
    with pytest.raises(IncompatibleError, match=rf"metric {faiss.METRIC_L2}.*inner product \({faiss.METRIC_INNER_PRODUCT}\)"):
        VectorIndex.load(tmp_path / "index")


def test_an_index_of_another_width_than_its_towers_is_refused_naming_both(retriever: Retriever, tmp_path: Path) -> None:
    """Row 17."""
    retriever.save(tmp_path)
    shutil.rmtree(tmp_path / "index")
    VectorIndex.build(retriever.towers.item_vectors[:, :-1].copy(), IndexConfig("flat", k=5)).save(tmp_path / "index")
    width = retriever.towers.shape.query
    with pytest.raises(IncompatibleError, match=rf"vectors of {width - 1} numbers, its towers make {width}"):
        Retriever.load(tmp_path)
