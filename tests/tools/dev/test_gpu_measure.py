"""What is asked of the kernels on a GPU, here over the emulation on the CPU."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rankbook.calibration.model import packed_ops
from rankbook.tools.dev import gpu_measure
from rankbook.tools.dev.gpu_measure import Meter
from tests.ops.runners import emulated_operators
from tests.plugins import emulated

CPU = torch.device("cpu")


@pytest.fixture
def kernels() -> Iterator[None]:
    """The operators compute on the CPU."""
    if emulated.compiler() is None or emulated.ON_GPU:
        pytest.skip("needs the emulation")
    with emulated_operators():
        yield


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("bits", [3, 4])
def test_right_results_pass_and_wrong_ones_do_not(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(gpu_measure.checks(CPU, (1, 17), (bits,)))
    assert len(found) == 2 * 2 * 9  # forms, tokens, types, int8 and rows, and of experts types and int8
    assert len({check.name for check in found}) == len(found)
    assert [check.name for check in found if not check.passed] == []
    assert max(check.error for check in found) > 0
    product = packed_ops.product

    def off(x: Any, *given: Any, **named: Any) -> Any:
        y = product(x, *given, **named)
        y[..., 3] *= 1.1
        return y

    monkeypatch.setattr(packed_ops, "product", off)
    assert not all(check.passed for check in gpu_measure.checks(CPU, (1,), (bits,)))
    assert not gpu_measure.Check("", float("nan"), 1.0).passed


@pytest.mark.usefixtures("kernels")
def test_bits_that_change_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_measure.unequal(CPU, 2, (1,), (4,)) == []
    product, calls = packed_ops.product, itertools.count()

    def restless(*given: Any, **named: Any) -> Any:
        y = product(*given, **named)
        y[0, 0] += next(calls) % 3 == 2
        return y

    monkeypatch.setattr(packed_ops, "product", restless)
    assert gpu_measure.unequal(CPU, 2, (1,), (4,)) == [
        "4 bits, 1 tokens: 1 of 2 turns differ",
        "4 bits, 1 tokens, int8: 1 of 2 turns differ",
    ]


@pytest.mark.parametrize(("size", "copies"), [(1 << 20, 64), (10 << 20, 26), (1 << 30, 2)])
def test_weights_of_a_turn_fill_more_than_a_cache(size: int, copies: int) -> None:
    assert Meter(CPU).copies(size) == copies


def test_the_median_turn_counts_and_turns_go_on_until_enough_is_spent() -> None:
    calls: list[str] = []
    ticks = iter([0.0, 4.0, 10.0, 16.0, 20.0, 32.0, 40.0, 48.0])  # turns of 4, 6, 12 and 8 seconds
    meter = Meter(CPU, spent=25.0, clock=lambda: next(ticks))
    assert meter.seconds(calls.append, ["a", "b"]) == 7.0 / 2
    assert calls == ["a", "b"] * 5  # once before the clock runs
    assert next(ticks, None) is None


def test_on_a_gpu_its_own_clock_counts_while_it_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host takes to launch a turn is no part of it: the device still runs the turn before."""
    calls: list[str] = []

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, _: Event) -> float:
            return 8.0  # milliseconds

    @contextlib.contextmanager
    def recorded(_: Graph) -> Iterator[None]:
        calls.append("begin")
        yield
        calls.append("end")

    for name, stand_in in {"CUDAGraph": Graph, "Event": Event, "graph": recorded}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: calls.append("wait"))
    assert Meter(torch.device("cuda:0")).seconds(calls.append, ["a", "b"]) == 0.008 / 2
    turn = ["replay", "record", "replay", "record", "wait"]
    assert calls == ["a", "b", "wait", "begin", "a", "b", "end", *turn * 3]


@pytest.mark.usefixtures("kernels")
def test_every_form_is_timed_for_every_number_of_tokens() -> None:
    clock = itertools.count()
    meter = Meter(CPU, spent=0.0, cache=0, clock=lambda: float(next(clock)))
    found = list(gpu_measure.timings(meter, ((64, 128),), (1, 17), (4,)))
    assert [item.what for item in found] == ["copy", "torch", "torch", *["packed"] * 3 * 2 * 2]
    assert {item.seconds for item in found} == {0.5}  # a turn of one second goes round two weights
    assert found[0].bytes_moved == 2 * 2 * 64 * 128
    assert found[1].bytes_moved == 2 * 64 * 128
    packed = [item.to_json() for item in found[3:]]
    forms = {(item["planes"], item["branch_rank"], item["tokens"], item["int8"]) for item in packed}
    assert len(forms) == len(packed)
    codes, levels = 64 * 128 // 2, 16
    first = packed[0]
    assert (first["bits"], first["planes"], first["branch_rank"], first["group"]) == (4, 1, 0, 128)
    assert codes + levels < first["bytes_moved"] < codes + levels + 64 * 10  # two parameters a group, and their scales
    assert first["gb_per_s"] == pytest.approx(first["bytes_moved"] / 0.5 / 1e9)
