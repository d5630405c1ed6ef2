"""The retriever folder: written, loaded, refused when mixed, and searched as the docs say."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from retrieval.batches import pad_left
from retrieval.candidates import CandidateConfig
from retrieval.filters import Filters, Range
from retrieval.index import IndexConfig, VectorIndex
from retrieval.retriever import Queries, Retriever, items_fingerprint, tower_scores
from tandem.core.errors import IncompatibleError, InputError, IntegrityError, NotFoundError
from tandem.core.folders import read_json, write_json

ITEMS = 60


def test_saved_and_loaded_it_answers_alike(retriever: Retriever, tmp_path: Path) -> None:
    retriever.save(tmp_path)
    loaded = Retriever.load(tmp_path)
    assert loaded.search(history=["i00", "i03"], k=7) == retriever.search(history=["i00", "i03"], k=7)


def test_search_stays_in_the_users_taste_and_leaves_out_what_was_seen(retriever: Retriever) -> None:
    found = retriever.search(history=["i00", "i03", "i06"], k=8)
    assert len({item for item, _, _ in found}) == 8
    assert not {"i00", "i03", "i06"} & {item for item, _, _ in found}
    assert sum(int(item[1:]) % 3 == 0 for item, _, _ in found) >= 6
    assert [score for *_, score in found] == sorted((score for *_, score in found), reverse=True)


def test_unknown_items_in_a_history_are_skipped(retriever: Retriever) -> None:
    assert retriever.search(history=["nobody", "i03"], k=3) == retriever.search(history=["i03"], k=3)


def test_k_above_the_catalogue_returns_all_that_is_eligible(retriever: Retriever) -> None:
    assert len(retriever.search(k=1000)) == ITEMS


def test_tower_scores_are_inner_products_also_of_what_other_sources_found(retriever: Retriever) -> None:
    queries = Queries(pad_left([np.array([1, 4])], 20), [np.empty(0, np.int64)], 0)
    found, scores = retriever.candidates(queries, CandidateConfig(k=ITEMS))
    vectors = retriever.vectors(queries)
    expected = (vectors @ retriever.towers.item_vectors.T)[0][found.ids[0]]
    assert np.allclose(scores[0], expected, atol=1e-4)
    with pytest.raises(InputError, match="coordinates"):
        tower_scores(vectors[:, :-1], retriever.towers.item_vectors, found.ids)


def test_an_item_of_tomorrow_is_not_available_today(retriever: Retriever) -> None:
    before = int(datetime(2025, 5, 1, tzinfo=UTC).timestamp() * 1e6)
    assert not retriever.available(before)[59]
    assert retriever.available(before + 60 * 86_400 * 10**6).all()


def test_similar_never_returns_the_item_itself(retriever: Retriever) -> None:
    rows, cosines = retriever.similar(4, 10)
    assert 4 not in rows
    assert (np.diff(cosines) <= 0).all()


def test_a_mixed_folder_is_refused_with_both_fingerprints(retriever: Retriever, tmp_path: Path) -> None:
    retriever.save(tmp_path)
    facts = read_json(tmp_path / "retriever.json")
    write_json(tmp_path / "retriever.json", facts | {"towers": "0123456789abcdef"})
    with pytest.raises(IncompatibleError, match=rf"{retriever.towers.fingerprint[:12]}.*0123456789ab"):
        Retriever.load(tmp_path)


def test_another_item_order_is_refused(retriever: Retriever, tmp_path: Path) -> None:
    retriever.save(tmp_path)
    shuffled = retriever.items.reverse()
    assert items_fingerprint(shuffled) != items_fingerprint(retriever.items)
    shuffled.write_parquet(tmp_path / "items.parquet")
    with pytest.raises(IncompatibleError, match="items are"):
        Retriever.load(tmp_path)


@pytest.mark.parametrize("kind", ["flat", "int8", "hnsw", "ivf", "ivfpq"])
def test_an_index_of_other_vectors_is_refused_before_anybody_asks(retriever: Retriever, tmp_path: Path, kind: str) -> None:
    """Rows 15 and 16: every number and hash of it fits."""
    vectors, config = retriever.towers.item_vectors, IndexConfig(kind, k=10)
    for name, held in (("own", vectors), ("foreign", np.random.default_rng(0).permutation(vectors))):
        folder = tmp_path / name
        folder.mkdir()
        replace(retriever, index=VectorIndex.build(held, config)).save(folder)
    assert Retriever.load(tmp_path / "own").index.kind == VectorIndex.build(vectors, config).kind
    with pytest.raises(IntegrityError, match=r"foreign: the index finds \d+% of .* not these towers'"):
        Retriever.load(tmp_path / "foreign")


def test_an_empty_folder_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="tandem train towers"):
        Retriever.load(tmp_path)


@pytest.mark.parametrize("kind", ["flat", "int8", "hnsw", "ivf", "ivfpq", "IVF4,SQ8"])
def test_filters_hold_and_every_eligible_item_can_come_on_every_kind(retriever: Retriever, kind: str) -> None:
    index = VectorIndex.build(retriever.towers.item_vectors, IndexConfig(kind, k=10))
    prices = pl.Series("price", [None if row % 10 == 9 else row / 10 for row in range(ITEMS)])
    priced = replace(retriever, index=index, items=retriever.items.with_columns(prices))
    asked = Filters(categories_any=("c0", "c1"), ranges={"price": Range(at_most=4.0)}, include=tuple(priced.item_ids[:50]))
    wanted = {row for row in range(50) if row % 3 != 2 and row % 10 != 9 and row <= 40}
    for history, out in (((), set()), (("i00", "i04"), {0, 4})):
        for k in (3, 100):
            found = [int(item[1:]) for item, *_ in priced.search(history=history, k=k, filters=asked)]
            assert len(found) == len(set(found)) == min(k, len(wanted - out))
            assert set(found) <= wanted - out
    again = priced.search(history=("i00", "i04"), k=100, filters=replace(asked, seen=True, exclude=("i06", "nobody")))
    assert {int(item[1:]) for item, *_ in again} == wanted - {6}


def test_what_may_come_is_counted_filter_by_filter(retriever: Retriever) -> None:
    now = int(datetime(2025, 5, 1, tzinfo=UTC).timestamp() * 1e6)
    masks = retriever.masks(Filters(categories_none=("c0",), include=("i01", "i03", "i05", "i59", "nobody")), now)
    queries = Queries(pad_left([np.array([5])], 20), [np.array([5, 7, 5])], now, filters=masks)
    assert retriever.eligible(queries) == (1, {"not available yet": 1, "category": 20, "not included": 37, "excluded": 1})
    found, _ = retriever.candidates(queries, CandidateConfig(k=5))
    assert found.ids.tolist() == [[1, -1, -1, -1, -1]]


def test_similar_items_pass_filters_too(retriever: Retriever) -> None:
    masks = retriever.masks(Filters(categories_any=("c1",)), 2**62)
    rows, _ = retriever.similar(4, 50, masks, np.array([1]))
    assert set(rows.tolist()) == set(range(1, ITEMS, 3)) - {1, 4}
