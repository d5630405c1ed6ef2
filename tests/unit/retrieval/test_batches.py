"""Histories become batches without a look ahead."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from retrieval.batches import Histories, cut_places, epoch, late_cut, pad_left, windows


def test_pad_left_keeps_the_end() -> None:
    padded = pad_left([np.array([1, 2, 3]), np.array([], np.int64), np.array([7])], 2)
    assert padded.tolist() == [[2, 3], [-1, -1], [-1, 7]]


def test_a_basket_is_never_cut() -> None:
    assert cut_places(np.array([10, 10, 20, 20, 20, 30])).tolist() == [2, 5]
    assert cut_places(np.array([5, 5, 5])).tolist() == []


def test_late_cut_is_the_last_within_four_fifths() -> None:
    assert late_cut(np.array([2, 5]), 6) == 2
    assert late_cut(np.array([5]), 6) == 5


@given(st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=12), min_size=1, max_size=6), st.integers(0, 100))
def test_targets_follow_the_history(gaps: list[list[int]], seed: int) -> None:
    """Items are numbered by time, so a target earlier than the end of its history would be a leak."""
    moments = [np.cumsum(gap) for gap in gaps]
    sequences = [np.arange(len(each)) for each in moments]
    usable = [place for place, each in enumerate(moments) if len(cut_places(each))]
    batches = epoch(
        [sequences[place] for place in usable], [cut_places(moments[place]) for place in usable],
        size=4, length=100, horizon=5, exclude_seen=True, targets=None, random=np.random.default_rng(seed),
    )  # fmt: skip
    for batch in batches:
        newest = batch.histories.max(1)
        assert (batch.items > newest[batch.rows]).all()


def test_only_positive_events_are_targets() -> None:
    (batch,) = epoch(
        [np.array([0, 1, 2, 3])], [np.array([1])], size=2, length=10, horizon=10, exclude_seen=True,
        targets=[np.array([True, False, True, False])], random=np.random.default_rng(0),
    )  # fmt: skip
    assert batch.histories.tolist() == [[0]]
    assert batch.items.tolist() == [2]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=14), st.integers(0, 50), st.booleans())
def test_targets_of_a_window_follow_their_place(gaps: list[int], seed: int, near: bool) -> None:
    """Items are numbered by place: the target is the next event, or an event of the next moment."""
    moments = np.cumsum(gaps)
    histories = Histories([np.arange(len(gaps))], [np.ones(len(gaps), bool)], [cut_places(moments)], exclude_seen=False)
    for window in windows(histories, users=1, size=1, length=20, near=float(near), random=np.random.default_rng(seed)):
        assert window.histories.tolist() == [list(range(len(gaps) - 1))]
        for place, target in enumerate(window.targets[0]):
            later = moments[moments > moments[place]]
            if near:
                assert target == place + 1
            elif len(later):
                assert moments[target] == later[0]
            else:
                assert target == -1


def test_a_window_is_no_longer_than_asked_and_skips_what_is_no_positive() -> None:
    sequence = np.arange(9)
    histories = Histories([sequence], [sequence % 2 == 0], [cut_places(sequence)], exclude_seen=True)
    (window,) = windows(histories, users=1, size=1, length=4, near=1.0, random=np.random.default_rng(1))
    assert window.histories.shape == (1, 4)
    following = window.histories[0] + 1
    assert window.targets[0].tolist() == np.where(following % 2 == 0, following, -1).tolist()
