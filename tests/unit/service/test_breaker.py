"""A store that fails is left alone for a while."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from feature_repo.online import UserRow
from tandem.core.errors import UnavailableError
from tandem.service.breaker import GuardedUsers


class Store:
    """User rows that can be switched off; counts how often it was asked."""

    def __init__(self) -> None:
        self.asked, self.up, self.now = 0, True, 100.0

    def read(self, user_ids: Sequence[str]) -> list[UserRow]:
        self.asked += 1
        if not self.up:
            raise ConnectionError("nobody listens")
        return [UserRow({"user": user_id}, {}) for user_id in user_ids]


def test_a_failure_opens_it_and_time_closes_it() -> None:
    store = Store()
    users = GuardedUsers(store, pause_s=2.0, clock=lambda: store.now)
    assert users.read(["ann"])[0].features == {"user": "ann"}
    store.up = False
    with pytest.raises(ConnectionError):
        users.read(["ann"])
    store.up, store.now = True, 101.9
    with pytest.raises(UnavailableError, match=r"less than 2.0 s ago"):
        users.read(["ann"])
    assert store.asked == 2
    store.now = 102.0
    assert users.read(["bob"])[0].features == {"user": "bob"}


def test_after_a_pause_one_request_tries_and_the_others_do_not_wait() -> None:
    """While the one that tries is under way, a second read is turned away at once; after an answer all pass."""
    store = Store()
    users = GuardedUsers(store, pause_s=2.0, clock=lambda: store.now)
    store.up = False
    with pytest.raises(ConnectionError):
        users.read(["ann"])
    store.up, store.now = True, 103.0
    plain, turned_away = store.read, []

    def slow(user_ids: Sequence[str]) -> list[UserRow]:
        with pytest.raises(UnavailableError) as refused:
            users.read(["bob"])
        turned_away.append(refused)
        return plain(user_ids)

    store.read = slow  # type: ignore[method-assign]
    assert users.read(["ann"])[0].features == {"user": "ann"}
    assert len(turned_away) == 1
    store.read = plain  # type: ignore[method-assign]
    assert users.read(["bob"])[0].features == {"user": "bob"}
