"""A reader that fails at once for a while after it failed: a store that is down must not cost every request its time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from feature_repo.online import UserRow
from tandem.core.errors import UnavailableError
from tandem.service.parts import UserRows

PAUSE_S: Final = 2.0


class GuardedUsers:
    """User rows behind a breaker. It opens at a failure for `pause_s`; then one request tries and the others do not wait."""

    def __init__(self, users: UserRows, pause_s: float = PAUSE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._users, self._pause_s, self._clock = users, pause_s, clock
        self._open_until = 0.0
        self._changing = threading.Lock()

    def read(self, user_ids: Sequence[str]) -> list[UserRow]:
        """Users' features; raises UnavailableError while the breaker is open, and whatever the reader raises."""
        trying = self._admit()
        try:
            rows = self._users.read(user_ids)
        except Exception:
            self._open_until = self._clock() + self._pause_s
            raise
        if trying:
            self._open_until = 0.0
        return rows

    def _admit(self) -> bool:
        """Let a read through, and say whether it is the one that tries after a pause. Raises UnavailableError during a pause."""
        with self._changing:
            now = self._clock()
            if now < self._open_until:
                raise UnavailableError(f"user features failed less than {self._pause_s} s ago; they are asked again after that")
            trying = self._open_until > 0
            if trying:
                self._open_until = now + self._pause_s  # the next ones keep out until this one has an answer
            return trying
