"""Layers worked on at once: in order, each on one thread, and the caller's threads afterwards as before."""

from __future__ import annotations

import threading

import pytest
import torch

from rankbook.calibration.threads import workers


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_each_item_is_worked_on_by_one_thread_and_results_keep_their_order(two_threads: None) -> None:
    started = threading.Barrier(2, timeout=60)

    def work(item: int) -> tuple[int, int, str]:
        if item < 2:
            started.wait()  # two at once, or this ends with an error
        return item, torch.get_num_threads(), threading.current_thread().name

    with workers(torch.device("cpu")) as at_once:
        found = at_once.map(work, range(6))
        assert torch.get_num_threads() == 2
    assert [item for item, _, _ in found] == list(range(6))
    assert {count for _, count, _ in found} == {1}
    assert len({name for _, _, name in found}) == 2
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [torch.get_num_threads()] == [2]


def test_errors_reach_the_caller(two_threads: None) -> None:
    def refuse(item: int) -> None:
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 7"), workers(torch.device("cpu")) as at_once:
        at_once.map(refuse, [7])


def test_a_gpu_has_one_order_of_work(two_threads: None) -> None:
    with workers(torch.device("cuda")) as at_once:
        assert at_once.map(lambda _: threading.current_thread(), [1, 2]) == [threading.current_thread()] * 2
