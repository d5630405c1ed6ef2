"""A loop looks again and again, and is over when `stop` returns."""

from __future__ import annotations

import threading
import time

from tandem.service.loop import Loop


def test_it_looks_until_it_is_stopped_and_stop_waits_for_the_last_look() -> None:
    looks: list[str] = []
    third = threading.Event()

    def look() -> None:
        looks.append("begun")
        if len(looks) >= 5:
            third.set()
        time.sleep(0.01)
        looks.append("done")

    loop = Loop(look, 0.001, "test")
    loop.start()
    assert third.wait(10)
    loop.stop()
    seen = len(looks)
    assert looks == ["begun", "done"] * (seen // 2)
    time.sleep(0.05)
    assert len(looks) == seen


def test_one_that_never_began_is_stopped_at_once() -> None:
    looks: list[str] = []
    loop = Loop(lambda: looks.append("begun"), 0.001, "test that never began")
    began = time.monotonic()
    loop.stop()
    assert time.monotonic() - began < 5
    assert not looks
    assert all(thread.name != "test that never began" for thread in threading.enumerate())
