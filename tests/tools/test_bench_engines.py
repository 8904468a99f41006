"""`rankbook bench --device cuda` with engines, over the stand-in of TensorRT: one table, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from rankbook.exporter.export import ExportOptions, export
from rankbook.tools import errors
from rankbook.tools.bench import device_bench, device_report, gpu
from rankbook.tools.bench.device_bench import CONTENDERS, DeviceRace, Instruments
from rankbook.tools.bench.options import DeviceOptions
from rankbook.tools.bench.subject import ModelSubject
from rankbook.tools.deploy.options import BuildOptions
from rankbook.tools.runtimes import LanguageModel, open_model
from rankbook.tools.runtimes.ort import OrtModel
from tests import tensorrt_stand_in as stand_in
from tests.exporter.checkpoints import make_checkpoint
from tests.tensorrt_stand_in import State
from tests.tools.files import pretend, run_cli, stdout_json

SIZES = ["--contexts", 4, 20, "--batches", 1, 2, 3, "--prompt-lengths", 8, 40, "--steps", 2, "--repeats", 2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    checkpoint = make_checkpoint(folder, "llama", bits=4)
    export(checkpoint, folder / "onnx", ExportOptions())
    return folder / "onnx"


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> State:
    return stand_in.install(monkeypatch)


@pytest.fixture
def engine(exported: Path, tmp_path: Path, state: State) -> Path:
    options = BuildOptions(max_batch=2, max_sequence=16, max_context=32)
    return stand_in.build(state, exported, tmp_path / "engine", options)


def test_engines_and_files_in_one_table(exported, engine, tmp_path, capsys, monkeypatch):
    """Every size of every contender; batches and prompts beyond a profile, and what was not given, have a reason."""
    pretend(monkeypatch, "native-cuda", "no NVIDIA driver with a GPU answers")
    command = ["bench", engine, f"{exported}@bodies", exported, "--device", "cuda", *SIZES, "-o", tmp_path / "out"]
    assert run_cli(*command, "--json", "--quiet") == errors.OK
    report = stdout_json(capsys)
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == report
    first, second = f"{engine}@auto", f"{exported}@bodies"
    sizes = [(cell["name"], cell["tokens"], cell["batch"]) for cell in report["decode"]]
    able = ((first, 1), (second, 1), (first, 2), (second, 2), (second, 3))
    assert sizes == [(name, tokens, batch) for tokens in (4, 20) for name, batch in able]
    assert [(cell["name"], cell["tokens"]) for cell in report["prefill"]] == [(first, 8), (second, 8), (second, 40)]
    for cell in (*report["decode"], *report["prefill"]):
        assert 0 < cell["p10"] <= cell["p50"] <= cell["p90"]
        given = cell["batch"] if cell in report["decode"] else cell["tokens"]
        assert cell["tokens_per_second"] == pytest.approx(1e3 * given / cell["p50"])
        compared = cell["name"] == first
        assert (cell["ratio"] is not None) == compared
        where = "TensorRT" if cell["name"] == first else "ONNX Runtime on the CPU (bodies)"
        assert cell["contender"] == f"{where}, rankbook operators"
    missing = {item["name"]: item["reason"] for item in report["missing"]}
    assert "no NVIDIA driver" in missing[f"{exported}@native-cuda"]
    assert "--max-batch" in missing[f"{first}: decoding behind 4 tokens, batch 3"]
    assert "holds 32" in missing[f"{first}: a prompt of 40 tokens"]
    assert set(CONTENDERS) - {"TensorRT, rankbook operators"} <= set(missing)
    sizes_of = {item["name"]: item for item in report["footprints"]}
    assert sizes_of[first]["file_bytes"] == (engine / "model.engine").stat().st_size
    assert sizes_of[first]["bits"] == sizes_of[second]["bits"] > 4
    assert report["copy_bandwidth"] is None
    assert "no NVIDIA driver" in report["machine"]["gpu"]
    text = (tmp_path / "out" / "bench.md").read_text()
    assert "not measured: TensorRT, INT4 DequantizeLinear: " in text
    assert "export it with --dtype fp16 --graph static --dialect dense and build that" in text
    assert (tmp_path / "out" / "bench.png").stat().st_size > 1000


def test_engines_are_measured_on_a_gpu_alone(engine, capsys):
    """The clock of one thread does not count waiting for it."""
    assert run_cli("bench", engine, "--threads", 1, "--quiet") == errors.USAGE
    assert "give --device cuda" in capsys.readouterr().err


def test_texts_of_a_file_side_by_side(exported):
    """Each gets the logits that it gets alone; other lengths are refused."""
    model = open_model(exported, "bodies")
    tokens = np.random.default_rng(0).integers(0, 256, (2, 6))
    together = [model.start_batch(list(tokens[:, :5])), model.step_batch(tokens[:, 5].tolist())]
    for row in (0, 1):
        alone = [model.start(tokens[row : row + 1, :5]), model.step(int(tokens[row, 5]))]
        for one, many in zip(alone, together, strict=True):
            np.testing.assert_allclose(many[row], one, rtol=0, atol=1e-5 * np.abs(one).max())
    with pytest.raises(errors.UsageError, match="one length"):
        model.start_batch([tokens[0], tokens[1, :3]])


def test_where_nothing_can_be_opened_the_first_reason_is_the_error(exported, monkeypatch, capsys):
    pretend(monkeypatch, "native-cuda", "no NVIDIA driver with a GPU answers")
    assert run_cli("bench", exported, "--device", "cuda", "--quiet") == errors.MISSING
    assert "no NVIDIA driver with a GPU answers" in capsys.readouterr().err


def test_what_is_looked_at_beside_the_clock(engine, state):
    """Device memory as the device counts it, and bytes of the file over time as share of a copy's."""
    looks: list[int] = []
    taken = state.memory.room()[0]
    instruments = Instruments(1e9, lambda: state.memory.room()[0], lambda: looks.append(1))
    options = DeviceOptions(contexts=(4,), prompts=(8,), steps=2, repeats=1)
    race = DeviceRace(options, instruments)
    report = race.run([ModelSubject(engine)], lambda *_: None)
    (size,), (cell,) = report.footprints, report.decode
    assert size.device_bytes == taken - state.memory.room()[0] > 0
    assert cell.bandwidth_share is not None
    assert cell.bandwidth_share == pytest.approx(size.file_bytes / (cell.p50 / 1e3) / 1e9)
    assert report.prefill[0].bandwidth_share is None
    assert len(looks) == 3
    assert device_report.tables(report)[0].rows[0][-1] == f"{100 * cell.bandwidth_share:.0f} %"


def test_memory_of_larger_batches_counts(exported, monkeypatch):
    """ONNX Runtime and PyTorch take it at the first turn of a size; what passes in later turns is not the model's."""
    free = [1000]

    def taking(model: OrtModel, rows: Any) -> Any:
        free[0] -= len(rows)
        return LanguageModel.start_best(model, rows)

    monkeypatch.setattr(OrtModel, "start_best", taking)
    options = DeviceOptions(contexts=(4,), batches=(1, 8), prompts=(8,), steps=1, repeats=1)
    race = DeviceRace(options, Instruments(free=lambda: free[0]))
    report = race.run([ModelSubject(exported, "bodies")], lambda *_: None)
    opened, sizes = 1, (1, 8, 1)
    assert [item.device_bytes for item in report.footprints] == [opened + sum(sizes)]


def test_what_does_not_fit_is_listed(exported, engine, monkeypatch):
    """One contender without memory at one size is no end of the measurement; another error is."""
    state = onnxruntime.capi.onnxruntime_pybind11_state

    def full(model: OrtModel, rows: Any) -> Any:
        if len(rows) == 2:
            raise state.RuntimeException("Failed to allocate memory for requested buffer of size 4294967296")
        return LanguageModel.start_best(model, rows)

    monkeypatch.setattr(OrtModel, "start_best", full)
    options = DeviceOptions(contexts=(4,), batches=(1, 2), prompts=(8,), steps=1, repeats=1)
    subjects = [ModelSubject(engine), ModelSubject(exported, "bodies")]
    report = DeviceRace(options, Instruments()).run(subjects, lambda *_: None)
    missing = {item.name: item.reason for item in report.missing}
    said = missing[f"{exported}@bodies: decoding behind 4 tokens, batch 2"]
    assert said.startswith("the device is out of memory (Failed to allocate memory")
    assert [cell.batch for cell in report.decode] == [1, 1, 2]
    monkeypatch.setattr(OrtModel, "start_best", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        DeviceRace(options, Instruments()).run(subjects, lambda *_: None)


def nvml() -> Any:
    """Stands for the module ``pynvml``: a GPU that becomes slower and hotter."""
    clocks = iter((1980, 2619, 1755, 2619))
    names: dict[str, Any] = {"nvmlInit": lambda: None, "nvmlDeviceGetHandleByUUID": {"GPU-0a-1b": 0}.__getitem__}
    names |= {"nvmlDeviceGetName": lambda _: b"NVIDIA L4", "nvmlSystemGetDriverVersion": lambda: "580.1"}
    names |= {"nvmlDeviceGetClockInfo": lambda *_: next(clocks), "nvmlDeviceGetPowerUsage": lambda _: 71_500}
    names |= {"nvmlDeviceGetTemperature": lambda *_: 60, "NVML_CLOCK_SM": 1, "NVML_CLOCK_MEM": 2}
    return SimpleNamespace(**names, NVML_TEMPERATURE_GPU=0)


def test_clocks_and_power_are_spans():
    watch = gpu.GpuWatch("0a-1b", nvml())
    watch.look()
    watch.look()
    seen = watch.describe()
    assert (seen["gpu"], seen["driver"]) == ("NVIDIA L4", "580.1")
    assert (seen["graphics_mhz"], seen["memory_mhz"]) == ([1755, 1980], [2619, 2619])
    assert (seen["watts"], seen["celsius"]) == ([71.5, 71.5], [60, 60])


def test_contenders_have_names():
    """By runtime and dialect; what is none of those that a whole comparison has is named all the same."""

    def kind(kernels: str, dialect: str) -> str:
        return device_bench.kind(SimpleNamespace(kernels=kernels, dialect=dialect, dtype="fp16"))  # type: ignore[arg-type]

    assert kind("trt", "qdq") == "TensorRT, INT4 DequantizeLinear"
    assert kind("native-cuda", "ort") == "ONNX Runtime CUDA, MatMulNBits"
    assert kind("trt-rtx", "dense") == "TensorRT, fp16"
    assert kind("native-cuda", "dense") == "ONNX Runtime CUDA, fp16"
    assert kind("dense", "") == "PyTorch"
    assert kind("native", "qdq") == "ONNX Runtime on the CPU (native), qdq"
