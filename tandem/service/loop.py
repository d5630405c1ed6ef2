"""Something that is looked at every few seconds, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Loop:
    """Calls `look` every `every_s` seconds from `start` to `stop`. `look` must not raise: nobody would hear it."""

    def __init__(self, look: Callable[[], object], every_s: float, name: str) -> None:
        self._look, self._every_s = look, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to look, for the first time after `every_s`."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; returns when the look that is under way is over."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self._look()
