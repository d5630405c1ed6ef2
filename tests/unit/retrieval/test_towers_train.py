"""The towers on a world with known answers: a checkerboard of tastes, with texts that tell a new item's taste."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval.batches import Batch, cut_places, pad_left
from retrieval.loss import sampled_softmax
from retrieval.negatives import NegativeSampler
from retrieval.sequence import SequenceConfig
from retrieval.towers import Towers, TwoTowers
from retrieval.train import Bases, Catalogue, Histories, TowerConfig, batch_loss, train_towers
from tandem.core.errors import IncompatibleError, InputError

TOPICS, PER_TOPIC, USERS = 4, 15, 240
ITEMS = TOPICS * PER_TOPIC
SEQUENCE = SequenceConfig(width=8, layers=1, heads=2, length=8, rounds=3)
CONFIG = TowerConfig(dimension=16, text_block=8, history=20, ridge=20.0, epochs=2, validation_users=0.1, sequence=SEQUENCE)


def _catalogue(seed: int = 0) -> Catalogue:
    random = np.random.default_rng(seed)
    centres = random.standard_normal((TOPICS, 24))
    text = centres[np.arange(ITEMS) % TOPICS] + 0.3 * random.standard_normal((ITEMS, 24))
    text = (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32)
    return Catalogue(text, text)


def _histories(untouched: tuple[int, ...] = (), seed: int = 1) -> Histories:
    """Each user stays within one topic; items in `untouched` are never seen."""
    random = np.random.default_rng(seed)
    sequences = []
    for user in range(USERS):
        own = np.setdiff1d(np.arange(user % TOPICS, ITEMS, TOPICS), untouched)
        sequences.append(random.permutation(own)[:8])
    return Histories(sequences, [np.ones(8, bool)] * USERS, [cut_places(np.arange(8))] * USERS, exclude_seen=True)


@pytest.fixture(scope="module")
def towers() -> Towers:
    return train_towers(_catalogue(), _histories(untouched=(0, 1)), CONFIG, lambda _: None)


def test_a_user_gets_their_own_topic(towers: Towers) -> None:
    for topic in range(TOPICS):
        seen = np.arange(topic, ITEMS, TOPICS)[2:7]
        scores = (towers.query(pad_left([seen], 20)) @ towers.item_vectors.T)[0]
        scores[seen] = -np.inf
        found = np.argsort(-scores)[:7]
        assert (found % TOPICS == topic).mean() >= 0.85


def test_an_item_nobody_has_touched_is_found_by_its_text(towers: Towers) -> None:
    """Item 0 has topic 0 in its text only; for a user of topic 0 it beats the items of other topics."""
    scores = (towers.query(pad_left([np.array([4, 8, 12])], 20)) @ towers.item_vectors.T)[0]
    others = np.flatnonzero(np.arange(ITEMS) % TOPICS != 0)
    assert scores[0] > np.quantile(scores[others], 0.95)


def test_a_sentence_alone_finds_items_with_that_text(towers: Towers) -> None:
    text = _catalogue().text
    scores = (towers.query(np.full((1, 1), -1), text[[5]]) @ towers.item_vectors.T)[0]
    assert scores.argmax() == 5
    assert (np.argsort(-scores)[:8] % TOPICS == 5 % TOPICS).mean() >= 0.75


def test_no_history_and_no_sentence_is_popularity(towers: Towers) -> None:
    scores = (towers.query(np.full((1, 1), -1)) @ towers.item_vectors.T)[0]
    assert np.allclose(scores, towers.item_vectors[:, towers.shape.dimension], atol=1e-6)


def test_the_texts_of_a_history_speak_in_its_query_as_loud_as_validation_wants(towers: Towers) -> None:
    log: list[dict[str, float]] = []
    train_towers(_catalogue(), _histories(untouched=(0, 1)), CONFIG, log.append)
    weight = next(line["profile/weight"] for line in log if "profile/weight" in line)
    texts = towers.query(pad_left([np.array([4, 8, 12])], 20))[0, towers.shape.dimension + 1 :]
    assert (weight > 0) == bool(np.abs(texts).max() > 0)
    loud = copy.deepcopy(towers)
    loud._network.profile.data = torch.ones(())
    spoken = loud.query(pad_left([np.array([4, 8, 12])], 20))[0, towers.shape.dimension + 1 :]
    own = towers.text_vectors[[4, 8, 12]].sum(0)
    assert spoken @ own > 0.95 * np.linalg.norm(spoken) * np.linalg.norm(own)
    nobody = loud.query(np.full((1, 1), -1))[0, towers.shape.dimension + 1 :]
    assert not nobody.any()


def test_batch_companions_change_nothing(towers: Towers) -> None:
    histories = pad_left([np.array([4, 8]), np.array([1, 5, 9, 13, 17]), np.array([], np.int64)], 20)
    together = towers.query(histories)
    alone = np.concatenate([towers.query(pad_left([row[row >= 0]], 20)) for row in histories])
    assert np.allclose(together, alone, atol=1e-4)


def test_same_seed_same_bytes(towers: Towers, tmp_path: Path) -> None:
    again = train_towers(_catalogue(), _histories(untouched=(0, 1)), CONFIG, lambda _: None)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    towers.save(tmp_path / "a")
    again.save(tmp_path / "b")
    assert towers.fingerprint == again.fingerprint


class KilledError(Exception):
    """Stands for the kill: nothing after it runs."""


@pytest.mark.parametrize("at", [{"towers/epoch": 2}, {"sequence/round": 3}], ids=["pooled", "sequence"])
def test_a_training_that_was_killed_goes_on_and_ends_with_the_same_bytes(
    at: dict[str, float], towers: Towers, tmp_path: Path
) -> None:
    def die(measured: dict[str, float]) -> None:
        if at.items() <= measured.items():
            raise KilledError

    histories, folder = _histories(untouched=(0, 1)), tmp_path / "training"
    with pytest.raises(KilledError):
        train_towers(_catalogue(), histories, CONFIG, die, folder, every_seconds=0.0)
    assert any(folder.iterdir())
    log: list[dict[str, float]] = []
    again = train_towers(_catalogue(), histories, CONFIG, log.append, folder, every_seconds=0.0)
    assert [key for key in log[0] if key in at] == list(at)
    assert log[0].items() >= at.items()  # it went on with the round in which it was killed
    assert not folder.exists()
    for place, trained in (("a", towers), ("b", again)):
        (tmp_path / place).mkdir()
        trained.save(tmp_path / place)
    assert again.fingerprint == towers.fingerprint


def test_the_checkpoint_of_another_training_is_not_looked_at(tmp_path: Path) -> None:
    def die(measured: dict[str, float]) -> None:
        if measured.get("towers/epoch") == 2:
            raise KilledError

    with pytest.raises(KilledError):
        train_towers(_catalogue(), _histories(seed=5), CONFIG, die, tmp_path / "training", every_seconds=0.0)
    log: list[dict[str, float]] = []
    train_towers(_catalogue(), _histories(), CONFIG, log.append, tmp_path / "training")
    assert log[0]["towers/epoch"] == 0


def test_saved_and_loaded_answers_alike(towers: Towers, tmp_path: Path) -> None:
    towers.save(tmp_path)
    loaded = Towers.load(tmp_path)
    histories = pad_left([np.array([3, 7])], 20)
    assert (loaded.item_vectors == towers.item_vectors).all()
    assert (loaded.query(histories) == towers.query(histories)).all()
    assert loaded.fingerprint == towers.fingerprint


def test_swapped_weights_are_refused(towers: Towers, tmp_path: Path) -> None:
    towers.save(tmp_path)
    weights = tmp_path / "towers.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(IncompatibleError, match=r"not the file that towers\.json describes"):
        Towers.load(tmp_path)


def test_towers_of_an_older_version_are_refused_with_the_way_out(towers: Towers, tmp_path: Path) -> None:
    towers.save(tmp_path)
    facts = json.loads((tmp_path / "towers.json").read_text())
    facts["shape"]["dimension"] = facts["shape"].pop("linear")
    (tmp_path / "towers.json").write_text(json.dumps(facts))
    with pytest.raises(IncompatibleError, match="tandem train towers"):
        Towers.load(tmp_path)


def test_only_the_rows_of_a_batch_get_a_gradient_and_it_is_the_right_one(towers: Towers) -> None:
    """Against autograd over whole tables, without dropout: sparse rows, and the same values."""
    catalogue, histories = _catalogue(), _histories()
    network = TwoTowers(towers.shape)
    for tower in (network.inner, network.outer):
        torch.nn.init.normal_(tower.id, generator=torch.Generator().manual_seed(1))
    bases, still = Bases.of(network, catalogue.content), replace(CONFIG, history_dropout=0.0)
    batch = Batch(np.array([[-1, 3, 7], [4, 8, 12]]), np.array([0, 0, 1]), np.array([11, 15, 16]))
    sampler = NegativeSampler(histories.counts(ITEMS), 10, 5)
    loss = batch_loss(network, bases, batch, sampler, True, still, np.random.default_rng(2))
    loss.backward()
    rows = network.inner.id.grad
    assert rows.is_sparse
    assert set(rows.coalesce().indices()[0].tolist()) == {3, 7, 4, 8, 12}

    inner, outer = (tower.id.detach().clone().requires_grad_() for tower in (network.inner, network.outer))
    random = np.random.default_rng(2)
    random.random(batch.histories.shape)
    drawn = sampler.draw(batch.items, random)
    past = [inner[[3, 7]].sum(0) / 2**0.5, inner[[4, 8, 12]].sum(0) / 3**0.5]
    scores = torch.stack(past) * 15.0 @ outer[torch.from_numpy(drawn.items)].T
    hidden = torch.tensor([[item in seen for item in drawn.items] for seen in ({3, 7}, {4, 8, 12})])
    columns = torch.from_numpy(np.searchsorted(drawn.items, batch.items))
    sampled_softmax(scores, torch.from_numpy(drawn.log_expected), torch.from_numpy(batch.rows), columns, hidden).backward()
    assert torch.allclose(rows.to_dense(), inner.grad, atol=1e-5)
    assert torch.allclose(network.outer.id.grad.to_dense(), outer.grad, atol=1e-5)


def test_training_never_ends_below_its_start() -> None:
    """The closed-form start competes as epoch 0: a destructive learning rate cannot lose what it gave."""
    log: list[dict[str, float]] = []
    wild = replace(CONFIG, learning_rate=1.0, item_learning_rate=1.0, epochs=2)
    trained = train_towers(_catalogue(), _histories(), wild, log.append)
    start = log[0]["towers/validation_recall_at_100"]
    assert float(trained.facts["validation_recall_at_100"]) >= start  # type: ignore[arg-type]


def test_the_random_state_of_the_caller_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train_towers(_catalogue(), _histories(), replace(CONFIG, epochs=1), lambda _: None)
    assert torch.rand(1) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_vectors_are_named(value: float) -> None:
    broken = _catalogue().text.copy()
    broken[7, 0] = value
    with pytest.raises(InputError, match=r"\[7\]"):
        train_towers(Catalogue(broken, _catalogue().text), _histories(), CONFIG, lambda _: None)


def test_one_moment_per_user_is_nothing_to_learn_from() -> None:
    flat = replace(_histories(), cuts=[np.empty(0, np.int64)] * USERS)
    with pytest.raises(InputError, match="two moments"):
        train_towers(_catalogue(), flat, CONFIG, lambda _: None)


def test_an_unknown_item_in_a_history_is_refused(towers: Towers) -> None:
    with pytest.raises(InputError, match=f"holds item {ITEMS}"):
        towers.query(np.array([[ITEMS]]))
