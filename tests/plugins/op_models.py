"""Random operators of the contract as one-node ONNX models, for every backend that can run one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from rankbook.plugins import contract, layout, reference

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class OpCase:
    """What to draw: an operator of ``kind`` with these sizes."""

    bits: int = 4
    out_features: int = 64
    in_features: int = 128
    group: int = 64
    planes: int = 2
    offset: bool = True
    params: str = "int8"
    rank: int = 0
    branch: str = "int8"
    bias: bool = False
    tokens: tuple[int, ...] = (3,)
    dtype: str = "float32"
    linear_levels: bool = False
    kind: str = contract.MATMUL
    seed: int = 0

    @property
    def op_type(self) -> str:
        """Name of the operator."""
        kind = self.kind
        if kind != contract.GATHER:
            kind = contract.matmul_kind(low_rank=bool(self.rank), int8_activations=kind == contract.MATMUL_INT8)
        return contract.op_name(kind, self.bits)


@dataclass
class Op:
    """One drawn operator."""

    op_type: str
    inputs: dict[str, Array]
    attributes: dict[str, Any]

    def expected(self) -> Array:
        """Return the output of the numpy reference."""
        return reference.run(self.op_type, list(self.inputs.values()), self.attributes)

    def model(self) -> onnx.ModelProto:
        """Return a model whose only node is the operator; every input but the first is an initializer."""
        first, *names = self.inputs
        initializers = [numpy_helper.from_array(self.inputs[name], name) for name in names]
        node = helper.make_node(
            self.op_type, list(self.inputs), ["y"], name="layer", domain=contract.DOMAIN, **self.attributes
        )
        feed = self.inputs[first]
        kind = helper.np_dtype_to_tensor_dtype(feed.dtype)
        x = helper.make_tensor_value_info(first, kind, [f"d{i}" for i in range(feed.ndim - 1)] + [None])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT if kind == TensorProto.INT64 else kind, None)
        graph = helper.make_graph([node], "op", [x], [y], initializers)
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid(contract.DOMAIN, contract.VERSION)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def draw(case: OpCase) -> Op:
    """Draw the tensors of ``case``; weights come out with magnitude near 1 / sqrt(K)."""
    rng = np.random.default_rng(case.seed)
    n, k, width = case.out_features, case.in_features, 1 << case.bits
    planes = case.planes + int(case.offset)
    inputs: dict[str, Array] = {}
    if case.kind == contract.GATHER:
        inputs["indices"] = rng.integers(0, n, case.tokens).astype(np.int64)
    else:
        inputs["x"] = rng.standard_normal((*case.tokens, k)).astype(case.dtype)
    codes = rng.integers(0, width, (n, k)).astype(np.uint8)
    inputs["codes"] = layout.to_carrier(layout.pack_codes(codes, case.bits))
    inputs["levels"] = _levels(case, rng)
    inputs |= _params(case, planes, rng)
    if case.kind != contract.GATHER:
        inputs["bias"] = rng.standard_normal(n if case.bias else 1).astype(np.float32) * np.float32(case.bias)
    if case.rank:
        inputs |= _factor("down", case.rank, k, (case.rank, 1), case.branch, rng)
        inputs |= _factor("up", n, case.rank, (1, case.rank), case.branch, rng)
    attributes: dict[str, Any] = {"in_features": k, "out_features": n, "offset": int(case.offset)}
    attributes |= {"plugin_namespace": contract.PLUGIN_NAMESPACE, "plugin_version": contract.PLUGIN_VERSION}
    return Op(case.op_type, inputs, attributes)


def _levels(case: OpCase, rng: np.random.Generator) -> Array:
    width = 1 << case.bits
    limit = width // 2 if case.bits == 8 else 64
    levels = rng.integers(-limit, limit, (case.planes, width)).astype(np.float16)
    if case.linear_levels:
        levels[:] = np.arange(width) - width // 2
    ones = np.ones((int(case.offset), width), np.float16)
    return np.concatenate([levels, ones])


def _params(case: OpCase, planes: int, rng: np.random.Generator) -> Mapping[str, Array]:
    groups = case.in_features // case.group
    size = 0.02 / np.sqrt(case.in_features)
    if case.params == "int8":
        panels = layout.ceil_div(case.out_features, layout.PANEL)
        stored = rng.integers(-128, 128, (case.out_features, groups, planes)).astype(np.int8)
        step = (rng.random((panels, 1, planes, 1)) * size / 128).astype(np.float32)
        return {"params": layout.pack_rows(stored), "step": step, "base": (step * 30).astype(np.float32)}
    values = (rng.standard_normal((case.out_features, groups, planes)) * size).astype(case.params)
    ones = np.ones((1, 1, 1, 1), np.int8)
    return {"params": ones, "step": layout.pack_rows(values), "base": np.zeros((1, 1, 1, 1), np.float32)}


def _factor(
    name: str, rows: int, columns: int, scale: tuple[int, int], form: str, rng: np.random.Generator
) -> Mapping[str, Array]:
    if form == "int8":
        stored = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
        return {name: stored, f"{name}_scale": (rng.random(scale) * 1e-3).astype(np.float32)}
    values = (rng.standard_normal((rows, columns)) * 0.05).astype(form)
    return {name: np.ones((1, 1), np.int8), f"{name}_scale": values}
