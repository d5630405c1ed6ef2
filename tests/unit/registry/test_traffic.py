"""Counts of live traffic: bins that add up, quantiles within 2.5%, sums over processes; the same on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.store import ReleaseStore
from registry.traffic import TOTAL, Counts, TrafficKey, bin_of, slot_at, summed, total_of


@pytest.fixture
def store(database: str) -> Iterator[ReleaseStore]:
    store = ReleaseStore(database)
    yield store
    store.close()


def write(store: ReleaseStore, process: str, *counted: tuple[TrafficKey, Counts]) -> None:
    with store.work() as work:
        work.traffic.write(process, summed(counted))
        work.commit()


def key(slot: int, champion: int = 1, experiment: int = 7, arm: str = "champion") -> TrafficKey:
    return TrafficKey(slot, champion, experiment, arm)


@given(st.lists(st.floats(0.02, 60_000), min_size=1, max_size=200), st.floats(0.01, 1))
def test_quantiles_are_within_two_and_a_half_percent(values: list[float], share: float) -> None:
    counted = sum((Counts.one(value) for value in values), Counts())
    exact = float(np.quantile(values, share, method="inverted_cdf"))
    assert counted.quantile_ms(share) == pytest.approx(exact, rel=0.0251)


def test_no_requests_have_no_quantile() -> None:
    assert Counts().quantile_ms(0.95) is None


def test_slower_than_leaves_the_limits_own_bin_out() -> None:
    counted = Counts.one(10.0) + Counts.one(10.1) + Counts.one(30.0)
    assert bin_of(10.0) in (bin_of(10.1), bin_of(10.1) - 1)
    assert (counted.slower_than(20.0), counted.slower_than(30.0), counted.slower_than(1.0)) == (1, 0, 3)


def test_processes_add_up_and_each_replaces_what_it_said_before(store: ReleaseStore) -> None:
    write(store, "one", (key(5), Counts.one(10, failed=True)))
    write(store, "one", (key(5), Counts.one(10, failed=True) + Counts.one(20)))
    write(store, "two", (key(5), Counts.one(20, degraded=True)), (key(6, arm="challenger"), Counts(dropped=3)))
    with store.look() as work:
        arms = work.traffic.of_experiment(7)
        later = work.traffic.of_experiment(7, since=6)
        nothing = work.traffic.of_experiment(8)
    assert (arms["champion"].requests, arms["champion"].failed, arms["champion"].degraded) == (3, 1, 1)
    assert arms["champion"].latency == {bin_of(10): 1, bin_of(20): 2}
    assert arms["challenger"].dropped == 3
    assert (set(later), nothing) == ({"challenger"}, {})


def test_a_champion_is_counted_in_experiments_and_outside(store: ReleaseStore) -> None:
    write(
        store, "one",
        (key(5, experiment=0), Counts.one(1)), (key(5), Counts.one(2)), (key(5, arm="challenger"), Counts.one(3)),
        (key(6, champion=2, experiment=0), Counts.one(4)),
    )  # fmt: skip
    with store.look() as work:
        assert work.traffic.of_champion(1).requests == 2
        assert work.traffic.of_champion(2).requests == 1
        assert work.traffic.of_champion(1, since=6).requests == 0


def test_old_slots_are_forgotten_and_totals_stay(store: ReleaseStore) -> None:
    counted = [(key(5), Counts.one(1)), (key(6), Counts.one(2))]
    write(store, "one", *counted, *((total_of(each), value) for each, value in counted))
    with store.work() as work:
        work.traffic.forget_before(6)
        work.commit()
    with store.look() as work:
        assert work.traffic.of_experiment(7)["champion"].requests == 1
        assert work.traffic.of_experiment(7, TOTAL)["champion"].requests == 2


def test_slots_are_ten_seconds() -> None:
    assert slot_at(1_000_009.9) == slot_at(1_000_000) == slot_at(1_000_010) - 1
