"""Independent jobs on all of torch's threads, one thread each: what waits for nobody is not slowed down by whoever is busy.

torch and its matrix library split every small operation over all threads and wait for the slowest. A scan is thousands of such
operations, and where other work runs on the machine each of them waits: measured, a twelfth of the speed on two busy cores.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

Result = TypeVar("Result")

_TURN: Final = threading.Lock()


def count() -> int:
    """How many jobs can run at once: torch's own number of threads."""
    import torch

    return torch.get_num_threads()


def run(jobs: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results in the order of the jobs. While they run, torch uses one thread each; a second caller gets no extra ones."""
    threads = count()
    if min(threads, len(jobs)) == 1 or not _TURN.acquire(blocking=False):
        return [job() for job in jobs]
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # holds for threads that begin now, and for the matrix library everywhere
        with ThreadPoolExecutor(min(threads, len(jobs))) as pool:
            return list(pool.map(lambda job: job(), jobs))
    finally:
        torch.set_num_threads(before)
        _TURN.release()
