"""Every method computes on a second device what it computes on the CPU, to the last bit, and mixes no devices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rankbook.calibration.checkpoint.format import MANIFEST
from rankbook.calibration.methods import METHODS
from rankbook.tools import errors
from tests import second_device
from tests.plugins import emulated
from tests.second_device import jobs
from tests.tiny import tiny_model, write_text
from tests.tools.method_runs import RUNS

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler")
CPU, SECOND = "cpu", second_device.NAME


@pytest.fixture(scope="module")
def there() -> Iterator[ProcessPoolExecutor]:
    """A process that has the device."""
    with second_device.process() as pool:
        yield pool


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models and a text."""
    folder = tmp_path_factory.mktemp("second")
    tiny_model("llama", folder / "model")
    tiny_model("gemma2", folder / "gemma2")
    write_text(folder / "text.txt")
    return folder


def quantize(pool: ProcessPoolExecutor, work: Path, output: Path, *flags: object, model: str = "model") -> str:
    """Quantize in the other process; return what it says."""
    calib = ["--calib", work / "text.txt", "--calib-sequences", 3, "--calib-length", 16]
    words = ["quantize", work / model, *flags, *calib, "-o", output, "--quiet", "--threads", 1]
    code, _, said = pool.submit(jobs.command, *words).result()
    assert code == 0, said
    return said


def same(
    work: Path, tmp_path: Path, pool: ProcessPoolExecutor, flags: list[object], *more: object, **where: str
) -> None:
    """Quantize on both and compare what was written; ``more`` are flags of the second device alone."""
    quantize(pool, work, tmp_path / CPU, *flags, "--device", CPU, **where)
    quantize(pool, work, tmp_path / SECOND, *flags, *(more or ("--device", SECOND)), **where)
    assert jobs.stored(tmp_path / CPU) == jobs.stored(tmp_path / SECOND)
    manifests = [json.loads((tmp_path / name / MANIFEST).read_text()) for name in (CPU, SECOND)]
    assert manifests[0]["layers"] == manifests[1]["layers"]
    assert manifests[0]["run"]["devices"] == [CPU]
    assert all(name.startswith(f"{SECOND}:") for name in manifests[1]["run"]["devices"])


def test_mixing_devices_raises_as_on_cuda(there: ProcessPoolExecutor) -> None:
    said = there.submit(jobs.mixed).result()
    for name in ("sum", "product", "two indexes", "list", "index", "in place"):
        assert "on the same device" in said[name], name
    assert "generator" in said["generator"]
    assert said["number"] == said["copy"] == f"is on {SECOND}:0"


def test_gradients_are_those_of_the_cpu(there: ProcessPoolExecutor) -> None:
    differences, where = there.submit(jobs.gradients).result()
    assert differences == [0.0] * 6
    assert where == f"{SECOND}:0"


ONE_EACH = [name for name in RUNS if name in METHODS] + ["lrq-branch"]


@pytest.mark.parametrize("name", ONE_EACH)
def test_every_method_gives_the_same_checkpoint(
    name: str, work: Path, tmp_path: Path, there: ProcessPoolExecutor
) -> None:
    same(work, tmp_path, there, ["--method", name.partition("-")[0], "--bits", 4, *RUNS[name]])


FEATURES: dict[str, list[object]] = {
    "codebooks by gradient": ["--method", "lcq", "--method-option", "steps=2", "recipe=codebook", "compute=float32"],
    "two planes, branch, fp16 side data": [
        *("--method", "lcq", "--rank", 2, "--effort", "fast", "--param-bits", 16, "--factor-bits", 16),
        *("--error-branch", "qera-diag", "--error-rank", 4, "--level-dtype", "float16"),
    ],
    "embeddings and output layer": ["--method", "lcq", "--effort", "fast", "--quantize-embeddings", 4],
    "static activations in training": [
        *("--method", "lrq", "--rank", 2, "--activations", "static8", "--kv-bits", 8),
        *("--method-option", "steps=2", "compute=float32"),
    ],
    "a budget": ["--method", "gptq", "--target-bits", 5.5, "--group-size", 16, "--quantize-lm-head", 4],
}


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_gives_the_same_checkpoint(
    name: str, work: Path, tmp_path: Path, there: ProcessPoolExecutor
) -> None:
    if "budget" in name:
        pytest.importorskip("scipy")
    same(work, tmp_path, there, FEATURES[name], model="gemma2" if "static" in name else "model")


SHORT: list[object] = ["--method", "lcq", "--method-option", "steps=2", "compute=float32"]


def test_activations_may_wait_on_the_host(work: Path, tmp_path: Path, there: ProcessPoolExecutor) -> None:
    same(work, tmp_path, there, SHORT, "--device", SECOND, "--device-memory", 0)


def test_layers_are_solved_side_by_side_on_several_devices(
    work: Path, tmp_path: Path, there: ProcessPoolExecutor
) -> None:
    same(work, tmp_path, there, SHORT, "--device", SECOND, "--devices", "1,3")
    run = json.loads((tmp_path / SECOND / MANIFEST).read_text())["run"]
    assert run["devices"] == [f"{SECOND}:1", f"{SECOND}:3"]


def test_a_full_device_says_what_would_fit_and_the_run_goes_on_elsewhere(
    work: Path, tmp_path: Path, there: ProcessPoolExecutor
) -> None:
    calib = ["--calib", work / "text.txt", "--calib-sequences", 3, "--calib-length", 16]
    words: list[Any] = ["quantize", work / "model", *SHORT, *calib, "--quiet", "--threads", 1]
    there.submit(jobs.command, *words, "--device", CPU, "-o", tmp_path / CPU).result()
    small = [*words, "-o", tmp_path / SECOND]
    code, _, said = there.submit(jobs.with_little_memory, 100_000, *small, "--device", SECOND).result()
    assert code == errors.MISSING
    assert f"memory of {SECOND}:0 does not suffice for model.layers.0" in said
    assert "--device-memory 0" in said
    assert not (tmp_path / SECOND).exists()
    code, _, said = there.submit(jobs.command, *small, "--device", CPU, "--resume").result()
    assert code == 0, said
    assert jobs.stored(tmp_path / CPU) == jobs.stored(tmp_path / SECOND)


def test_models_are_evaluated_and_continue_text_there(work: Path, tmp_path: Path, there: ProcessPoolExecutor) -> None:
    quantize(there, work, tmp_path / "q", "--method", "rtn", "--quantize-embeddings", 8, "--error-branch", "lqer")
    told = []
    for device in (CPU, SECOND):
        common = ["--device", device, "--quiet", "--json", "--threads", 1]
        text = ["--text", work / "text.txt", "--context", 32, "--max-tokens", 96, "--activations", "token8"]
        code, out, said = there.submit(jobs.command, "eval", tmp_path / "q", *text, *common).result()
        assert code == 0, said
        measured = json.loads(out)
        prompt = ["--prompt", "the quick", "--max-new-tokens", 8, "--ignore-eos"]
        code, out, said = there.submit(jobs.command, "generate", tmp_path / "q", *prompt, *common).result()
        assert code == 0, said
        told.append((measured["perplexity"], json.loads(out)["ids"]))
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (["--device", "cuda:99"], errors.MISSING, "--device"),
        (["--device", "tpu"], errors.USAGE, "PyTorch has no device 'tpu'"),
        (["--device", "cuda 1"], errors.USAGE, "give auto, cpu, cuda or cuda:N"),
        (["--devices", "0,0"], errors.USAGE, "different indexes"),
        (["--device-memory", "much"], errors.USAGE, "'much' is not a size of memory; give a number with a unit"),
        (["--device-memory", "nan"], errors.USAGE, "device_memory is nan; give a finite number"),
        (["--device-memory", "-1"], errors.USAGE, "device_memory is -1.0; give at least 0"),
        (["--device", "cuda:1", "--devices", "0,1"], errors.USAGE, "both name indexes"),
        (["--device", "cpu", "--devices", "0,1"], errors.MISSING, "solves layers by itself"),
    ],
)
def test_what_is_not_there_is_said(
    flags: list[str], code: int, text: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.tools.files import run_cli

    assert run_cli("quantize", work / "model", "--calib", work / "text.txt", "-o", tmp_path / "q", *flags) == code
    assert text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
