"""A store that fails is left alone for a while."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.core.errors import UnavailableError
from tandem.service.breaker import GuardedUsers


class Store:
    """User rows that can be switched off; counts how often it was asked."""

    def __init__(self) -> None:
        self.asked, self.up, self.now = 0, True, 100.0

    def row(self, user_id: str) -> dict[str, Any]:
        self.asked += 1
        if not self.up:
            raise ConnectionError("nobody listens")
        return {"user": user_id}


def test_a_failure_opens_it_and_time_closes_it() -> None:
    store = Store()
    users = GuardedUsers(store, pause_s=2.0, clock=lambda: store.now)
    assert users.row("ann") == {"user": "ann"}
    store.up = False
    with pytest.raises(ConnectionError):
        users.row("ann")
    store.up, store.now = True, 101.9
    with pytest.raises(UnavailableError, match=r"less than 2.0 s ago"):
        users.row("ann")
    assert store.asked == 2
    store.now = 102.0
    assert users.row("bob") == {"user": "bob"}
