"""docs/retrieval.md: its programs run, and its table names the kinds that exist."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import scipy.sparse as sp

from retrieval.baselines import ItemKNN
from retrieval.batches import cut_places
from retrieval.content import content_matrix
from retrieval.index import IndexConfig, VectorIndex
from retrieval.kinds import NAMES
from retrieval.retriever import Retriever
from retrieval.sequence import SequenceConfig
from retrieval.train import Catalogue, Histories, TowerConfig, train_towers

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "retrieval.md").read_text(encoding="utf-8")
ITEMS = 30


def save_retriever(folder: Path) -> None:
    noise = np.random.default_rng(0)
    text = noise.standard_normal((ITEMS, 12)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    sequences = [noise.permutation(ITEMS)[:6] for _ in range(40)]
    histories = Histories(sequences, [np.ones(6, bool)] * 40, [cut_places(np.arange(6))] * 40, exclude_seen=True)
    config = TowerConfig(dimension=8, text_block=6, history=20, epochs=1, ridge=10.0, sequence=SequenceConfig(width=8, rounds=1))
    columns = {
        "item_id": [f"i{number:02}" for number in range(ITEMS)],
        "title": [f"Item {number}" for number in range(ITEMS)],
        "categories": [["c"]] * ITEMS,
        "available_from": [None] * ITEMS,
        "price": [float(number) for number in range(ITEMS)],
    }
    items = pl.DataFrame(columns, schema_overrides={"available_from": pl.Datetime("us", "UTC")})
    towers = train_towers(Catalogue(content_matrix(items, text), text), histories, config, lambda _: None)
    matrix = sp.csr_matrix((np.ones(240, np.float32), (np.repeat(np.arange(40), 6), np.concatenate(sequences))), (40, ITEMS))
    counts = np.asarray(matrix.sum(axis=0), np.float32).ravel()
    folder.mkdir(parents=True)
    index = VectorIndex.build(towers.item_vectors)
    Retriever(items, towers, index, ItemKNN.fit(matrix, 20), counts, exclude_seen=True).save(folder)


def test_the_programs_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_retriever(Path("workspace/models/retrieval"))
    search, filtered, change, put = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(search, "docs/retrieval.md", "exec"), names)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 5
    assert not {"i00", "i01", "i02"} & {row[1] for row in rows}
    exec(compile(filtered, "docs/retrieval.md", "exec"), names)
    kinds, found = capsys.readouterr().out.splitlines()
    assert kinds == "{'price': 'number'}"
    assert len(re.findall(r"\('i\d\d'", found)) == 5
    assert not re.search(r"\('i2[1-9]'", found)
    exec(compile(change, "docs/retrieval.md", "exec"), names)
    listed = capsys.readouterr().out
    assert "a new mug" in listed
    assert "i01" not in listed
    exec(compile(put, "docs/retrieval.md", "exec"), names)
    assert capsys.readouterr().out == "A new mug\n"


def test_the_kinds_of_the_page_are_those_that_have_a_name() -> None:
    named = set(re.findall(r"^\| `(\w+)` \|", PAGE.split("\n## Kinds of index\n")[1], re.MULTILINE))
    assert named == set(NAMES) - {"auto"}
    vectors = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)
    for name in named:
        assert VectorIndex.build(vectors, IndexConfig(name, k=5)).recall >= 0.98
