"""`rankbook bench --device cuda`: how it refuses, and what it asks of ONNX Runtime. No GPU takes part."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from rankbook.plugins import library
from rankbook.plugins.library import unavailable as library_unavailable
from rankbook.tools import errors
from rankbook.tools.bench import layer_bench, model_bench, timing
from rankbook.tools.bench.layers import matmul_nbits, packed_matmul
from rankbook.tools.runtimes import ort as backend
from tests.tools.files import pretend, run_cli, stdout_json

LAYER = ["--shapes", "64x128", "--ranks", 1, "--repeats", 1, "--stream", 1]


class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
    """Remembers libraries, which this runtime could not use."""

    def __init__(self) -> None:
        super().__init__()
        self.libraries: list[str] = []

    def register_custom_ops_library(self, path: str) -> None:
        self.libraries.append(path)


class Session:
    """Takes what an InferenceSession takes, and answers with zeros."""

    made: list[Session]

    def __init__(self, model: bytes, options: Options, providers: list[str]) -> None:
        self.graph = onnx.load_from_string(model).graph
        self.options, self.providers = options, providers
        self.dtypes: set[str] = set()
        self.made.append(self)

    def get_providers(self) -> list[str]:
        return self.providers

    def run(self, outputs: object, feeds: dict[str, Any]) -> list[Any]:
        self.dtypes |= {str(value.dtype) for value in feeds.values()}
        return [np.zeros((1, 1))]


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    """The sessions made as if there were a GPU."""
    Session.made = []
    pretend(monkeypatch, "native-cuda")
    monkeypatch.setattr(library, "library", Path)
    monkeypatch.setattr(library, "unavailable", lambda _runtime: None)
    monkeypatch.setattr(library, "native_info", lambda runtime: {"library": runtime})
    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    return Session.made


def test_layers_and_peers_run_on_the_cuda_provider_alone(sessions, monkeypatch, capsys) -> None:
    """Those of rankbook with its CUDA library, the peers without; no node on the CPU; the clock counts waiting."""
    clocks = []

    def seconds(work: Callable[[], object], threads: int | None) -> Callable[[], float]:
        clocks.append(timing.clock(threads))
        return timing.seconds(work, threads)

    monkeypatch.setattr(layer_bench, "seconds", seconds)
    flags = ["--bits", 4, 2, "--peers", "matmulnbits", "fp32", "--json", "--quiet"]
    assert run_cli("bench", "--device", "cuda", *LAYER, *flags) == errors.OK
    report = stdout_json(capsys)
    names = [item["name"] for item in report["layers"]]
    assert names[:2] == ["rankbook 4 bits rank 1 int8", "rankbook 4 bits rank 1 fp16"]
    operators = [made.graph.node[0].op_type for made in sessions]
    native = ["CodebookMatMul4A8", "CodebookMatMul4", "CodebookMatMul2A8", "CodebookMatMul2"]
    assert operators == [*native, "MatMulNBits", "MatMul"]  # MatMulNBits has no 2 bits there
    assert [made.options.libraries for made in sessions] == [["ort-cuda"]] * 4 + [[]] * 2
    assert [made.dtypes for made in sessions] == [{"float16"}] * 5 + [{"float32"}]
    for made, item in zip(sessions, report["layers"], strict=True):
        assert made.providers == ["CUDAExecutionProvider"]
        assert made.options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        assert item["threads"] == 1
    assert set(clocks) == {time.perf_counter}
    assert report["machine"]["native"] == {"library": "ort-cuda"}
    assert report["bandwidth"] == {}


def test_models_run_with_native_cuda(tmp_path, monkeypatch, sessions) -> None:
    """Where kernels are chosen so; turns are timed on the wall."""
    seen: list[model_bench.ModelRace] = []

    def measure(race: model_bench.ModelRace, _progress: object) -> list[model_bench.ModelResult]:
        seen.append(race)
        return []

    monkeypatch.setattr(model_bench, "measure_models", measure)
    models = [tmp_path, f"{tmp_path}@bodies"]
    assert run_cli("bench", *models, "--kernels", "native-cuda", "--threads", 1, "--quiet") == errors.OK
    (race,) = seen
    assert [subject.runtime for subject in race.subjects] == ["native-cuda", "bodies"]
    assert race.clock_threads is None
    assert replace(race, subjects=race.subjects[1:]).clock_threads == 1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "subject",
    [
        packed_matmul(4, 1, gpu=True),
        packed_matmul(3, 2, branch=4, gpu=True),
        packed_matmul(2, 1, activations="fp32", gpu=True),
        matmul_nbits(4),
    ],
    ids=lambda subject: subject.name,
)
@pytest.mark.skipif(library_unavailable("ort") is not None, reason=str(library_unavailable("ort")))
def test_the_graphs_are_valid(subject, dtype) -> None:
    """The same graphs on the CPU, which has all these operators."""
    model, _, _ = replace(subject, dtype=dtype).model((64, 128), 1)
    (y,) = backend.session(model.SerializeToString(), native=True).run(None, {"x": np.ones((2, 128), dtype)})
    assert y.shape == (2, 64)
    assert y.dtype == dtype
    assert np.isfinite(y).all()


@pytest.mark.skipif(backend.cuda_unavailable() is None, reason="there is a GPU")
@pytest.mark.parametrize("model", [False, True])
def test_without_a_gpu_it_says_what_native_cuda_says(model, tmp_path, capsys) -> None:
    """The same code and words for both spellings."""
    models = [tmp_path] if model else []
    said = []
    for flags in (["--device", "cuda"], ["--kernels", "native-cuda"]):
        assert run_cli("bench", *models, *flags, *LAYER, "--quiet") == errors.MISSING
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    assert str(backend.cuda_unavailable()) in said[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--kernels", "native-int8"], "contradict"),
        (["--no-native"], "contradict"),
        (["model", "--peers", "genai=model"], "--dialect ort"),
        (["--peers", "genai=model"], "matmulnbits, fp32, none"),
    ],
)
def test_wrong_flags_are_named(flags, words, capsys, sessions) -> None:
    """A usage error with what is allowed."""
    assert run_cli("bench", *flags, "--device", "cuda", *LAYER, "--quiet") == errors.USAGE
    assert words in capsys.readouterr().err
    assert not sessions
