"""The cache of ONNX Runtime stays on the device: over a stand-in of one, which counts what crosses its border.

The session computes on the CPU; values "on the device" are refused to whoever wants them as an array, but for what is
counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from rankbook.exporter.export import ExportOptions, export
from rankbook.tools.runtimes.ort import OrtModel
from tests.exporter.checkpoints import make_checkpoint

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12))
GRAPHS = {
    "standard": ExportOptions(),
    "ort": ExportOptions(graph="ort"),
    "static": ExportOptions(graph="static", max_context=24, sample="greedy"),
}
DEVICE = "cuda"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama's checkpoint, and its file in every graph."""
    folder = tmp_path_factory.mktemp("device")
    checkpoint = make_checkpoint(folder, "llama", model={"num_hidden_layers": 1, "head_dim": 16}, bits=4)
    for name, options in GRAPHS.items():
        export(checkpoint, folder / name, options)
    return folder


class Traffic:
    """Bytes that crossed the border of the device."""

    def __init__(self) -> None:
        self.up: list[int] = []
        self.down: list[int] = []

    def clear(self) -> None:
        self.up.clear()
        self.down.clear()


class Value:
    """Stands for ``onnxruntime.OrtValue``."""

    traffic: Traffic
    real: Any = onnxruntime.OrtValue

    def __init__(self, held: Any, device: str) -> None:
        self.held, self.device = held, device

    @classmethod
    def ortvalue_from_numpy(cls, array: Any, device: str = "cpu") -> Value:
        if device == DEVICE:
            cls.traffic.up.append(array.nbytes)
            array = array.copy()
        return cls(cls.real.ortvalue_from_numpy(array), device)

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape: Any, kind: Any, device: str = "cpu") -> Value:
        return cls(cls.real.ortvalue_from_shape_and_type(shape, kind), device)

    def update_inplace(self, array: Any) -> None:
        if self.device == DEVICE:
            self.traffic.up.append(array.nbytes)
        self.held.update_inplace(array)

    def numpy(self) -> Any:
        array = self.held.numpy()
        if self.device == DEVICE:
            self.traffic.down.append(array.nbytes)
            return array.copy()
        return array

    def shape(self) -> Any:
        return self.held.shape()

    def data_ptr(self) -> int:
        return int(self.held.data_ptr())


class Binding:
    """Stands for an ``IOBinding`` of a session on the device."""

    def __init__(self, held: Any, traffic: Traffic) -> None:
        self.held, self.traffic = held, traffic
        self.places: dict[str, str] = {}

    def bind_cpu_input(self, name: str, array: Any) -> None:
        self.traffic.up.append(array.nbytes)
        self.held.bind_cpu_input(name, array)

    def bind_input(self, name: str, device: str, index: int, kind: Any, shape: Any, place: int) -> None:
        assert device == DEVICE
        self.held.bind_input(name, "cpu", index, kind, shape, place)

    def bind_ortvalue_input(self, name: str, value: Value) -> None:
        assert value.device == DEVICE, f"{name} would be copied to the device"
        self.held.bind_ortvalue_input(name, value.held)

    def bind_output(self, name: str, device: str = "cpu") -> None:
        self.places[name] = device
        self.held.bind_output(name)

    def bind_ortvalue_output(self, name: str, value: Value) -> None:
        self.places[name] = value.device
        self.held.bind_ortvalue_output(name, value.held)

    def get_outputs(self) -> list[Value]:
        values = [
            Value(value, device) for value, device in zip(self.held.get_outputs(), self.places.values(), strict=True)
        ]
        self.traffic.down += [value.held.numpy().nbytes for value in values if value.device == "cpu"]
        return values


class Session:
    """Stands for a session on the device."""

    def __init__(self, held: Any, traffic: Traffic) -> None:
        self.held, self.traffic = held, traffic

    def io_binding(self) -> Binding:
        return Binding(self.held.io_binding(), self.traffic)

    def get_outputs(self) -> Any:
        return self.held.get_outputs()

    def run_with_iobinding(self, binding: Binding) -> None:
        self.held.run_with_iobinding(binding.held)


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    found = Traffic()
    monkeypatch.setattr(Value, "traffic", found, raising=False)
    monkeypatch.setattr(onnxruntime, "OrtValue", Value)
    return found


def on_device(folder: Path, traffic: Traffic) -> OrtModel:
    model = OrtModel(folder)
    model.device, model.session = DEVICE, Session(model.session, traffic)
    return model


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_step_moves_its_tokens_and_what_is_wanted(graph: str, work: Path, traffic: Traffic) -> None:
    """No key and no value comes to the host or goes back, whether the cache grows or not."""
    model, rows = on_device(work / graph, traffic), list(TOKENS[:, :6])
    given = [model.start_batch(rows), model.step_batch(TOKENS[:, 6].tolist())]
    traffic.clear()
    given += [model.step_batch(TOKENS[:, index].tolist()) for index in range(7, 11)]
    positions = 11 if graph == "standard" else 0  # the mask, which is on the device already in the other two
    # Token and position of both rows, or token, place in the cache and length.
    assert max(traffic.up, default=0) <= 8 * 2 * max(1, positions)
    assert sum(traffic.up) <= 4 * 8 * 2 * (3 + positions)
    assert set(traffic.down) <= {2 * 259 * 4}, "logits, and nothing else"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "OrtValue", Value.real)
        plain = OrtModel(work / graph)
        want = [plain.start_batch(rows), *(plain.step_batch(TOKENS[:, index].tolist()) for index in range(6, 11))]
    np.testing.assert_array_equal(np.stack(given), np.stack(want))


def test_the_graph_chooses_the_token(work: Path, traffic: Traffic) -> None:
    """Of a step 8 bytes a text come to the host."""
    model, rows = on_device(work / "static", traffic), list(TOKENS[:, :6])
    best = [model.start_best(rows)]
    best += [model.step_best(best[-1].tolist()) for _ in range(4)]
    assert set(traffic.down) == {8 * 2}
    logits = [model.start_batch(rows)]
    logits += [model.step_batch(tokens.tolist()) for tokens in best[:-1]]
    np.testing.assert_array_equal(np.stack(best), np.stack(logits).argmax(-1))
