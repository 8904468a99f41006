"""The parts of the report on a GPU: over the emulation, on the CPU, and what each says where something is missing."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rankbook.plugins import library
from rankbook.plugins.widths import BITS
from rankbook.tools.commands import discover
from rankbook.tools.dev import gpu_parts, gpu_report, kernel_library, layer_time, roofline, sass
from rankbook.tools.dev.gpu_measure import FORMS, GROUP, TOKENS, Meter
from rankbook.tools.dev.gpu_parts import Effort, Request, answer
from rankbook.tools.errors import CommandError, MissingError
from rankbook.tools.flags import flags_of
from tests.ops.runners import RUNNERS, emulated_operators
from tests.plugins import emulated
from tests.processes import run_python
from tests.tiny import tiny_model

PACKED = {"what": "packed", "rows": 4096, "columns": 4096, "bits": 4, "planes": 1, "branch_rank": 32, "group": 128}
PACKED |= {"tokens": 1, "int8": False}


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    """A request to compute on the CPU."""
    return Request("", 100.0, str(tmp_path), device="cpu", gpu="NVIDIA H200", architecture=90)


@pytest.fixture
def kernels() -> Iterator[None]:
    """The operators compute on the CPU."""
    if emulated.compiler() is None or emulated.ON_GPU:
        pytest.skip("needs the emulation")
    with emulated_operators():
        yield


@pytest.mark.usefixtures("kernels")
def test_kernels_are_compared_repeated_and_timed(request_: Request) -> None:
    found = gpu_parts.results(request_, tokens=(1,), bits=(2,))
    assert found["checks"] == 10 + 8  # of products, and of stacks of experts
    assert found["wrong"] == []
    assert 0 < found["worst_share_of_bound"] <= 1
    assert gpu_parts.bits(request_, 1, tokens=(1,), bits=(2,)) == {"turns": 1, "wrong": []}


@pytest.mark.usefixtures("kernels")
def test_timing_stops_in_time_and_keeps_what_it_has(request_: Request) -> None:
    sizes: dict[str, Any] = {"shapes": ((32, 128),), "tokens": (1,), "bits": (4,)}
    short = {"spent": 0.0, "cache": 0}
    clock = itertools.count(step=30)  # each look at the clock is half a minute later than the last
    meter = Meter(gpu_parts._device(request_), **short)  # type: ignore[arg-type]
    found = gpu_parts.speed(request_, lambda: float(next(clock)), meter=meter, **sizes)
    assert [item["what"] for item in found["timings"]] == ["copy", "torch", "packed", "packed"]
    assert found["left_out"] == ["stopped after 90 s: what the tables lack was not timed"]
    found = gpu_parts.speed(request_, lambda: 0.0, meter=meter, **sizes)
    assert found["count"] == len(found["timings"]) == 2 + 3 * 2
    assert found["left_out"] == []


def test_only_a_few_wrong_results_are_listed_and_the_others_counted() -> None:
    assert gpu_parts._first(["a"] * 20) == ["a"] * 20
    assert gpu_parts._first(["a"] * 23) == [*["a"] * 20, "and 3 more"]


@pytest.mark.slow
def test_a_model_is_quantized_evaluated_and_continued(request_: Request, tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "model", hidden_size=64, intermediate_size=128, max_position_embeddings=512)
    asked = dataclasses.replace(request_, model=str(tmp_path / "model"), device="cpu")
    found = gpu_parts.model(asked, Effort(sequences=1, steps=1, tokens=64, new_tokens=4))
    assert found["source"] == "model"
    assert found["bits_per_weight"] > 3
    assert found["perplexity"] == found["perplexity_on_cpu"] > 1
    assert found["tokens_per_second"] > 0
    assert found["layers"] == found["layers_on_cpu"] == "dense: there are no kernels for tensors on cpu"
    assert found["wrong"] == []
    assert (tmp_path / "checkpoint" / "config.json").is_file()


def test_perplexities_that_differ_are_wrong() -> None:
    assert gpu_parts.apart(20.03, 20.0, "cuda:0") == []
    (sentence,) = gpu_parts.apart(20.05, 20.0, "cuda:0")
    assert sentence == "the perplexities of cuda:0 and cpu are 0.25% apart, 0.2 % are allowed"
    assert gpu_parts.apart(float("nan"), 20.0, "cuda:0")


@pytest.mark.parametrize(
    ("part", "gone", "sentence"),
    [
        ("cases", "hypothesis", "the test cases need hypothesis: pip install them"),
        ("model", "transformers", "quantizing a model needs transformers: pip install them"),
        ("machine", "torch", "PyTorch is not installed"),
        ("engine", "", "there is no checkpoint to build an engine from"),
        ("prediction", "", "the roofline knows no 'NVIDIA H200 NVL'"),
    ],
)
def test_what_is_missing_is_said(
    part: str, gone: str, sentence: str, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_parts, "find_spec", lambda name: None if name == gone else name)
    monkeypatch.setattr(gpu_parts, "_use", lambda _: None)
    asked = dataclasses.replace(request_, part=part, gpu="NVIDIA H200 NVL")
    assert sentence in answer(asked)["missing"]


def test_the_demo_model_and_tensorrt_may_be_missing(
    request_: Request, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from rankbook.tools import demo

    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    monkeypatch.setattr(gpu_parts, "_use", lambda _: None)
    assert "the demo's model is not installed" in answer(dataclasses.replace(request_, part="model"))["missing"]
    (tmp_path / "checkpoint").mkdir()
    said = answer(dataclasses.replace(request_, part="engine"))["missing"]
    assert "tensorrt" in said


def test_an_engine_is_built_run_and_compared_with_flags_that_there_are(
    request_: Request, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from rankbook.tools import runtimes, stages

    verbs = {name: flags_of(command.options).values() for name, command in discover().items()}
    known = {verb: {word for flag in flags for word in flag.flags} for verb, flags in verbs.items()}
    commands: list[Any] = []

    def run_stage(name: str, arguments: Any, log: Path) -> stages.Stage:
        assert log.parent == tmp_path
        commands.append(arguments)
        return stages.Stage(name, "", 1.0, 0, name != "parity", {"tokens_per_second": 9.0})

    (tmp_path / "checkpoint").mkdir()
    monkeypatch.setattr(stages, "run_stage", run_stage)
    monkeypatch.setattr(library, "unavailable", lambda _: None)
    here = {name: SimpleNamespace(unavailable=lambda: None) for name in ("trt-rtx", "trt")}
    monkeypatch.setattr(runtimes, "runtimes", lambda: here)
    assert gpu_parts.engine(request_)["target"] == "trt", "TensorRT-RTX has nothing for an H200"
    assert "--compute-capability" not in commands[0]
    commands.clear()
    found = gpu_parts.engine(dataclasses.replace(request_, architecture=89))
    assert (found["target"], found["tokens_per_second"]) == ("rtx", 9.0)
    assert commands[0][4:6] == ["--compute-capability", "SM89"]
    assert found["wrong"] == [f"parity: a check failed, see {tmp_path / 'engine.log'}"]
    assert [words[:2] for words in commands] == [
        ["build", str(tmp_path / "checkpoint")],
        ["generate", str(tmp_path / "engine")],
        ["parity", str(tmp_path / "engine")],
    ]
    for verb, *words in commands:
        assert {word for word in words if word.startswith("-")} <= known[verb]


def test_what_breaks_is_reported(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_library, "build", lambda _: 1 / 0)
    found = answer(dataclasses.replace(request_, part="build"))
    assert found == {"failed": "ZeroDivisionError: division by zero"}


def test_cases_that_fail_or_do_not_begin_are_wrong(request_: Request, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho $RANKBOOK_KERNELS_ON $*; echo FAILED a; echo '1 failed, 2 skipped'; exit 1\n")
    script.chmod(0o755)
    found = gpu_parts.cases(request_, str(script))
    assert found["wrong"] == ["FAILED a"]
    assert found["left_out"] == [found["summary"]] == ["1 failed, 2 skipped"]
    script.write_text("#!/bin/sh\necho no tests >&2; exit 5\n")
    assert gpu_parts.cases(request_, str(script)) == {"summary": "", "wrong": ["no tests"], "left_out": []}
    script.write_text("#!/bin/sh\necho $RANKBOOK_KERNELS_ON $*\n")
    found = gpu_parts.cases(request_, str(script))
    assert found["summary"].startswith("gpu -m pytest")
    assert found["wrong"] == []
    script.write_text(
        "#!/bin/sh\necho 'a.py::one PASSED'; echo 'a.py::two FAILED'; echo 'a.py::three '; exec sleep 60\n"
    )
    late = gpu_parts.cases(dataclasses.replace(request_, seconds=2.0), str(script))
    assert late == {"summary": "3 cases", "wrong": ["a.py::two FAILED"], "left_out": ["stopped after 2 s"]}


def test_the_cases_are_those_of_the_kernels() -> None:
    file, option, words = gpu_parts.CASES
    assert (kernel_library.ROOT / file).is_file()
    assert option == "-k"
    names = [f"{runner.name}: {case}" for runner in RUNNERS.values() for case in runner.cases]
    chosen = [name for name in names if words in name]
    assert chosen == [f"cuda: {case}" for case in RUNNERS["cuda"].cases]


@pytest.fixture(scope="module")
def code() -> Any:
    """Loops and registers of the kernels in the library, read once: cuobjdump takes its time."""
    if reason := library.unavailable("trt"):
        pytest.skip(reason)
    try:
        sass.tool("cuobjdump")
    except CommandError as error:
        pytest.skip(str(error))
    return layer_time.compiled(library.library("trt"), 80)


@pytest.fixture
def l4(request_: Request, code: Any, monkeypatch: pytest.MonkeyPatch) -> Request:
    """A request on an L4, whose architecture is 89: it runs the machine code of 80."""
    monkeypatch.setattr(layer_time, "compiled", lambda _, architecture: code if architecture == 80 else ({}, {}))
    return dataclasses.replace(request_, part="prediction", gpu="NVIDIA L4", architecture=89, timings=(PACKED,))


def test_every_kernel_that_is_timed_is_predicted(l4: Request, code: Any) -> None:
    sizes = {"rows": 4096, "columns": 14336, "group": GROUP, "what": "packed"}
    timings: tuple[Any, ...] = ({"what": "torch"}, PACKED)
    for bits, (planes, rank), tokens, int8 in itertools.product(BITS, FORMS, TOKENS, (False, True)):
        timings += ({**sizes, "bits": bits, "planes": planes, "branch_rank": rank, "tokens": tokens, "int8": int8},)
    found = gpu_parts.prediction(dataclasses.replace(l4, timings=timings))
    assert found["gpu"] == "L4"
    torch, first, *others = found["predictions"]
    assert torch is None
    assert all(1e-6 < seconds < 1 for seconds in others)
    gpu = roofline.known("NVIDIA L4")
    assert gpu
    one = layer_time.Times(gpu, *code).of(layer_time.Layer(4096, 4096, 4, 1, 128, 32), 1)
    assert one.launches == 2
    assert first == pytest.approx(1e-6 * (one.busy + 2 * layer_time.LAUNCH))


def test_without_machine_code_or_timings_nothing_is_predicted(l4: Request) -> None:
    with pytest.raises(MissingError, match="nothing was timed"):
        gpu_parts.prediction(dataclasses.replace(l4, timings=()))
    with pytest.raises(MissingError, match="holds no machine code for NVIDIA H200, only PTX"):
        gpu_parts.prediction(dataclasses.replace(l4, gpu="NVIDIA H200", architecture=90))


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H200", "H200-SXM"),
        ("NVIDIA GH200 480GB", "GH200-96GB"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L40S", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GH200", None),
    ],
)
def test_only_the_very_gpu_is_known(name: str, known: str | None) -> None:
    found = roofline.known(name)
    assert (found.name if found else None) == known


@pytest.mark.usefixtures("kernels")
def test_the_kernels_need_torch_and_numpy_alone() -> None:
    """Nothing that an installation of torch, numpy, onnx and pytest lacks is imported by the parts of the kernels."""
    lacking = "safetensors transformers tokenizers onnx_ir rich yaml hypothesis psutil polygraphy gguf onnxruntime"
    code = f"""
import sys
sys.modules.update(dict.fromkeys({lacking.split()}))
sys.path.insert(0, {str(kernel_library.ROOT)!r})
from rankbook.calibration.model import packed_ops
from rankbook.tools.dev import gpu_parts, gpu_report
from tests.plugins import emulated
packed_ops.OTHERS["cpu"], gpu_parts._use = emulated.Kernels(), lambda _: None
asked, few = gpu_parts.Request("", 9.0, ".", device="cpu"), dict(tokens=(1,), bits=(4,))
print(gpu_parts.results(asked, **few)["wrong"], gpu_parts.bits(asked, 1, **few)["wrong"])
print(gpu_parts.answer(gpu_parts.Request("cases", 9.0, "."))["missing"])
print(gpu_parts.answer(gpu_parts.Request("model", 9.0, "."))["missing"])
"""
    assert run_python(code).splitlines() == [
        "[] []",
        "the test cases need onnx_ir, hypothesis: pip install them",
        "quantizing a model needs transformers, safetensors, tokenizers, gguf: pip install them",
    ]


def test_a_part_is_a_process_with_an_end(request_: Request) -> None:
    asked = dataclasses.replace(request_, part="engine")
    assert gpu_report.run_part(asked)["missing"].startswith("there is no checkpoint")
    asked = dataclasses.replace(request_, part="machine", seconds=0.1)  # importing PyTorch takes longer
    assert gpu_report.run_part(asked) == {"failed": "not at its end after 0.1 s, and was ended"}
