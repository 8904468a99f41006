"""The rewrite toolkit: names, constants that are shared, domains that are imported, and what takes whose place."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from rankbook.exporter import rewrite
from rankbook.exporter.rewrite import Writer, lazy_tensor
from rankbook.plugins import attention, contract, rows


def model() -> ir.Model:
    return ir.from_onnx_text("""
        <ir_version: 11, opset_import: ["" : 23]>
        g (float[b,4] x) => (float[b,4] y) <float[1] one = {1}, float[2] two = {1, 2}> { h = Abs (x)  y = Neg (h) }
    """)


def test_nodes_are_named_after_the_prefix_and_take_the_place_of_one() -> None:
    graph = model().graph
    absolute, negated = graph
    writer = Writer(graph, "layer")
    half = writer.op("Mul", absolute.outputs[0], writer.number(0.5, ir.DataType.FLOAT), like=absolute.outputs[0])
    writer.replace(negated, {negated.outputs[0]: writer.op("Relu", half)})
    assert [node.name for node in list(graph)[1:]] == ["layer.Mul.0", "layer.Relu.1"]
    assert half.shape == absolute.outputs[0].shape
    (result,) = graph.outputs
    assert (result.name, result.shape) == ("y", ir.Shape(["b", 4]))
    assert result.producer() is writer.nodes[-1]


def test_constants_of_one_value_are_one_tensor() -> None:
    writer = Writer(model().graph, "a")
    assert writer.ints(0, -1) is writer.ints(0, -1)
    assert writer.number(1.0, ir.DataType.FLOAT) is not writer.number(1.0, ir.DataType.FLOAT16)
    assert writer.array("same", np.zeros(2)) is writer.array("same", np.zeros(2))


def test_domains_of_what_is_written_are_imported() -> None:
    held = model()
    writer = Writer(held.graph, "a")
    writer.call(rows.SWIGLU, list(held.graph.inputs) * 2)
    assert held.opset_imports == {"": 23, contract.DOMAIN: contract.VERSION}
    writer.call(rows.ADD_NORM, list(held.graph.inputs) * 3, {"epsilon": 0.1}, stock=True)
    assert held.opset_imports[contract.STOCK_DOMAIN] == 1


@pytest.mark.parametrize(("operator", "outputs"), [(rows.ADD_NORM, 4), (attention.OPERATOR, 3)])
def test_outputs_that_nothing_uses_are_left_out(operator: contract.Operator, outputs: int) -> None:
    writer = Writer(model().graph, "a")
    results = writer.call(operator, [], stock=True)
    names = [value.name for value in writer.nodes[0].outputs]
    assert len(names) == outputs
    assert [name for name in names if name] == [value.name for value in results]
    assert len(results) == len(operator.outputs)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (ir.DataType.BFLOAT16, torch.tensor([0.5, -2.0], dtype=torch.bfloat16)),
        (ir.DataType.INT4, torch.tensor([-8, 7], dtype=torch.int8)),
    ],
)
def test_lazy_tensors_are_read_when_they_are_asked_for(dtype: ir.DataType, values: torch.Tensor) -> None:
    asked = []

    def load() -> torch.Tensor:
        asked.append(dtype)
        return values

    tensor = lazy_tensor("w", dtype, (2,), load)
    assert (tensor.dtype, tensor.shape, asked) == (dtype, ir.Shape((2,)), [])
    assert tensor.numpy().astype(np.float32).tolist() == values.float().tolist()
    assert asked


def test_questions_about_values() -> None:
    graph = model().graph
    absolute, negated = graph
    assert rewrite.producer(negated.inputs[0], "Abs") is absolute
    assert rewrite.producer(negated.inputs[0], "Neg") is None
    assert rewrite.only_number(graph.initializers["one"]) == 1
    assert rewrite.only_number(graph.initializers["two"]) is None
    assert rewrite.fixed_size(graph.inputs[0], 1) == 4
    with pytest.raises(ValueError, match="axis 0 of 'x' has no fixed size"):
        rewrite.fixed_size(graph.inputs[0], 0)
    with pytest.raises(ValueError, match="lacks input 1"):
        rewrite.given(absolute, 1)
