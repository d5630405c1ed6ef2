"""Times the stages of one request by name, and collects what degraded."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tandem.core.errors import InputError, NotFoundError

_SPENT: Final = "budget_spent"


class StageClock:
    """Times stages by name, and collects what degraded."""

    def __init__(self, deadline: float = math.inf) -> None:
        self.took: dict[str, float] = {}
        self.degraded: list[str] = []
        self._start = time.perf_counter()
        self._deadline = deadline

    def in_time(self) -> None:
        """Raise TimeoutError, inside a stage with a fallback, when the budget is spent: computing cannot be cancelled later."""
        if time.perf_counter() < self._deadline:
            return
        if _SPENT not in self.degraded:
            self.degraded.append(_SPENT)
        raise TimeoutError(_SPENT)

    @contextmanager
    def stage(self, name: str, fallback: str | None = None) -> Iterator[None]:
        """Time a block. With a `fallback`, a failure is recorded under that name and the block's default result stands."""
        start = time.perf_counter()
        try:
            yield
        except (InputError, NotFoundError):
            raise
        except Exception:
            if fallback is None:
                raise
            self.degraded.append(fallback)
        finally:
            self.took[name] = round((time.perf_counter() - start) * 1000, 3)

    def total(self) -> dict[str, float]:
        return self.took | {"total": round((time.perf_counter() - self._start) * 1000, 3)}
