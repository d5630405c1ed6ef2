"""The sequence tower on a world where only the order tells what comes next: everybody walks round one circle of items."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval.batches import Histories, cut_places, pad_left
from retrieval.negatives import SharedNegatives
from retrieval.sequence import SequenceConfig, SequenceTower, sequence_scores, train_sequence
from retrieval.towers import Towers
from retrieval.train import Catalogue, TowerConfig, train_towers
from retrieval.validate import Questions

ITEMS, USERS, STEPS = 40, 160, 12
CONFIG = SequenceConfig(width=16, layers=1, heads=2, length=8, dropout=0.0, rounds=40, patience=10, learning_rate=5e-3, warm_up=1)


def _circle() -> Histories:
    """User u begins anywhere; item i is always followed by item i + 7 (mod 40), so that all items are equally popular."""
    random = np.random.default_rng(3)
    sequences = [(start + 7 * np.arange(STEPS)) % ITEMS for start in random.integers(0, ITEMS, USERS)]
    return Histories(sequences, [np.ones(STEPS, bool)] * USERS, [cut_places(np.arange(STEPS))] * USERS, exclude_seen=True)


def _trained(seed: int = 0) -> SequenceTower:
    random = np.random.default_rng(seed)
    histories = _circle()
    questions = Questions.of(histories.take(range(60)), 1, 400)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = random.standard_normal((ITEMS, CONFIG.width)).astype(np.float32)
        return train_sequence(start, histories.take(range(60, USERS)), questions, CONFIG, random, lambda _: None)


@pytest.fixture(scope="module")
def tower() -> SequenceTower:
    return _trained()


def test_it_learns_what_comes_next(tower: SequenceTower) -> None:
    pasts = [(item + 7 * np.arange(8)) % ITEMS for item in range(ITEMS)]
    found = sequence_scores(tower, pasts).argmax(1).numpy()
    assert (found == (np.arange(ITEMS) + 56) % ITEMS).mean() >= 0.9


def test_no_position_sees_a_later_event(tower: SequenceTower) -> None:
    first = torch.tensor([[1, 8, 15, 22]])
    other = torch.tensor([[1, 8, 15, 3]])
    with torch.inference_mode():
        assert torch.equal(tower(first)[:, :3], tower(other)[:, :3])
        assert not torch.equal(tower(first)[:, 3], tower(other)[:, 3])


def test_padding_changes_nothing_and_an_empty_history_is_zero(tower: SequenceTower) -> None:
    with torch.inference_mode():
        together = tower.last(
            torch.from_numpy(pad_left([np.array([1, 8]), np.array([5, 12, 19, 26]), np.array([], np.int64)], 8))
        )
        alone = tower.last(torch.tensor([[1, 8]]))
    assert torch.allclose(together[0], alone[0], atol=1e-5)
    assert not together[2].any()


def test_same_seed_same_weights(tower: SequenceTower) -> None:
    again = _trained()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in tower.state_dict().items())


def test_towers_with_order_find_the_next_item_and_keep_it_when_saved(tmp_path: Path) -> None:
    """In this world pooling cannot tell the direction: the sequence tower must be heard, and be heard again after loading."""
    text = np.random.default_rng(1).standard_normal((ITEMS, 6)).astype(np.float32)
    config = TowerConfig(dimension=16, text_block=4, ridge=10.0, epochs=1, horizon=1, validation_users=0.2, sequence=CONFIG)
    pasts = pad_left([(np.arange(3) * 7 + item) % ITEMS for item in range(ITEMS)], 8)
    wanted = (np.arange(ITEMS) + 21) % ITEMS

    def share(towers: Towers) -> float:
        scores = towers.query(pasts) @ towers.item_vectors.T
        np.put_along_axis(scores, pasts, -np.inf, axis=1)
        return float((scores.argmax(1) == wanted).mean())

    with_order = train_towers(Catalogue(text, text), _circle(), config, lambda _: None)
    silent = replace(config, sequence=replace(CONFIG, rounds=0))
    without = train_towers(Catalogue(text, text), _circle(), silent, lambda _: None)
    with_order.save(tmp_path)
    loaded = Towers.load(tmp_path)
    assert with_order.facts["sequence_weight"] > 0  # type: ignore[operator]
    assert share(with_order) >= 0.9 > share(without)
    assert without.shape.width == 0
    assert (loaded.query(pasts) == with_order.query(pasts)).all()


def test_the_chance_of_a_shared_negative_is_what_is_said() -> None:
    sampler = SharedNegatives(np.array([100, 10, 1, 0, 5]), 6)
    random = np.random.default_rng(0)
    often = np.zeros(5)
    for _ in range(4000):
        often[sampler.draw(random).items] += 1
    assert np.allclose(often / 4000, np.exp(sampler.log_expected(np.arange(5))), atol=0.025)
