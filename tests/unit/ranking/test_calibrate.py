"""Calibration: contract for both kinds, known probabilities, and the whole ranker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import expit

from ranking.batches import Examples
from ranking.calibrate import calibrate, isotonic, platt
from ranking.ranker import Calibrator, Ranker
from tandem.core.metrics import expected_calibration_error

Fit = Callable[[np.ndarray, np.ndarray], Calibrator]
KINDS = pytest.mark.parametrize("fit", [platt, isotonic])


def known_world(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits that are twice too steep and far too high, labels, and the true probabilities."""
    rng = np.random.default_rng(seed)
    true = rng.normal(-2.5, 1.0, rows)
    return 2.0 * true + 4.0, (rng.random(rows) < expit(true)).astype(np.float64), expit(true)


@KINDS
def test_calibration_error_falls_on_data_that_it_has_not_seen(fit: Fit) -> None:
    logits, labels, _ = known_world(20_000, 0)
    calibrator = fit(logits, labels)
    fresh, outcome, true = known_world(20_000, 1)
    before = expected_calibration_error(expit(fresh), outcome)
    after = expected_calibration_error(expit(calibrator(fresh)), outcome)
    assert before > 0.15
    assert after < 0.01
    assert np.abs(expit(calibrator(fresh)) - true).mean() < 0.01


def test_isotonic_follows_a_bend_that_a_line_cannot() -> None:
    rng = np.random.default_rng(0)
    logits = rng.uniform(-4, 4, 30_000)
    true = np.where(logits < 0, 0.05, 0.4)
    labels = (rng.random(len(logits)) < true).astype(np.float64)
    error = {fit.__name__: np.abs(expit(fit(logits, labels)(logits)) - true).mean() for fit in (platt, isotonic)}
    assert error["isotonic"] < 0.02 < error["platt"]


@KINDS
@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float64, st.integers(2, 60), elements=st.floats(-20, 20)),
    st.integers(0, 10_000),
    st.floats(0, 1),
)
def test_maps_are_strictly_increasing_and_finite(fit: Fit, logits: np.ndarray, seed: int, rate: float) -> None:
    labels = (np.random.default_rng(seed).random(len(logits)) < rate).astype(np.float64)
    calibrator = fit(logits, labels)
    out = calibrator(np.linspace(-60, 60, 500))
    assert np.isfinite(out).all()
    assert (np.diff(out) > 0).all()


@KINDS
def test_labels_of_one_kind_shift_the_line_and_do_not_break_it(fit: Fit) -> None:
    calibrator = fit(np.linspace(-3, 0, 400), np.zeros(400))
    p = expit(calibrator(np.linspace(-3, 0, 400)))
    assert 0 < p.mean() < 0.03


def test_an_anti_correlated_task_keeps_its_order() -> None:
    calibrator = platt(np.linspace(-3, 3, 2000), (np.linspace(-3, 3, 2000) < 0).astype(np.float64))
    assert calibrator.slope > 0


def test_platt_of_nothing_is_the_identity() -> None:
    assert platt(np.zeros(0), np.zeros(0))(np.array([-2.0, 3.0])).tolist() == [-2.0, 3.0]


@pytest.mark.parametrize(("isotonic_from", "kind"), [(100_000, "platt"), (100, "isotonic")])
def test_a_shifted_ranker_is_put_right_without_changing_any_order(
    trained: Ranker, make_world: Callable[..., Examples], isotonic_from: int, kind: str
) -> None:
    off = replace(trained, calibrators={})
    off.network.offset.data += 2.0
    try:
        fixed = calibrate(off, make_world(200, 3), isotonic_from=isotonic_from)
        assert fixed.calibrators["click"].kind == kind
        test = make_world(200, 4)
        rows = (test.features, test.names, test.request)
        clicks = test.labels["click"]
        before = expected_calibration_error(off.predict(*rows)["click"], clicks)
        after = expected_calibration_error(fixed.predict(*rows)["click"], clicks)
        assert after < 0.02 < before
        np.testing.assert_array_equal(np.argsort(off.logits(*rows)["click"]), np.argsort(fixed.logits(*rows)["click"]))
    finally:
        off.network.offset.data -= 2.0


def test_missed_positives_do_not_calibrate(trained: Ranker, make_world: Callable[..., Examples]) -> None:
    world = make_world(60, 3)
    half = np.arange(len(world)) % 2 == 0
    lying = replace(
        world, labels={name: np.where(half, 1, v).astype(np.float32) for name, v in world.labels.items()}, missed=half
    )
    assert calibrate(trained, lying).calibrators == calibrate(trained, lying.served()).calibrators
