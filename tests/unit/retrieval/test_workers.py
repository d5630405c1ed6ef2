"""Jobs side by side: order, errors, and torch's threads left as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from retrieval import workers


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_jobs_run_side_by_side_with_one_thread_each_and_answer_in_order() -> None:
    together = threading.Barrier(2, timeout=20)

    def job(number: int) -> tuple[int, int]:
        together.wait()
        return number, torch.get_num_threads()

    assert workers.run([lambda number=number: job(number) for number in range(4)]) == [(number, 1) for number in range(4)]
    assert torch.get_num_threads() == workers.count() == 2


def test_an_error_comes_through_and_the_threads_come_back() -> None:
    with pytest.raises(ZeroDivisionError):
        workers.run([lambda: 1, lambda: 1 // 0])
    assert torch.get_num_threads() == 2
    assert workers.run([lambda: 1, lambda: 2]) == [1, 2]


def test_a_second_caller_does_its_jobs_itself() -> None:
    def inner() -> list[int]:
        return workers.run([threading.get_ident, threading.get_ident])

    for idents in workers.run([inner, inner]):
        assert len(set(idents)) == 1


def test_torch_keeps_its_own_number_of_threads_whatever_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "count", lambda: 4)
    assert workers.run([lambda: 1, lambda: 2]) == [1, 2]
    assert torch.get_num_threads() == 2
