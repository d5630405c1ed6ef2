"""New items beside known ones: found by what they say, as loud as serves everybody, at little cost to what is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from retrieval.batches import cut_places, pad_left
from retrieval.cold_start import MOST_LOST, ColdStart, _share_apart, fit_cold_start
from retrieval.sequence import SequenceConfig
from retrieval.towers import Towers
from retrieval.train import Catalogue, Histories, TowerConfig, train_towers
from retrieval.validate import Questions

TOPICS, PER_TOPIC, USERS = 6, 40, 600
ITEMS = TOPICS * PER_TOPIC
NEW = np.arange(0, ITEMS, 7)
SILENT = SequenceConfig(width=8, layers=1, heads=2, length=8, rounds=0)
CONFIG = TowerConfig(dimension=12, text_block=4, history=20, ridge=20.0, epochs=1, validation_users=0.25, sequence=SILENT)


def _catalogue() -> Catalogue:
    random = np.random.default_rng(3)
    centres = random.standard_normal((TOPICS, 24))
    text = centres[np.arange(ITEMS) % TOPICS] + 0.6 * random.standard_normal((ITEMS, 24))
    text = (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32)
    return Catalogue(text, text)


def _histories() -> Histories:
    random = np.random.default_rng(4)
    known = np.setdiff1d(np.arange(ITEMS), NEW)
    sequences = []
    for user in range(USERS):
        own = known[known % TOPICS == user % TOPICS]
        others = random.choice(known, 4, replace=False)
        sequences.append(random.permutation(np.unique(np.concatenate([random.permutation(own)[:10], others]))))
    return Histories(
        sequences,
        [np.ones(len(each), bool) for each in sequences],
        [cut_places(np.arange(len(each))) for each in sequences],
        exclude_seen=True,
    )


@pytest.fixture(scope="module")
def logged() -> tuple[Towers, list[dict[str, float]]]:
    log: list[dict[str, float]] = []
    return train_towers(_catalogue(), _histories(), CONFIG, log.append), log


def _ranks(towers: Towers, topic: int) -> np.ndarray:
    """Place of every item for somebody of that topic."""
    past = np.setdiff1d(np.arange(topic, ITEMS, TOPICS), NEW)[:8]
    scores = (towers.query(pad_left([past], 20)) @ towers.item_vectors.T)[0]
    return np.argsort(np.argsort(-scores))


def test_new_items_come_up_among_known_ones(logged: tuple[Towers, list[dict[str, float]]]) -> None:
    towers, log = logged
    for topic in range(TOPICS):
        own = NEW[topic == NEW % TOPICS]
        assert np.median(_ranks(towers, topic)[own]) < 80
    assert any("cold/louder" in line for line in log)


def test_known_items_lose_no_more_than_was_allowed(logged: tuple[Towers, list[dict[str, float]]]) -> None:
    towers, _ = logged
    histories = _histories()
    questions = Questions.of(histories.take(range(300)), 50, 300)
    still = towers.with_cold_start(replace(towers._cold, map=towers._cold.map * 0 - 1e6))

    def recall(which: Towers) -> float:
        return questions.judge(lambda pasts: torch.from_numpy(which.query(pad_left(pasts, 20)) @ which.item_vectors.T)).recall

    assert recall(towers) >= (1 - 2 * MOST_LOST) * recall(still)


def test_a_new_item_is_what_its_content_says(logged: tuple[Towers, list[dict[str, float]]]) -> None:
    towers, _ = logged
    catalogue, width = _catalogue(), towers.shape.dimension + 1
    np.testing.assert_allclose(towers.item_vectors[NEW, :width], towers._cold(catalogue.content[NEW]), atol=1e-5)
    listed, _ = towers.items(catalogue.content[NEW], catalogue.text[NEW], np.full(len(NEW), -1))
    np.testing.assert_allclose(listed, towers.item_vectors[NEW], atol=1e-5)
    again, _ = towers.items(catalogue.content[NEW], catalogue.text[NEW], NEW)
    np.testing.assert_allclose(again, listed, atol=1e-5)  # in the catalogue, yet nobody touched it


def test_without_anybody_to_ask_the_map_is_the_regression(logged: tuple[Towers, list[dict[str, float]]]) -> None:
    towers, _ = logged
    found = fit_cold_start(
        towers, _catalogue().content, _histories(), Questions([], [], True), np.random.default_rng(0), lambda _: None
    )
    assert np.isfinite(found.map).all()
    assert not found.touched[NEW].any()
    assert found.touched.sum() == ITEMS - len(NEW)


def test_touched_rows_stay_as_they_are() -> None:
    landmarks = np.array([[1, 0]], np.float32)
    cold = ColdStart(landmarks, np.ones((4, 2), np.float32), np.array([True, False]))
    taste, content = np.zeros((2, 2), np.float32), np.array([[5, 5], [3, 4]], np.float32)
    said = 3 + 4 + 1 + 0.6**3
    np.testing.assert_allclose(cold.instead(taste, content, cold.touched), [[0, 0], [said, said]], rtol=1e-6)
    np.testing.assert_allclose(cold.louder(0.5)(content[1:]), [[said, said + 0.5]], rtol=1e-6)
    assert cold.instead(taste, content, np.array([True, True])) is taste
    assert (taste == 0).all()


def test_a_large_catalogue_is_said_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    cold = ColdStart(*(random.standard_normal(shape).astype(np.float32) for shape in ((5, 4), (10, 3))), np.ones(7, bool))
    content = random.standard_normal((7, 4)).astype(np.float32)
    whole = cold(content)
    monkeypatch.setattr("retrieval.cold_start._BLOCK", 3)
    np.testing.assert_allclose(cold(content), whole, rtol=1e-4, atol=1e-5)
    assert cold(content[:0]).shape == (0, 3)


@pytest.mark.parametrize(("new", "share"), [(0, 0.05), (15, 0.15), (90, 0.3)])
def test_as_many_known_items_are_set_apart_as_are_new(new: int, share: float) -> None:
    assert _share_apart(np.repeat([0, 3], [new, 100 - new])) == pytest.approx(share)
