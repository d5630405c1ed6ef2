"""A live index against exact search over what is listed: any order of changes, several threads and processes, restarts."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval import live as live_module
from retrieval.index import IndexConfig, VectorIndex
from retrieval.live import LiveIndex
from retrieval.tier import View
from tandem.core.errors import IncompatibleError, InputError

WIDTH, MAIN = 8, 400
NAMES = [f"item {row}" for row in range(MAIN)]
MAIN_VECTORS = np.random.default_rng(0).normal(size=(MAIN, WIDTH)).astype(np.float32)
QUERIES = np.random.default_rng(1).normal(size=(5, WIDTH)).astype(np.float32)
EMPTY = np.empty((0, WIDTH), np.float32)


@cache
def main_index(kind: str = "flat") -> VectorIndex:
    return VectorIndex.build(MAIN_VECTORS, IndexConfig(kind, target_recall=1.0, k=50), QUERIES)


@dataclass
class Catalogue:
    """What should be listed: a plain dictionary, changed by the same calls."""

    vectors: dict[str, np.ndarray] = field(default_factory=lambda: dict(zip(NAMES, MAIN_VECTORS, strict=True)))

    def put(self, ids: list[str], vectors: np.ndarray) -> None:
        self.vectors.update(zip(ids, vectors, strict=True))

    def delete(self, ids: list[str]) -> None:
        for item_id in ids:
            self.vectors.pop(item_id, None)

    def best(self, query: np.ndarray, k: int) -> list[tuple[float, str]]:
        return sorted(((float(vector @ query), item_id) for item_id, vector in self.vectors.items()), reverse=True)[:k]


def assert_right(view: View, catalogue: Catalogue, k: int) -> None:
    scores, numbers = view.search(QUERIES, k)
    for row, query in enumerate(QUERIES):
        wanted = catalogue.best(query, k)
        found = numbers[row][numbers[row] >= 0]
        assert view.item_ids(found) == [item_id for _, item_id in wanted]
        np.testing.assert_allclose(scores[row, : len(wanted)], [score for score, _ in wanted], atol=1e-5)
        assert (numbers[row, len(wanted) :] == -1).all()


some_ids = st.lists(st.sampled_from([*NAMES[:12], "new a", "new b", "新品", "new/c d"]), min_size=1, max_size=6, unique=True)


@given(st.lists(st.tuples(st.sampled_from(["put", "put", "delete"]), some_ids), max_size=12), st.sampled_from([1, 10, MAIN + 20]))
@settings(max_examples=40, deadline=None)
def test_any_order_of_changes_leads_to_what_a_dictionary_holds(changes: list[tuple[str, list[str]]], k: int) -> None:
    import tempfile

    main, catalogue, noise = main_index(), Catalogue(), np.random.default_rng(2)
    with tempfile.TemporaryDirectory() as folder:
        here = LiveIndex(main, NAMES, Path(folder), "towers")
        there = LiveIndex(main, NAMES, Path(folder), "towers")
        for kind, ids in changes:
            vectors = noise.normal(size=(len(ids), WIDTH)).astype(np.float32)
            (here.put(ids, vectors), catalogue.put(ids, vectors)) if kind == "put" else (here.delete(ids), catalogue.delete(ids))
        again = LiveIndex(main, NAMES, Path(folder), "towers")
        for index in (here, there, again):
            assert_right(index.view(), catalogue, k)
            np.testing.assert_array_equal(index.search(QUERIES, k)[1], here.search(QUERIES, k)[1])


@pytest.fixture
def live(tmp_path: Path) -> LiveIndex:
    return LiveIndex(main_index(), NAMES, tmp_path, "towers")


@pytest.mark.parametrize("kind", ["flat", "int8", "hnsw", "ivf", "ivfpq"])
def test_every_kind_of_main_index_never_gives_less_than_k(kind: str, tmp_path: Path) -> None:
    live = LiveIndex(main_index(kind), NAMES, tmp_path, "towers")
    live.delete(NAMES[: MAIN - 30])
    live.put(["new", NAMES[0]], QUERIES[:2])
    for k in (5, 32, 40):
        _, numbers = live.search(QUERIES, k)
        assert ((numbers >= 0).sum(axis=1) == min(k, 32)).all()
        assert live.view().listed()[numbers[numbers >= 0]].all()
    assert live.view().item_ids(live.search(QUERIES[:1], 1)[1][0]) == ["new"]


def test_a_filter_may_know_the_new_items_or_not(live: LiveIndex) -> None:
    live.put(["new"], QUERIES[:1] * 9)
    view = live.view()
    assert view.item_ids(view.search(QUERIES[:1], 1, np.ones(view.count, bool))[1][0]) == ["new"]
    assert view.search(QUERIES[:1], 1, np.ones(MAIN, bool))[1][0, 0] < MAIN
    only = np.arange(view.count) == MAIN
    assert view.search(QUERIES[:1], 3, only)[1].tolist() == [[MAIN, -1, -1]]
    with pytest.raises(IncompatibleError, match=r"\(401,\) bool, or \(400,\)"):
        view.search(QUERIES, 1, np.ones(7, bool))


def test_a_view_stays_as_it_was(live: LiveIndex) -> None:
    before, answer = live.view(), live.view().search(QUERIES, 20)
    live.put(["new"], QUERIES[:1] * 9)
    live.delete(NAMES[:200])
    np.testing.assert_array_equal(before.search(QUERIES, 20)[1], answer[1])
    assert live.view().version == before.version + 2


def test_nothing_new_makes_no_new_view(live: LiveIndex) -> None:
    live.put(["new"], QUERIES[:1])
    assert live.refresh() is False
    assert live.view() is live.view()


def test_everything_may_go(live: LiveIndex) -> None:
    live.delete(NAMES)
    scores, numbers = live.search(QUERIES, 3)
    assert (numbers == -1).all()
    assert np.isneginf(scores).all()
    live.delete(["never heard of"])
    live.put([], EMPTY)
    assert not live.view().listed().any()


@pytest.mark.parametrize(
    ("ids", "vectors", "reason"),
    [
        (["a"], QUERIES[:2], "1 ids"),
        (["a", "a"], QUERIES[:2], "1 of them different"),
        (["u\u0308", "\u00fc"], QUERIES[:2], "1 of them different"),
        (["a\0"], QUERIES[:1], "control character"),
        ([""], QUERIES[:1], "empty"),
        (["a"], np.full((1, WIDTH), np.nan, np.float32), r"rows \[0\]"),
    ],
)
def test_a_bad_change_is_refused_and_changes_nothing(live: LiveIndex, ids: list[str], vectors: np.ndarray, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        live.put(ids, vectors)
    assert live.view().count == MAIN
    assert not live.refresh()


def test_vectors_of_another_width_and_parts_of_another_release_are_refused(live: LiveIndex, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match=r"7 numbers.*8"):
        live.put(["a"], np.ones((1, 7), np.float32))
    with pytest.raises(IncompatibleError, match="399 item ids"):
        LiveIndex(main_index(), NAMES[1:], tmp_path, "towers")
    with pytest.raises(IncompatibleError, match="belongs to"):
        LiveIndex(main_index(), NAMES, tmp_path, "other towers")


def test_a_long_journal_is_rewritten_and_numbers_stay(live: LiveIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "_SPARE_BYTES", 2_000)
    catalogue, noise = Catalogue(), np.random.default_rng(3)
    other = LiveIndex(main_index(), NAMES, tmp_path, "towers")
    numbers: dict[str, int] = {}
    for step in range(90):
        ids = [f"new {step % 7}", NAMES[step % 11]]
        vectors = noise.normal(size=(2, WIDTH)).astype(np.float32)
        for change in (live, catalogue):
            change.put(ids, vectors)
            change.delete([f"new {(step + 3) % 7}"])
        view = (live, other)[step % 2].view()
        for number in range(MAIN, view.count):
            (item_id,) = view.item_ids(np.array([number]))
            assert numbers.setdefault(item_id, number) == number
        assert_right(view, catalogue, 12)
    (file,) = tmp_path.glob("journal-*.bin")
    assert file.name != "journal-00000001.bin"
    assert file.stat().st_size < 10_000
    assert_right(LiveIndex(main_index(), NAMES, tmp_path, "towers").view(), catalogue, 12)


def test_another_process_sees_a_change_and_so_does_a_later_one(live: LiveIndex, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nimport numpy as np\n"
        "from retrieval.index import IndexConfig, VectorIndex\nfrom retrieval.live import LiveIndex\n"
        "vectors = np.load(sys.argv[1])\nmain = VectorIndex.build(vectors, IndexConfig('flat'))\n"
        "live = LiveIndex(main, [f'item {row}' for row in range(len(vectors))], Path(sys.argv[2]), 'towers')\n"
        "scores, numbers = live.search(np.ones((1, vectors.shape[1]), np.float32), 1)\n"
        "print(live.view().item_ids(numbers[0])[0])\nlive.delete(['from here'])"
    )
    np.save(tmp_path / "vectors.npy", MAIN_VECTORS)
    live.put(["from here"], np.full((1, WIDTH), 9, np.float32))
    run = [sys.executable, "-c", program, str(tmp_path / "vectors.npy"), str(tmp_path)]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == "from here"
    _, numbers = live.search(np.ones((1, WIDTH), np.float32), MAIN + 1)
    assert (numbers[0] >= 0).sum() == MAIN
    assert "from here" not in live.view().item_ids(numbers[0, :MAIN])


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_searches_beside_a_thousand_changes_are_all_right(kind: str, tmp_path: Path) -> None:
    """One thread changes the catalogue, others search; each answer is judged on the catalogue of its own version."""
    live = LiveIndex(main_index(kind), NAMES, tmp_path, "towers")
    noise = np.random.default_rng(4)
    changes = []
    for step in range(300):
        ids = [f"new {number}" for number in noise.integers(0, 60, 2)] + [NAMES[number] for number in noise.integers(0, MAIN, 2)]
        ids = list(dict.fromkeys(ids))
        changes.append((step % 3, ids, noise.normal(size=(len(ids), WIDTH)).astype(np.float32)))
    done = threading.Event()

    def change() -> None:
        for kind_of_change, ids, vectors in changes:
            live.delete(ids) if kind_of_change == 2 else live.put(ids, vectors)
        done.set()

    def look() -> list[tuple[View, np.ndarray]]:
        answers = []
        while not done.is_set() or not answers:
            view = live.view()
            answers.append((view, view.search(QUERIES, 15)[1]))
        return answers

    with ThreadPoolExecutor(3) as pool:
        looking = [pool.submit(look) for _ in range(2)]
        pool.submit(change).result()
        answers = sorted((pair for future in looking for pair in future.result()), key=lambda pair: pair[0].version)
    catalogue, at = Catalogue(), 0
    for view, numbers in answers[:: max(1, len(answers) // 50)]:
        for kind_of_change, ids, vectors in changes[at : view.version]:
            catalogue.delete(ids) if kind_of_change == 2 else catalogue.put(ids, vectors)
        at = view.version
        for row, query in enumerate(QUERIES):
            assert view.item_ids(numbers[row]) == [item_id for _, item_id in catalogue.best(query, 15)]
    assert len({view.version for view, _ in answers}) > 3
