"""Work done ahead of whoever asks for it: while one part is being stored, the next one is read and encoded."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

Item = TypeVar("Item")

_END: Final = object()


def ahead(items: Iterable[Item]) -> Generator[Item, None, None]:
    """The items in their order, made in a thread of their own, each while the one before is being used.

    An error of the items is raised where the item would have stood. Whoever stops early waits for the item under way.
    """
    source = iter(items)
    pool = ThreadPoolExecutor(1)
    try:
        coming = pool.submit(next, source, _END)
        while (item := coming.result()) is not _END:
            coming = pool.submit(next, source, _END)
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(cancel_futures=True)
