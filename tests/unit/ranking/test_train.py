"""Training on worlds with known answers; the trained ranker: order, predictions, saving, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from ranking.batches import Examples
from ranking.ranker import Calibrator, Ranker, RankerConfig
from ranking.tasks import RankingTask
from ranking.train import clearly_better, ndcg_within, train_ranker
from tandem.core.errors import IncompatibleError, InputError, IntegrityError
from tandem.core.folders import hash_files
from tandem.core.metrics import auc

World = Callable[..., Examples]


def ndcg(scores: np.ndarray, examples: Examples, task: str = "click") -> float:
    return float(ndcg_within(scores, examples.labels[task], examples.request).mean())


def score(ranker: Ranker, examples: Examples) -> np.ndarray:
    return ranker.score(examples.features, examples.names, examples.request)


def quiet(_: dict[str, float]) -> None:
    return None


def test_ndcg_within_by_hand() -> None:
    scores = np.array([3.0, 2.0, 1.0, 0.5, 0.9, 1.0, 1.0])
    labels = np.array([0, 1, 1, 0, 0, 0, 1], np.float32)
    request = np.array([0, 0, 0, 1, 1, 2, 2])
    ideal = 1 + 1 / np.log2(3)
    expected = [(1 / np.log2(3) + 0.5) / ideal, 1 / np.log2(3)]
    np.testing.assert_allclose(ndcg_within(scores, labels, request), expected)


def test_a_hidden_feature_is_found_and_the_order_comes_near_the_best_possible(trained: Ranker, make_world: World) -> None:
    test = make_world(200, 2)
    base, found = ndcg(test.features[:, 0], test), ndcg(score(trained, test), test)
    best = ndcg(z_of_tower(test) + 2.0 * np.log(test.features[:, 1]), test)
    assert found > base + 0.15
    assert (found - base) / (best - base) > 0.85


def z_of_tower(world: Examples) -> np.ndarray:
    """The tower's score without the shift of each request."""
    table = world.features[:, 0].reshape(-1, 40)
    return (table - table.mean(axis=1, keepdims=True)).ravel()


def test_where_only_the_base_matters_the_ranker_is_hardly_worse(make_world: World, config: RankerConfig) -> None:
    training, validation, test = (make_world(60, seed, base=1.5, hidden=0.0) for seed in (0, 1, 2))
    ranker = train_ranker(training, validation, config, quiet)
    assert ndcg(score(ranker, validation), validation) >= ndcg(validation.features[:, 0], validation)
    assert ndcg(score(ranker, test), test) >= ndcg(test.features[:, 0], test) - 0.02


def test_when_training_misleads_the_order_of_the_first_stage_is_returned(make_world: World, config: RankerConfig) -> None:
    """Training labels follow the opposite of what validation wants: nothing learned may ship."""
    validation = make_world(60, 1, base=2.0, hidden=0.0)
    wrong = make_world(60, 0, base=-2.0, hidden=0.0)
    log: list[dict[str, float]] = []
    ranker = train_ranker(wrong, validation, replace(config, requests_per_batch=4), log.append)
    assert np.array_equal(np.argsort(score(ranker, validation)[:40]), np.argsort(validation.features[:40, 0]))
    assert len(log) > 2
    assert log[-2]["best"] == log[0]["ndcg"]
    assert log[-1] == {"kept_base_order": 1.0}


def checkerboard(requests: int, seed: int) -> Examples:
    """Liked are the candidates of one colour: no single feature says anything."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, size=(requests * 30, 2)).astype(np.float32)
    like = ((x[:, 0] > 0) ^ (x[:, 1] > 0)) & (rng.random(len(x)) < 0.3)
    features = np.column_stack([rng.normal(size=len(x)), x]).astype(np.float32)
    request = np.repeat(np.arange(requests), 30)
    return Examples(features, ("tower_score", "x", "y"), {"like": like.astype(np.float32)}, request, np.zeros(len(x), bool))


@pytest.mark.parametrize("trunk", ["shared", "mmoe"])
def test_a_checkerboard_is_learned(trunk: Any) -> None:
    config = RankerConfig((RankingTask("like"),), "like", trunk=trunk, hidden=(16, 8), learning_rate=1e-2, rounds=25, models=1)
    ranker = train_ranker(checkerboard(200, 0), checkerboard(60, 1), config, quiet)
    test = checkerboard(100, 2)
    colour = ((test.features[:, 1] > 0) ^ (test.features[:, 2] > 0)).astype(np.float32)
    assert auc(score(ranker, test), colour) > 0.95


def conflict(requests: int, seed: int) -> Examples:
    """Two tasks that look at different checkerboards of different features, so that a narrow shared body must choose."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, size=(requests * 30, 4)).astype(np.float32)
    a, b = (x[:, 0] > 0) ^ (x[:, 1] > 0), (x[:, 2] > 0) ^ (x[:, 3] > 0)
    labels = {"a": a.astype(np.float32), "b": b.astype(np.float32)}
    return Examples(x, ("p", "q", "r", "s"), labels, np.repeat(np.arange(requests), 30), np.zeros(len(x), bool))


def test_mmoe_serves_conflicting_tasks_better_than_a_narrow_shared_body() -> None:
    """Ma et al. 2018: at equal width per task path, gates let tasks that disagree use different experts."""
    tasks = (RankingTask("a"), RankingTask("b"))
    shared = RankerConfig(
        tasks, "a", base=None, within_request=(), utility={"a": 1.0, "b": 1.0}, hidden=(4, 3), dropout=0.0, bce=1.0,
        listwise=0.0, learning_rate=2e-2, rounds=30, patience=30, models=2,
    )  # fmt: skip
    test = conflict(60, 2)
    worst = {}
    for trunk in ("shared", "mmoe"):
        ranker = train_ranker(conflict(150, 0), conflict(40, 1), replace(shared, trunk=trunk, experts=4), quiet)
        predictions = ranker.predict(test.features, test.names, test.request)
        worst[trunk] = min(auc(predictions[name], test.labels[name]) for name in ("a", "b"))
    assert worst["mmoe"] > 0.9
    assert worst["mmoe"] > worst["shared"]


def test_same_seed_same_bytes_and_another_seed_others(make_world: World, config: RankerConfig, tmp_path: Path) -> None:
    short = replace(config, rounds=2)
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        train_ranker(make_world(40, 0), make_world(20, 1), replace(short, seed=seed), quiet).save(tmp_path / name)
    one, two, other = (hash_files(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one != other


def test_a_saved_ranker_is_the_same_ranker(trained: Ranker, make_world: World, tmp_path: Path) -> None:
    bent = Calibrator("isotonic", (-3.0, 1.0), (-4.0, 0.5), 1.0)
    ranker = replace(trained, calibrators={"click": bent})
    ranker.save(tmp_path / "a")
    loaded = Ranker.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["ranker.json", "ranker.safetensors"]
    assert hash_files(tmp_path / "a") == hash_files(tmp_path / "b")
    assert (loaded.config, loaded.transform, loaded.learned) == (ranker.config, ranker.transform, ranker.learned)
    world = make_world(5, 9)
    before, after = (r.predict(world.features, world.names, world.request) for r in (ranker, loaded))
    for name in ("click", "purchase"):
        np.testing.assert_array_equal(before[name], after[name])


def test_damaged_missing_and_foreign_folders_are_refused(trained: Ranker, tmp_path: Path) -> None:
    folder = tmp_path / "ranker"
    trained.save(folder)
    weights, settings = folder / "ranker.safetensors", folder / "ranker.json"
    good, text = weights.read_bytes(), settings.read_text()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(IntegrityError, match="damaged"):
        Ranker.load(folder)
    weights.write_bytes(good)
    raw = json.loads(text)
    settings.write_text(json.dumps({**raw, "format": 99}))
    with pytest.raises(IncompatibleError, match="format 99"):
        Ranker.load(folder)
    settings.write_text(json.dumps({**raw, "config": {**raw["config"], "magic": 1}}))
    with pytest.raises(IncompatibleError, match="magic"):
        Ranker.load(folder)
    settings.unlink()
    with pytest.raises(IntegrityError, match=r"ranker\.json is missing"):
        Ranker.load(folder)


def test_columns_are_matched_by_name(trained: Ranker, make_world: World) -> None:
    world = make_world(1, 5)
    turned = world.features[:, ::-1]
    np.testing.assert_array_equal(score(trained, world), trained.score(turned, world.names[::-1]))
    with pytest.raises(IncompatibleError, match=r"missing \['gap'\], extra \['hole'\]"):
        trained.score(world.features, (*world.names[:3], "hole"))


def test_no_candidates_and_only_missing_values_get_an_answer(trained: Ranker) -> None:
    empty = trained.predict(np.zeros((0, 4), np.float32), trained.names)
    assert {name: p.shape for name, p in empty.items()} == {"click": (0,), "purchase": (0,)}
    assert trained.score(np.zeros((0, 4), np.float32), trained.names).shape == (0,)
    for value in (np.nan, np.inf):
        blank = np.full((3, 4), value, np.float32)
        p = trained.predict(blank, trained.names)["click"]
        assert np.isfinite(p).all()
        assert (p == p[0]).all()


def test_candidates_of_other_requests_do_not_matter(trained: Ranker, make_world: World) -> None:
    world = make_world(4, 6)
    together = score(trained, world)
    for one in range(4):
        mine = world.take(world.request == one)
        np.testing.assert_allclose(trained.score(mine.features, mine.names), together[world.request == one], atol=1e-5)


def test_many_threads_get_what_one_gets(trained: Ranker, make_world: World) -> None:
    worlds = [make_world(1, seed) for seed in range(20)]
    alone = [score(trained, world) for world in worlds]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for mine, other in zip(pool.map(lambda world: score(trained, world), worlds), alone, strict=True):
                np.testing.assert_array_equal(mine, other)


def test_purchases_are_never_likelier_than_the_clicks_they_need(trained: Ranker, make_world: World) -> None:
    world = make_world(20, 8)
    p = trained.predict(world.features, world.names, world.request)
    assert (p["purchase"] <= p["click"]).all()
    assert p["purchase"].sum() == pytest.approx(world.labels["purchase"].sum(), rel=0.35)


def test_a_task_without_positives_is_left_out_and_answers_its_base_rate(make_world: World, config: RankerConfig) -> None:
    world = make_world(40, 0)
    bare = replace(world, labels={**world.labels, "purchase": np.zeros(len(world), np.float32)})
    log: list[dict[str, float]] = []
    ranker = train_ranker(bare, make_world(20, 1), config, log.append)
    assert {"task_without_positives/purchase": 1.0} in log
    assert ranker.learned == ("click",)
    p = ranker.predict(world.features, world.names, world.request)["purchase"]
    assert p == pytest.approx(np.full(len(world), 0.5 / (len(world) + 1)))


def test_without_anything_to_judge_the_order_of_the_base_stays(make_world: World, config: RankerConfig) -> None:
    log: list[dict[str, float]] = []
    nothing = make_world(1, 1).take(np.zeros(40, bool))
    ranker = train_ranker(make_world(20, 0), nothing, config, log.append)
    assert {"validation_without_positives": 1.0} in log
    world = make_world(1, 3)
    assert np.array_equal(np.argsort(score(ranker, world)), np.argsort(world.features[:, 0]))


def test_unknown_labels_teach_nothing(make_world: World, config: RankerConfig) -> None:
    """Labels that lie, but are NaN, leave the ranker as good as without these rows."""
    world = make_world(150, 0)
    lie = np.random.default_rng(0).random(len(world)) < 0.5
    masked = {name: np.where(lie, np.nan, values).astype(np.float32) for name, values in world.labels.items()}
    ranker = train_ranker(replace(world, labels=masked), make_world(60, 1), config, quiet)
    test = make_world(100, 2)
    assert ndcg(score(ranker, test), test) > ndcg(test.features[:, 0], test) + 0.15


def test_missed_positives_weigh_what_the_settings_say(make_world: World, config: RankerConfig) -> None:
    """Weight 0 equals their absence bit for bit; validation never sees them."""
    world, validation = make_world(40, 0), make_world(20, 1)
    missed = (world.labels["click"] > 0) & (np.random.default_rng(0).random(len(world)) < 0.3)
    flagged = replace(world, missed=missed)
    short = replace(config, rounds=2)
    ignored = train_ranker(flagged, validation, replace(short, missed_weight=0.0), quiet)
    absent = train_ranker(flagged.served(), validation, short, quiet)
    used = train_ranker(flagged, validation, replace(short, missed_weight=1.0), quiet)
    test = make_world(5, 2)
    np.testing.assert_array_equal(score(ignored, test), score(absent, test))
    assert not np.array_equal(score(used, test), score(absent, test))


def test_sampled_negatives_keep_order_and_probabilities(make_world: World, config: RankerConfig) -> None:
    """Ten of about 35 negatives per request: their weights make up for the others, before any calibration."""
    few = replace(config, negatives_per_request=10, tasks=(RankingTask("click"),))
    ranker = train_ranker(make_world(150, 0), make_world(60, 1), few, quiet)
    test = make_world(100, 2)
    assert ndcg(score(ranker, test), test) > ndcg(test.features[:, 0], test) + 0.15
    mean = ranker.predict(test.features, test.names, test.request)["click"].mean()
    assert mean == pytest.approx(test.labels["click"].mean(), rel=0.25)


def test_utility_decides_the_order(trained: Ranker, make_world: World) -> None:
    world = make_world(1, 4)
    against = replace(trained, config=replace(trained.config, utility={"click": -1.0}))
    np.testing.assert_array_equal(score(against, world), -score(trained, world))
    p = trained.predict(world.features, world.names)
    both = replace(trained, config=replace(trained.config, utility={"click": 1.0, "purchase": 10.0}, utility_kind="linear"))
    np.testing.assert_allclose(score(both, world), p["click"] + 10 * p["purchase"], rtol=1e-4)


def test_probabilities_are_the_sigmoid_of_the_logits(trained: Ranker, make_world: World) -> None:
    world = make_world(1, 4)
    logits = trained.logits(world.features, world.names)
    np.testing.assert_allclose(trained.predict(world.features, world.names)["click"], expit(logits["click"]), rtol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": ()}, "at least one layer"),
        ({"dropout": 1.0}, "dropout"),
        ({"knots": 1}, "knots = 1"),
        ({"bce": 0.0, "listwise": 0.0}, "not both 0"),
        ({"utility": {"like": 1.0}}, r"\['like'\]"),
        ({"positive": "like"}, "positive = 'like'"),
    ],
)
def test_settings_that_cannot_work_are_refused(config: RankerConfig, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(config, **wrong)


def test_examples_that_cannot_work_are_refused(make_world: World, config: RankerConfig) -> None:
    world = make_world(3, 0)
    with pytest.raises(InputError, match="no training examples"):
        train_ranker(world.take(np.zeros(len(world), bool)), world, config, quiet)
    with pytest.raises(IncompatibleError, match=r"validation examples lack labels for tasks \['purchase'\]"):
        train_ranker(world, replace(world, labels={"click": world.labels["click"]}), config, quiet)
    with pytest.raises(IncompatibleError, match="other features"):
        train_ranker(world, replace(world, names=("tower_score", "hidden", "noise", "hole")), config, quiet)
    with pytest.raises(IncompatibleError, match=r"\['ease_score'\]"):
        train_ranker(world, world, replace(config, within_request=("ease_score",)), quiet)


def test_a_gain_within_its_own_noise_is_not_taken() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(60)
    assert not clearly_better(base + rng.normal(0.0, 0.3, 60) - 0.01, base)
    assert not clearly_better(base, base)
    assert clearly_better(base + rng.normal(0.1, 0.3, 60), base)
    assert not clearly_better(np.array([1.0]), np.array([0.0]))
