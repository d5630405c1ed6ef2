"""Several processes of a service that share one limit, with a real Redis between them."""

from __future__ import annotations

from tandem.service.limits import Rates


def test_processes_count_together_in_redis(redis_url: str) -> None:
    one, other = Rates("2/hour", redis_url), Rates("2/hour", redis_url)
    assert [one.wait("a"), other.wait("a")] == [None, None]
    assert one.wait("a") is not None
    assert other.wait("a") is not None
