"""The bodies compute the reference in stock ONNX Runtime, keep weights packed, and import into TensorRT-RTX."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from rankbook.plugins import contract, layout
from tests.calibration.records import random_record
from tests.exporter.rtx import build, needs_rtx
from tests.ops.cases import Op, look_up_model, op_model, random_x, relative_error
from tests.ops.runners import run_bodies


@pytest.mark.parametrize("bits", layout.BITS)
def test_a_single_row_works(bits):
    record = random_record(bits=bits, rank=2)
    op = Op.of(record, random_x(record, tokens=(1, 1)))
    assert relative_error(run_bodies(op), op.expected()) < 2e-6


def test_half_precision_activations_round_only_the_weight_and_the_product():
    record = random_record(bits=4, in_features=64, group=32, rank=3)
    op = Op.of(record, random_x(record, "float16"))
    got = run_bodies(op)
    assert got.dtype == np.float16
    # 64 products with weights rounded to 11 bits, and an error branch that sums in the same precision.
    assert relative_error(got, op.unrounded()) < 3e-3


@pytest.mark.parametrize("rank", [0, 5])
def test_a_body_that_rounds_has_the_extremes_of_the_definition(rank):
    """Halves go to even, zeros and tiny groups vanish, a NaN or an infinity spoils its row and no other."""
    record = random_record(rank=rank)  # groups of 16
    x = np.repeat(random_x(record, tokens=(1, 3)), 2, axis=1)
    x[0, 0, :32] = [127, *(np.arange(-15, 16) / 2)]  # one step is 1: every second number is a tie
    x[0, 1, 16:32], x[0, 1, :16] = 0, 1e-38
    x[0, 3, 5], x[0, 5, 40] = np.inf, np.nan
    op = Op.of(record, x, int8_activations=True)
    want, got = op.expected(), run_bodies(op)
    np.testing.assert_array_equal(np.isnan(want[0]).all(axis=1), [False, False, False, True, False, True])
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    assert relative_error(got[~np.isnan(got)], want[~np.isnan(want)]) < 2e-6


def test_half_precision_with_rounding_is_float32_inside():
    record = random_record(bits=4, in_features=64, group=32, rank=3)
    op = Op.of(record, random_x(record, "float16"), int8_activations=True)
    got = run_bodies(op)
    assert got.dtype == np.float16
    # Both round a float32 result to 11 bits, at worst to either side of a tie.
    assert relative_error(got, op.expected()) <= 2**-10


@pytest.mark.parametrize("int8_activations", [False, True])
@pytest.mark.parametrize("bits", layout.BITS)
def test_weights_stay_packed_in_the_optimized_graph(bits, int8_activations, tmp_path):
    record = random_record(256, 512, bits=bits, group=256, planes=1)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    model = op_model(record, int8_activations=int8_activations)
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    weights = sum(tensor.ByteSize() for tensor in onnx.load(tmp_path / "optimized.onnx").graph.initializer)
    # Codes, tables of levels and indices of groups; one float32 copy of the weight alone would be 512 kB.
    assert weights < 256 * 512 * bits / 8 + 20_000


def model_of(record, kind, dtype="float32"):
    """Return a model of one operator of a kind."""
    if kind == contract.GATHER:
        return look_up_model(record)
    return op_model(
        record, dtype, int8_activations=contract.PACKED[contract.op_name(kind, record.bits)].int8_activations
    )


@needs_rtx
@pytest.mark.trt
@pytest.mark.parametrize("kind", contract.KINDS)
def test_tensorrt_rtx_builds_the_body_and_keeps_weights_packed(kind, tmp_path):
    rank = 4 if contract.PACKED[contract.op_name(kind, 4)].low_rank else 0
    exact = kind in (contract.MATMUL, contract.MATMUL_LOW_RANK)
    # The codes of A8 operators are decoded by the same nodes as those of the others.
    for bits in (3, 8) if contract.PACKED[contract.op_name(kind, 4)].int8_activations else layout.BITS:
        record = random_record(512, 512, bits=bits, group=128, planes=1, rank=rank)
        for dtype in contract.FLOATS if exact else ("float32",) if kind == contract.GATHER else ("float16",):
            path = tmp_path / f"{kind}{bits}{dtype}.onnx"
            onnx.save(model_of(record, kind, dtype), path)
            sizes = [] if kind == contract.GATHER else [512]
            name = "indices" if kind == contract.GATHER else "x"
            report = build(path, {name: ([1, 1, *sizes], [1, 4, *sizes], [2, 8, *sizes])})
            assert report["errors"] == []
            # Codes and parameters plus the group starts (4 bytes an input) and small tables.
            assert report["weight_bytes"] < 512 * 512 * bits / 8 + 512 * 4 * 5 + 4096 + rank * 1100


@needs_rtx
@pytest.mark.trt
def test_tensorrt_rtx_expands_a_body_more_than_once(tmp_path):
    # Its parser gives DequantizeLinear layers the bare names of their nodes, see rankbook.exporter.functions.
    for kind in sorted(set(contract.KINDS) - {contract.GATHER}):
        record = random_record(64, 64, rank=2 if "LowRank" in kind else 0)
        model = model_of(record, kind)
        second = onnx.NodeProto()
        second.CopyFrom(model.graph.node[0])
        model.graph.node[0].output[0] = second.input[0] = "between"
        model.graph.node.append(second)
        onnx.save(model, tmp_path / "twice.onnx")
        report = build(tmp_path / "twice.onnx", {"x": ([1, 1, 64], [1, 4, 64], [2, 8, 64])})
        assert report["errors"] == []
