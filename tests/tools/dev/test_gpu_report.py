"""The report on a GPU: what runs in which order, what it writes, and what it says without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rankbook.tools.dev import gpu_report, kernel_library
from rankbook.tools.dev.gpu_parts import PARTS, Request
from rankbook.tools.dev.gpu_report import Report
from rankbook.tools.errors import CheckFailedError, MissingError

MACHINE = {"gpu": "NVIDIA H200", "architecture": 90, "memory_gb": 150.1}
SHAPE = {"rows": 64, "columns": 128, "planes": 0, "branch_rank": 0, "group": 0, "int8": False, "bits": 16}
PACKED = {**SHAPE, "what": "packed", "bits": 4, "planes": 1, "group": 128}
TIMINGS: list[dict[str, Any]] = [
    {**SHAPE, "what": "copy", "tokens": 0, "seconds": 4e-6, "gb_per_s": 4000.0},
    {**SHAPE, "what": "torch", "tokens": 1, "seconds": 20e-6, "gb_per_s": 3000.0},
    {**SHAPE, "what": "torch", "tokens": 16, "seconds": 30e-6, "gb_per_s": 2000.0},
    {**PACKED, "tokens": 1, "seconds": 8e-6, "gb_per_s": 3200.0},
    {**PACKED, "tokens": 16, "seconds": 15e-6, "gb_per_s": 1600.0},
    {**PACKED, "tokens": 1, "seconds": 10e-6, "gb_per_s": 2400.0, "branch_rank": 32, "int8": True},
]
FOUND: dict[str, Any] = {
    "machine": MACHINE,
    "build": {"library": "kernels.so", "megabytes": 28.0},
    "results": {"checks": 160, "worst_share_of_bound": 0.25, "wrong": []},
    "bits": {"turns": 500, "wrong": []},
    "speed": {"count": 6, "timings": TIMINGS, "left_out": ["stopped early"]},
    "prediction": {"gpu": "H200-SXM", "predictions": [None, None, None, 4e-6, 10e-6, 5e-6]},
    "model": {"perplexity_cuda:0": 20.0, "wrong": [f"differ, see {kernel_library.ROOT}/build/log"]},
}


class Parts:
    """Answers as the parts of a machine with a GPU, and keeps what it was asked."""

    def __init__(self, **answers: Any) -> None:
        self.answers = {**{name: {"found": found} for name, found in FOUND.items()}, **answers}
        self.asked: dict[str, Request] = {}

    def __call__(self, request: Request) -> dict[str, Any]:
        self.asked[request.part] = request
        return dict(self.answers.get(request.part, {"missing": f"{request.part} needs a package"}))


@pytest.fixture(autouse=True)
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Runs keep their files in a folder of the test."""
    monkeypatch.setattr(gpu_report, "WORK", tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def report() -> Report:
    return gpu_report.run(part=Parts())


def test_every_part_runs_in_order_and_knows_what_earlier_ones_found(work: Path) -> None:
    work.mkdir()
    (work / "of an earlier run").touch()
    parts = Parts()
    report = gpu_report.run("some/model", part=parts)
    assert list(parts.asked) == list(report.parts) == list(report.seconds) == list(PARTS)
    assert (parts.asked["build"].architecture, parts.asked["build"].library) == (90, "")
    assert (parts.asked["model"].library, parts.asked["model"].model) == ("kernels.so", "some/model")
    assert parts.asked["speed"].seconds == PARTS["speed"].seconds
    assert parts.asked["speed"].timings == ()
    assert parts.asked["prediction"].timings == tuple(TIMINGS)
    assert parts.asked["prediction"].gpu == "NVIDIA H200"
    assert not list(work.glob("*"))


def test_the_minutes_are_never_exceeded() -> None:
    now = [0.0]
    limits: dict[str, float] = {}
    answers = Parts()

    def slow(request: Request) -> dict[str, Any]:
        limits[request.part] = request.seconds
        now[0] += request.seconds  # each takes all that it may
        return answers(request)

    report = gpu_report.run(part=slow, clock=lambda: now[0])
    assert now[0] <= gpu_report.SECONDS == 480
    assert limits["results"] == PARTS["results"].seconds
    assert limits["speed"] == 480 - sum(PARTS[name].seconds for name in ("machine", "build", "results", "bits"))
    assert "engine" not in limits
    assert report.parts["engine"] == {"missing": "the 8 minutes of the report were over"}
    assert "engine: the 8 minutes of the report were over" in report.left_out


def test_without_a_library_its_parts_do_not_run_and_say_so() -> None:
    parts = Parts(build={"failed": "RuntimeError: error in launch.cu"})
    report = gpu_report.run(part=parts)
    assert list(parts.asked) == ["machine", "build", "engine"]
    assert report.wrong == ["build: RuntimeError: error in launch.cu"]
    assert "speed: the library of the kernels could not be built" in report.left_out
    assert gpu_report.markdown(report).startswith("# NVIDIA H200\n")


def test_neither_gpu_nor_compiler_ends_the_report() -> None:
    with pytest.raises(MissingError, match="nothing to report on: no GPU"):
        gpu_report.run(part=Parts(machine={"missing": "no GPU"}))
    with pytest.raises(MissingError, match="nothing to report on: nvcc is not installed"):
        gpu_report.run(part=Parts(build={"missing": "nvcc is not installed"}))
    with pytest.raises(CheckFailedError, match="does not answer: its process ended with -11"):
        gpu_report.run(part=Parts(machine={"failed": "its process ended with -11"}))


def test_timings_are_compared_with_torch_the_copy_and_the_prediction() -> None:
    found = gpu_report.compared(TIMINGS, FOUND["prediction"]["predictions"])
    assert [item["times_predicted"] for item in found] == [None, None, None, 2.0, 1.5, 2.0]
    assert [item["times_torch"] for item in found] == pytest.approx([None, 1, 1, 2.5, 2, 2])
    assert [item["share_of_copy"] for item in found] == pytest.approx([1, 0.75, 0.5, 0.8, 0.4, 0.6])
    assert [item["predicted_seconds"] for item in gpu_report.compared(TIMINGS, [])] == [None] * 6


def test_the_text_has_verdict_tables_and_what_did_not_run(report: Report) -> None:
    text = gpu_report.markdown(report)
    assert f"- **wrong**: model: differ, see {kernel_library.ROOT}/build/log" in text
    for left in ("cases: cases needs a package", "engine: engine needs a package", "speed: stopped early"):
        assert f"- **did not run**: {left}" in text
    assert "turns: 500 |" in text
    assert "| checks: 160; worst share of bound: 0.25 |" in text
    assert "A copy within the memory moves 4000 GB/s, read and written." in text
    assert "|  | M = 1 | M = 16 | share of the copy, M = 1 |" in text
    assert "| torch, fp16 | 20.0 | 30.0 | 75% |" in text
    assert "| 4 bits, planes 1 | 8.0 (2.5) | 15.0 (2.0) | 80% |" in text
    assert "| 4 bits, planes 1, branch of rank 32, int8 | 10.0 (2.0) |  | 60% |" in text
    assert "| 4 bits, planes 1 | 2.00 (4.0) | 1.50 (10.0) |" in text
    assert text.count("torch, fp16") == 1, "it is no kernel that is predicted"


def test_without_a_prediction_there_is_no_table_of_it() -> None:
    text = gpu_report.markdown(gpu_report.run(part=Parts(prediction={"missing": "the roofline knows no such GPU"})))
    assert "Measured over predicted" not in text
    assert "- **did not run**: prediction: the roofline knows no such GPU" in text
    assert "| 4 bits, planes 1 | 8.0 (2.5) | 15.0 (2.0) | 80% |" in text


def test_both_files_are_written_and_the_exit_code_is_the_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_report, "run_part", Parts(bits={"found": {"turns": 500, "share": float("nan")}}))
    assert gpu_report.main(["--output", str(tmp_path / "gpu")]) == 1
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "gpu" / "nvidia-h200.md")
    assert "model: differ" in said.err
    assert "did not run: engine: engine needs a package" in said.err
    content = json.loads((tmp_path / "gpu" / "nvidia-h200.json").read_text(), parse_constant=pytest.fail)
    assert content["wrong"] == ["model: differ, see build/log"]
    assert len(content["left_out"]) == 3
    assert content["timings"][3]["times_predicted"] == 2.0
    assert content["parts"]["speed"]["found"] == {"count": 6, "left_out": ["stopped early"]}
    assert content["parts"]["bits"]["found"]["share"] is None
    assert set(content["seconds"]) == set(PARTS)
    monkeypatch.setattr(gpu_report, "run_part", Parts(model={"found": {}}))
    assert gpu_report.main(["--output", str(tmp_path / "gpu")]) == 0
    assert "Everything that ran is right." in (tmp_path / "gpu" / "nvidia-h200.md").read_text()


def test_a_process_that_breaks_or_does_not_end_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import os; os.write(2, b'gone'); os.abort()\n")
    (tmp_path / "endless.py").write_text("import signal, time; signal.alarm(1); time.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    request = Request("speed", 1.0, str(tmp_path / "work"))
    assert "its process ended with -6: gone" in gpu_report.run_part(request, "broken")["failed"]
    found = gpu_report.run_part(request, "endless")
    assert found == {"failed": "not at its end after 1 s, and was ended"}


def test_kernels_can_be_compiled_for_another_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernel_library, "build", lambda architecture, native: Path(f"sm_{architecture}-{native}.so"))
    assert gpu_report.main(["--compile", "90"]) == 0
    assert capsys.readouterr().out == "sm_90-None.so\n"


def test_make_without_a_gpu_says_so_in_one_sentence_and_fails_with_3() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = ["make", "-s", "gpu-report", f"REPORT_PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=kernel_library.ROOT, capture_output=True, text=True, check=False)
    sentence, last = done.stderr.strip().splitlines()[-2:]
    assert sentence.startswith(f"nothing to report on: PyTorch {torch.__version__} finds no NVIDIA GPU: ")
    assert last.endswith("Error 3")
    assert done.returncode
