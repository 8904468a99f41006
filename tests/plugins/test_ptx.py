"""The PTX of the CUDA kernels, executed lane by lane on the CPU, agrees with the numpy reference.

sm_80: what the built library carries; sm_90 and sm_120: compiled here. No GPU takes part, so the machine code that
ptxas makes of it is not executed, and only one order of warps is tried.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from rankbook.plugins import library
from tests.calibration.records import random_record
from tests.ops.cases import Case, Op, random_x
from tests.ops.runners import Runner, check, cuda_kernels, has_int8_kernel
from tests.plugins.ptx import launches, launches_int8, machine, modules, parser, semantics
from tests.plugins.ptx.memory import Array, Device
from tests.plugins.toolchain import EXPECTED

SHIPPED = 80


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], launches.Module]:
    @functools.cache
    def load(architecture: int) -> launches.Module:
        folder = tmp_path_factory.mktemp("ptx")
        shipped = architecture == SHIPPED
        return launches.Module(modules.of_library(folder) if shipped else modules.compiled(architecture, folder))

    return load


@pytest.fixture(params=[SHIPPED, 90, 120], ids=lambda a: f"sm_{a}")
def module(request: pytest.FixtureRequest, load: Callable[[int], launches.Module]) -> launches.Module:
    shipped = request.param == SHIPPED
    missing = library.unavailable("trt") if shipped else None if modules.nvcc() else "nvcc is not installed"
    if missing and not EXPECTED:
        pytest.skip(missing)
    return load(request.param)


def some(cases: Iterable[str], everywhere: Sequence[str]) -> pytest.MarkDecorator:
    """All cases on what is shipped, some on the other architectures as well."""
    pairs = [(SHIPPED, case) for case in cases] + [(a, case) for a in (90, 120) for case in everywhere]
    ids = [f"sm_{architecture}-{case}" for architecture, case in pairs]
    return pytest.mark.parametrize(("module", "case"), pairs, ids=ids, indirect=["module"])


# Record and launch: (changes to the record, type of x, tokens, blocks that share a panel; of many tokens: all blocks).
# Both widths of a group's parameters in registers, the shared-memory table, the ticket of shared panels, rows and
# inputs that end inside a tile.
PRODUCTS: dict[str, tuple[dict[str, Any], str, int, int]] = {
    "2 bits": ({"bits": 2, "planes": 1, "in_features": 256, "group": 64, "has_offset": True}, "float16", 1, 1),
    "2 bits, rank 2": ({"bits": 2, "planes": 2, "in_features": 136, "group": 136}, "float16", 2, 1),
    "3 bits": ({"bits": 3, "planes": 1, "in_features": 128, "group": 32, "bias": True}, "bfloat16", 8, 1),
    "3 bits, rank 2": ({"bits": 3, "planes": 2, "in_features": 256, "group": 64, "rank": 2}, "bfloat16", 2, 1),
    "4 bits": ({"bits": 4, "planes": 1, "in_features": 256, "group": 128, "out_features": 64}, "float16", 1, 2),
    "4 bits, rank 2": ({"bits": 4, "planes": 2, "in_features": 160, "group": 32, "rank": 3}, "float16", 8, 1),
    "8 bits, 9 tokens": ({"bits": 8, "planes": 1, "in_features": 64, "group": 64}, "float16", 9, 1),
    "fp32": ({"bits": 3, "planes": 2, "in_features": 128, "group": 64, "out_features": 33}, "float32", 2, 2),
    "many tokens": ({"bits": 4, "planes": 2, "in_features": 70, "group": 70, "bias": True}, "float16", 17, 1),
}


def interpret(op: Op, launch: Callable[..., Array], module: launches.Module, **options: Any) -> None:
    """Launch the kernels of a product in the interpreter; the bounds are those of the emulation."""

    def run(op: Op) -> Array:
        bits = op.x if op.dtype == "float32" else op.x.view(np.uint16)
        return launch(module, op.constants(), op.attributes, bits, op.dtype, **options).view(op.x.dtype)

    check(Runner("ptx", lambda: None, run, cuda_kernels, {}), op)


def product_of(changes: dict[str, Any], dtype: str, tokens: int, *, int8_activations: bool = False) -> Op:
    record = random_record(**changes)
    x = random_x(record, dtype, (tokens,), seed=tokens)
    if int8_activations:
        x[0, : record.in_features // 2] *= 30  # groups of one token have scales of their own
    return Op.of(record, x, int8_activations=int8_activations)


@pytest.mark.parametrize("case", list(PRODUCTS))
def test_products(module: launches.Module, case: str) -> None:
    changes, dtype, tokens, blocks = PRODUCTS[case]
    interpret(product_of(changes, dtype, tokens), launches.matmul, module, blocks=blocks)


# The same for rounded activations. Groups of one step, of half a step and of two, one for a whole row that ends inside
# a step, groups without an integer kernel; levels in registers and in shared memory; factors of the error branch as
# int8 and as floats.
ROUNDED: dict[str, tuple[dict[str, Any], str, int, int]] = {
    "2 bits": ({"bits": 2, "planes": 1, "in_features": 256, "group": 128, "has_offset": True}, "float16", 1, 2),
    "2 bits, rank 2": ({"bits": 2, "planes": 2, "in_features": 192, "group": 64, "rank": 2}, "bfloat16", 8, 1),
    "3 bits": ({"bits": 3, "planes": 2, "in_features": 256, "group": 128, "bias": True}, "float16", 1, 1),
    "3 bits, rank 1": (
        {"bits": 3, "planes": 1, "in_features": 192, "group": 64, "rank": 1, "factor_bits": 16}, "float32", 8, 1
    ),
    "4 bits": ({"bits": 4, "planes": 1, "in_features": 160, "group": 32, "out_features": 33}, "float16", 8, 1),
    "4 bits, half steps": ({"bits": 4, "planes": 1, "in_features": 160, "group": 32, "rank": 2}, "bfloat16", 1, 1),
    "4 bits, folded planes": ({"bits": 4, "planes": 2, "in_features": 136, "group": 136}, "float16", 1, 1),
    "4 bits, table": ({"bits": 4, "planes": 2, "in_features": 128, "group": 64, "float_levels": True}, "float16", 8, 1),
    "4 bits, a block rounds": ({"bits": 4, "planes": 1, "in_features": 1040, "group": 1040}, "float16", 1, 2),
    "rounded in place": ({"bits": 4, "planes": 1, "in_features": 144, "group": 48}, "float16", 2, 1),
}  # fmt: skip


@some(ROUNDED, ["3 bits", "4 bits"])
def test_products_of_rounded_activations(module: launches.Module, case: str) -> None:
    changes, dtype, tokens, blocks = ROUNDED[case]
    op = product_of(changes, dtype, tokens, int8_activations=True)
    assert has_int8_kernel(op) == (case != "rounded in place")
    interpret(op, launches_int8.matmul, module, blocks=blocks)


# The product for many tokens: more tokens than one block takes, stages that are used again, warps without a panel,
# inputs and rows that end inside a tile.
MANY_TOKENS: dict[str, tuple[dict[str, Any], str, int, int]] = {
    "2 bits": ({"bits": 2, "planes": 2, "in_features": 136, "group": 136, "bias": True}, "float16", 17, 1),
    "3 bits": ({"bits": 3, "planes": 1, "in_features": 384, "group": 64}, "bfloat16", 66, 1),
    "4 bits": (
        {"bits": 4, "planes": 2, "in_features": 256, "group": 64, "rank": 20, "out_features": 64}, "float16", 64, 1
    ),
    "4 bits, shared": (
        {"bits": 4, "planes": 2, "in_features": 320, "group": 64, "rank": 20, "bias": True}, "float16", 20, 2
    ),
    "4 bits, parts of two tiles": (  # 2 tiles of 5 steps: 4 and 4 and 2, the second block ends one and begins the other
        {"bits": 4, "planes": 2, "in_features": 320, "group": 64, "rank": 4, "out_features": 288}, "float16", 20, 3
    ),
    "4 bits, more than a tile": (  # 3 tiles of 2 steps: the first block has a whole one and half of the next
        {"bits": 4, "planes": 2, "in_features": 128, "group": 64, "rank": 4, "out_features": 544}, "float16", 20, 2
    ),
}  # fmt: skip


@some(MANY_TOKENS, ["4 bits, shared", "4 bits, more than a tile"])
def test_products_of_many_tokens(module: launches.Module, case: str) -> None:
    changes, dtype, tokens, blocks = MANY_TOKENS[case]
    interpret(product_of(changes, dtype, tokens), launches.matmul, module, blocks=blocks)


# Experts: more tokens of one than a block takes, one without any; tiles of which some are empty.
STACKS: dict[str, tuple[dict[str, Any], str, int, bool]] = {
    "2 bits, tiles": ({"bits": 2, "planes": 1, "in_features": 136, "group": 136}, "bfloat16", 30, True),
    "3 bits": ({"bits": 3, "planes": 2, "in_features": 128, "group": 32, "rank": 2}, "bfloat16", 9, False),
    "3 bits, tiles": ({"bits": 3, "planes": 1, "in_features": 128, "group": 64}, "float16", 30, True),
    "4 bits": ({"bits": 4, "planes": 1, "in_features": 160, "group": 32, "bias": True}, "float16", 20, False),
    "4 bits, tiles": ({"bits": 4, "planes": 2, "in_features": 256, "group": 64, "rank": 1}, "float16", 80, True),
    "8 bits": ({"bits": 8, "planes": 1, "in_features": 64, "group": 64, "rank": 1}, "float16", 3, False),
    "fp32": ({"bits": 4, "planes": 1, "in_features": 45, "group": 45, "rank": 3}, "float32", 5, False),
    "odd, tiles": ({"bits": 4, "planes": 3, "in_features": 48, "group": 16}, "float16", 12, True),
}  # fmt: skip


@some(STACKS, ["4 bits", "4 bits, tiles"])
def test_products_of_experts(module: launches.Module, case: str) -> None:
    changes, dtype, tokens, tiles = STACKS[case]
    op = Case(dtype=dtype, tokens=(tokens,), experts=4, **changes).draw()
    interpret(op, launches.experts, module, numbers=op.numbers, tiles=tiles)


def test_look_ups(module: launches.Module) -> None:
    record = random_record(bits=4, planes=2, out_features=70, in_features=80)
    indices = np.array([[0, 69], [-1, 32]])
    op = Op.of(record, indices, gather=True)
    got = launches.gather(module, op.constants(), op.attributes, indices)
    assert np.isnan(got[1, 0]).all()
    got[1, 0], indices[1, 0] = 0, 0
    want = Op.of(record, indices, gather=True).expected()
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


COPY = (
    "ld.param.u64 %rd1, [out];", "mul.wide.u32 %rd2, %r1, 4;", "add.s64 %rd3, %rd1, %rd2;",
    "st.global.u32 [%rd3], %r1;", "mov.u32 %r2, bytes;", "shl.b32 %r3, %r1, 2;", "add.s32 %r4, %r2, %r3;",
    "mul.wide.u32 %rd4, %r1, 16;", "add.s64 %rd5, %rd1, %rd4;", "shl.b32 %r5, %r1, 4;", "add.s32 %r6, %r2, %r5;",
    "and.b32 %r7, %r1, 1;", "shl.b32 %r7, %r7, 4;", "bar.sync 0;", "setp.gt.u32 %p1, %r1, 15;", "@%p1 bra joined;",
    "cp.async.cg.shared.global.L2::128B [%r6], [%rd5], 16, %r7;",
)  # fmt: skip
"""16 lanes copy the 64 words of the buffer, of which every second copy brings zeros."""
READ_BACK = ("joined:", "bar.sync 0;", "ld.shared.u32 %r0, [%r4];")


def test_copies_arrive_when_they_were_waited_for() -> None:
    got = run_lines(*COPY, "cp.async.commit_group;", "cp.async.wait_group 0;", *READ_BACK, shared=256)
    assert got.tolist() == [i if i // 4 % 2 else 0 for i in range(64)]
    later = ("cp.async.commit_group;", "cp.async.commit_group;", "cp.async.wait_group 1;")  # the last one may be late
    assert run_lines(*COPY, *later, *READ_BACK, shared=256).tolist() == got.tolist()


@pytest.mark.parametrize(
    "lines",
    [
        ("cp.async.commit_group;", "cp.async.wait_group 1;"),  # this group may be late
        ("cp.async.wait_group 0;", "cp.async.commit_group;"),
        ("cp.async.commit_group;",),
    ],
)
def test_copies_that_nobody_waited_for_cannot_be_read(lines: tuple[str, ...]) -> None:
    with pytest.raises(parser.PtxError, match=r"ld\.shared.*") as caught:
        run_lines(*COPY, *lines, *READ_BACK, shared=256)
    assert "while a copy to it is on its way" in str(caught.value)


def test_products_of_bytes() -> None:
    """Row g of A is g - 3 in column 5 (lane 4 g + 1, second byte), -2 in column 20; column n of B has n + 100 and 7."""
    got = run_lines(
        "shr.u32 %r2, %r1, 2;", "and.b32 %r2, %r2, 7;", "and.b32 %r3, %r1, 3;", "setp.eq.s32 %p1, %r3, 1;",
        "add.s32 %r4, %r2, -3;", "and.b32 %r4, %r4, 255;", "shl.b32 %r4, %r4, 8;", "selp.b32 %r4, %r4, 0, %p1;",
        "selp.b32 %r5, 254, 0, %p1;", "add.s32 %r6, %r2, 100;", "shl.b32 %r6, %r6, 8;", "selp.b32 %r6, %r6, 0, %p1;",
        "selp.b32 %r7, 7, 0, %p1;", "mov.u32 %r8, 0;",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r0,%r3,%r2,%r3}, {%r4,%r8,%r5,%r8}, {%r6,%r7}, "
        "{%r1,%r8,%r8,%r8};",
    )  # fmt: skip
    lanes = np.arange(64)
    row, column = lanes // 4 % 8, 2 * (lanes % 4)
    assert got.view(np.int32).tolist() == ((row - 3) * (column + 100) - 14 + lanes).tolist()


def one(*lines: str) -> Callable[[], Array]:
    return lambda: run_lines(*lines, shared=64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (one("tanh.approx.f32 %f1, %f2;"), r"line 8: the instruction is not known: tanh\.approx\.f32"),
        (one("ld.global.lu.u32 %r0, [%rd1];"), "line 8: unknown form"),
        (one("cvt.rmi.s32.f32 %r0, %f1;"), "line 8: the conversion is not known"),
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
        (one("bar.warp.sync 15;"), "line 8: only barriers of whole warps"),
        (one("cp.async.ca.shared.global [%r2], [%rd1], 4;"), "line 8: unknown form"),
        (one("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%r0}, {%r1}, {%r2}, {%r3};"), "line 8: unknown form"),
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
        ("lop3.b32", (0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA, 0x6A), 0x6A6A6A6A),
        ("cvt.rni.s32.f32", (0x40200000,), 2),  # 2.5
        ("cvt.rzi.s32.f32", (0xC0200000,), -2 & 0xFFFFFFFF),
        ("cvt.rni.s32.f32", (0x4F800000,), 0x7FFFFFFF),  # 2^32
        ("cvt.rni.s32.f32", (0x7FC00000,), 0),
        ("add.f32", (0x3F800000, 0x40000000), 0x40400000),
        ("fma.rn.f16x2", (0x3C004000, 0x40003C00, 0x3C003C00), 0x42004200),
    ],
)
def test_arithmetic(opcode: str, operands: tuple[int, ...], result: int) -> None:
    assert arithmetic(opcode, *operands) == result
