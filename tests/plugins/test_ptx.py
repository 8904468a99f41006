"""The PTX of the CUDA kernels, executed lane by lane on the CPU, agrees with the numpy reference.

sm_80: what the built library carries; sm_90 and sm_120: compiled here. No GPU takes part, so the machine code that
ptxas makes of it is not executed, and only one order of warps is tried.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rankbook.calibration.layer_meta import LayerMeta
from rankbook.exporter import emit
from rankbook.plugins import contract, library
from tests.op_cases import case_record, expected, numpy_inputs
from tests.plugins import emulated
from tests.plugins.ptx import launches, machine, modules, parser, semantics
from tests.plugins.ptx.memory import Array, Device
from tests.plugins.test_cuda_emulated import check_matmul

EXPECTED = "RANKBOOK_EXPECT_CUDA" in os.environ
"""Set by .ci/run where the library was built: from there on, what cannot be tested fails instead of being skipped."""


@pytest.fixture(scope="module", params=[80, 90, 120], ids=lambda a: f"sm_{a}")
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> launches.Module:
    folder = tmp_path_factory.mktemp("ptx")
    shipped = request.param == 80
    missing = library.unavailable("trt") if shipped else None if modules.nvcc() else "nvcc is not installed"
    if missing and not EXPECTED:
        pytest.skip(missing)
    return launches.Module(modules.of_library(folder) if shipped else modules.compiled(request.param, folder))


# Record and launch: (changes to the record, type of x, tokens, blocks that share a panel). Both widths of a group's
# parameters in registers, the shared-memory table, the ticket of shared panels, rows and inputs that end inside a tile.
PRODUCTS: dict[str, tuple[dict[str, Any], str, int, int]] = {
    "2 bits": ({"bits": 2, "planes": 1, "in_features": 256, "group": 64, "has_offset": True}, "float16", 1, 1),
    "2 bits, rank 2": ({"bits": 2, "planes": 2, "in_features": 136, "group": 136}, "float16", 2, 1),
    "3 bits": ({"bits": 3, "planes": 1, "in_features": 128, "group": 32, "bias": True}, "bfloat16", 8, 1),
    "3 bits, rank 2": ({"bits": 3, "planes": 2, "in_features": 256, "group": 64, "rank": 2}, "bfloat16", 2, 1),
    "4 bits": ({"bits": 4, "planes": 1, "in_features": 256, "group": 128, "out_features": 64}, "float16", 1, 2),
    "4 bits, rank 2": ({"bits": 4, "planes": 2, "in_features": 160, "group": 32, "rank": 3}, "float16", 8, 1),
    "8 bits, 9 tokens": ({"bits": 8, "planes": 1, "in_features": 64, "group": 64}, "float16", 9, 1),
    "fp32": ({"bits": 3, "planes": 2, "in_features": 128, "group": 64, "out_features": 33}, "float32", 2, 2),
    "many tokens": ({"bits": 4, "planes": 2, "in_features": 72, "group": 72, "bias": True}, "float16", 17, 1),
}


@pytest.mark.parametrize("case", list(PRODUCTS))
def test_products(module: launches.Module, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, dtype, tokens, blocks = PRODUCTS[case]

    def interpreted(tensors: Any, attributes: Any, x: Array, type_: str) -> Array:
        return launches.matmul(module, tensors, attributes, x, type_, blocks)

    monkeypatch.setattr(emulated, "matmul", interpreted)  # and keep the bounds of the emulation's test
    check_matmul(case_record("plain", **changes), dtype, tokens)


def test_look_ups(module: launches.Module) -> None:
    record = case_record("plain", bits=4, planes=2, out_features=70, in_features=80, group=16)
    indices = np.array([[0, 69], [-1, 32]])
    constants, attributes = numpy_inputs(record, contract.GATHER), emit.attributes(LayerMeta.of(record))
    got = launches.gather(module, constants, attributes, indices)
    assert np.isnan(got[1, 0]).all()
    got[1, 0], indices[1, 0] = 0, 0
    want = expected(record, indices, contract.GATHER)
    want[1, 0] = 0
    # Both sides work in fp32; they differ in the order of a sum over planes.
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


# ------------------------------------------------------------------------------------------------ the interpreter


def run_lines(*lines: str, shared: int = 0) -> Array:
    """Run a kernel of 64 threads that stores %r0 of every thread; returns what they have stored."""
    body = "\n".join(lines)
    text = f"""
.extern .shared .align 16 .b8 bytes[];
.visible .entry probe(.param .u64 out)
.maxntid 64
{{
.reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<9>; .reg .b32 %f<9>; .reg .b64 %rd<9>;
mov.u32 %r1, %tid.x;
{body}
ld.param.u64 %rd1, [out];
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
st.global.u32 [%rd3], %r0;
ret;
}}"""
    kernel, device = parser.parse(text, "probe"), Device()
    out = device.add(np.zeros(64, np.uint32), writable=True)
    arguments = np.array([out]).tobytes()
    machine.run(kernel, semantics.compile_kernel(kernel), device, arguments, grid=(1, 1), shared=shared)
    return device.array(out)


def test_lanes_part_and_meet() -> None:
    got = run_lines(
        "mov.u32 %r0, 0;", "and.b32 %r2, %r1, 3;",
        "loop:", "add.s32 %r0, %r0, 10;", "add.s32 %r2, %r2, -1;", "setp.ge.s32 %p1, %r2, 0;", "@%p1 bra loop;",
        "shfl.sync.bfly.b32 %r0|%p2, %r0, 1, 31, -1;",
    )  # fmt: skip
    assert got.tolist() == [20, 10, 40, 30] * 16


def test_barriers_order_shared_memory() -> None:
    got = run_lines(
        "shl.b32 %r2, %r1, 2;", "mov.u32 %r3, bytes;", "add.s32 %r4, %r3, %r2;", "st.shared.u32 [%r4], %r1;",
        "bar.sync 0;", "sub.s32 %r5, 252, %r2;", "add.s32 %r6, %r3, %r5;", "ld.shared.u32 %r0, [%r6];",
        shared=256,
    )  # fmt: skip
    assert got.tolist() == list(range(63, -1, -1))


def one(*lines: str) -> Callable[[], Array]:
    return lambda: run_lines(*lines, shared=64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (one("tanh.approx.f32 %f1, %f2;"), r"line 8: the instruction is not known: tanh\.approx\.f32"),
        (one("ld.global.lu.u32 %r0, [%rd1];"), "line 8: unknown form"),
        (one("cvt.rzi.s32.f32 %r0, %f1;"), "line 8: the conversion is not known"),
        (one("mov.u32 %r2, bytes;", "ld.shared.u32 %r0, [%r2+64];"), "line 9.* outside the shared memory"),
        (
            one("mov.u32 %r2, bytes;", "ld.shared.v2.u32 {%r0, %r3}, [%r2+4];"),
            "8 bytes to shared memory is not aligned",
        ),
        (one("mov.u32 %r2, bytes;", "st.shared.u32 [%r2], %r1;"), "different values at one address"),
        (one("ld.param.u64 %rd1, [out];", "st.global.u32 [%rd1+256], %r1;"), "outside the global memory"),
        (one("setp.eq.s32 %p1, %r1, 3;", "@%p1 bra end;", "bar.sync 0;", "end:"), "wait for others that do not come"),
        (
            one(
                "setp.eq.s32 %p1, %r1, 3;",
                "@%p1 bra end;",
                "shfl.sync.bfly.b32 %r0, %r1, 1, 31, -1;",
                "end:",
                "bar.sync 0;",
            ),
            "wait for others that do not come",
        ),
        (one("setp.lt.s32 %p1, %r1, 32;", "@%p1 bra a;", "bar.sync 0;", "a:", "bar.sync 0;"), "different barriers"),
        (one("loop:", "bra loop;"), "does not end"),
    ],
)
def test_what_a_kernel_must_not_do_is_caught(
    call: Callable[[], Array], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "MOST_STEPS", 1000)
    with pytest.raises(parser.PtxError, match=message):
        call()


def arithmetic(opcode: str, *operands: int) -> int:
    """The result of one instruction on numbers, as the bits of a 32-bit register."""
    moves = [f"mov.u32 %r{2 + i}, {value};" for i, value in enumerate(operands)]
    names = ", ".join(f"%r{2 + i}" for i in range(len(operands)))
    return int(run_lines(*moves, f"{opcode} %r0, {names};")[0])


# By the formulas of the PTX manual, worked by hand.
@pytest.mark.parametrize(
    ("opcode", "operands", "result"),
    [
        ("div.s32", (-7, 2), -3 & 0xFFFFFFFF),
        ("rem.s32", (-7, 2), -1 & 0xFFFFFFFF),
        ("shr.s32", (-8, 33), 0xFFFFFFFF),
        ("shl.b32", (1, 32), 0),
        ("mul.hi.u32", (0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFE),
        ("prmt.b32", (0x03020180, 0x07060504, 0x8074), 0xFF800704),
        ("bfe.s32", (0x000000F0, 4, 4), 0xFFFFFFFF),
        ("bfe.u32", (0x12345678, 8, 8), 0x56),
        ("bfi.b32", (0xAB, 0x11111111, 8, 8), 0x1111AB11),
        ("add.f32", (0x3F800000, 0x40000000), 0x40400000),
        ("fma.rn.f16x2", (0x3C004000, 0x40003C00, 0x3C003C00), 0x42004200),
    ],
)
def test_arithmetic(opcode: str, operands: tuple[int, ...], result: int) -> None:
    assert arithmetic(opcode, *operands) == result
