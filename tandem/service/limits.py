"""How much a service takes: requests per caller and time, and requests at once. What is above is told when to come again.

In: `service.rate` ("100/second", empty: no limit), `service.rate_store` and `service.max_in_flight`. Out: 429 `too_many_requests`
or 503 `overloaded`, both with Retry-After. Probes (health, readiness, metrics) are always answered.
"""

from __future__ import annotations

import math
import os
import time
from typing import Any, Final

from limits import RateLimitItem, parse
from limits.errors import ConfigurationError, StorageError
from limits.storage import MemoryStorage, storage_from_string
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.types import ASGIApp, Receive, Scope, Send

from tandem.core.errors import InputError
from tandem.service.problems import OVERLOADED, PROBES, log_line, problem, request_id_of

_PATIENCE_S: Final = 0.05
"""How long a request waits for the store that counts."""


class Rates:
    """Counts each caller's requests over a sliding window; in this process, or in Redis for all processes together."""

    def __init__(self, rate: str, store: str) -> None:
        """Raises InputError for a rate that cannot be read, or a store that cannot be opened."""
        self._rate = _parsed(rate)
        self._window = SlidingWindowCounterRateLimiter(_storage(store)) if self._rate else None

    def wait(self, caller: str) -> int | None:
        """Count one request of `caller`: None lets it through, a number is the seconds until the next one would be.

        A store that does not answer lets everybody through and is logged: limits protect the service, they must not stop it.
        """
        if self._rate is None or self._window is None:
            return None
        try:
            if self._window.hit(self._rate, caller):
                return None
            return max(1, math.ceil(self._window.get_window_stats(self._rate, caller).reset_time - time.time()))
        except StorageError as error:
            log_line("rate_store_unreachable", reason=type(error.storage_error).__name__)
            return None


class Crowd:
    """ASGI middleware: turns requests away while `most` are being answered or wait for it (0: takes all)."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most, self._inside = app, most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self.most or scope["path"].endswith(PROBES):
            await self.app(scope, receive, send)
        elif self._inside >= self.most:
            await problem(OVERLOADED, request_id_of(scope), headers={"retry-after": "1"})(scope, receive, send)
        else:
            self._inside += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self._inside -= 1


def _parsed(rate: str) -> RateLimitItem | None:
    try:
        return parse(rate) if rate else None
    except ValueError:
        raise InputError(f'service.rate = {rate!r} cannot be read; write it like "100/second" or "3000/minute"') from None


def _storage(store: str) -> Any:
    """In memory, or in the store of a URL, where `${NAME}` stands for a variable of the environment."""
    if not store:
        return MemoryStorage()
    patience = {"socket_timeout": _PATIENCE_S, "socket_connect_timeout": _PATIENCE_S}
    try:
        return storage_from_string(os.path.expandvars(store), wrap_exceptions=True, **patience)
    except ConfigurationError:
        kind = store.partition(":")[0]
        raise InputError(f'service.rate_store is a {kind!r} URL; use "redis://…", or "" to count per process') from None
