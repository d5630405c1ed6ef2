"""Items put and deleted over a trained retriever: in every source, under every filter, in histories, on every kind of index."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval import tier as tier_module
from retrieval.batches import pad_left
from retrieval.candidates import CandidateConfig
from retrieval.content import content_matrix
from retrieval.filters import Filters, Range
from retrieval.fresh import card_of
from retrieval.index import IndexConfig, VectorIndex
from retrieval.listing import Card
from retrieval.retriever import Queries, Retriever
from tandem.core.errors import InputError
from tandem.core.schema import MAX_CATEGORIES

ITEMS = 60
NOW = 2**60
NONE = np.empty(0, np.int64)


@pytest.fixture
def live(retriever: Retriever) -> Retriever:
    """Without any change yet."""
    return replace(retriever)


def text_of(retriever: Retriever, row: int) -> np.ndarray:
    return np.asarray(retriever.towers._text[row])


def ids(retriever: Retriever, **asked: object) -> list[str]:
    return [item_id for item_id, *_ in retriever.search(**asked)]  # type: ignore[arg-type]


def ask(*history: int, exclude: tuple[int, ...] = ()) -> Queries:
    return Queries(pad_left([np.array(history, np.int64)], 20), [np.array(exclude, np.int64)], NOW)


def unit(seed: int, width: int = 12) -> np.ndarray:
    row = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    return row / np.linalg.norm(row)


# --------------------------------------------------------------------------------------------------------------- vectors


def test_the_towers_read_a_put_item_as_they_read_it_in_training(retriever: Retriever) -> None:
    towers = retriever.towers
    vectors, inner = towers.items(towers._content, towers._text, np.arange(ITEMS))
    np.testing.assert_allclose(vectors, towers.item_vectors, atol=1e-6)
    np.testing.assert_allclose(inner, towers.inner_vectors, atol=1e-6)
    stranger, _ = towers.items(towers._content[:1], towers._text[:1], np.array([-1]))
    width = towers.shape.dimension + 1
    np.testing.assert_allclose(stranger[:, :width], towers._cold(towers._content[:1]), atol=1e-6)  # nobody touched it
    np.testing.assert_allclose(stranger[0, width:], vectors[0, width:], atol=1e-6)
    assert not np.allclose(stranger[0, :width], vectors[0, :width])
    with pytest.raises(InputError, match="release's own encoder"):
        towers.items(towers._content[:, 1:], towers._text, np.arange(ITEMS))


def test_an_item_put_as_it_is_changes_no_answer(live: Retriever) -> None:
    before = live.search(history=["i00", "i05"], k=30)
    live.put([card_of(row) for row in live.items[4:6].to_dicts()], live.towers._text[4:6])
    after = live.search(history=["i00", "i05"], k=30)
    assert [item for item, *_ in after] == [item for item, *_ in before]
    np.testing.assert_allclose([score for *_, score in after], [score for *_, score in before], atol=1e-4)


# --------------------------------------------------------------------------------------------------------------- sources


def test_a_new_item_is_found_by_its_words_and_is_the_last_of_the_popular(live: Retriever) -> None:
    text = unit(1)
    live.put([Card("new/1 ü", "A new mug", "for tea", ("c0", "mugs"))], text[None, :])
    found = live.search(sentence=text, k=5)
    assert found[0][:2] == ("new/1 ü", "A new mug")
    candidates, scores = live.candidates(ask(), CandidateConfig(k=ITEMS + 1))
    assert sorted(candidates.ids[0].tolist()) == list(range(ITEMS + 1))
    assert candidates.ranks["popular"][0][candidates.ids[0] == ITEMS].tolist() == [ITEMS]
    assert np.isfinite(scores).all()
    assert live.item_ids == [f"i{row:02}" for row in range(ITEMS)]  # what was trained on stays what it is


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_a_deleted_item_comes_from_no_source_and_a_put_brings_it_back(retriever: Retriever, exclude_seen: bool) -> None:
    live = replace(retriever, exclude_seen=exclude_seen)
    history = [0, 3, 3, 6]
    before, _ = live.candidates(ask(*history), CandidateConfig(k=ITEMS))
    gone = [int(item) for item in before.ids[0, [0, 5, 20]]] + [3]
    assert {name for name in before.names if np.isfinite(before.ranks[name][0][np.isin(before.ids[0], gone)]).any()} >= (
        {"towers", "covisit", "popular"} | (set() if exclude_seen else {"history"})
    )
    live.delete([live.item_ids[row] for row in gone] + ["never heard of"])
    after, _ = live.candidates(ask(*history), CandidateConfig(k=ITEMS))
    assert set(after.ids[0].tolist()) - {-1} == set(range(ITEMS)) - set(gone)
    assert not set(live.similar(9, ITEMS)[0].tolist()) & set(gone)
    assert live.trace(ask(*history), gone[0], CandidateConfig(k=5)).removed == "allowed"
    assert live.eligible(ask(*history))[0] == ITEMS - len(set(gone))
    live.put([card_of(live.items.row(gone[0], named=True))], text_of(live, gone[0])[None, :])
    back, _ = live.candidates(ask(*history), CandidateConfig(k=ITEMS))
    assert gone[0] in back.ids[0]


def test_a_history_may_hold_new_changed_and_deleted_items(live: Retriever) -> None:
    live.put([Card("new", "New", "new")], unit(2)[None, :])
    row = live.listing.row("new")
    assert row == ITEMS
    width = live.towers.shape.dimension
    alone = live.vectors(ask(row))[0, :width]
    inner = np.asarray(live.listing.view.columns["inner"][0])  # type: ignore[union-attr]
    wanted = live.towers.query(np.array([[row]]), put=(np.array([[0]]), inner[None, :]))[0, :width]
    np.testing.assert_allclose(alone, wanted, atol=1e-6)
    old = live.vectors(ask(1, 4))
    live.delete(["new", "i01"])
    np.testing.assert_array_equal(live.vectors(ask(1, 4)), old)  # what a person did stays done
    np.testing.assert_allclose(live.vectors(ask(row))[0, :width], alone, atol=1e-6)
    both = live.vectors(Queries(np.array([[-1, 1, row], [-1, -1, 4]]), [NONE, NONE], NOW))
    np.testing.assert_allclose(both[1], live.vectors(ask(4))[0], atol=1e-6)


def test_similar_to_a_new_item_are_those_of_like_text(live: Retriever) -> None:
    live.put([Card("new", "New", "new")], text_of(live, 7)[None, :])
    rows, cosines = live.similar(ITEMS, 3)
    assert rows[0] == 7
    assert cosines[0] == pytest.approx(1.0, abs=1e-3)
    assert ITEMS not in rows


# --------------------------------------------------------------------------------------------------------------- filters


def test_filters_know_what_was_put(live: Retriever) -> None:
    now = 1_000
    cards = [
        Card("a", "A", "a", ("c0", "brand new"), None, {"price": 500, "colour": "mauve"}),
        Card("b", "B", "b", ("c1",), now + 1, {"price": 600.5, "colour": "red"}),
        Card("i00", "Moved", "moved", ("c2",), None, {"price": None, "colour": None}),
    ]
    live.put(cards, np.stack([unit(seed) for seed in range(3)]))

    def passing(**asked: object) -> set[str]:
        found = live.search(k=ITEMS * 2, now_us=now, filters=Filters(**asked))  # type: ignore[arg-type]
        return {item_id for item_id, *_ in found}

    assert passing(categories_any=("brand new",)) == {"a"}
    assert passing(ranges={"price": Range(at_least=400)}) == {"a"}
    assert passing(ranges={"price": Range(at_least=400)}, available=False) == {"a", "b"}
    assert passing(attributes={"colour": ("mauve",)}) == {"a"}
    assert "i00" not in passing(categories_any=("c0",)) | passing(ranges={"price": Range(at_most=0)}) | passing(
        attributes={"colour": ("red",)}
    )
    assert "i00" in passing(categories_all=("c2",))
    assert passing(include=("a", "b", "i00", "i05")) == {"a", "i00", "i05"}
    assert passing(include=("a", "i00", "i05"), exclude=("a",)) == {"i00", "i05"}


def test_masks_made_before_an_item_came_do_not_let_it_in(live: Retriever) -> None:
    queries = replace(ask(), filters=live.masks(Filters(), NOW))
    live.put([Card("new", "New", "new")], unit(1)[None, :])
    found, _ = live.candidates(queries, CandidateConfig(k=ITEMS * 2))
    assert set(found.ids[0].tolist()) == {*range(ITEMS), -1}


names = st.lists(st.sampled_from(["i00", "i01", "i07", "i30", "new a", "new b", "新"]), min_size=1, max_size=4, unique=True)
changes = st.lists(st.tuples(st.sampled_from(["put", "put", "delete"]), names, st.integers(0, 9)), max_size=10)


@given(changes, st.sampled_from(["flat", "hnsw", "ivf", "ivfpq"]), st.integers(1, 80))
@settings(max_examples=40, deadline=None)
def test_every_listed_item_can_come_whatever_was_changed(
    retriever: Retriever, made: list[tuple[str, list[str], int]], kind: str, k: int
) -> None:
    live = replace(retriever, index=VectorIndex.build(retriever.towers.item_vectors, IndexConfig(kind, k=10)))
    listed = {item_id: float(row) for row, item_id in enumerate(live.item_ids)}
    for what, item_ids, price in made:
        if what == "delete":
            live.delete(item_ids)
            listed = {item_id: own for item_id, own in listed.items() if item_id not in item_ids}
        else:
            cards = [Card(item_id, item_id, "t", ("c1",), None, {"price": price}) for item_id in item_ids]
            live.put(cards, np.stack([unit(price + place) for place in range(len(cards))]))
            listed |= dict.fromkeys(item_ids, float(price))
    cheap = Filters(ranges={"price": Range(at_most=20)})
    for filters, wanted in ((None, set(listed)), (cheap, {item_id for item_id, own in listed.items() if own <= 20})):
        found = ids(live, history=["i05", "nobody"], k=k, filters=filters)
        left = wanted - {"i05"}
        assert len(found) == len(set(found)) == min(k, len(left))
        assert set(found) <= left


# ------------------------------------------------------------------------------------------------------------- the tier


def test_many_updates_later_a_deleted_item_still_has_a_title(live: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_module, "_ROOM", 4)
    live.put([Card("gone", "Gone", "gone"), Card("kept", "Kept", "kept")], np.stack([unit(1), unit(2)]))
    row, kept = (int(live.listing.row(name) or -1) for name in ("gone", "kept"))
    vector = live.listing.item_vectors(np.array([kept, row]))
    live.delete(["gone"])
    for number in range(50):
        live.put([Card("i03", f"Title {number}", "t", (), None, {"price": number})], unit(number)[None, :])
    assert live.listing.title(row) == "Gone"
    assert live.listing.title(3) == "Title 49"
    assert live.listing.attribute("price", np.array([3, 4, kept])).tolist()[:2] == [49, 4]
    np.testing.assert_array_equal(live.listing.item_vectors(np.array([kept, row])), vector)
    assert set(ids(live, k=100, filters=Filters(ranges={"price": Range(49, 49)}))) == {"i03", "i49"}
    assert len(live.listing.view.rows) < 20  # type: ignore[union-attr]


def test_the_content_of_a_put_item_is_read_with_the_catalogues_own_columns(live: Retriever) -> None:
    frame = live.items.select("categories", "price")
    whole = content_matrix(live.items, live.towers._text)
    _, content = live.fresh._opened()
    np.testing.assert_array_equal(content(frame[10:20], live.towers._text[10:20]), whole[10:20])


@pytest.mark.parametrize(
    ("cards", "said"),
    [
        ([Card("a\0", "t", "t")], "control character"),
        ([Card("a", "t", "t"), Card("a", "t", "t")], "1 of them different"),
        ([Card("a", "t", "t", (), None, {"price": "dear"})], "'dear' is no number"),
        ([Card("a", "t", "t", (), None, {"colour": 3})], "3 is no text"),
        ([Card("a", "t", "t", tuple(str(each) for each in range(MAX_CATEGORIES + 1)))], "33 categories"),
    ],
)
def test_a_bad_item_is_refused_and_changes_nothing(live: Retriever, cards: list[Card], said: str) -> None:
    with pytest.raises(InputError, match=said):
        live.put(cards, np.stack([unit(1)] * len(cards)))
    with pytest.raises(InputError, match=r"rows \[0\]"):
        live.put([Card("a", "t", "t")], np.full((1, 12), np.nan, np.float32))
    assert live.listing.view is None
