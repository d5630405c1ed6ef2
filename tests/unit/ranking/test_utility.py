"""Utility: formulas, order, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from ranking.utility import Utility
from tandem.core.errors import InputError

P = {"click": np.array([0.5, 0.2], np.float32), "return": np.array([0.1, 0.4], np.float32)}


def test_formulas() -> None:
    linear = Utility({"click": 2.0, "return": -1.0}, "linear")(P)
    np.testing.assert_allclose(linear, [0.9, 0.0], atol=1e-6)
    geometric = Utility({"click": 2.0, "return": 1.0})(P)
    np.testing.assert_allclose(geometric, np.log([0.5**2 * 0.1, 0.2**2 * 0.4]), rtol=1e-6)


def test_one_task_gives_its_logit_so_that_sure_things_do_not_tie() -> None:
    logits = {"click": np.array([40.0, 41.0, -900.0])}
    assert Utility({"click": 1.0, "return": 0.0}, "linear").of_logits(logits).tolist() == [40.0, 41.0, -900.0]


def test_probabilities_and_logits_agree() -> None:
    utility = Utility({"click": 1.0, "return": 0.5})
    logits = {name: np.log(p / (1 - p)).astype(np.float64) for name, p in P.items()}
    np.testing.assert_allclose(utility(P), utility.of_logits(logits), rtol=1e-6)


def test_refusals() -> None:
    with pytest.raises(InputError, match="all zero"):
        Utility({"click": 0.0})
    with pytest.raises(InputError, match="finite"):
        Utility({"click": float("nan")})
    with pytest.raises(InputError, match=r"\['like'\]"):
        Utility({"like": 1.0})(P)
