"""Every index kind against exact search, on clustered unit vectors; filters, bad input, damage and threads."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from retrieval import index as index_module
from retrieval.checks import MAX_K
from retrieval.exact import exact_search
from retrieval.index import IndexConfig, VectorIndex
from retrieval.kinds import Storage, resolve_kind
from tandem.core.errors import IncompatibleError, InputError, IntegrityError, NotFoundError
from tandem.core.folders import content_hash, read_json, write_json

COUNT, DIMENSION = 3_000, 24
EXACT = ("flat", "int8", "hnsw", "ivf", "ivfpq", "IVF16_HNSW8,Flat", "SQ8,RFlat", "IVF16,PQ4x4,RFlat")
COMPRESSED = ("HNSW16,SQ8", "HNSW16,SQfp16", "SQ8", "SQfp16", "IVF16,SQ8", "IVF16,SQfp16", "PCA16,IVF16,Flat", "PQ4x4")
KINDS = EXACT + COMPRESSED


def clustered(count: int, seed: int) -> np.ndarray:
    """Unit vectors around 40 shared centres."""
    centres = np.random.default_rng(99).normal(size=(40, DIMENSION))
    noise = np.random.default_rng(seed)
    vectors = centres[noise.integers(0, 40, count)] + 0.5 * noise.normal(size=(count, DIMENSION))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


VECTORS, QUERIES = clustered(COUNT, 1), clustered(60, 2)


@cache
def built(kind: str) -> VectorIndex:
    return VectorIndex.build(VECTORS, IndexConfig(kind, k=20, construction=60), QUERIES)


def masks() -> dict[str, np.ndarray]:
    noise = np.random.default_rng(3)
    return {
        "none": np.zeros(COUNT, bool),
        "one": np.arange(COUNT) == 1_234,
        "few": noise.random(COUNT) < 0.004,
        "tenth": noise.random(COUNT) < 0.1,
        "most": noise.random(COUNT) < 0.9,
        "all": np.ones(COUNT, bool),
        "corner": VECTORS[:, 0] > np.quantile(VECTORS[:, 0], 0.95),
    }


def recall(ids: np.ndarray, truth: np.ndarray) -> float:
    """Share of the true ids that were found."""
    hits = [len((set(found) & set(true)) - {-1}) for found, true in zip(ids.tolist(), truth.tolist(), strict=True)]
    return sum(hits) / max((truth >= 0).sum(), 1)


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    """What holds for each kind, whatever it is made of."""

    def test_its_recall_is_what_the_judge_measures(self, kind: str) -> None:
        _, ids = built(kind).search(QUERIES, 20)
        assert built(kind).recall >= (0.98 if kind in EXACT else 0.2)
        assert abs(built(kind).recall - recall(ids, exact_search(VECTORS, QUERIES, 20)[1])) < 0.005

    @pytest.mark.parametrize("k", [1, 20, 400])
    def test_filters_hold_inside_the_search_and_never_starve_it(self, kind: str, k: int) -> None:
        for name, allowed in masks().items():
            scores, ids = built(kind).search(QUERIES, k, allowed)
            full = min(k, int(allowed.sum()))
            assert ids.shape == scores.shape == (len(QUERIES), k)
            assert (ids[:, :full] >= 0).all(), name
            assert (ids[:, full:] == -1).all(), name
            assert allowed[ids[ids >= 0]].all(), name
            assert all(len(set(row[row >= 0])) == full for row in ids), name
            assert (np.diff(scores[:, :full], axis=1) <= 0).all(), name

    def test_filtered_recall_is_about_as_good_as_unfiltered(self, kind: str) -> None:
        for name, allowed in masks().items():
            _, ids = built(kind).search(QUERIES, 20, allowed)
            _, truth = exact_search(VECTORS, QUERIES, 20, allowed)
            if allowed.any():
                assert recall(ids, truth) >= (0.95 if kind in EXACT else 0.9 * built(kind).recall), name

    def test_scores_are_the_inner_products_of_what_is_stored(self, kind: str) -> None:
        scores, ids = built(kind).search(QUERIES, 10, masks()["tenth"])
        stored = VECTORS if kind in EXACT else built(kind).vectors(np.arange(COUNT))
        np.testing.assert_allclose(scores, np.einsum("bd,bkd->bk", QUERIES, stored[ids]), atol=1e-4)

    def test_saved_it_comes_back_and_answers_the_same(self, kind: str, tmp_path: Path) -> None:
        index = built(kind)
        index.save(tmp_path / "index")
        loaded = VectorIndex.load(tmp_path / "index")
        assert (loaded.kind, loaded.count, loaded.dimension, loaded.config) == (index.kind, COUNT, DIMENSION, index.config)
        assert (loaded.recall, loaded.breadth, loaded.widen) == (index.recall, index.breadth, index.widen)
        for allowed in (None, masks()["few"], masks()["most"]):
            for before, after in zip(index.search(QUERIES, 9, allowed), loaded.search(QUERIES, 9, allowed), strict=True):
                np.testing.assert_array_equal(before, after)

    def test_threads_with_different_filters_do_not_disturb_each_other(self, kind: str) -> None:
        index, chosen = built(kind), list(masks().values()) * 2
        alone = [index.search(QUERIES, 15, allowed)[1] for allowed in chosen]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda allowed: index.search(QUERIES, 15, allowed)[1], chosen))
        for before, after in zip(alone, together, strict=True):
            np.testing.assert_array_equal(before, after)


def test_a_kind_that_re_scores_does_no_more_of_it_than_the_target_takes() -> None:
    modest = VectorIndex.build(VECTORS, IndexConfig("IVF16,PQ4x4,RFlat", target_recall=0.5, k=20), QUERIES)
    assert modest.widen < built("IVF16,PQ4x4,RFlat").widen
    assert 0.5 <= modest.recall < 0.98


def test_a_card_from_before_re_scoring_was_tuned_is_read(tmp_path: Path) -> None:
    built("ivf").save(tmp_path / "index")
    card = read_json(tmp_path / "index" / "index.json")
    del card["seal"], card["widen"], card["config"]["storage"]
    write_json(tmp_path / "index" / "index.json", {**card, "seal": content_hash(card)})
    loaded = VectorIndex.load(tmp_path / "index")
    assert (loaded.widen, loaded.config.storage) == (1, "float32")


def test_items_that_hnsw_cannot_reach_are_found_exactly() -> None:
    """A graph over identical vectors is badly connected; k = N must still name every item."""
    vectors = np.repeat(clustered(20, 5), 15, axis=0)
    index = VectorIndex.build(vectors, IndexConfig("HNSW4,Flat", k=5))
    _, ids = index.search(vectors[:3], len(vectors))
    assert (np.sort(ids, axis=1) == np.arange(len(vectors))).all()


def test_more_than_there_are_gives_padding_and_nothing_else_does() -> None:
    scores, ids = built("hnsw").search(QUERIES[:2], COUNT + 5)
    assert (ids[:, -5:] == -1).all()
    assert (scores[:, -5:] == -np.inf).all()
    assert (np.sort(ids[:, :-5], axis=1) == np.arange(COUNT)).all()


def test_auto_picks_the_kind_by_size() -> None:
    assert resolve_kind("auto", 49_999) == "Flat"
    assert resolve_kind("auto", 50_000) == "IVF512,Flat"
    assert resolve_kind("auto", 1_000_000) == "IVF2048,Flat"
    assert resolve_kind("ivf", 30) == "IVF1,Flat"
    assert resolve_kind("PQ8", 10) == "PQ8"


@pytest.mark.parametrize(
    ("kind", "storage", "wanted"),
    [
        ("flat", "float16", "SQfp16"),
        ("flat", "int8", "SQ8"),
        ("hnsw", "int8", "HNSW32,SQ8"),
        ("ivf", "float16", "IVF512,SQfp16"),
        ("auto", "int8", "IVF512,SQ8"),
    ],
)
def test_storage_is_part_of_the_kind(kind: str, storage: Storage, wanted: str) -> None:
    assert resolve_kind(kind, 50_000, 64, storage) == wanted


def test_product_quantisation_fits_every_width() -> None:
    assert resolve_kind("ivfpq", 50_000, 64) == "IVF512,PQ32x4fs,RFlat"
    assert resolve_kind("ivfpq", 50_000, 65) == "RR66,IVF512,PQ33x4fs,RFlat"
    odd = VectorIndex.build(VECTORS[:, :23].copy(), IndexConfig("ivfpq", k=10), QUERIES[:, :23].copy())
    assert odd.recall >= 0.98


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_the_same_vectors_give_the_same_bytes(kind: str, tmp_path: Path) -> None:
    for name in "ab":
        VectorIndex.build(VECTORS, IndexConfig(kind, k=20), QUERIES).save(tmp_path / name)
    for file in ("index.faiss", "index.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    VectorIndex.build(VECTORS[:40], IndexConfig("hnsw", k=5)).save(tmp_path / "index")
    return tmp_path / "index"


@pytest.mark.parametrize("file", ["index.faiss", "index.json"])
def test_every_flipped_bit_is_refused(small: Path, file: str) -> None:
    whole = (small / file).read_bytes()
    noise = np.random.default_rng(0)
    for place in noise.integers(0, len(whole), 60):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(noise.integers(0, 8))
        (small / file).write_bytes(bytes(damaged))
        try:
            if file == "index.json" and json.loads(damaged) == json.loads(whole):
                continue  # a blank became another blank
        except ValueError:
            pass
        with pytest.raises(IntegrityError):
            VectorIndex.load(small)


def test_a_truncated_or_missing_file_is_named(small: Path) -> None:
    whole = (small / "index.faiss").read_bytes()
    (small / "index.faiss").write_bytes(whole[:-1])
    with pytest.raises(IntegrityError, match=r"index\.faiss"):
        VectorIndex.load(small)
    (small / "index.faiss").unlink()
    with pytest.raises(IntegrityError, match=r"index\.faiss"):
        VectorIndex.load(small)
    with pytest.raises(NotFoundError, match="nowhere"):
        VectorIndex.load(small / "nowhere")


def test_a_card_of_another_version_is_refused(small: Path) -> None:
    card = read_json(small / "index.json")
    card["config"]["unheard_of"] = 1
    del card["seal"]
    write_json(small / "index.json", {**card, "seal": content_hash(card)})
    with pytest.raises(IncompatibleError, match="unheard_of"):
        VectorIndex.load(small)


def test_a_failed_save_leaves_the_old_index(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    before = (small / "index.faiss").read_bytes()
    monkeypatch.setattr(index_module, "file_hash", full)
    with pytest.raises(OSError, match="no space"):
        built("flat").save(small)
    assert (small / "index.faiss").read_bytes() == before
    assert [path.name for path in small.parent.iterdir()] == ["index"]


def test_bad_vectors_are_refused_with_their_rows() -> None:
    vectors = VECTORS[:30].copy()
    vectors[[3, 7], 0] = np.nan
    vectors[11, 2] = np.inf
    with pytest.raises(InputError, match=r"\[3, 7, 11\]"):
        VectorIndex.build(vectors)
    vectors[:] = np.nan
    with pytest.raises(InputError, match="and 20 more"):
        VectorIndex.build(vectors)


def test_bad_queries_are_refused() -> None:
    index, queries = built("flat"), QUERIES[:3].copy()
    with pytest.raises(IncompatibleError, match=r"23 numbers.*24"):
        index.search(queries[:, :-1], 5)
    with pytest.raises(InputError, match="shape"):
        index.search(queries[0], 5)
    queries[1, 0] = np.nan
    with pytest.raises(InputError, match=r"rows \[1\]"):
        index.search(queries, 5)
    with pytest.raises(IncompatibleError, match=r"\(5,\)"):
        index.search(QUERIES, 5, np.ones(5, bool))
    with pytest.raises(IncompatibleError, match="int64"):
        index.search(QUERIES, 5, np.ones(COUNT, np.int64))
    with pytest.raises(IncompatibleError, match="23"):
        VectorIndex.build(VECTORS, queries=QUERIES[:, :-1])


@pytest.mark.parametrize("k", [0, -1, MAX_K + 1, 10**23, 2.5, True, "10"])
def test_a_k_out_of_range_is_refused(k: object) -> None:
    with pytest.raises(InputError, match="k = "):
        built("flat").search(QUERIES, k)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="k = "):
        exact_search(VECTORS, QUERIES, k)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["nonsense", "IDMap,Flat", "IVF5000,Flat", "PQ7"])
def test_a_kind_that_faiss_cannot_build_is_refused_with_a_way_out(kind: str) -> None:
    with pytest.raises(InputError, match=kind.split(",")[0]):
        VectorIndex.build(VECTORS[:500], IndexConfig(kind))


@pytest.mark.parametrize(
    "values",
    [
        {"target_recall": 0.0},
        {"target_recall": 1.5},
        {"k": 0},
        {"tuning_queries": 0},
        {"storage": "int4"},
        {"storage": "int8", "kind": "PQ8"},
    ],
)
def test_a_senseless_config_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(InputError):
        IndexConfig(**values)  # type: ignore[arg-type]


def test_an_empty_index_only_on_request(tmp_path: Path) -> None:
    nothing = np.empty((0, DIMENSION), np.float32)
    with pytest.raises(InputError, match="allow_empty"):
        VectorIndex.build(nothing)
    VectorIndex.build(nothing, IndexConfig(allow_empty=True)).save(tmp_path / "index")
    scores, ids = VectorIndex.load(tmp_path / "index").search(QUERIES, 4)
    assert (ids == -1).all()
    assert (scores == -np.inf).all()
    assert exact_search(nothing, QUERIES, 4)[1].tolist() == ids.tolist()


def test_no_queries_give_no_rows() -> None:
    scores, ids = built("hnsw").search(np.empty((0, DIMENSION), np.float32), 4)
    assert scores.shape == ids.shape == (0, 4)
