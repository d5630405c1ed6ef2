"""Sequences -> training batches: a history up to a cut, and what followed it.

In: per user the dense item ids of their history, oldest first. Out: left-padded histories and (row, item) targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

PAD = -1


@dataclass(frozen=True)
class Batch:
    """`histories` (B, H) int64, oldest first, padded on the left with -1; targets as parallel `rows`, `items` (T,)."""

    histories: np.ndarray
    rows: np.ndarray
    items: np.ndarray


def pad_left(histories: Sequence[np.ndarray], length: int) -> np.ndarray:
    """The last `length` items of each history: (B, H) int64 with H <= length, as short as the longest one allows."""
    width = max(1, min(length, max((len(history) for history in histories), default=1)))
    padded = np.full((len(histories), width), PAD, np.int64)
    for row, history in enumerate(histories):
        tail = history[-width:]
        if len(tail):
            padded[row, width - len(tail) :] = tail
    return padded


def epoch(
    sequences: Sequence[np.ndarray],
    cuts: Sequence[np.ndarray],
    *,
    size: int,
    length: int,
    horizon: int,
    exclude_seen: bool,
    targets: Sequence[np.ndarray] | None,
    random: np.random.Generator,
) -> Iterator[Batch]:
    """One pass over the users in random order, each cut once: at a random place among its `cuts`, or at 80% as in the evaluation.

    `targets` (one boolean array per sequence) marks the events that count as positives; by default all do.
    Users of like length share a batch, so that padding is small.
    """
    order = random.permutation(len(sequences))
    chunk = size * 16
    for start in range(0, len(order), chunk):
        near = order[start : start + chunk]
        near = near[np.argsort([len(sequences[user]) for user in near], kind="stable")]
        pieces = [near[at : at + size] for at in range(0, len(near), size)]
        for piece in random.permutation(len(pieces)):
            batch = _cut(sequences, cuts, targets, pieces[piece], length, horizon, exclude_seen, random)
            if len(batch.rows):
                yield batch


def cut_places(moments: np.ndarray) -> np.ndarray:
    """Where a history may be cut: (C,) positions at which time moves on. A basket or a shown list stays in one piece."""
    return np.flatnonzero(np.diff(moments)) + 1


def late_cut(cuts: np.ndarray, length: int) -> int:
    """The last cut within the first 80% of a history, else its first cut."""
    early = cuts[cuts <= 0.8 * length]
    return int(early[-1] if len(early) else cuts[0])


def _cut(
    sequences: Sequence[np.ndarray],
    cuts: Sequence[np.ndarray],
    targets: Sequence[np.ndarray] | None,
    users: np.ndarray,
    length: int,
    horizon: int,
    exclude_seen: bool,
    random: np.random.Generator,
) -> Batch:
    histories, rows, items = [], [], []
    for row, user in enumerate(users):
        sequence = sequences[user]
        cut = int(random.choice(cuts[user])) if random.random() < 0.5 else late_cut(cuts[user], len(sequence))
        history, future = sequence[:cut], sequence[cut : cut + horizon]
        if targets is not None:
            future = future[targets[user][cut : cut + horizon]]
        future = np.unique(future)
        if exclude_seen:
            future = np.setdiff1d(future, history)
        histories.append(history)
        rows.append(np.full(len(future), row))
        items.append(future)
    return Batch(pad_left(histories, length), np.concatenate(rows), np.concatenate(items).astype(np.int64))
