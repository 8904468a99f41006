"""Single-operator models with random records: every runtime is compared with the numpy reference on these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.exporter import emit
from rankbook.exporter.bodies.codebook import functions
from rankbook.exporter.functions import OPSET
from rankbook.plugins import contract, reference
from tests.calibration.records import FORMS, random_record

CASES: dict[str, dict[str, Any]] = {
    **FORMS,
    "3 bits, wide": {"out_features": 64, "in_features": 128, "group": 64},
    "4 bits, half block groups": {"bits": 4, "in_features": 80, "group": 16, "out_features": 70},
    "4 bits, branch, bias": {"bits": 4, "rank": 3, "bias": True, "in_features": 96, "group": 48},
    "2 bits, odd": {"bits": 2, "in_features": 45, "group": 45, "out_features": 31},
    "8 bits, branch, fp32 params": {"bits": 8, "rank": 2, "param_bits": 32, "factor_bits": 32, "planes": 1},
    "8 bits, odd": {"bits": 8, "in_features": 45, "group": 45, "out_features": 65, "planes": 1},
    "one of everything": {"out_features": 1, "in_features": 16, "planes": 1, "has_offset": False},
}
"""Arguments of `random_record`."""


def case_record(name: str, **changes: Any) -> QuantizedLinear:
    """Return the record of a case."""
    return random_record(**{**CASES[name], **changes})


def numpy_inputs(record: QuantizedLinear, kind: str = "") -> dict[str, np.ndarray[Any, Any]]:
    """Return the constants of a record's operator by formal name."""
    return {name: tensor.numpy() for name, tensor in emit.from_record(record, kind).items()}


def expected(record: QuantizedLinear, x: np.ndarray[Any, Any], kind: str = "") -> np.ndarray[Any, Any]:
    """Return what the operator of a record must give for x (activations, or row indices)."""
    spec = record.spec()
    op = emit.operator(spec, kind)
    return reference.run(op.name, [x, *numpy_inputs(record, kind).values()], emit.attributes(spec))


def op_model(record: QuantizedLinear, kind: str = "", dtype: str = "float32") -> onnx.ModelProto:
    """Return a model with one operator: x (batch, sequence, K), or indices (batch, sequence), to y."""
    spec = record.spec()
    op = emit.operator(spec, kind)
    constants = [ir.serde.serialize_tensor(tensor) for tensor in emit.from_record(record, kind).values()]
    for constant, name in zip(constants, op.constants(), strict=True):
        constant.name = name
    first = op.inputs[0].name
    attributes: dict[str, Any] = dict(emit.attributes(spec))
    node = helper.make_node(op.name, list(op.input_names()), ["y"], domain=contract.DOMAIN, **attributes)
    gather = op.kind == contract.GATHER
    x_type = np.dtype("int64") if gather else np.dtype(dtype) if dtype != "bfloat16" else None
    x_elem = onnx.TensorProto.BFLOAT16 if x_type is None else helper.np_dtype_to_tensor_dtype(x_type)
    y_elem = onnx.TensorProto.FLOAT if gather else x_elem
    x_shape: list[str | int] = ["batch", "sequence"] if gather else ["batch", "sequence", spec.in_features]
    y_size = spec.in_features if gather else spec.out_features
    graph = helper.make_graph(
        [node],
        "op",
        [helper.make_tensor_value_info(first, x_elem, x_shape)],
        [helper.make_tensor_value_info("y", y_elem, ["batch", "sequence", y_size])],
        constants,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(contract.DOMAIN, contract.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions([op.name]), ir_version=11)


def activations(record: QuantizedLinear, kind: str = "", seed: int = 0) -> np.ndarray[Any, Any]:
    """Return random inputs of a record's operator, 2 x 3 rows."""
    generator = np.random.default_rng(seed)
    if kind == contract.GATHER:
        return generator.integers(0, record.out_features, (2, 3))
    return generator.standard_normal((2, 3, record.in_features)).astype(np.float32)


def relative_error(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> float:
    """Return the largest difference relative to the largest expected magnitude."""
    return float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max() / np.abs(want.astype(np.float64)).max())


def feeds(record: QuantizedLinear, x: np.ndarray[Any, Any], kind: str = "") -> Mapping[str, np.ndarray[Any, Any]]:
    """Return the named input of `op_model`."""
    return {emit.operator(record.spec(), kind).inputs[0].name: x}
