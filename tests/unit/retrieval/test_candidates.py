"""The merge against one written with loops, every source by hand, and the promise: unique, eligible, never short."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from retrieval import candidates as module
from retrieval import sources as sources_module
from retrieval.baselines import ItemKNN
from retrieval.candidates import CandidateConfig, Candidates, Trace, retrieve, trace
from retrieval.exact import exact_search
from retrieval.index import IndexConfig, VectorIndex
from retrieval.merge import merge
from retrieval.query_batch import Answer, QueryBatch, removed_by
from retrieval.sources import (
    CandidateSource,
    HistorySource,
    RankedSource,
    TowerSource,
    category_source,
    covisit_source,
    new_source,
    popular_source,
)
from tandem.core.errors import IncompatibleError, InputError

DAY = 86_400_000_000


def answer(rows: list[list[int]], width: int) -> Answer:
    """Ids with falling scores, padded."""
    ids = np.full((len(rows), width), -1, np.int64)
    scores = np.full((len(rows), width), -np.inf, np.float32)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        scores[number, : len(row)] = [10.0 - 0.5 * place for place in range(len(row))]
    return scores, ids


def merged_with_loops(results: dict[str, list[int]], quotas: dict[str, int], k: int) -> list[int]:
    """One request: sure items first, then source by source; ordered by first source and its rank."""
    home = {}
    for number, items in enumerate(results.values()):
        for rank, item in enumerate(items):
            home.setdefault(item, (number, rank))
    sure = {item for name, items in results.items() for item in items[: quotas.get(name, 0)]}
    chosen = sorted(home, key=lambda item: (item not in sure, home[item]))[:k]
    return sorted(chosen, key=lambda item: home[item])


def check_carried(found: Candidates, row: int, results: dict[str, list[int]]) -> None:
    for slot, item in enumerate(found.ids[row].tolist()):
        holders = [name for name, items in results.items() if item in items] if item >= 0 else []
        assert found.source[row, slot] == (found.names.index(holders[0]) if holders else -1)
        for name, items in results.items():
            rank, score = found.ranks[name][row, slot], found.scores[name][row, slot]
            if name in holders:
                assert rank == items.index(item)
                assert score == np.float32(10.0 - 0.5 * items.index(item))
            else:
                assert np.isnan(rank)
                assert np.isnan(score)


lists = st.lists(st.integers(0, 14), unique=True, max_size=8)


@given(st.data(), st.integers(1, 20), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_merge_equals_the_one_with_loops(data: st.DataObject, k: int, requests: int) -> None:
    names = ["towers", "covisit", "popular"][: data.draw(st.integers(1, 3))]
    rows = {name: data.draw(st.lists(lists, min_size=requests, max_size=requests)) for name in names}
    quotas: dict[str, int] = {}
    for name in names:
        quotas[name] = data.draw(st.integers(0, k - sum(quotas.values())))
    found = merge({name: answer(rows[name], data.draw(st.integers(8, 10))) for name in names}, quotas, k)
    for row in range(requests):
        one = {name: rows[name][row] for name in names}
        expected = merged_with_loops(one, quotas, k)
        assert found.ids[row].tolist() == expected + [-1] * (k - len(expected))
        check_carried(found, row, one)


def test_merge_by_hand() -> None:
    results = {"towers": answer([[5, 6, 7, 8]], 4), "covisit": answer([[9, 6, 4]], 4), "popular": answer([[1, 2]], 4)}
    found = merge(results, {"covisit": 1, "popular": 1}, 4)
    assert found.ids.tolist() == [[5, 6, 9, 1]]
    assert found.source.tolist() == [[0, 0, 1, 2]]
    assert found.ranks["covisit"].tolist()[0][1:3] == [1.0, 0.0]
    assert np.isnan(found.ranks["covisit"][0, 0])
    assert found.scores["covisit"][0, 1] == 9.5


@given(st.data(), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_quotas_hold(data: st.DataObject, k: int) -> None:
    rows = {name: data.draw(lists) for name in ("towers", "covisit", "popular")}
    quotas = {"covisit": data.draw(st.integers(0, k))}
    quotas["popular"] = data.draw(st.integers(0, k - quotas["covisit"]))
    found = merge({name: answer([items], 8) for name, items in rows.items()}, quotas, k)
    for name, quota in quotas.items():
        assert set(rows[name][:quota]) <= set(found.ids[0].tolist())


def test_an_item_that_a_source_returns_twice_counts_once_with_its_better_rank() -> None:
    found = merge({"towers": answer([[3, 4, 3]], 3), "popular": answer([[4, 4, 1]], 3)}, {}, 4)
    assert found.ids.tolist() == [[3, 4, 1, -1]]
    assert found.ranks["towers"][0, :2].tolist() == [0, 1]
    assert found.ranks["popular"][0, 1:3].tolist() == [0, 2]


def test_quotas_that_cannot_hold_are_refused() -> None:
    results = {"towers": answer([[1]], 1)}
    for quotas in ({"towers": 3}, {"towers": -1}, {"nobody": 1}):
        with pytest.raises(InputError, match="quotas"):
            merge(results, quotas, 2)
    with pytest.raises(InputError, match="k = 0"):
        merge(results, {}, 0)


# A small world: 60 items around a circle (a little off their places, so that no two are equally near to a third).
N = 60
ANGLE = np.linspace(0, 2 * np.pi, N, endpoint=False) + np.random.default_rng(2).uniform(0, 0.05, N)
CIRCLE = np.stack([np.cos(ANGLE), np.sin(ANGLE)], axis=1).astype(np.float32)
COUNTS = np.random.default_rng(0).permutation(N).astype(np.float32)
TOUCHED = (np.random.default_rng(1).random((200, N)) < 0.08).astype(np.float32)
KNN = ItemKNN.fit(sparse.csr_matrix(TOUCHED), 10)
INDEX = VectorIndex.build(CIRCLE, IndexConfig("flat", k=5))
POPULAR = popular_source(COUNTS)


def batch(
    history: list[list[int]],
    exclude: list[list[int]] | None = None,
    allowed: np.ndarray | None = None,
    filters: dict[str, np.ndarray] | None = None,
    vectors: np.ndarray | None = None,
) -> QueryBatch:
    width = max(map(len, history), default=0)
    padded = np.array([[-1] * (width - len(row)) + row for row in history], np.int64).reshape(len(history), width)
    excluded = [np.array(row, np.int64) for row in (exclude if exclude is not None else [[] for _ in history])]
    given_vectors = np.tile(CIRCLE[:1], (len(history), 1)) if vectors is None else vectors
    return QueryBatch(given_vectors, padded, excluded, allowed, filters or {})


def sources() -> list[CandidateSource]:
    category = category_source(np.arange(N), np.arange(N) % 2, COUNTS, 8)
    fresh = new_source(np.arange(N, dtype=np.int64) * DAY, N * DAY, 10)
    return [TowerSource(INDEX), covisit_source(KNN), category, HistorySource(N), fresh]


ids_of_items = st.lists(st.integers(0, N - 1), max_size=30)
requests_of_items = st.lists(st.tuples(ids_of_items, ids_of_items), min_size=1, max_size=5)


@given(requests_of_items, st.none() | hnp.arrays(np.bool_, N), st.integers(1, 70), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_unique_eligible_and_never_short(
    requests: list[tuple[list[int], list[int]]], allowed: np.ndarray | None, k: int, seed: int
) -> None:
    vectors = np.random.default_rng(seed).normal(size=(len(requests), 2)).astype(np.float32)
    asked = batch([history for history, _ in requests], [exclude for _, exclude in requests], allowed, vectors=vectors)
    found = retrieve(asked, sources(), POPULAR, CandidateConfig(k=k))
    for row, (_, exclude) in enumerate(requests):
        eligible = set(range(N) if allowed is None else np.flatnonzero(allowed)) - set(exclude)
        returned = [item for item in found.ids[row].tolist() if item >= 0]
        assert len(returned) == len(set(returned)) == min(k, len(eligible))
        assert set(returned) <= eligible
        assert (found.ids[row, len(returned) :] == -1).all()
        assert (found.source[row] >= 0).tolist() == (found.ids[row] >= 0).tolist()


@given(requests_of_items, st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_a_batch_answers_as_its_requests_do_alone(requests: list[tuple[list[int], list[int]]], k: int) -> None:
    vectors = CIRCLE[np.arange(len(requests)) * 7]
    asked = batch([history for history, _ in requests], [exclude for _, exclude in requests], vectors=vectors)
    together = retrieve(asked, sources(), POPULAR, CandidateConfig(k=k))
    for row in range(len(requests)):
        alone = retrieve(asked.rows(row, row + 1), sources(), POPULAR, CandidateConfig(k=k))
        assert together.ids[row].tolist() == alone.ids[0].tolist()
        for name in together.names:
            np.testing.assert_array_equal(together.ranks[name][row], alone.ranks[name][0])


def test_blocks_of_requests_equal_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = batch([[item] for item in range(9)], vectors=CIRCLE[:9])
    whole = retrieve(asked, sources(), POPULAR, CandidateConfig(k=20))
    monkeypatch.setattr(module, "_BLOCK_ROWS", 2)
    monkeypatch.setattr(sources_module, "_SUM_CELLS", 1)
    blocks = retrieve(asked, sources(), POPULAR, CandidateConfig(k=20))
    assert (blocks.ids == whole.ids).all()
    assert (blocks.source == whole.source).all()


def test_towers_return_the_nearest_that_are_left() -> None:
    near = [1, 59, 2, 58, 0]
    scores, ids = TowerSource(INDEX).candidates(batch([[]], [near]), 4)
    wanted = exact_search(CIRCLE, CIRCLE[:1], 4, ~np.isin(np.arange(N), near))
    assert ids.tolist() == wanted[1].tolist()
    np.testing.assert_allclose(scores, wanted[0], atol=1e-6)


@given(st.lists(ids_of_items, min_size=1, max_size=4), hnp.arrays(np.bool_, N), st.integers(1, 65))
@settings(max_examples=60, deadline=None)
def test_towers_equal_the_judge_under_every_exclusion(exclude: list[list[int]], allowed: np.ndarray, k: int) -> None:
    vectors = CIRCLE[np.arange(len(exclude)) * 11] @ np.float32([[0.9, 0.2], [0.1, 1.1]])
    asked = batch([[] for _ in exclude], exclude, allowed, vectors=vectors)
    _, ids = TowerSource(INDEX).candidates(asked, k)
    for row, out in enumerate(exclude):
        _, wanted = exact_search(CIRCLE, vectors[row : row + 1], k, allowed & ~np.isin(np.arange(N), out))
        assert ids[row].tolist() == wanted[0].tolist()


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_query_vector_without_meaning_is_answered_by_the_others(bad: float) -> None:
    vectors = np.stack([np.full(2, bad, np.float32), CIRCLE[0]])
    found = retrieve(batch([[3], [3]], vectors=vectors), sources(), POPULAR, CandidateConfig(k=10))
    assert np.isnan(found.scores["towers"][0]).all()
    assert (found.ids >= 0).all()
    assert found.scores["towers"][1, 0] == pytest.approx(1.0)


def test_covisits_are_item_knn_scores() -> None:
    history = [4, 17, 4, 30]
    expected = KNN.score_items(np.array(history, np.int64))
    scores, ids = covisit_source(KNN).candidates(batch([history], [[4, 17, 30]]), 8)
    expected[[4, 17, 30]] = 0
    order = [item for item in np.argsort(-expected, kind="stable") if expected[item] > 0][:8]
    assert ids[0, : len(order)].tolist() == order
    np.testing.assert_allclose(scores[0, : len(order)], expected[order], rtol=1e-5)
    assert (
        covisit_source(KNN, last=1).candidates(batch([history]), 8)[1] == covisit_source(KNN).candidates(batch([[30]]), 8)[1]
    ).all()


def test_category_gives_the_popular_of_the_histories_categories() -> None:
    rows, codes = np.array([0, 1, 1, 2, 3]), np.array([0, 0, 1, 1, 1])
    source = category_source(rows, codes, np.array([1, 9, 5, 3, 99], np.float32), keep=3)
    _, ids = source.candidates(batch([[0]]), 4)
    assert ids.tolist() == [[1, 0, -1, -1]]
    _, ids = source.candidates(batch([[2]]), 4)
    assert ids.tolist() == [[1, 2, 3, -1]]
    _, ids = source.candidates(batch([[4], []]), 2)
    assert (ids == -1).all()


def test_history_gives_the_most_frequent_then_the_newest() -> None:
    _, ids = HistorySource(N).candidates(batch([[7, 3, 9, 3, 8], [5]]), 4)
    assert ids.tolist() == [[3, 8, 9, 7], [5, -1, -1, -1]]
    _, ids = HistorySource(N).candidates(batch([[7, 3, 9, 3, 8]], [[3, 9]]), 4)
    assert ids.tolist() == [[8, 7, -1, -1]]


def test_new_items_are_those_of_the_last_days_newest_first() -> None:
    source = new_source(np.array([0, 9, 5, 11, 10], np.int64) * DAY, 10 * DAY, 5)
    scores, ids = source.candidates(batch([[]]), 4)
    assert ids.tolist() == [[4, 1, 2, -1]]
    assert scores[0, :3].tolist() == [0, -1, -5]


def test_popular_reads_on_below_what_is_barred() -> None:
    allowed = COUNTS < 10
    _, ids = POPULAR.candidates(batch([[]], allowed=allowed), 5)
    assert COUNTS[ids[0]].tolist() == [9, 8, 7, 6, 5]
    assert popular_source(np.array([1, 2, 2], np.float32)).order.tolist() == [1, 2, 0]


@dataclass(frozen=True)
class Rogue:
    """A source that breaks every rule."""

    name: str = "rogue"

    def candidates(self, batch: QueryBatch, k: int) -> Answer:
        return answer([[5, 5, 999, 6, 7]] * len(batch), max(k, 5))


def test_a_source_that_returns_barred_unknown_or_repeated_items_does_no_harm() -> None:
    found = retrieve(batch([[]], [[6]]), [Rogue()], POPULAR, CandidateConfig(k=60, shares={}))
    assert found.ids[0, :2].tolist() == [5, 7]
    returned = found.ids[0][found.ids[0] >= 0]
    assert sorted(returned.tolist()) == [item for item in range(N) if item != 6]


def test_two_sources_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="share a name"):
        retrieve(batch([[]]), [TowerSource(INDEX), TowerSource(INDEX)], POPULAR, CandidateConfig())
    with pytest.raises(InputError, match="share a name"):
        retrieve(batch([[]]), [POPULAR], POPULAR, CandidateConfig())


def test_parts_of_different_sizes_are_refused() -> None:
    with pytest.raises(IncompatibleError, match="length"):
        QueryBatch(CIRCLE[:2], np.empty((1, 0), np.int64), [np.empty(0, np.int64)])
    with pytest.raises(IncompatibleError, match=r"\(3,\).*60"):
        retrieve(batch([[]], allowed=np.ones(3, bool)), sources(), POPULAR, CandidateConfig())


@pytest.mark.parametrize("values", [{"k": 0}, {"k": 10**9}, {"shares": {"towers": 1.2}}, {"shares": {"towers": -0.1}}])
def test_a_senseless_config_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(InputError):
        CandidateConfig(**values)  # type: ignore[arg-type]


def test_shares_become_slots_of_the_sources_that_are_there() -> None:
    assert CandidateConfig(k=200).quotas(["towers", "popular", "mine"]) == {"towers": 100, "popular": 20, "mine": 0}
    assert CandidateConfig(k=10, shares={"a": 0.7, "b": 0.3}).quotas(["a", "b"]) == {"a": 7, "b": 3}


def test_nobody_and_nothing_are_answered() -> None:
    nobody = QueryBatch(CIRCLE[:0], np.empty((0, 5), np.int64), [])
    assert retrieve(nobody, sources(), POPULAR, CandidateConfig(k=7)).ids.shape == (0, 7)
    empty = VectorIndex.build(CIRCLE[:0], IndexConfig(allow_empty=True))
    no_items = RankedSource("popular", np.empty(0, np.int64), np.empty(0, np.float32), 0)
    found = retrieve(batch([[]]), [TowerSource(empty), HistorySource(0)], no_items, CandidateConfig(k=3))
    assert found.ids.tolist() == [[-1, -1, -1]]


def test_trace_says_what_became_of_an_item() -> None:
    asked = batch([[30]], [[3]], np.arange(N) != 4, {"category": np.arange(N) != 5, "stock": np.arange(N) != 6})
    config = CandidateConfig(k=4, shares={"towers": 0.5, "popular": 0.5})
    found = retrieve(asked, [TowerSource(INDEX)], POPULAR, config)

    def ask(item: int, depth: int = 1_000) -> Trace:
        return trace(asked, 0, item, [TowerSource(INDEX)], POPULAR, config, depth)

    assert ask(999).removed == "unknown"
    assert ask(-1).removed == "unknown"
    assert ask(4).removed == "allowed"
    assert ask(5).removed == "category"
    assert ask(6).removed == "stock"
    assert ask(3).removed == "excluded"
    assert removed_by(asked, 0, 0, N) is None
    kept = ask(0)
    assert (kept.removed, kept.position) == (None, found.ids[0].tolist().index(0))
    assert kept.found["towers"] == (0, pytest.approx(1.0))
    far = int(np.argmin(COUNTS[20:40])) + 20
    assert ask(far).removed == "too deep"
    assert set(ask(far).found) == {"towers", "popular"}
    assert ask(far, depth=1).removed == "not found"
    crowded = int(TowerSource(INDEX).candidates(asked, 4)[1][0, 3])
    assert ask(crowded).removed == "crowded out"
    assert ask(crowded).found["towers"][0] == 3
