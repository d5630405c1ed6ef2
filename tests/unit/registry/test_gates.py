"""Gates: intervals that scipy agrees with, verdicts that repeat, and a false promotion as rare as promised."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, ttest_rel

from registry.gates import Gate, Method, judge, paired_interval
from tandem.core.errors import InputError


def rows(values: np.ndarray, **columns: object) -> pl.DataFrame:
    return pl.DataFrame({"user_id": [f"u{one}" for one in range(len(values))], "ndcg@10": values, **columns})


def skewed(rng: np.random.Generator, users: int) -> np.ndarray:
    """Rows as recall gives them: most users 0, a few in between, some 1."""
    return np.where(rng.random(users) < 0.6, 0.0, rng.choice([0.25, 0.5, 1.0], users))


def test_interval_by_hand() -> None:
    interval = paired_interval(np.array([0.0, 1.0, 0.0, 1.0]), np.array([1.0, 1.0, 0.0, 1.0]), seed=1)
    assert (interval.mean_a, interval.mean_b, interval.difference, interval.n) == (0.5, 0.75, 0.25, 4)
    assert interval.low <= 0.25 <= interval.high


def test_equal_sides_give_an_interval_of_nothing() -> None:
    same = np.array([0.1, 0.9, 0.3])
    interval = paired_interval(same, same, seed=1)
    assert (interval.low, interval.difference, interval.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_scipy_agrees(method: Method) -> None:
    """An independent implementation, on skewed rows; both draw 20,000 resamples, so bounds differ by Monte Carlo error only."""
    rng = np.random.default_rng(3)
    difference = rng.exponential(1.0, 60) ** 2
    ours = paired_interval(np.zeros(60), difference, seed=1, resamples=20_000, method=method)
    theirs = bootstrap((difference,), np.mean, n_resamples=20_000, method=method, rng=2).confidence_interval
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.03 * width
    assert abs(ours.high - theirs.high) < 0.03 * width


@given(seed=st.integers(0, 2**32 - 1), users=st.integers(2, 50), shift=st.floats(-1, 1))
@settings(max_examples=50, deadline=None)
def test_swapping_sides_mirrors_and_the_seed_repeats(seed: int, users: int, shift: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=users), rng.normal(size=users) + shift
    there = paired_interval(a, b, seed, resamples=200, method="percentile")
    back = paired_interval(b, a, seed, resamples=200, method="percentile")
    assert there == paired_interval(a, b, seed, resamples=200, method="percentile")
    assert back.low == pytest.approx(-there.high, abs=1e-12)
    assert back.high == pytest.approx(-there.low, abs=1e-12)
    assert there.low <= there.high


def test_pairing_counts() -> None:
    """Users differ far more than systems do: unpaired rows could never show what paired ones do."""
    rng = np.random.default_rng(0)
    a = rng.random(300)
    b = a + 0.01 + rng.normal(0, 0.02, 300)
    assert paired_interval(a, b, seed=0).low > 0
    assert paired_interval(a, rng.permutation(b), seed=0).low < 0


@pytest.mark.parametrize(
    ("a", "b", "match"),
    [
        ([1.0], [1.0], "at least 2"),
        ([1.0, 2.0], [1.0], "shapes"),
        ([1.0, np.nan], [1.0, 2.0], "NaN"),
        ([[1.0, 2.0]], [[1.0, 2.0]], "two"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(a: list[float], b: list[float], match: str) -> None:
    with pytest.raises(InputError, match=match):
        paired_interval(np.array(a), np.array(b), seed=0)


def test_coverage_is_what_it_says() -> None:
    """400 worlds with a known difference: the 95% interval holds it in 95% of them (less than 91% is chance in 1 of 5,000)."""
    rng = np.random.default_rng(11)
    held = 0
    for world in range(400):
        a = skewed(rng, 200)
        b = np.where(rng.random(200) < 0.1, 1.0, a)  # lifts a user to 1 with probability 0.1
        true = 0.1 * (1 - 0.4 * (0.25 + 0.5 + 1) / 3)
        interval = paired_interval(a, b, seed=world, resamples=500)
        held += interval.low <= true <= interval.high
    assert held / 400 > 0.91


def test_false_promotions_are_as_rare_as_promised() -> None:
    """Two equal systems, 400 times: a superiority gate at 95% lets one in 40 pass. More than 5% is chance in 1 of 500."""
    rng = np.random.default_rng(5)
    passed = sum(
        judge(
            rows(skewed(rng, 200)), rows(skewed(rng, 200)), [Gate("ndcg@10", kind="superiority")], seed=world, resamples=500
        ).passed
        for world in range(400)
    )
    assert 1 <= passed <= 20


@pytest.mark.parametrize("users", [30, 100])
def test_few_users_make_no_false_promotion_likelier(users: int) -> None:
    """Two equal systems, 1,000 times: more than 3.8% is chance in 1 of 200; BCa alone lets 6% pass with 30 users."""
    rng, gate, passed = np.random.default_rng(8), [Gate("ndcg@10", kind="superiority", minimum_users=30)], 0
    for world in range(1000):
        easy = skewed(rng, users)
        a, b = (np.where(rng.random(users) < 0.7, easy, skewed(rng, users)) for _ in range(2))
        passed += judge(rows(a), rows(b), gate, seed=world, resamples=300).passed
    assert 5 <= passed <= 38


def test_the_cautious_interval_holds_students_and_bcas() -> None:
    rng = np.random.default_rng(2)
    a, b = skewed(rng, 40), skewed(rng, 40)
    cautious, bca = (paired_interval(a, b, 1, method=method) for method in ("cautious", "bca"))
    student = ttest_rel(b, a).confidence_interval(0.95)
    assert cautious.low == pytest.approx(min(bca.low, student.low), abs=1e-12)
    assert cautious.high == pytest.approx(max(bca.high, student.high), abs=1e-12)
    assert cautious.low < bca.low or cautious.high > bca.high


def test_a_worse_challenger_passes_non_inferiority_as_rarely() -> None:
    """Worse by exactly the margin is the hardest case of the hypothesis that the gate guards against."""
    rng = np.random.default_rng(6)
    gate = Gate("ndcg@10", margin=0.02)
    passed = 0
    for world in range(400):
        a = skewed(rng, 200)
        b = a - 0.02 + rng.normal(0, 0.1, 200)
        passed += judge(rows(a), rows(b), [gate], seed=world, resamples=500).passed
    assert 1 <= passed <= 20


def test_a_better_challenger_is_let_in() -> None:
    rng = np.random.default_rng(7)
    passed = 0
    for world in range(50):
        a = skewed(rng, 500)
        passed += judge(rows(a), rows(a + rng.normal(0.02, 0.1, 500)), [Gate("ndcg@10", kind="superiority")], seed=world).passed
    assert passed >= 45


def test_the_same_rows_give_the_same_verdict_in_any_order() -> None:
    rng = np.random.default_rng(1)
    a, b = rows(rng.random(200)), rows(rng.random(200))
    gates = [Gate("ndcg@10", margin=0.01), Gate("ndcg@10", kind="superiority")]
    first = judge(a, b, gates, seed=3)
    assert judge(a.sample(fraction=1, shuffle=True, seed=9), b.reverse(), gates, seed=3) == first


def test_every_gate_must_pass_and_the_table_says_which() -> None:
    cold = [one % 2 == 0 for one in range(200)]
    a = rows(np.full(200, 0.5), cold_user=cold, segment=["x"] * 150 + ["y"] * 50)
    b = rows(np.where(cold, 0.4, 0.7), cold_user=cold, segment=["x"] * 150 + ["y"] * 50)
    gates = [
        Gate("ndcg@10", kind="superiority"),
        Gate("ndcg@10", margin=0.05, where="cold_user"),
        Gate("ndcg@10", margin=0.05, where="segment=y", minimum_users=50),
    ]
    verdict = judge(a, b, gates)
    table = verdict.table()
    assert not verdict.passed
    assert table["passed"].to_list() == [True, False, True]
    assert table["users"].to_list() == [200, 100, 50]
    assert table["difference"].to_list() == pytest.approx([0.05, -0.1, 0.05])
    assert verdict.sentences[1] == (
        "ndcg@10 on cold_user: challenger 0.4000, champion 0.5000, difference -0.1000 "
        "(95% interval -0.1000 to -0.1000, 100 users); not shown to be worse by less than 0.05"
    )


def test_lower_is_better_turns_the_gate_round() -> None:
    a, b = rows(np.full(100, 0.2)), rows(np.full(100, 0.1))
    assert judge(a, b, [Gate("ndcg@10", kind="superiority", higher_is_better=False)]).passed
    assert not judge(a, b, [Gate("ndcg@10", kind="superiority")]).passed


def test_exactly_the_margin_is_not_enough() -> None:
    a, b = rows(np.full(100, 0.5)), rows(np.full(100, 0.25))
    assert not judge(a, b, [Gate("ndcg@10", margin=0.25)]).passed
    assert judge(a, b, [Gate("ndcg@10", margin=0.26)]).passed


def test_several_rows_of_a_user_are_one_user() -> None:
    a = pl.DataFrame({"user_id": ["u", "u", "v"], "m": [0.0, 1.0, 1.0]})
    b = pl.DataFrame({"user_id": ["u", "v", "v"], "m": [1.0, 1.0, 1.0]})
    (result,) = judge(a, b, [Gate("m", minimum_users=2)]).results
    assert result.interval is not None
    assert (result.interval.n, result.interval.mean_a, result.interval.mean_b) == (2, 0.75, 1.0)


def test_users_without_the_metric_on_both_sides_are_left_out() -> None:
    a, b = rows(np.array([0.1, np.nan, 0.3])), rows(np.array([0.2, np.nan, 0.4]))
    (result,) = judge(a, b, [Gate("ndcg@10", minimum_users=2)]).results
    assert result.interval is not None
    assert result.interval.n == 2
    assert result.passed


@pytest.mark.parametrize(
    ("challenger", "reason"),
    [
        (rows(np.full(149, 0.9)), "different users: 150 of the champion, 149 of the challenger, 150 together"),
        (rows(np.append(np.full(149, 0.9), np.nan)), "for 1 users only one"),
        (rows(np.full(150, 0.9)).rename({"ndcg@10": "recall"}), "challenger's rows have no column 'ndcg@10'"),
        (rows(np.full(150, 0.9)).with_columns(user_id=pl.lit("x") + pl.col("user_id")), "300 together"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_a_sentence(challenger: pl.DataFrame, reason: str) -> None:
    verdict = judge(rows(np.full(150, 0.1)), challenger, [Gate("ndcg@10", margin=1.0)])
    assert not verdict.passed
    assert "refused" in verdict.sentences[0]
    assert reason in verdict.sentences[0]


def test_too_few_users_are_refused_however_good_they_look() -> None:
    verdict = judge(rows(np.zeros(99)), rows(np.ones(99)), [Gate("ndcg@10", kind="superiority")])
    assert not verdict.passed
    assert "99 users are fewer than the 100" in verdict.sentences[0]
    assert verdict.table()["difference"].to_list() == [None]


def test_an_empty_slice_and_empty_frames_are_refused() -> None:
    empty = rows(np.zeros(0), cold_user=[])
    assert not judge(empty, empty, [Gate("ndcg@10"), Gate("ndcg@10", where="cold_user")]).passed


def test_the_first_champion_has_nobody_to_beat() -> None:
    verdict = judge(None, rows(np.zeros(3)), [Gate("ndcg@10")])
    assert verdict.passed
    assert verdict.sentences == ("ndcg@10: no champion to compare with",)


def test_gates_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match="no gates"):
        judge(None, rows(np.zeros(3)), [])
    with pytest.raises(InputError, match="margin"):
        Gate("m", margin=-0.1)
    with pytest.raises(InputError, match="margin"):
        Gate("m", margin=float("nan"))


def test_a_verdict_goes_through_json() -> None:
    rng = np.random.default_rng(1)
    verdict = judge(rows(rng.random(200)), rows(rng.random(200)), [Gate("ndcg@10"), Gate("gone")])
    plain = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert plain["passed"] is False
    assert plain["sentences"] == list(verdict.sentences)
    assert plain["results"][0]["interval"]["n"] == 200
    assert plain["results"][1]["interval"] is None
