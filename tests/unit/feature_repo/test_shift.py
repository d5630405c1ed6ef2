"""Drift is judged by what it lets pass and what it catches: samples of one population, and shifted ones."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from feature_repo.checks import CheckResult
from feature_repo.shift import DriftLimits, drift, psi
from tandem.core.errors import InputError


def sample(seed: int, shift: float = 0.0, missing: float = 0.0, rows: int = 4_000) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    number = np.where(rng.random(rows) < missing, np.nan, rng.normal(shift, 1, rows))
    word = np.where(rng.random(rows) < 0.7 - shift / 4, "red", "blue")
    return pl.DataFrame({"number": number, "word": word, "constant": 3, "tags": [["a"]] * rows})


def indexes(reference: pl.DataFrame, current: pl.DataFrame) -> dict[str, float]:
    return {name: psi(reference[name], current[name]) for name in reference.columns if name != "tags"}


def moved(result: CheckResult) -> dict[str, str]:
    return dict(result.table.filter(pl.col("problem").is_not_null()).select("feature", "problem").rows())


def test_two_samples_of_one_population_do_not_drift() -> None:
    result = drift(sample(2), sample(1), sample(3))
    assert (result.passed, result.rows) == (True, 4_000)
    assert set(result.table["feature"]) == {"number", "word", "constant"}
    assert result.table["psi"].max() < 0.02  # type: ignore[operator]
    assert "0 of 3 features have an index above 0.2; none beyond its limit" in result.detail


def test_a_shift_a_new_value_and_lost_values_move_the_index() -> None:
    assert indexes(sample(1), sample(2, shift=1))["number"] > 0.2
    assert indexes(sample(1), sample(2, missing=0.3))["number"] > 0.2
    assert indexes(sample(1), sample(2).with_columns(word=pl.lit("green")))["word"] > 0.2


def test_a_large_shift_fails_and_is_named() -> None:
    result = drift(sample(2, shift=1), sample(1), sample(3))
    assert not result.passed
    assert set(moved(result)) == {"number"}
    assert "1 of 3 features moved: number (index 0.9" in result.detail
    assert drift(sample(2, shift=1), sample(1), sample(3), DriftLimits(psi=2.0)).passed


def test_a_small_shift_is_reported_and_passes() -> None:
    result = drift(sample(2, shift=0.6), sample(1), sample(3))
    assert result.passed
    assert result.table.row(0, named=True)["noticed"]
    assert "1 of 3 features have an index above 0.2: number (0.3" in result.detail


def test_what_is_like_the_end_of_the_past_or_like_all_of_it_has_not_moved() -> None:
    """A counter that has grown all along is like the rows just before it; a phase of the day is like the whole past."""
    assert drift(sample(2, shift=1), sample(1), sample(3, shift=1)).passed
    assert drift(sample(2, shift=1), sample(1, shift=1), sample(3)).passed


def test_values_that_are_lost_or_arrive_fail() -> None:
    assert moved(drift(sample(2, missing=0.3), sample(1), sample(3)))["number"] == "missing in 31% of rows, before in 0%"
    assert set(moved(drift(sample(2), sample(1, missing=0.4), sample(3, missing=0.4)))) == {"number"}
    words = sample(2).with_columns(word=pl.lit(None, pl.String))
    assert moved(drift(words, sample(1), sample(3)))["word"] == "missing in 100% of rows, before in 0%"


def test_numbers_outside_the_range_of_the_past_fail() -> None:
    """A third of the values lie beyond everything that was seen, which ten quantiles hardly notice."""
    far = sample(2).with_columns(number=pl.when(pl.int_range(pl.len()) % 3 == 0).then(99.0).otherwise("number"))
    assert moved(drift(far, sample(1), sample(3)))["number"] == "33% of values outside the range of the past"


def test_few_rows_may_differ_by_chance() -> None:
    """Forty rows of one population have an index that four thousand would be refused for."""
    few = [sample(seed, rows=40) for seed in range(3)]
    assert psi(few[0]["number"], few[1]["number"]) > 0.5
    assert drift(*few).passed


def test_the_index_of_two_bins_by_hand() -> None:
    """Half and half against nine in ten, 0.4 ln(0.9 / 0.5) - 0.4 ln(0.1 / 0.5), but for the smoothing."""
    before, now = pl.DataFrame({"word": ["a", "b"] * 5_000}), pl.DataFrame({"word": ["a"] * 9_000 + ["b"] * 1_000})
    assert indexes(before, now)["word"] == pytest.approx(0.4 * np.log(0.9 / 0.5) - 0.4 * np.log(0.1 / 0.5), abs=2e-3)


def test_a_column_that_was_always_missing_drifts_when_it_arrives() -> None:
    nothing = pl.DataFrame({"number": [None] * 500}, schema={"number": pl.Float64})
    assert indexes(nothing, nothing)["number"] == 0
    assert indexes(nothing, pl.DataFrame({"number": np.arange(500.0)}))["number"] > 1


def test_drift_needs_rows() -> None:
    with pytest.raises(InputError, match="4000, 0 and 4000"):
        drift(sample(2), sample(1).clear(), sample(3))
