"""The int8 mode of the native library equals its definition in numpy bit for bit, on every instruction set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from rankbook.plugins import int8, library
from tests.ops.cases import WIDE, Array, Case, Op, drawn, relative_error
from tests.ops.runners import built, ort_session, run_in_process, run_native

ROOT = Path(__file__).resolve().parents[2]


def session(op: Op, activations: str = "int8", threads: int = 2) -> Any:
    """Return a session with the native library that rounds activations, or does not."""
    return ort_session(op.model(), str(library.library("ort")), threads=threads, activations=activations)


def run(op: Op, activations: str = "int8", threads: int = 2) -> Array:
    """Run ``op`` natively."""
    return run_native(op, activations=activations, threads=threads)


def expected(op: Op) -> Array:
    """Return what the definition says."""
    return int8.codebook_matmul(op.inputs, op.attributes)


@built
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(case=drawn())
def test_equals_the_definition(case: Case) -> None:
    """Any width, rank, group, size, parameter form and branch: not one bit differs.

    The session asks for it, or the file: an operator that ends in A8 rounds whatever the session says.
    """
    named = case.seed % 2 == 1
    op = case.draw(int8_activations=named)
    assert op.op_type.endswith("A8") == named
    np.testing.assert_array_equal(run(op, "fp32" if named else "int8"), expected(op))


@built
@pytest.mark.parametrize("isa", ["portable", "avx2", "avxvnni", "avx512", "amx"])
def test_every_instruction_set(isa: str) -> None:
    """So do the kernels of each instruction set that this processor has (others fall back to what it has)."""
    run_in_process(f"{__name__}:check_all_widths", isa)


def check_all_widths() -> None:
    """Compare every number of tokens that has loops of its own, at every width, with one to five planes.

    Tokens do not see each other, so the first rows of one expected result serve all numbers.
    """
    for bits in (2, 3, 4, 8):
        for planes in (1, 2, 3, 5)[: 2 if bits == 2 else 4]:
            for linear in (False, True):
                case = replace(
                    WIDE, bits=bits, planes=planes, tokens=(200,), in_features=240, group=48, out_features=77, rank=5
                )
                op = case.draw(linear_levels=linear, bias=True)
                if linear:  # a range beyond what 7-bit tables hold
                    op.inputs["levels"][0, :2] = (-127, 128)
                library_session, want = session(op), expected(op)
                for tokens in (1, 2, 3, 4, 5, 8, 9, 13, 16, 17, 200):
                    (y,) = library_session.run(None, {"x": op.inputs["x"][:tokens]})
                    np.testing.assert_array_equal(y, want[:tokens], err_msg=f"{tokens} tokens, {case}")


@built
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_activations(dtype: str, int8: bool) -> None:
    """16 bits in and out, the same arithmetic inside: the result is rounded once, to even."""
    op = WIDE.draw(bits=3, dtype=dtype, bias=True, rank=8, tokens=(2, 5), int8_activations=int8)
    actual = run(op)
    np.testing.assert_array_equal(actual.astype(np.float32), expected(op).astype(np.float32))


@built
def test_levels_that_are_not_whole() -> None:
    """NF4-like levels are rounded as the definition says."""
    op = WIDE.draw(bits=4, planes=1)
    op.inputs["levels"][0] = np.sort(np.random.default_rng(0).uniform(-1, 1, 16)).astype(np.float16)
    np.testing.assert_array_equal(run(op), expected(op))


@built
@pytest.mark.parametrize("group", [32, 96])
def test_groups_of_an_odd_number_of_blocks(group: int) -> None:
    """Two blocks of 32 inputs fill a tile of AMX; the third of a group, or the only one, has tiles of its own."""
    op = WIDE.draw(bits=4, planes=2, in_features=192, group=group, out_features=77, tokens=(35,))
    np.testing.assert_array_equal(run(op), expected(op))


@built
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_one_long_group(tokens: int) -> None:
    """A row that is one group is decoded in parts whose integer sums are carried on."""
    op = WIDE.draw(bits=4, in_features=1999, group=1999, out_features=70, tokens=(tokens,))
    np.testing.assert_array_equal(run(op), expected(op))


@built
def test_bad_activations_spoil_their_row_only() -> None:
    """A NaN or an infinity gives NaNs in its row; zeros give the bias; other rows are untouched."""
    op = WIDE.draw(bits=4, bias=True, tokens=(4,))
    x = op.inputs["x"]
    x[0, 3], x[1, 100], x[2] = np.nan, np.inf, 0
    y = run(op)
    np.testing.assert_array_equal(y, expected(op))
    assert np.isnan(y[:2]).all()
    np.testing.assert_array_equal(y[2], op.inputs["bias"])
    assert np.isfinite(y[3]).all()


@built
def test_result_does_not_depend_on_threads_or_company() -> None:
    """A token gets the same bits alone, among others, and on any number of threads."""
    op = WIDE.draw(bits=3, out_features=500, in_features=512, tokens=(7,), rank=8)
    together = run(op)
    np.testing.assert_array_equal(together, run(op, threads=1))
    x = op.inputs["x"]
    for token in range(len(x)):
        op.inputs["x"] = x[token : token + 1]
        np.testing.assert_array_equal(run(op)[0], together[token])


@built
def test_default_is_exact() -> None:
    """Without the entry, or with fp32, nothing is rounded to 8 bits."""
    op = WIDE.draw(bits=4)
    assert relative_error(run(op, "fp32"), op.expected()) < 1e-5
    assert relative_error(run(op, "int8"), op.expected()) > 1e-4


@built
def test_unknown_activations_are_refused() -> None:
    """A typing error is an error, not a silent choice."""
    with pytest.raises(Exception, match=r"rankbook\.activations must be fp32 or int8"):
        run(WIDE.draw(), "int7")


@built
def test_too_long_a_group_is_refused() -> None:
    """An int32 sum could overflow: an error when the session is made, with what to do."""
    op = WIDE.draw(bits=2, in_features=65568, group=65568, out_features=1, tokens=(1,), has_offset=False)
    with pytest.raises(Exception, match=r"(?s)'layer'.*65568 inputs are too long.*65536.*fp32"):
        session(op)
