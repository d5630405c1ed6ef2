"""The candidate set of a batch: holds its positives, knows how likely each candidate was."""

import numpy as np

from retrieval.negatives import NegativeSampler


def test_a_small_catalogue_is_taken_whole() -> None:
    drawn = NegativeSampler(np.array([5, 1, 0]), 2, 2).draw(np.array([1]), np.random.default_rng(0))
    assert drawn.items.tolist() == [0, 1, 2]
    assert drawn.log_expected.tolist() == [0.0, 0.0, 0.0]


def test_every_positive_is_in_and_nothing_twice() -> None:
    random = np.random.default_rng(1)
    sampler = NegativeSampler(random.integers(0, 50, 1000), 20, 20)
    positives = random.integers(0, 1000, 64)
    drawn = sampler.draw(positives, random)
    assert np.isin(positives, drawn.items).all()
    assert (np.diff(drawn.items) > 0).all()


def test_expected_counts_match_how_often_items_are_drawn() -> None:
    random = np.random.default_rng(2)
    popularity = random.integers(1, 200, 300).astype(np.float64)
    sampler, share = NegativeSampler(popularity, 10, 10), popularity / popularity.sum()
    hits, rounds = np.zeros(300), 4000
    for _ in range(rounds):
        drawn = sampler.draw(random.choice(300, 5, p=share), random)
        hits[drawn.items] += 1
    everything = np.arange(300)
    predicted = np.exp(sampler._log_expected(everything, 5))
    assert np.abs(hits / rounds - predicted).max() < 5 * np.sqrt(0.25 / rounds)
