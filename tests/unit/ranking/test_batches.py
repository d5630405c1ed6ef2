"""Examples, groups, within-request statistics, the input transform, thinning and batches."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import ndtri
from scipy.stats import rankdata

from ranking.batches import (
    Examples,
    Groups,
    InputTransform,
    QuantileMaps,
    Quantiles,
    aligned,
    negatives_for,
    normal_within,
    request_batches,
    thin,
    z_within,
)
from tandem.core.errors import IncompatibleError, InputError

NONE = np.zeros(0, np.int64)


def examples(features: np.ndarray, request: np.ndarray, names: tuple[str, ...] = ("a", "b")) -> Examples:
    rows = len(features)
    return Examples(features.astype(np.float32), names, {"t": np.zeros(rows, np.float32)}, request, np.zeros(rows, bool))


def test_examples_refuse_rows_that_disagree_and_requests_out_of_order() -> None:
    with pytest.raises(InputError, match=r"'request': 2"):
        examples(np.zeros((3, 2)), np.zeros(2, np.int64))
    with pytest.raises(InputError, match="ascending"):
        examples(np.zeros((2, 2)), np.array([1, 0]))
    with pytest.raises(InputError, match=r"repeat: \['a'\]"):
        examples(np.zeros((2, 2)), np.array([0, 0]), ("a", "a"))
    with pytest.raises(InputError, match="2 names"):
        examples(np.zeros((2, 3)), np.array([0, 0]))


def test_groups_know_starts_sizes_and_sums() -> None:
    groups = Groups.of(np.array([4, 4, 7, 9, 9, 9]))
    assert groups.starts.tolist() == [0, 2, 3]
    assert groups.sizes.tolist() == [2, 1, 3]
    assert groups.index.tolist() == [0, 0, 1, 2, 2, 2]
    assert groups.sum(np.arange(6.0)).tolist() == [1.0, 2.0, 12.0]
    assert Groups.of(NONE).sum(np.zeros(0)).shape == (0,)


def test_z_within_is_per_request_and_leaves_uncounted_rows_out_of_the_statistics() -> None:
    groups = Groups.of(np.array([0, 0, 0, 1, 1, 2]))
    counted = np.array([True, True, False, True, True, True])
    z = z_within(np.array([1.0, 3.0, -2.0, 5.0, 5.0, np.nan]), groups, counted)
    np.testing.assert_allclose(z, [-1.0, 1.0, -4.0, 0.0, 0.0, np.nan])


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float64, st.integers(1, 30), elements=st.integers(-5, 5).map(float)), st.integers(1, 6))
def test_normal_scores_are_those_of_average_ranks(values: np.ndarray, per_request: int) -> None:
    request = np.arange(len(values)) // per_request
    found = normal_within(values, Groups.of(request), np.ones(len(values), bool))
    for one in np.unique(request):
        mine = values[request == one]
        np.testing.assert_allclose(found[request == one], ndtri((rankdata(mine) - 0.5) / len(mine)), atol=1e-12)


def test_normal_scores_keep_missing_and_place_uncounted_rows_among_the_counted() -> None:
    values = np.array([3.0, np.nan, 1.0, 2.0, 0.0])
    scores = normal_within(values, Groups.single(5), np.array([True, True, True, False, False]))
    assert np.isnan(scores[1])
    assert scores[2] < scores[3] < scores[0]
    assert scores[4] == scores[2]


def test_quantiles_ignore_scale_outliers_and_put_ties_at_their_mid_rank() -> None:
    column = np.random.default_rng(0).normal(size=4000).astype(np.float32)
    column[0] = 1e30
    plain, stretched = Quantiles.fit(column, 33), Quantiles.fit(np.exp(column.clip(-5, 5)), 33)
    at = np.array([-1.0, 0.0, 1.5])
    np.testing.assert_allclose(np.interp(at, plain.values, plain.levels), at, atol=0.1)
    np.testing.assert_allclose(np.interp(np.exp(at), stretched.values, stretched.levels), at, atol=0.15)
    flag = Quantiles.fit(np.array([0, 0, 0, 1], np.float32), 33)
    assert flag.values == (0.0, 1.0)
    assert flag.levels == pytest.approx((-0.3186, 1.1503), abs=1e-3)
    assert Quantiles.fit(np.full(9, np.nan, np.float32), 33).constant


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 40))
def test_the_tables_of_all_columns_agree_with_interpolation_of_each(seed: int, knots: int) -> None:
    rng = np.random.default_rng(seed)
    columns = [rng.normal(size=300) * 1e6, rng.integers(0, 3, 300), np.full(300, 4.0), np.exp(5 * rng.normal(size=300))]
    features = np.stack(columns, axis=1).astype(np.float32)
    quantiles = [Quantiles.fit(column, knots) for column in features.T]
    asked = np.concatenate([features * 1.1, features[::-1] - 1, np.full((1, 4), np.nan, np.float32)])
    maps = QuantileMaps.of(quantiles)
    assert maps.columns.tolist() == [0, 1, 3]
    expected = np.stack([np.interp(asked[:, c], quantiles[c].values, quantiles[c].levels) for c in maps.columns], axis=1)
    np.testing.assert_allclose(maps(asked), expected, atol=1e-4)


def test_transform_flags_missing_drops_constants_and_round_trips_through_json() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 3))
    features[:, 2] = 7.0
    features[::4, 1] = np.nan
    data = examples(features, np.arange(40) // 10, ("base", "half", "flat"))
    transform = InputTransform.fit(data, "base", ("base",), 9, rng)
    assert transform.sources == ("base", "half", "half", "base", "base")
    base, inputs = transform(data.features, Groups.of(data.request))
    assert inputs[::4, 1].tolist() == [0.0] * 10
    assert inputs[:, 2].tolist() == np.isnan(data.features[:, 1]).astype(float).tolist()
    assert np.isfinite(inputs).all()
    again = InputTransform.from_json(json.loads(json.dumps(transform.to_json())))
    assert again == transform
    np.testing.assert_array_equal(again(data.features, Groups.of(data.request))[1], inputs)
    np.testing.assert_allclose(base, inputs[:, 3], atol=1e-6)


def test_training_sees_the_numbers_that_serving_sees() -> None:
    """A thinned batch of many requests with missed rows gives the same inputs as each served list asked alone."""
    rng = np.random.default_rng(1)
    request = np.repeat(np.arange(5), 8)
    missed = np.tile(np.arange(8) >= 6, 5)
    features = rng.normal(size=(40, 2)).astype(np.float32)
    data = Examples(features, ("base", "x"), {"t": np.zeros(40, np.float32)}, request, missed)
    transform = InputTransform.fit(data, "base", ("base", "x"), 9, rng)
    rows = np.flatnonzero(~missed & (rng.random(40) < 0.5))
    base, inputs = transform(features, Groups.of(request), ~missed, rows)
    for one in range(5):
        alone = np.flatnonzero((request == one) & ~missed)
        served_base, served = transform(features[alone], Groups.single(len(alone)))
        np.testing.assert_allclose(inputs[request[rows] == one], served[np.isin(alone, rows)], atol=1e-6)
        np.testing.assert_allclose(base[request[rows] == one], served_base[np.isin(alone, rows)], atol=1e-6)


def test_a_candidate_without_base_stands_with_the_lowest() -> None:
    data = examples(np.array([[1.0, 0], [np.nan, 1], [3.0, 2], [2.0, 3]]), np.zeros(4, np.int64), ("base", "x"))
    base, _ = InputTransform.fit(data, "base", (), 9, np.random.default_rng(0))(data.features, Groups.single(4))
    assert base[1] == base[0] == base.min()


def test_transform_names_columns_that_are_not_there() -> None:
    with pytest.raises(IncompatibleError, match=r"\['tower_score'\]"):
        InputTransform.fit(examples(np.zeros((2, 2)), np.zeros(2, np.int64)), "tower_score", ("a",), 9, np.random.default_rng(0))


def test_aligned_reorders_and_names_what_is_missing_and_extra() -> None:
    features = np.array([[1.0, 2.0]], np.float32)
    assert aligned(features, ("b", "a"), ("a", "b")).tolist() == [[2.0, 1.0]]
    with pytest.raises(IncompatibleError, match=r"missing \['b'\], extra \['c'\]"):
        aligned(features, ("a", "c"), ("a", "b"))
    with pytest.raises(IncompatibleError, match="3 names"):
        aligned(features, ("a", "b", "c"), ("a", "b"))


def test_thinning_keeps_positives_and_estimates_sums_without_bias() -> None:
    rng = np.random.default_rng(0)
    request = np.sort(rng.integers(0, 20, 1000))
    positive = rng.random(1000) < 0.05
    values = rng.normal(size=1000)
    groups = Groups.of(request)
    estimates = []
    for _ in range(200):
        kept = thin(positive, groups, 5, rng)
        assert set(np.flatnonzero(positive)) <= set(kept.rows.tolist())
        assert (np.diff(kept.rows) > 0).all()
        per_request = np.bincount(request[kept.rows][~positive[kept.rows]], minlength=20)
        assert (per_request == 5).all()
        assert kept.weight.sum() == pytest.approx(1000, rel=1e-5)
        estimates.append(kept.weight @ values[kept.rows])
    assert np.mean(estimates) == pytest.approx(values.sum(), abs=4 * np.std(estimates) / np.sqrt(200))


def test_thinning_keeps_everything_where_there_is_room() -> None:
    kept = thin(np.array([True, False, False]), Groups.single(3), 2, np.random.default_rng(0))
    assert kept.rows.tolist() == [0, 1, 2]
    assert kept.weight.tolist() == [1.0, 1.0, 1.0]
    assert negatives_for(np.array([True, False, False]), 1, rows=100) == 99
    assert negatives_for(np.ones(50, bool), 10, rows=20) == 8


def test_batches_hold_whole_requests_each_once() -> None:
    groups = Groups.of(np.repeat([3, 5, 8, 9, 11], [2, 1, 4, 3, 2]))
    batches = list(request_batches(groups, 2, np.random.default_rng(0)))
    assert [len(sizes) for _, sizes in batches] == [2, 2, 1]
    assert sorted(np.concatenate([rows for rows, _ in batches]).tolist()) == list(range(12))
    for rows, sizes in batches:
        assert np.array_equal(Groups.of(groups.index[rows]).sizes, sizes)
