"""From scored candidates to the slate's order: diversity, rules, exploration.

In: scores (P,) and what the rules need (category codes, keys, counts). Out: `order`, int64 indices of candidates, best first.
All functions are pure; orders are permutations (or their first k), so a candidate is never lost twice or shown twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tandem.core.errors import InputError

Order = NDArray[np.int64]
Rule = Callable[[Order], Order]
"""An order → an order of the same candidates."""


def by_score(scores: NDArray[np.float32]) -> Order:
    """Candidates by falling score; equal scores keep the order in which they came."""
    return np.argsort(-scores.astype(np.float64), kind="stable").astype(np.int64)


def mmr(scores: NDArray[np.float32], categories: NDArray[np.int64], diversity: float, k: int) -> Order:
    """The first min(k, P) candidates by maximal marginal relevance over categories.

    Each slot takes the candidate with the highest (1 − diversity) · relevance − diversity · (similarity to the most similar one
    already taken). `scores` (P,) become a relevance in [0, 1] by their range among the candidates; similarity is the Jaccard
    overlap of `categories` (P, C) int64 codes, −1 = padding. diversity 0 is the pure score order, 1 looks only at categories.
    Carbonell and Goldstein 1998, "The Use of MMR". Raises InputError for a diversity outside [0, 1].
    """
    if not 0.0 <= diversity <= 1.0:
        raise InputError(f"diversity = {diversity}; give a number from 0 (score order) to 1")
    order = by_score(scores)
    if diversity == 0.0 or len(order) < 2:
        return order[:k]
    relevance, codes = _unit_range(scores)[order], categories[order]
    similar = np.zeros(len(order))
    free = np.ones(len(order), bool)
    taken = []
    for _ in range(min(k, len(order))):
        value = np.where(free, (1.0 - diversity) * relevance - diversity * similar, -np.inf)
        best = int(np.argmax(value))
        taken.append(best)
        free[best] = False
        similar = np.maximum(similar, jaccard(codes, codes[best]))
    return order[np.array(taken, np.int64)]


def jaccard(categories: NDArray[np.int64], one: NDArray[np.int64]) -> NDArray[np.float64]:
    """(P, C) and (C,) codes, −1 = padding, none repeated in a row → (P,) overlap / union; 0 where both are empty."""
    one = one[one >= 0]
    both = (categories[:, :, None] == one[None, None, :]).sum(axis=(1, 2))
    union = (categories >= 0).sum(axis=1) + len(one) - both
    overlap: NDArray[np.float64] = both / np.maximum(union, 1)
    return overlap


def apply_rules(order: Order, rules: Sequence[Rule]) -> Order:
    """`order` after all rules, in turn."""
    for rule in rules:
        order = rule(order)
    return order


def at_most_per_key(keys: NDArray[np.int64], limit: int) -> Rule:
    """Rule: at most `limit` candidates of one key (first category, brand, series) before the surplus, which goes to the end.

    `keys` (P,) codes, −1 = none, which is never limited. Nothing is dropped, so the slate stays full.
    """
    if limit < 1:
        raise InputError(f"limit = {limit} per key; give at least 1")

    def rule(order: Order) -> Order:
        own = keys[order]
        by_key = np.argsort(own, kind="stable")
        first = np.searchsorted(own[by_key], own[by_key], "left")
        nth = np.empty(len(order), np.int64)
        nth[by_key] = np.arange(len(order)) - first
        return _to_the_end(order, (nth >= limit) & (own >= 0))

    return rule


def frequency_cap(shown: NDArray[np.int64], at_most: int) -> Rule:
    """Rule: candidates that the user was shown `at_most` times or more (`shown` (P,) counts) go to the end, in their order."""
    return demote(shown >= at_most)


def demote(where: NDArray[np.bool_]) -> Rule:
    """Rule: candidates marked in `where` (P,) go to the end, in their order."""
    return lambda order: _to_the_end(order, where[order])


def pin(candidate: int, slot: int) -> Rule:
    """Rule: `candidate` stands at `slot` (0 = first), if it is among the candidates."""

    def rule(order: Order) -> Order:
        if candidate not in order:
            return order
        rest = order[order != candidate]
        return np.insert(rest, min(slot, len(rest)), candidate)

    return rule


@dataclass(frozen=True)
class Explored:
    """A slate with its log: `order` (k,), `propensity` (k,) = P(this candidate at this slot | request), `swapped` or not."""

    order: Order
    propensity: NDArray[np.float64]
    swapped: bool


def explore(order: Order, k: int, epsilon: float, slot: int, rng: np.random.Generator, pool: int | None = None) -> Explored:
    """The first k of `order`; with probability `epsilon` the one at `slot` gives way to a candidate drawn evenly from below.

    The pool are the next `pool` candidates after the k-th (None: all of them), N in number. Logged propensities, for inverse
    propensity weighting (Horvitz and Thompson 1952): at `slot` 1 − ε for the candidate of the order and ε / N for one swapped
    in; 1 at the other slots, which are never touched. Without a pool, or with slot ≥ k, nothing is explored and all are 1.
    """
    if not 0.0 <= epsilon <= 1.0 or slot < 0:
        raise InputError(f"epsilon = {epsilon} and slot = {slot}; give epsilon from 0 to 1 and a slot from 0")
    top, below = order[:k].copy(), order[k:][:pool]
    propensity = np.ones(len(top))
    if slot >= len(top) or not len(below):
        return Explored(top, propensity, swapped=False)
    swapped = bool(rng.random() < epsilon)
    if swapped:
        top[slot] = below[rng.integers(len(below))]
    propensity[slot] = epsilon / len(below) if swapped else 1.0 - epsilon
    return Explored(top, propensity, swapped)


def _to_the_end(order: Order, where: NDArray[np.bool_]) -> Order:
    return np.concatenate([order[~where], order[where]])


def _unit_range(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    low, high = float(scores.min()), float(scores.max())
    return (scores.astype(np.float64) - low) / (high - low) if high > low else np.zeros(len(scores))
