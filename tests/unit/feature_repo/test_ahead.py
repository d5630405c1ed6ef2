"""Items made ahead: in their order, no more than asked for, errors where they belong, nothing left running."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from feature_repo.ahead import ahead


def test_items_come_in_order_and_are_made_elsewhere() -> None:
    makers: set[int] = set()

    def items() -> Iterator[int]:
        for number in range(100):
            makers.add(threading.get_ident())
            yield number

    assert list(ahead(items())) == list(range(100))
    assert list(ahead([])) == []
    assert makers
    assert threading.get_ident() not in makers


def test_one_is_made_before_it_is_asked_for_and_no_more() -> None:
    made = [threading.Event() for _ in range(10)]

    def items() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    coming = ahead(items())
    assert next(coming) == 0
    assert made[1].wait(10)
    assert not made[2].wait(0.2)
    assert next(coming) == 1
    assert made[2].wait(10)
    coming.close()


def test_an_error_stands_where_its_item_would_have() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    coming = ahead(items())
    assert next(coming) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(coming)


def test_whoever_stops_early_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    coming = ahead(iter(range(1_000_000)))
    assert next(coming) == 0
    assert threading.active_count() == before + 1
    coming.close()
    assert threading.active_count() == before
