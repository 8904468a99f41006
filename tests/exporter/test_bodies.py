"""The bodies compute the reference in stock ONNX Runtime, keep weights packed, and import into TensorRT-RTX."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from rankbook.plugins import contract, layout
from tests.calibration.records import random_record
from tests.exporter.rtx import build, needs_rtx
from tests.op_cases import CASES, activations, case_record, expected, feeds, op_model, relative_error

KINDS = [(case, kind) for case in CASES for kind in ("", contract.GATHER) if not (kind and "rank" in CASES[case])]
KINDS += [(case, contract.matmul_kind(low_rank="rank" in CASES[case], int8_activations=True)) for case in CASES]


@pytest.mark.parametrize(("case", "kind"), KINDS)
def test_stock_onnxruntime_equals_the_reference(case, kind):
    record = case_record(case)
    model = op_model(record, kind)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    x = activations(record, kind)
    (got,) = session.run(None, feeds(record, x, kind))
    # float32 sums of at most 128 products against float64 ones: a few units of 2^-24 each. Where x is rounded to 8
    # bits both round to the same integers; a single one that differed would show at 1/127 of a product, 1e-4 or more.
    assert relative_error(got, expected(record, x, kind)) < 2e-6
    assert got.shape == expected(record, x, kind).shape


@pytest.mark.parametrize("bits", layout.BITS)
def test_a_single_row_works(bits):
    record = random_record(bits=bits, rank=2)
    session = onnxruntime.InferenceSession(op_model(record).SerializeToString())
    x = activations(record)[:1, :1]
    assert relative_error(session.run(None, {"x": x})[0], expected(record, x)) < 2e-6


def test_half_precision_activations_round_only_the_weight_and_the_product():
    record = random_record(bits=4, in_features=64, group=32, rank=3)
    session = onnxruntime.InferenceSession(op_model(record, dtype="float16").SerializeToString())
    x = activations(record).astype(np.float16)
    (got,) = session.run(None, {"x": x})
    assert got.dtype == np.float16
    # 64 products with weights rounded to 11 bits, and an error branch that sums in the same precision.
    assert relative_error(got, expected(record, x.astype(np.float32))) < 3e-3


@pytest.mark.parametrize("kind", [contract.MATMUL_INT8, contract.MATMUL_LOW_RANK_INT8])
def test_a_body_that_rounds_has_the_extremes_of_the_definition(kind):
    """Halves go to even, zeros and tiny groups vanish, a NaN or an infinity spoils its row and no other."""
    record = random_record(rank=5 if "LowRank" in kind else 0)  # groups of 16
    x = np.repeat(activations(record)[:1], 2, axis=1).reshape(6, -1)
    x[0, :32] = [127, *(np.arange(-15, 16) / 2)]  # one step is 1: every second number is a tie
    x[1, 16:32], x[1, :16] = 0, 1e-38
    x[3, 5], x[5, 40] = np.inf, np.nan
    want = expected(record, x[None], kind)
    (got,) = onnxruntime.InferenceSession(op_model(record, kind).SerializeToString()).run(None, {"x": x[None]})
    np.testing.assert_array_equal(np.isnan(want[0]).all(axis=1), [False, False, False, True, False, True])
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    assert relative_error(got[~np.isnan(got)], want[~np.isnan(want)]) < 2e-6


def test_half_precision_with_rounding_is_float32_inside():
    record = random_record(bits=4, in_features=64, group=32, rank=3)
    model = op_model(record, contract.MATMUL_LOW_RANK_INT8, "float16")
    x = activations(record).astype(np.float16)
    (got,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    assert got.dtype == np.float16
    # Both round a float32 result to 11 bits, at worst to either side of a tie.
    assert relative_error(got, expected(record, x, contract.MATMUL_LOW_RANK_INT8)) <= 2**-10


@pytest.mark.parametrize("kind", [contract.MATMUL, contract.MATMUL_INT8])
@pytest.mark.parametrize("bits", layout.BITS)
def test_weights_stay_packed_in_the_optimized_graph(bits, kind, tmp_path):
    record = random_record(256, 512, bits=bits, group=256, planes=1)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    model = op_model(record, kind)
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    weights = sum(tensor.ByteSize() for tensor in onnx.load(tmp_path / "optimized.onnx").graph.initializer)
    # Codes, tables of levels and indices of groups; one float32 copy of the weight alone would be 512 kB.
    assert weights < 256 * 512 * bits / 8 + 20_000


@needs_rtx
@pytest.mark.trt
@pytest.mark.parametrize("kind", contract.KINDS)
def test_tensorrt_rtx_builds_the_body_and_keeps_weights_packed(kind, tmp_path):
    rank = 4 if contract.OPERATORS[contract.op_name(kind, 4)].low_rank else 0
    exact = kind in (contract.MATMUL, contract.MATMUL_LOW_RANK)
    # The codes of A8 operators are decoded by the same nodes as those of the others.
    for bits in (3, 8) if contract.OPERATORS[contract.op_name(kind, 4)].int8_activations else layout.BITS:
        record = random_record(512, 512, bits=bits, group=128, planes=1, rank=rank)
        for dtype in contract.FLOATS if exact else ("float32",) if kind == contract.GATHER else ("float16",):
            path = tmp_path / f"{kind}{bits}{dtype}.onnx"
            onnx.save(op_model(record, kind, dtype), path)
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
        model = op_model(record, kind)
        second = onnx.NodeProto()
        second.CopyFrom(model.graph.node[0])
        model.graph.node[0].output[0] = second.input[0] = "between"
        model.graph.node.append(second)
        onnx.save(model, tmp_path / "twice.onnx")
        report = build(tmp_path / "twice.onnx", {"x": ([1, 1, 64], [1, 4, 64], [2, 8, 64])})
        assert report["errors"] == []
