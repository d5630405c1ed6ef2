"""How much a service takes: per caller and window, and at once. The clock is the real one, so windows are long or awaited."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from tandem.core.errors import InputError
from tandem.service.limits import Crowd, Rates


def test_each_caller_has_a_count_of_their_own() -> None:
    rates = Rates("2/hour", "")
    assert [rates.wait("a"), rates.wait("a"), rates.wait("b")] == [None, None, None]
    wait = rates.wait("a")
    assert wait is not None
    assert 1 <= wait <= 3600
    assert rates.wait("b") is None


def test_without_a_rate_everybody_goes_on() -> None:
    rates = Rates("", "")
    assert {rates.wait("a") for _ in range(1000)} == {None}


def test_a_rate_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(InputError, match=r"service\.rate = 'fast' .*100/second"):
        Rates("fast", "")


def test_a_store_of_another_kind_is_refused_without_its_password() -> None:
    with pytest.raises(InputError, match="is a 'postgresql' URL") as refused:
        Rates("2/hour", "postgresql://user:s3cret@db/x")
    assert "s3cret" not in str(refused.value)


def test_a_store_that_is_down_lets_everybody_through(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tandem.service")
    rates = Rates("1/hour", "redis://127.0.0.1:1/0")
    assert [rates.wait("a"), rates.wait("a")] == [None, None]
    assert "rate_store_unreachable" in caplog.text


def test_a_full_house_turns_requests_away_but_not_probes() -> None:
    assert asyncio.run(_visits("/v1/recommend", "/v1/recommend", "/v1/recommend", "/v1/healthz")) == [200, 200, 503, 200]


def test_who_leaves_makes_room() -> None:
    async def one_by_one() -> list[int]:
        crowd, done = Crowd(_answer_at_once, 1), []
        for _ in range(3):
            done.append(await _status(crowd, "/v1/recommend"))
        return done

    assert asyncio.run(one_by_one()) == [200, 200, 200]


def test_a_crash_leaves_the_house_too() -> None:
    async def crash(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError

    async def twice() -> int:
        crowd = Crowd(crash, 1)
        for _ in range(2):
            with pytest.raises(RuntimeError):
                await _status(crowd, "/v1/recommend")
        crowd.app = _answer_at_once
        return await _status(crowd, "/v1/recommend")

    assert asyncio.run(twice()) == 200


async def _visits(*paths: str) -> list[int]:
    """Statuses when all of them come before the first is answered, in a house for two."""
    leave = asyncio.Event()

    async def waits(scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].endswith("healthz"):
            await leave.wait()
        await _answer_at_once(scope, receive, send)

    crowd = Crowd(waits, 2)
    tasks = [asyncio.create_task(_status(crowd, path)) for path in paths]
    await asyncio.sleep(0.05)
    leave.set()
    return list(await asyncio.gather(*tasks))


async def _answer_at_once(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def _status(app: Any, path: str) -> int:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    await app({"type": "http", "path": path, "state": {"request_id": "r"}}, receive, send)
    return int(sent[0]["status"])
