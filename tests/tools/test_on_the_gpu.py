"""The verbs on a GPU against the same on the CPU: what a machine without one cannot show. See plugins/csrc/GPU.md.

None of it has run on a GPU yet. The bounds are those of docs/gpu.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankbook.calibration.checkpoint.format import load_records
from rankbook.calibration.methods import METHODS
from rankbook.tools.dev.kernel_library import present_architecture
from rankbook.tools.runtimes import open_model, runtimes, trt
from rankbook.tools.runtimes.trt_engine import RUNTIME_CACHE_NAME
from rankbook.tools.runtimes.trt_model import EngineModel
from tests.tiny import tiny_model, write_text
from tests.tools.files import run_cli, stdout_json
from tests.tools.method_runs import RUNS

EQUAL_CODES, PERPLEXITIES = 0.999, 2e-3
"""Least share of equal codes, and largest difference of perplexities as a share, between the GPU and the CPU."""
CONTEXT = 64
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a text, and a checkpoint ``q`` that was made on the CPU."""
    folder = tmp_path_factory.mktemp("gpu")
    tiny_model("llama", folder / "model", head_dim=16)
    write_text(folder / "text.txt")
    quantize(folder, folder / "q", "cpu", "rtn", "--bits", 4)
    return folder


def quantize(work: Path, output: Path, device: str, method: str, *flags: object) -> None:
    calib = ["--calib", work / "text.txt", "--calib-sequences", 3, "--calib-length", 16]
    words = ["quantize", work / "model", "--method", method, *flags, *calib, "--device", device, "-o", output]
    assert run_cli(*words, "--quiet") == 0


def equal_codes(first: Path, second: Path) -> float:
    """Return the share of weights that have the same code in two checkpoints."""
    records = [load_records(folder) for folder in (first, second)]
    assert records[0].keys() == records[1].keys()
    pairs = [(one.codes, records[1][name].codes) for name, one in records[0].items()]
    same = sum(int((one == other).sum()) for one, other in pairs)
    return same / sum(one.numel() for one, _ in pairs)


def measured(model: Path, work: Path, capsys: pytest.CaptureFixture[str], device: str = "cpu") -> tuple[float, Any]:
    """Return the perplexity of a model and the tokens with which it continues a prompt."""
    capsys.readouterr()
    how = ["--device", device, "--json", "--quiet"]
    text = ["--text", work / "text.txt", "--context", 32, "--max-tokens", 96]
    assert run_cli("eval", model, *text, *how) == 0
    perplexity = stdout_json(capsys)["perplexity"]
    prompt = ["--prompt", "the quick", "--max-new-tokens", 8, "--ignore-eos"]
    assert run_cli("generate", model, *prompt, *how) == 0
    return perplexity, stdout_json(capsys)["ids"]


def test_equal_codes_are_counted(work: Path, tmp_path: Path) -> None:
    """A measure that always says 1 would prove nothing on the GPU."""
    quantize(work, tmp_path / "other", "cpu", "gptq", "--bits", 4)
    assert equal_codes(work / "q", work / "q") == 1
    assert equal_codes(work / "q", tmp_path / "other") < EQUAL_CODES


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("method", sorted(set(RUNS) & set(METHODS)))
def test_a_method_gives_the_checkpoint_of_the_cpu(
    method: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for device in ("cpu", "cuda"):
        quantize(work, tmp_path / device, device, method, "--bits", 4, *RUNS[method])
    assert equal_codes(tmp_path / "cpu", tmp_path / "cuda") >= EQUAL_CODES
    found, want = (measured(tmp_path / device, work, capsys)[0] for device in ("cuda", "cpu"))
    assert found == pytest.approx(want, rel=PERPLEXITIES)


@pytest.mark.gpu
@on_a_gpu
def test_a_checkpoint_computes_on_the_gpu_what_it_computes_on_the_cpu(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, want = (measured(work / "q", work, capsys, device) for device in ("cuda", "cpu"))
    assert found[0] == pytest.approx(want[0], rel=PERPLEXITIES)
    assert found[1] == want[1]


def built(work: Path, output: Path, runtime: str, *flags: object) -> Path:
    """Build an engine for the GPU of this machine."""
    if reason := runtimes()[runtime].unavailable():
        pytest.skip(reason)
    target = {"trt-rtx": "rtx", "trt": "trt"}[runtime]
    capability = f"SM{present_architecture()}"
    if target == "rtx" and capability not in trt.RTX_CAPABILITIES:
        pytest.skip(f"TensorRT-RTX builds no engines for {capability}")
    sizes = ["--max-batch", 2, "--max-sequence", 8, "--max-context", CONTEXT]
    where = ["--compute-capability", capability] if target == "rtx" else []
    assert run_cli("build", work / "q", "--target", target, *where, *sizes, *flags, "-o", output, "--quiet") == 0
    return output


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [(), ("--sample", "greedy"), ("--dtype", "bf16"), ("--dtype", "fp32")], ids=str)
@pytest.mark.parametrize("runtime", ["trt-rtx", "trt"])
def test_an_engine_computes_what_pytorch_and_onnx_runtime_compute(
    runtime: str, flags: tuple[str, ...], work: Path, tmp_path: Path
) -> None:
    """Prompts of several pieces, steps, texts of several lengths side by side, what is compiled kept for later."""
    engine = built(work, tmp_path / "engine", runtime, *flags)
    assert run_cli("parity", engine, "--quiet", "--tokens", 24, "--greedy", 16) == 0
    tokens = np.random.default_rng(0).integers(0, 250, (2, 40))
    for _ in range(2):
        model = open_model(engine)
        assert isinstance(model, EngineModel)
        texts = [tokens[0, :19], tokens[1, :3]]
        together = [model.start_batch(texts), *(model.step_batch(tokens[:, 20 + step].tolist()) for step in range(6))]
        for row, text in enumerate(texts):
            alone = [model.start(text[None]), *(model.step(int(tokens[row, 20 + step])) for step in range(6))]
            for one, many in zip(alone, together, strict=True):
                np.testing.assert_allclose(many[row], one, rtol=0, atol=2e-2 * np.abs(one).max())
        best = model.start_best(texts)
        np.testing.assert_array_equal(best, model.start_batch(texts).argmax(-1))
        assert (engine / RUNTIME_CACHE_NAME).is_file() == (runtime == "trt-rtx")


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["standard", "ort", "static"])
def test_onnx_runtime_computes_on_the_gpu_what_pytorch_computes(graph: str, work: Path, tmp_path: Path) -> None:
    if reason := runtimes()["native-cuda"].unavailable():
        pytest.skip(reason)
    context = ["--max-context", CONTEXT] if graph == "static" else []
    assert run_cli("export", work / "q", "--graph", graph, *context, "-o", tmp_path / "onnx", "--quiet") == 0
    assert run_cli("parity", tmp_path / "onnx", "--kernels", "native-cuda", "--tokens", 24, "--quiet") == 0


@pytest.mark.gpu
def test_everything_that_is_there_is_timed(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An engine, a file and the checkpoint side by side; clocks and power through NVML."""
    pytest.importorskip("pynvml")
    engine = built(work, tmp_path / "engine", "trt" if runtimes()["trt"].unavailable() is None else "trt-rtx")
    sizes = ["--contexts", 16, "--batches", 1, 2, "--prompt-lengths", 8, 24, "--steps", 4]
    capsys.readouterr()
    assert run_cli("bench", engine, work / "q", "--device", "cuda", *sizes, "--json", "--quiet") == 0
    found = stdout_json(capsys)
    assert {cell["contender"] for cell in found["decode"]} == {"TensorRT, rankbook operators", "PyTorch"}
    assert len(found["prefill"]) == 4
    assert found["machine"]["watts"]
