"""Small layers worked on at once: in order, each on one thread, and the caller's threads afterwards as before."""

from __future__ import annotations

import threading

import pytest
import torch

from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.solve import InProcess, LayerTask
from rankbook.calibration.methods import lcq
from rankbook.calibration.threads import workers
from rankbook.calibration.training import reconstruct
from rankbook.calibration.training.learned_rounding import LearnedRounding
from tests.calibration import problems


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
        found = at_once.map(work, range(6), lambda _: True)
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
        at_once.map(refuse, [7], lambda _: True)


def test_a_gpu_has_one_order_of_work(two_threads: None) -> None:
    with workers(torch.device("cuda")) as at_once:
        found = at_once.map(lambda _: threading.current_thread(), [1, 2], lambda _: True)
    assert found == [threading.current_thread()] * 2


def test_large_items_have_all_threads_of_the_caller(two_threads: None) -> None:
    with workers(torch.device("cpu")) as at_once:
        found = at_once.map(lambda item: (item, torch.get_num_threads()), range(5), lambda item: item % 2 == 0)
    assert found == [(0, 1), (1, 2), (2, 1), (3, 2), (4, 1)]


@pytest.mark.parametrize("size", [1 << 22, 1 << 10])
def test_small_layers_alone_are_trained_on_one_thread(
    size: int, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large ones side by side would take the memory of all of them, and leave threads without work."""
    monkeypatch.setattr(reconstruct, "SMALL", size)
    problem, counts = problems.block(), dict[str, int]()

    class Layer(LearnedRounding):
        def update(self, grad: torch.Tensor, fraction: float) -> None:
            counts[str(len(counts))] = torch.get_num_threads()
            super().update(grad, fraction)

    start = {name: lcq.quantize(part, lcq.LcqConfig(feedback_rounds=0)) for name, part in problem.layers.items()}
    layers = {name: Layer(problem.layers[name].weight, record, 1) for name, record in start.items()}
    assert all(1 << 10 < part.weight.numel() < 1 << 22 for part in problem.layers.values())
    reconstruct.train_block(problem, start, layers, reconstruct.TrainConfig(steps=1, compute="float32"))
    assert set(counts.values()) == {1 if size == 1 << 22 else 2}


def test_progress_grows_whatever_the_order_of_work(two_threads: None) -> None:
    chosen, problem = QuantizeOptions(method="rtn", group_size=32), problems.layer(32, 64)
    tasks = [LayerTask(name, chosen, lambda: problem, small=name != "b") for name in "abcd"]
    told: list[float] = []
    InProcess([torch.device("cpu")]).solve(tasks, lambda _, share: told.append(share))
    assert told == [0.0, 0.25, 0.5, 0.75]
