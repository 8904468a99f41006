"""What runs operators: one entry in `RUNNERS` each. `test_every_runner.py` compares all of them with the reference.

A runner says why it cannot run here, which cases it takes, and how far from the reference it may be and why.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankbook.plugins import library
from rankbook.plugins.experts import NUMBERS
from tests.ops.cases import DTYPES, EPSILON, EXPERTS, FORMS, LOOK_UPS, Array, Case, Op, expand
from tests.plugins import emulated

ROOT = Path(__file__).resolve().parents[2]

Bound = Callable[[Op, Array], Array]


@dataclass(frozen=True)
class Runner:
    """Something that computes operators.

    Attributes:
        name: For the names of tests.
        missing: Returns why it cannot run here, or None.
        run: Computes y of an operator, in the type of x.
        bound: Largest allowed difference from the unrounded reference, given the operator and that reference.
        cases: What it is given, by name.
    """

    name: str
    missing: Callable[[], str | None]
    run: Callable[[Op], Array]
    bound: Bound
    cases: Mapping[str, Case]


# ------------------------------------------------------------------------------------------------------------- bounds


def float32_sums(op: Op, want: Array) -> Array:
    """Products and sums in fp32, in any order: the error of a sum of K terms grows like sqrt(K) * 2**-24, 4e-6 of the
    largest output at K = 4096. The result is rounded once to the type of x; where x is rounded to 8 bits both sides
    round to the same integers, and a single one that differed would show at 1/127 of a product, 1e-4 or more.
    """
    largest = np.abs(want).max() if want.size else 0.0
    return 1e-5 * largest + 2 * np.abs(want) * (EPSILON[op.dtype] if op.dtype != "float32" else 0.0)


def the_definition(op: Op, want: Array) -> Array:
    """Bit for bit: 8-bit activations are defined to the last rounding, and the result is rounded once, to even."""
    return float32_sums(op, want) if not op.contract.int8_activations else np.abs(want - want.astype(DTYPES[op.dtype]))


def has_int8_kernel(op: Op) -> bool:
    """Whether 8-bit activations go to integer tensor cores; elsewhere x is rounded and computed with in its type."""
    if op.records:
        return False
    record, tokens = op.record, op.x.size // op.x.shape[-1]
    step = 128 if record.bits == 3 else 64
    whole = record.group == record.in_features or record.group % step == 0
    if tokens > 16 or record.params.codes is None or not (whole or record.group % (step // 2) == 0):
        return False
    return record.planes <= 2 or tokens == 1 or (tokens <= 8 and whole)


def cuda_kernels(op: Op, want: Array) -> Array:
    """Tensor cores: weights in the type of x, sums in fp32; with 8-bit activations, integer sums of a group.

    Integer sums are exact: 2**-24 of the sum of magnitudes for each addition in fp32, half a unit in the last place of
    the type of x for the result. Weights: one rounding for each plane, the offset and the coefficients, in the type of
    x. Where there is no integer kernel for 8-bit activations, levels and factors that are not whole numbers are not
    rounded to steps of 1 / 127, as the definition does.
    """
    record, (weights, branch) = op.record, op.magnitude
    if op.gather:  # decoded in fp32; the order of the sum over planes differs
        return np.full_like(want, 2e-6)
    bound = (weights + branch) * EPSILON["float32"] * (record.in_features + 64) + np.abs(want) * EPSILON[op.dtype]
    if op.contract.int8_activations and has_int8_kernel(op):
        return bound + 1e-7
    bound = bound + weights * EPSILON[op.dtype] * (record.params.shape[2] + 3) + 1e-6
    if op.contract.int8_activations and (record.levels.is_floating_point() or record.low_rank is not None):
        bound = bound + (weights + branch) * 2 / 254
    return bound


def half_inside(op: Op, want: Array) -> Array:
    """Bodies compute in the type of x: in fp16, products with weights rounded to 11 bits, summed in that precision.

    In fp32, a few units of 2**-24 for sums of 128 terms against float64 ones.
    """
    if op.dtype == "float32" or op.gather:
        terms = max(1.0, op.record.in_features / 128)
        return np.full_like(want, 2e-6 * terms**0.5 * np.abs(want).max(initial=0.0))
    if op.contract.int8_activations:
        return float32_sums(op, want)
    return np.full_like(want, 4e-3 * np.abs(want).max(initial=0.0))


# ------------------------------------------------------------------------------------------------------------ runners


def ort_session(model: Any, path: str | None = None, *, threads: int = 2, **entries: str) -> Any:
    """Return a session of ONNX Runtime, with a library of custom operators and with session entries ``rankbook.*``."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    for name, value in entries.items():
        options.add_session_config_entry(f"rankbook.{name}", value)
    if path is not None:
        options.register_custom_ops_library(path)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_session(session: Any, op: Op) -> Array:
    """Run a session of one operator; bfloat16 goes through buffers of 16 bits, the only way ONNX Runtime takes it."""
    import onnxruntime as ort
    from onnx import TensorProto

    name = session.get_inputs()[0].name
    numbers = {NUMBERS: op.numbers} if op.records else {}
    if op.dtype != "bfloat16":
        (y,) = session.run(None, {name: op.x, **numbers})
        return np.asarray(y)
    y = np.zeros((*op.x.shape[:-1], int(op.attributes["out_features"])), op.x.dtype)
    binding = session.io_binding()
    for port, array in numbers.items():
        binding.bind_cpu_input(port, array)
    for bind, port, array in ((binding.bind_ortvalue_input, name, op.x), (binding.bind_ortvalue_output, "y", y)):
        bind(port, ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TensorProto.BFLOAT16))
    session.run_with_iobinding(binding)
    return y


def run_native(op: Op, **entries: Any) -> Array:
    """Run an operator in ONNX Runtime with the native library."""
    return run_session(ort_session(op.model(), str(library.library("ort")), **entries), op)


def run_in_process(function: str, isa: str) -> None:
    """Call ``module:function`` in a process of its own, where the native library takes the kernels of ``isa``."""
    module, name = function.split(":")
    code = f"import sys; sys.path.insert(0, '.'); from {module} import {name}; {name}()"
    environment = {**os.environ, "RANKBOOK_NATIVE_ISA": isa}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def run_bodies(op: Op) -> Array:
    """Run the function body of an operator in stock ONNX Runtime."""
    import onnx

    model = op.model(bodies=True)
    onnx.checker.check_model(model, full_check=True)
    return run_session(ort_session(model), op)


def run_kernels(op: Op) -> Array:
    """Run the CUDA kernels, over the emulation or on the GPU (`tests.plugins.emulated`)."""
    if op.gather:
        return emulated.gather(op.constants(), op.attributes, op.x)
    rows = op.x.reshape(-1, op.x.shape[-1])
    bits = rows if op.dtype == "float32" else rows.view(np.uint16)
    numbers = op.numbers if op.records else None
    y = emulated.matmul(
        op.constants(), op.attributes, bits, op.dtype, int8=op.contract.int8_activations, numbers=numbers
    )
    return y.view(op.x.dtype).reshape(*op.x.shape[:-1], y.shape[-1])


def run_torch(op: Op) -> Array:
    """Run the layer in PyTorch."""
    import torch

    from rankbook.calibration.model.experts import ExpertMatrices
    from rankbook.calibration.model.packed_modules import CodebookEmbedding, CodebookLinear

    x = torch.from_numpy(op.x)
    if op.gather:
        return CodebookEmbedding.from_record(op.record)(x).numpy()
    if op.records:
        layers = ExpertMatrices(CodebookLinear.from_record(record) for record in op.records)
        return layers(x, torch.from_numpy(op.numbers)).numpy()
    return CodebookLinear.from_record(op.record)(x).numpy()


@contextlib.contextmanager
def emulated_operators() -> Iterator[None]:
    """Let the operators of PyTorch compute on the CPU, over the emulated kernels."""
    from rankbook.calibration.model import packed_ops

    packed_ops.OTHERS["cpu"] = emulated.Kernels()
    try:
        yield
    finally:
        del packed_ops.OTHERS["cpu"]


def run_operators(op: Op) -> Array:
    """Run the CUDA kernels as operators of PyTorch: on the GPU, or over the emulation."""
    import torch

    from rankbook.calibration.model import packed_ops

    spec = op.record.spec()
    device = torch.device("cuda" if emulated.ON_GPU else "cpu")
    packed = [record.pack() for record in op.records] or [op.record.pack()]
    stacked = {name: torch.stack([each[name] for each in packed]) for name in packed[0]} if op.records else packed[0]
    tensors = {name: tensor.to(device) for name, tensor in stacked.items()}
    numbers = torch.from_numpy(op.numbers).to(device) if op.records else None
    with contextlib.nullcontext() if emulated.ON_GPU else emulated_operators():
        constants = packed_ops.constants(spec, tensors)
        if op.gather:
            return packed_ops.rows(torch.from_numpy(op.x).to(device), constants, spec).cpu().numpy()
        bits = op.x.view(np.uint16) if op.dtype == "bfloat16" else op.x
        x = torch.from_numpy(bits).view(getattr(torch, op.dtype)).to(device)
        rounds = op.contract.int8_activations
        y = packed_ops.product(x, constants, spec, int8_activations=rounds, numbers=numbers).cpu()
    return (y.view(torch.uint16) if op.dtype == "bfloat16" else y).numpy().view(op.x.dtype)


built = pytest.mark.skipif(library.unavailable("ort") is not None, reason=str(library.unavailable("ort")))
"""For tests of the native library."""


def _installed(name: str) -> Callable[[], str | None]:
    return lambda: library.unavailable(name)


def _compiles() -> str | None:
    return None if emulated.compiler() else "no C++ compiler to build the emulated kernels"


def _emulated(cases: dict[str, Case]) -> dict[str, Case]:
    """As they are but for the most tokens: 150 are several tiles and launches of the emulation."""
    return {name: replace(case, tokens=(150,)) if case.tokens == (900,) else case for name, case in cases.items()}


def _forms() -> dict[str, Case]:
    """Every stored form with every type of x; the kernels behind are those of ``cuda``, which takes all cases."""
    cases = _emulated({**FORMS, **EXPERTS})
    types = dict(zip(cases, itertools.cycle(DTYPES), strict=False))
    exact = {f"{name}, {types[name]}": replace(case, dtype=types[name]) for name, case in cases.items()}
    rounded = {f"{name}, int8": replace(case, int8_activations=True) for name, case in exact.items()}
    rows = {f"{name}, rows": case for name, case in LOOK_UPS.items() if name in FORMS}
    return exact | rounded | rows


RUNNERS: dict[str, Runner] = {
    runner.name: runner
    for runner in (
        Runner("torch", lambda: None, run_torch, float32_sums, expand(("float32",), int8=False)),
        Runner("bodies", lambda: None, run_bodies, half_inside, expand(("float32", "float16"))),
        Runner("native", _installed("ort"), run_native, the_definition, expand(tuple(DTYPES))),
        Runner("cuda", _compiles, run_kernels, cuda_kernels, _emulated(expand(tuple(DTYPES)))),
        Runner("operators", _compiles, run_operators, cuda_kernels, _forms()),
    )
}
"""Every runner by name."""


@functools.cache
def drawn(case: Case) -> Op:
    """Return the operator of a case: drawn once, whoever runs it."""
    return case.draw()


def check(runner: Runner, op: Op) -> None:
    """Compare a runner with the reference on one operator."""
    want, y = op.unrounded(), runner.run(op)
    assert y.shape == want.shape
    assert y.dtype == DTYPES[op.dtype]
    error, bound = np.abs(y.astype(np.float64) - want), runner.bound(op, want)
    assert np.isfinite(error).all()
    over = error - bound
    assert (over <= 0).all(), (
        f"worst error is {error.flat[over.argmax()]:.3g}, allowed are {bound.flat[over.argmax()]:.3g}"
    )
