"""The CUDA kernels, run on the CPU from their own source over the emulation, agree with the numpy reference.

No GPU takes part. The emulation stops at every access outside the buffers, misaligned vector, write past the shared
memory, and at threads of a warp or block that do not all meet; uninitialized shared memory and scratch are NaN.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankbook.plugins import layout
from tests.calibration.records import random_record
from tests.ops.cases import DTYPES, EPSILON, FORMS, Case, Op, random_x
from tests.ops.runners import RUNNERS, check, run_kernels
from tests.plugins import emulated

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler to build the emulated kernels")


@pytest.mark.parametrize(("bits", "planes"), list(product(layout.BITS, (1, 2, 3, 4))))
def test_gather(bits, planes):
    record = random_record(bits=bits, planes=planes, out_features=70, in_features=80)
    check(RUNNERS["cuda"], Op.of(record, np.array([[0, 69, 31], [32, 7, 66]]), gather=True))


def test_gather_of_a_row_that_does_not_exist_is_nan():
    got = run_kernels(Op.of(FORMS["odd sizes"].draw().record, np.array([-1, 33, 32]), gather=True))
    assert np.isnan(got[:2]).all()
    assert np.isfinite(got[2]).all()


@pytest.mark.parametrize(("bits", "dtype"), list(product(layout.BITS, DTYPES)))
def test_dense(bits, dtype):
    for case in ("plain", "odd sizes", "fp16 params"):
        op = FORMS[case].draw(bits=bits)
        got = emulated.dense(op.constants(), op.attributes, dtype).view(DTYPES[dtype]).astype(np.float64)
        rows = Op.of(op.record, np.arange(op.record.out_features), gather=True)
        magnitude, _ = rows.magnitude
        assert (np.abs(got - op.record.weight().numpy()) <= magnitude * (EPSILON[dtype] + 4 * EPSILON["float32"])).all()


def test_levels_and_coefficients_of_any_magnitude_survive_fp16():
    """Levels far from 1 would overflow or vanish in fp16 products if the table did not divide them out."""
    record = random_record(float_levels=True)
    for factor in (2.0**-10, 2.0**9):
        step, base = record.params.step, record.params.base
        assert step is not None
        assert base is not None
        params = dataclasses.replace(record.params, step=step / factor * 16, base=base / factor * 16)
        scaled = dataclasses.replace(record, levels=(record.levels.float() * factor).half(), params=params)
        check(RUNNERS["cuda"], Op.of(scaled, random_x(scaled, "float16", (2,))))


@pytest.mark.skipif(emulated.ON_GPU, reason="a GPU does not report these errors; compute-sanitizer does")
@pytest.mark.parametrize(
    ("what", "message"),
    [
        (0, "only a part of the threads"),
        (1, "only a part of the threads|different places"),
        (2, "write of 4 bytes outside all buffers by thread 16"),
        (3, "outside the shared memory"),
        (4, "different places"),
        (5, "outside the shared memory"),
        (6, "access to what an earlier kernel may still write"),
        (7, "ended without waiting for earlier ones"),
    ],
)
def test_the_emulation_catches_broken_kernels(what, message):
    with pytest.raises(RuntimeError, match=message):
        emulated.broken(what)
    emulated.broken(8)  # two kernels, of which the second waits where it should


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 7}, "must divide"),
        ({"bits": 5}, "2, 3, 4 or 8 bits"),
        ({"params_planes": 6}, "1 to 4 planes"),
        ({"rows": 0}, "no rows"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changes, message):
    op = FORMS["plain"].draw()
    arena = emulated.Arena()
    weight = emulated.packed_weight(arena, op.constants(), op.attributes)
    for name, value in changes.items():
        setattr(weight, name, value)
    arena.register()
    assert emulated.library().rb_dense(ctypes.byref(weight), None, 0) == 1
    assert message in emulated.library().rb_error().decode()


LONG: dict[str, Any] = {"bits": 4, "out_features": 33, "in_features": 2560, "group": 64, "rank": 5}
"""Rows so long that blocks share panels."""


def prepared(op: Op) -> emulated.Product:
    x = op.x if op.dtype == "float32" else op.x.view(np.uint16)
    x, rounds, numbers = x.reshape(-1, x.shape[-1]), op.contract.int8_activations, op.numbers if op.records else None
    return emulated.Product(op.constants(), op.attributes, x, op.dtype, int8=rounds, numbers=numbers)


@pytest.mark.parametrize(("dtype", "tokens", "rank", "int8"), [
    ("float16", 1, 5, False), ("float16", 1, 0, False), ("bfloat16", 12, 5, False), ("float32", 3, 0, False),
    ("float16", 20, 5, False), ("float16", 1, 5, True), ("float16", 9, 0, True),
])  # fmt: skip
def test_sums_of_several_blocks_repeat_bit_for_bit(dtype, tokens, rank, int8):
    """On a GPU blocks arrive in another order every time, and find the counters as the last run left them."""
    case = Case(**LONG | {"rank": rank}, dtype=dtype, tokens=(tokens,), int8_activations=int8)
    run = prepared(case.draw()).run
    first = run()
    assert np.isfinite(first.view(DTYPES[dtype]).astype(np.float64)).all()
    for _ in range(500 if emulated.ON_GPU else 2):
        np.testing.assert_array_equal(run(), first)


# Tokens, rounded or not, rank of the branch, changes to the second product, kernels of three products of one x: x
# rounded once; x down^T and the product of each; for more tokens the sum of shares.
SEVERAL: dict[str, tuple[int, bool, int, dict[str, Any], int]] = {
    "branch": (3, False, 5, {}, 3 + 3),
    "no branch": (3, False, 0, {}, 3),
    "rounded": (3, True, 5, {}, 1 + 3 + 3),
    "rounded, no branch": (1, True, 0, {}, 1 + 3),
    "rounded, other groups": (3, True, 5, {"group": 128}, 3 * (1 + 1 + 1)),
    "rounded, many tokens": (20, True, 5, {}, 1 + 3 * (1 + 1 + 1)),
    "many tokens": (20, False, 5, {}, 3 * (1 + 1 + 1)),
}


@pytest.mark.parametrize("case", list(SEVERAL))
def test_products_of_one_x_are_what_each_is_alone(case):
    tokens, int8, rank, changes, launches = SEVERAL[case]
    same = Case(**LONG | {"rank": rank}, dtype="float16", tokens=(tokens,), int8_activations=int8)
    cases = [dataclasses.replace(same, seed=i, out_features=rows) for i, rows in enumerate((33, 70, 32))]
    cases[1] = dataclasses.replace(cases[1], **changes)
    ops = [each.draw() for each in cases]
    x = ops[0].x.view(np.uint16)
    products = [emulated.Product(op.constants(), op.attributes, x, op.dtype, int8=int8) for op in ops]
    found, kernels = emulated.several(products)
    for y, one in zip(found, products, strict=True):
        np.testing.assert_array_equal(y, one.run())
    assert emulated.ON_GPU or kernels == launches


@pytest.mark.parametrize(("rank", "factor_bits"), [(0, 8), (5, 8), (70, 8), (70, 16)])
def test_blocks_may_have_parts_of_two_tiles(rank, factor_bits):
    """Four tiles for three blocks: each has more than a tile and less than two, and one in the middle is whole.

    Blocks that share a tile share its ranks, 16 at a time; 64 are in shared memory at once.
    """
    sizes = LONG | {"rank": rank, "factor_bits": factor_bits, "out_features": 257}
    op = Case(**sizes, dtype="float16", bias=True).draw(tokens=(65,))
    if emulated.ON_GPU:
        check(RUNNERS["cuda"], op)
        return
    before = emulated.library().rb_resident(3)
    try:
        emulated.library().rb_launches()
        check(RUNNERS["cuda"], op)
        assert emulated.library().rb_launches() == 2 + (rank > 0)
    finally:
        emulated.library().rb_resident(before)


def test_products_of_one_call_must_have_x_in_common():
    one = prepared(Case(bits=4, in_features=64, group=64).draw())
    other = prepared(Case(bits=4, in_features=128, group=64).draw())
    with pytest.raises(RuntimeError, match="must have x, its type and what is done to it in common"):
        emulated.several([one, other])
    with pytest.raises(RuntimeError, match="1 to 4 products"):
        emulated.several([one] * 5)


@pytest.mark.parametrize(("tokens", "columns"), [(17, 160), (45, 80)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_branch_of_many_tokens_goes_through_tensor_cores(dtype, tokens, columns):
    """Ranks and tokens that end inside a tile, columns inside a step; where there are many blocks, wider ones."""
    sizes: dict[str, Any] = {"bits": 4, "in_features": columns, "group": 16, "rank": 19, "out_features": 40}
    tokens = 2000 if emulated.ON_GPU and tokens > 17 else tokens
    check(RUNNERS["cuda"], Case(**sizes, dtype=dtype).draw(tokens=(tokens,)))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_more_tokens_than_fit_a_grid_are_multiplied_in_slices(dtype, int8):
    """65,472 on a GPU; the emulation takes 128 at once."""
    tokens = 70_000 if emulated.ON_GPU else 150
    op = Case(bits=4, out_features=5, in_features=32, group=32, planes=1, rank=2, bias=True, dtype=dtype).draw(
        tokens=(tokens,), int8_activations=int8
    )
    check(RUNNERS["cuda"], op)


def test_scratch_for_a_decoded_weight_is_bounded():
    """Three planes, or fp32, with many tokens: a head would take 1 to 2 GB, and is decoded in parts instead."""
    for dtype, planes in (("float16", 3), ("float32", 1)):
        weight = emulated.PackedWeight(
            params_full=True, base_full=True, rows=128_256, columns=4096, bits=4, groups=64, params_planes=planes
        )
        head = emulated.Matmul(weight=weight, type=emulated.TYPES[dtype], tokens=512)
        assert 0 < emulated.library().rb_workspace(ctypes.byref(head)) <= 128 * 2**20
    for dtype in DTYPES:
        check(
            RUNNERS["cuda"],
            Case(out_features=150, in_features=64, planes=3, rank=2, bias=True, dtype=dtype).draw(tokens=(20,)),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.down, "codes", m.down.codes + 2), "down must be aligned to 4 bytes"),
        (lambda m: setattr(m.up.scale, "data", m.up.scale.data + 2), "up must be aligned .* scale to one element"),
        (lambda m: setattr(m, "workspace", m.workspace + 8), "workspace must be aligned to 16 bytes"),
        (lambda m: setattr(m, "bias", m.bias + 1), "bias must be aligned to 4 bytes"),
        (lambda m: setattr(m, "x", m.x + 4), "x and y must be aligned to 16 bytes"),
        (lambda m: setattr(m, "workspace", None), "needs a workspace"),
    ],
)
def test_misaligned_pointers_are_refused_before_the_launch(change, message):
    made = prepared(Case(bits=4, in_features=64, group=64, rank=4, bias=True).draw())
    change(made.arguments)
    with pytest.raises(RuntimeError, match=message):
        made.run()


STACK = Case(bits=4, planes=1, out_features=40, in_features=96, group=48, rank=3, bias=True, experts=5)
"""Experts, of whose tokens eight are a block's with few of them, and 64 with many."""


@pytest.mark.parametrize(
    ("experts", "tokens", "dtype"),
    [(1, 3, "float16"), (1, 70, "bfloat16"), (1, 20, "float32"), (12, 30, "float16"), (12, 70, "bfloat16")],
)
def test_products_of_one_expert_and_of_many(experts, tokens, dtype):
    """More than eight tokens an expert go to tiles; those of several slices, too."""
    check(RUNNERS["cuda"], STACK.draw(experts=experts, tokens=(tokens,), dtype=dtype))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("tokens", [7, 60])
def test_tokens_of_an_expert_that_does_not_exist_are_nan(tokens, dtype):
    op = STACK.draw(tokens=(tokens,), dtype=dtype)
    wrong = op.with_numbers(op.numbers.copy())
    wrong.numbers[[0, 3, 6]] = 5, -1, 2**40
    got = run_kernels(wrong)
    there = np.ones(tokens, bool)
    there[[0, 3, 6]] = False
    assert np.isnan(got[~there]).all()
    # Few tokens are multiplied as they are in any company; tiles begin elsewhere, which changes nothing either.
    np.testing.assert_array_equal(got[there], run_kernels(op)[there])


@pytest.mark.skipif(emulated.ON_GPU, reason="a GPU does not say what was read")
@pytest.mark.parametrize(("dtype", "planes"), [("float16", 1), ("bfloat16", 3), ("float32", 2)])
@pytest.mark.parametrize("tokens", [3, 60])
def test_only_the_chosen_experts_are_read(tokens, dtype, planes):
    op = STACK.draw(tokens=(tokens,), dtype=dtype, planes=planes)
    chosen = sorted(set(op.numbers.tolist()))
    assert chosen != list(range(5))
    made = prepared(op)
    made.arena.keep_parts(op.constants().values(), chosen)
    assert np.isfinite(made.run().view(DTYPES[dtype]).astype(np.float32)).all()
    made.arena.keep_parts(op.constants().values(), chosen[1:])
    with pytest.raises(RuntimeError, match="outside all buffers"):
        made.run()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("numbers", None, "needs the number of the expert"), ("experts", 5000, "1 to 4096 experts")],
)
def test_experts_that_make_no_sense_are_refused(name, value, message):
    made = prepared(STACK.draw())
    setattr(made.arguments, name, value)
    with pytest.raises(RuntimeError, match=message):
        made.run()


def test_sanitizers_see_every_kind_of_kernel():
    makefile = (Path(emulated.ROOT) / "Makefile").read_text()
    selected = re.search(r"^SANITIZED := (.*)$", makefile, re.MULTILINE)
    assert selected
    assert selected[1] == "tests/ops/test_every_runner.py tests/plugins/test_cuda_emulated.py -k 'cuda'"
    assert "pytest -q $(SANITIZED)" in makefile
    cases = RUNNERS["cuda"].cases.values()
    many = {(c.dtype, c.planes) for c in cases if not c.gather and math.prod(c.tokens) > 16}
    assert {("float16", 1), ("bfloat16", 2)} <= many  # prefill
    assert {("float16", 3), ("float32", 1)} <= many  # tiled products of a decoded weight
    assert {(c.dtype, c.planes) for c in cases if c.experts and math.prod(c.tokens) > 64} >= {("bfloat16", 2)}  # tiles
    assert any(c.gather for c in cases)


def test_no_compiler_on_a_gpu_is_an_error_and_not_a_skip(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(emulated, "ON_GPU", True)
    with pytest.raises(RuntimeError, match=r"RANKBOOK_KERNELS_ON=gpu, but .* set CXX"):
        emulated.compiler()
