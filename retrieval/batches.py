"""Sequences -> training batches: a history up to a cut, and what followed it.

In: per user the dense item ids of their history, oldest first. Out: left-padded histories and (row, item) targets, or windows
with a target at every position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

PAD = -1


@dataclass(frozen=True)
class Histories:
    """Users' histories as dense item ids, oldest first.

    `positive` marks the events that retrieval should find; `cuts` are the places where time moves on (`cut_places`).
    """

    sequences: Sequence[np.ndarray]
    positive: Sequence[np.ndarray]
    cuts: Sequence[np.ndarray]
    exclude_seen: bool

    def take(self, users: Iterable[int]) -> Histories:
        """Those of some users, by their place."""
        chosen = list(users)
        columns = {name: [getattr(self, name)[user] for user in chosen] for name in ("sequences", "positive", "cuts")}
        return Histories(**columns, exclude_seen=self.exclude_seen)

    def usable(self) -> Histories:
        """Those that can be cut into a past and a future."""
        return self.take(user for user, cuts in enumerate(self.cuts) if len(cuts))

    def counts(self, items: int) -> np.ndarray:
        """(N,) how many events each item has."""
        return np.bincount(np.concatenate([np.asarray(sequence, np.int64) for sequence in self.sequences]), minlength=items)


@dataclass(frozen=True)
class Window:
    """`histories` (B, L) int64, oldest first, padded on the left; `targets` (B, L): what followed each place, -1: nothing."""

    histories: np.ndarray
    targets: np.ndarray


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


def seen_columns(histories: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """(B, C) bool: the candidates (C,), ascending, that stand in the row's history (B, H)."""
    hidden = np.zeros((len(histories), len(candidates)), bool)
    rows, steps = np.nonzero(histories >= 0)
    seen = histories[rows, steps]
    columns = np.minimum(np.searchsorted(candidates, seen), len(candidates) - 1)
    found = candidates[columns] == seen
    hidden[rows[found], columns[found]] = True
    return hidden


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


def windows(
    histories: Histories, *, users: int, size: int, length: int, near: float, random: np.random.Generator
) -> Iterator[Window]:
    """One window of at most `length` events of up to `users` users: the end of their history, or any place where it is longer.

    The target of a position is the next event (in a share `near` of the windows), or any event of the next moment: what lies in
    one basket has no order, and the next question will be about another basket.
    """
    order = random.permutation(len(histories.sequences))[:users]
    order = order[np.argsort([min(len(histories.sequences[user]), length + 1) for user in order], kind="stable")]
    pieces = [order[at : at + size] for at in range(0, len(order), size)]
    for piece in random.permutation(len(pieces)):
        pairs = [_window(histories, user, length, near, random) for user in pieces[piece]]
        window = Window(pad_left([past for past, _ in pairs], length), pad_left([next_one for _, next_one in pairs], length))
        if (window.targets >= 0).any():
            yield window


def _window(
    histories: Histories, user: int, length: int, near: float, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Events (L,) of one user and the target of each (L,)."""
    sequence, positive, cuts = histories.sequences[user], histories.positive[user], histories.cuts[user]
    end = len(sequence)
    if end > length + 1 and random.random() < 0.5:
        end = int(random.integers(length + 1, end + 1))
    places = np.arange(max(0, end - length - 1), end - 1)
    chosen = places + 1
    if random.random() >= near:
        moment = np.searchsorted(cuts, places, side="right")
        edges = np.append(cuts, [len(sequence), len(sequence)])
        first, after = edges[moment], edges[moment + 1]
        chosen = first + (random.random(len(places)) * (after - first)).astype(np.int64)
    kept = chosen < len(sequence)
    chosen = np.where(kept, chosen, 0)
    return sequence[places], np.where(kept & positive[chosen], sequence[chosen], PAD)


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
