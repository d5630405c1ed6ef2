"""Work done ahead of whoever asks for it: while one part is being stored, the next one is read and encoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

Item = TypeVar("Item")

_END: Final = object()


def ahead(items: Iterable[Item], depth: int = 1) -> Generator[Item, None, None]:
    """The items in their order, made in a thread of their own, up to `depth` of them before they are asked for.

    An error of the items is raised where the item would have stood. Whoever stops early waits for the item under way.
    """
    source = iter(items)
    waiting: deque[Future[Item | object]] = deque()
    pool = ThreadPoolExecutor(1)
    try:
        for _ in range(depth):
            waiting.append(pool.submit(next, source, _END))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, source, _END))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(cancel_futures=True)
