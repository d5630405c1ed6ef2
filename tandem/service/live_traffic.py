"""Counts what this process answered, by arm and in slots of ten seconds, until the registry has them.

In: one note per request, from any thread. Out: rows for `registry.traffic`. What cannot be written now is written later.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from registry.traffic import TOTAL, Counts, TrafficKey, slot_at, summed, total_of

if TYPE_CHECKING:
    from registry.store import ReleaseStore


class LiveTraffic:
    """Thread-safe; a note costs a few microseconds. `process` is this process's name in the table."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.process = uuid.uuid4().hex
        self._clock = clock
        self._lock = threading.Lock()
        self._new: dict[tuple[int, int, str], Counts] = {}
        self._known: dict[TrafficKey, Counts] = {}
        self._unwritten: set[TrafficKey] = set()

    def note(self, experiment: int, arm: str, counts: Counts) -> None:
        """Add what one request was; `experiment` 0: outside of any."""
        place = (slot_at(self._clock()), experiment, arm)
        with self._lock:
            self._new[place] = self._new.get(place, Counts()) + counts

    def flush(self, store: ReleaseStore, champion: int, keep_seconds: float) -> None:
        """Write what is new; `champion` is the change by which the release that answers here went live.

        Raises what the store raises; then the next call writes it.
        """
        self._take(champion)
        if not self._unwritten:
            return
        oldest = slot_at(self._clock() - keep_seconds)
        with store.work() as work:
            work.traffic.write(self.process, {key: self._known[key] for key in self._unwritten})
            work.traffic.forget_before(oldest)
            work.commit()
        self._unwritten.clear()
        self._known = {key: value for key, value in self._known.items() if key.slot == TOTAL or key.slot >= oldest}

    def of_experiment(self, number: int, since: int) -> dict[str, Counts]:
        """What this process alone counted, for when the registry does not answer: arm -> counts in the slots from `since` on."""
        with self._lock:
            fresh = [(TrafficKey(slot, 0, own, arm), value) for (slot, own, arm), value in self._new.items()]
        chosen = [(key, value) for key, value in [*self._known.items(), *fresh] if key.experiment == number]
        recent = [(total_of(key), value) for key, value in chosen if key.slot >= max(since, TOTAL + 1)]
        return {key.arm: value for key, value in summed(recent).items()}

    def _take(self, champion: int) -> None:
        """Move what is new to what is known, under the champion that it was answered by."""
        with self._lock:
            new, self._new = self._new, {}
        slots = [(TrafficKey(slot, champion, experiment, arm), value) for (slot, experiment, arm), value in new.items()]
        totals = [(total_of(key), value) for key, value in slots if key.experiment]
        added = summed([*slots, *totals])
        self._known = summed([*self._known.items(), *added.items()])
        self._unwritten |= added.keys()
