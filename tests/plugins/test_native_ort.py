"""The native library computes what the reference says, on every instruction set, and refuses what is malformed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from rankbook.plugins import contract, library
from rankbook.tools.dev import contract_header
from tests.ops.cases import DTYPES, WIDE, Case, Op, drawn, relative_error
from tests.ops.runners import built, ort_session, run_in_process, run_native

ROOT = Path(__file__).resolve().parents[2]

RELATIVE = 1e-5
"""The parity mode: fp32 products and sums of up to a few thousand terms, against sums in float64. The error of a sum of
K terms in fp32 grows like sqrt(K) * 2**-24, 4e-6 at K = 4096; it is compared with the largest output."""


def session(op: Op, threads: int = 2) -> Any:
    """Return a session of the operator with the native library."""
    return ort_session(op.model(), str(library.library("ort")), threads=threads)


@built
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(case=drawn())
def test_matmul_matches_the_reference(case: Case) -> None:
    """Any width, rank, group, size, parameter form and branch: the outputs agree within the parity bound."""
    op = case.draw()
    expected = op.expected()
    actual = run_native(op)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if expected.size:
        assert relative_error(actual, expected) < RELATIVE


@built
@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=drawn())
def test_gather_matches_the_reference(case: Case) -> None:
    """Rows come out as decoded in fp32: a few roundings of the sum over planes apart at most."""
    op = case.draw(gather=True, rank=0, bias=False)
    expected = op.expected()
    actual = run_native(op)
    assert actual.shape == expected.shape
    if expected.size:
        assert relative_error(actual, expected) < 2e-6


@built
@pytest.mark.parametrize("rank", [0, 3])
def test_the_kernel_runs_in_place_of_the_body(rank: int, tmp_path: Path) -> None:
    """An operator with its body in the file is one native node."""
    import onnxruntime as ort

    op = Case(rank=rank).draw()
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library.library("ort")))
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    native = ort.InferenceSession(
        op.model(bodies=True).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (y,) = native.run(None, {"x": op.x})
    assert relative_error(y, op.expected()) < RELATIVE
    events = json.loads(Path(native.end_profiling()).read_text("utf-8"))
    ran = {event["args"]["op_name"] for event in events if "op_name" in event.get("args", {})}
    assert {kind.rstrip("2348") for kind in ran} <= {contract.MATMUL, contract.MATMUL_LOW_RANK}


@built
@pytest.mark.parametrize(("dtype", "unit"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
@pytest.mark.parametrize("tokens", [(1,), (2, 5)])
def test_half_activations(dtype: str, unit: float, tokens: tuple[int, ...]) -> None:
    """16 bits in and out, fp32 inside: outputs are rounded once, half a unit in the last place, and little more."""
    op = WIDE.draw(bits=3, dtype=dtype, bias=True, rank=8, tokens=tokens)
    actual = run_native(op)
    assert actual.dtype == DTYPES[dtype]
    assert relative_error(actual, op.expected()) < 2 * unit


@built
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    """The kernels of each instruction set that this processor has agree with the reference (others fall back)."""
    run_in_process(f"{__name__}:check_all_widths", isa)


def check_all_widths() -> None:
    """Compare one token, a few and many at every width, with one to five planes."""
    for bits in (2, 3, 4, 8):
        for planes in (1, 2, 3, 4, 5)[: 2 if bits == 2 else 5]:
            for tokens in (1, 5, 200):
                case = replace(
                    WIDE, bits=bits, planes=planes, tokens=(tokens,), in_features=240, group=48, out_features=77, rank=5
                )
                for linear in (False, True):
                    op = case.draw(linear_levels=linear, bias=True)
                    error = relative_error(run_native(op), op.expected())
                    if not error < RELATIVE:
                        raise SystemExit(f"{case}: {error}")


@built
def test_unknown_instruction_set_is_refused() -> None:
    """A typing error in the variable is an error, not a silent choice."""
    code = "from tests.ops import cases, runners; runners.run_native(cases.WIDE.draw())"
    environment = {**os.environ, "RANKBOOK_NATIVE_ISA": "sse9", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "RANKBOOK_NATIVE_ISA must be one of portable avx2 avxvnni avx512 amx" in done.stderr


@built
def test_result_does_not_depend_on_threads() -> None:
    """Each panel is computed by one thread in a fixed order, so the bits are the same."""
    op = WIDE.draw(bits=3, out_features=500, in_features=512, tokens=(7,))
    one, two = (session(op, threads).run(None, {"x": op.inputs["x"]})[0] for threads in (1, 2))
    np.testing.assert_array_equal(one, two)


def damage_codes_shape(op: Op) -> None:
    op.inputs["codes"] = op.inputs["codes"][:-1]


def damage_levels_width(op: Op) -> None:
    op.inputs["levels"] = op.inputs["levels"][:, :-1]


def damage_params_planes(op: Op) -> None:
    op.inputs["params"] = op.inputs["params"][:, :, :-1]


def damage_groups(op: Op) -> None:
    op.inputs["params"] = np.repeat(op.inputs["params"], 5, axis=1)


def damage_step(op: Op) -> None:
    op.inputs["step"] = op.inputs["step"][:, :, :1]


def damage_base_type(op: Op) -> None:
    op.inputs["base"] = op.inputs["base"].astype(np.int64)


def damage_bias(op: Op) -> None:
    op.inputs["bias"] = np.zeros(7, np.float32)


def damage_down(op: Op) -> None:
    op.inputs["down"] = op.inputs["down"][:, :-1]


def damage_up_scale(op: Op) -> None:
    op.inputs["up_scale"] = np.ones((1, 3), np.float32)


def damage_in_features(op: Op) -> None:
    op.attributes["in_features"] = 1000


def damage_negative(op: Op) -> None:
    op.attributes["out_features"] = -5


def damage_offset(op: Op) -> None:
    op.attributes["offset"] = 2


def damage_codes_type(op: Op) -> None:
    op.inputs["codes"] = op.inputs["codes"].astype(np.int32)


def damage_levels_type(op: Op) -> None:
    op.inputs["levels"] = op.inputs["levels"].astype(np.float64)  # float32 is what ONNX Runtime makes of an fp16 file


def damage_count(op: Op) -> None:
    del op.inputs["up_scale"]


def damage_more(op: Op) -> None:
    op.inputs["more"] = np.zeros(1, np.float32)


def damage_missing(op: Op) -> None:
    del op.attributes["offset"]


@built
@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (damage_codes_shape, "codes"),
        (damage_levels_width, "levels"),
        (damage_params_planes, "params"),
        (damage_groups, "groups"),
        (damage_step, "step"),
        (damage_base_type, "base"),
        (damage_bias, "bias"),
        (damage_down, "down"),
        (damage_up_scale, "up_scale"),
        (damage_in_features, "codes"),
        (damage_negative, "out_features"),
        (damage_offset, "offset"),
        (damage_missing, "offset"),
        (damage_codes_type, "codes"),
        (damage_levels_type, "levels"),
        (damage_count, "10 inputs; it must have 11"),
        (damage_more, "12 inputs; it must have 11"),
    ],
)
def test_malformed_node_is_named(damage: Callable[[Op], None], word: str) -> None:
    """A node that breaks the contract makes an error that names the node, the input or attribute; never a crash."""
    op = WIDE.draw(rank=8)
    damage(op)
    with pytest.raises(Exception, match=rf"(?s)CodebookMatMulLowRank4 'layer'.*{word}"):
        session(op)


@built
def test_wrong_activation_size_is_named() -> None:
    """x of another width fails when it arrives, with both sizes in the message."""
    model = WIDE.draw().model()
    model.graph.input[0].type.tensor_type.shape.dim[1].Clear()  # or ONNX Runtime itself says no
    made = ort_session(model, str(library.library("ort")))
    with pytest.raises(Exception, match=r"(?s)'layer'.*x has shape \(3, 100\).*in_features = 128"):
        made.run(None, {"x": np.zeros((3, 100), np.float32)})


@built
def test_index_out_of_range_is_named() -> None:
    """A token id beyond the table is an error, not a read beyond the weight."""
    op = WIDE.draw(gather=True)
    with pytest.raises(Exception, match=r"(?s)'layer'.*outside \[0, 64\)"):
        session(op).run(None, {"indices": np.array([64], np.int64)})


@built
def test_library_exports_only_its_entry_points() -> None:
    """Two libraries with the same kernels may share a process: nothing else is visible."""
    done = subprocess.run(
        ["nm", "-D", "--defined-only", str(library.library("ort"))], capture_output=True, text=True, check=True
    )
    groups = {f"rankbook_groups_{name}" for name in ("feedback", "moments", "round", "step")}
    symbols = {line.split()[-1] for line in done.stdout.splitlines()}
    assert symbols == {"RegisterCustomOps", "rankbook_native_info", *groups}


def test_contract_header_is_current() -> None:
    """plugins/csrc/contract.h is what the contract generates."""
    assert contract_header.header_path().read_text("utf-8") == contract_header.header_text(), (
        "stale: run python -m rankbook.tools.dev.contract_header"
    )


def test_missing_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the library there is a sentence; an unknown runtime is an error that lists the known ones."""
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    assert "make native" in str(library.unavailable("ort"))
    with pytest.raises(FileNotFoundError, match="make native"):
        library.library("ort")
    with pytest.raises(ValueError, match="'ort'"):
        library.unavailable("nnapi")


@pytest.mark.skipif("RANKBOOK_EXPECT_NATIVE" not in os.environ, reason="asked for by .ci/run where the build succeeded")
def test_library_is_built_in_ci() -> None:
    """Skips must not hide everything: where CI built the library, it loads and describes itself."""
    assert library.unavailable("ort") is None
    info = library.native_info("ort")
    assert info["isa"] in {"portable", "avx2", "avx512"}
    assert info["isa_int8"] in {"portable", "avx2", "avx-vnni", "avx512-vnni", "amx"}
