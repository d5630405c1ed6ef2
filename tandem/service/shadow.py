"""A challenger that answers the same requests behind the users' backs: a bounded queue, and one thread that asks it.

In: asks that the champion has answered. Out: the challenger's slates in a served-log of its own; the thread that answers users
never waits. What comes while the queue is full is dropped and counted.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from registry.traffic import Counts
from tandem.core.errors import InputError, NotFoundError
from tandem.service.problems import log_failure
from tandem.service.recommend import Recommender
from tandem.service.slate import Ask

_PATIENCE_S: Final = 5.0
"""How long closing waits for the request that is being asked; computing cannot be cancelled."""


class Shadow:
    """Asks `challenger` what `offer` hands over, one by one. `note` hears of each request: answered, failed or dropped."""

    def __init__(self, challenger: Recommender, waiting: int, note: Callable[[Counts], None]) -> None:
        self._challenger, self._note = challenger, note
        self._asks: queue.Queue[Ask | None] = queue.Queue(waiting)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._thread.start()

    def offer(self, ask: Ask) -> None:
        """Hand over a request; returns at once."""
        try:
            self._asks.put_nowait(ask)
        except queue.Full:
            self._note(Counts(dropped=1))

    def close(self) -> None:
        """Stop after the request that is being asked, or leave it behind when it takes too long; what waits is dropped."""
        self._closed = True
        with suppress(queue.Empty):
            while self._asks.get_nowait() is not None:
                self._note(Counts(dropped=1))
        end = time.monotonic() + _PATIENCE_S
        while self._thread.is_alive() and time.monotonic() < end:
            with suppress(queue.Full):  # somebody offers still; the thread takes one more and stops
                self._asks.put_nowait(None)
            self._thread.join(0.05)

    def _run(self) -> None:
        while (ask := self._asks.get()) is not None and not self._closed:
            self._ask(ask)

    def _ask(self, ask: Ask) -> None:
        start = time.perf_counter()
        degraded = failed = False
        try:
            degraded = bool(self._challenger.recommend(ask).degraded)
        except (InputError, NotFoundError):  # the caller's mistake, and the champion has said so
            return
        except Exception as error:
            failed = True
            log_failure(error, ask.request_id or "")
        self._note(Counts.one((time.perf_counter() - start) * 1000, failed=failed, degraded=degraded))
