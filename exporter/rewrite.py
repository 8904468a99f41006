"""What dialects and passes read and write graphs with: nodes and constants with names, and what replaces what.

onnxscript's pattern rules were tried for gates and for sums with norms. They find the same nodes in the same time, but
name what they write by a counter (``node_SwiGLU_979``) and not after the node that it replaces, and leave a note in the
metadata of each; about ten lines a pattern would go. Slices and shared tables of a rotary embedding need the same code.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from rankbook.exporter.functions import VERSIONS
from rankbook.plugins import contract
from rankbook.plugins.contract import Operator

TRACE_DOMAIN = "rankbook.trace"
"""Domain of placeholders that do not outlive the passes."""
AttributeValue = int | float | str | Sequence[int] | ir.DataType
"""What an attribute of a node may be."""


class Writer:
    """Collects nodes that belong together, and registers their constants.

    Attributes:
        graph: Where the constants go.
        prefix: Begin of the names of the nodes.
        nodes: The nodes so far, in order.
    """

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph, self.prefix = graph, prefix
        self.nodes: list[ir.Node] = []

    def node(
        self,
        op_type: str,
        inputs: Iterable[ir.Value | None],
        attributes: Mapping[str, AttributeValue] | None = None,
        *,
        domain: str = "",
        name: str = "",
        outputs: int = 1,
    ) -> ir.Node:
        """Append a node; one without a name is named after the prefix and its operator."""
        name = name or f"{self.prefix}.{op_type}.{len(self.nodes)}"
        node = ir.node(op_type, list(inputs), dict(attributes or {}), domain=domain, name=name, num_outputs=outputs)
        for number, output in enumerate(node.outputs):
            output.name = f"{name}.output" + (f".{number}" if number else "")
        self.nodes.append(node)
        self.graph.opset_imports.setdefault(domain, VERSIONS.get(domain, 1))
        return node

    def op(
        self, op_type: str, *inputs: ir.Value | None, like: ir.Value | None = None, **attributes: AttributeValue
    ) -> ir.Value:
        """Append a node of the standard domain and return its output, with the type and shape of ``like`` if given."""
        output = self.node(op_type, inputs, attributes).outputs[0]
        if like is not None:
            output.type, output.shape = like.type, like.shape
        return output

    def call(
        self,
        operator: Operator,
        inputs: Iterable[ir.Value | None],
        attributes: Mapping[str, AttributeValue] | None = None,
        *,
        stock: bool = False,
    ) -> list[ir.Value]:
        """Append a node of an operator of rankbook with the name of the prefix, and return the operator's outputs.

        ``stock`` asks for ONNX Runtime's own operator in its place, whose other outputs are left out.
        """
        kind = operator.stock if stock else None
        places = kind.places if kind else range(len(operator.outputs))
        node = self.node(
            kind.name if kind else operator.name,
            inputs,
            attributes,
            domain=contract.STOCK_DOMAIN if kind else contract.DOMAIN,
            name=self.prefix,
            outputs=places[-1] + 1,
        )
        for unused in set(range(len(node.outputs))) - set(places):
            node.outputs[unused].name = ""
        return [node.outputs[place] for place in places]

    def constant(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Return the initializer that holds a tensor, by its name, adding it if it is new."""
        name = str(tensor.name)
        if name not in self.graph.initializers:
            shape = ir.Shape(tensor.shape.numpy())
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def array(self, name: str, values: npt.NDArray[np.generic]) -> ir.Value:
        """Return the constant ``name`` with these values."""
        return self.constant(ir.tensor(values, name=name))

    def ints(self, *numbers: int) -> ir.Value:
        """Return a constant of int64, one for all who ask for these numbers."""
        return self.array("ints." + "_".join(map(str, numbers)), np.array(numbers, np.int64))

    def number(self, number: float, dtype: ir.DataType) -> ir.Value:
        """Return a constant without axes, one for all who ask for it in this type."""
        return self.array(f"number.{dtype.name}.{number!r}", np.array(number, dtype.numpy()))

    def replace(self, old: ir.Node, results: Mapping[ir.Value, ir.Value]) -> None:
        """Put the nodes where ``old`` is, and each result in the place of an earlier one; remove ``old``."""
        self.graph.insert_before(old, self.nodes)
        for replaced, result in results.items():
            take_over(replaced, result)
        self.graph.remove(old, safe=True)


class NodePass(ir.passes.InPlacePass):
    """A pass that looks at the standard nodes of one kind, in order."""

    kind: ClassVar[str]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place."""
        changed = [node for node in standard_nodes(model.graph, self.kind) if self.change(model.graph, node)]
        return ir.passes.PassResult(model, modified=bool(changed))

    @abstractmethod
    def change(self, graph: ir.Graph, node: ir.Node) -> bool:
        """Change what is around a node, and return whether anything was changed."""


def lazy_tensor(name: str, dtype: ir.DataType, shape: Iterable[int], load: Callable[[], Tensor]) -> ir.LazyTensor:
    """Return a tensor whose values are computed when they are asked for; INT4 ones are given as int8 numbers."""

    def make() -> ir.TensorProtocol:
        values = load().contiguous()
        if dtype == ir.DataType.INT4:
            return ir.tensor(values.numpy().astype(dtype.numpy()), name=name)
        return TorchTensor(values, name=name)

    return ir.LazyTensor(make, dtype, ir.Shape(shape), name=name)


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Give ``new`` name, type, shape and users of ``old``, which may be an output of the graph."""
    new.name, new.type, new.shape = old.name, old.type, old.shape
    old.name = f"{old.name}.replaced"
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def given(node: ir.Node, position: int) -> ir.Value:
    """Return an input of a node.

    Raises:
        ValueError: It has none there.
    """
    value = node.inputs[position] if position < len(node.inputs) else None
    if value is None:
        raise ValueError(f"{node.op_type} node {node.name!r} lacks input {position}")
    return value


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the node that makes a value if it is a standard one of this kind."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type == op_type else None


def standard_nodes(graph: ir.Graph, op_type: str) -> list[ir.Node]:
    """Return the standard nodes of a kind, in order."""
    return [node for node in graph if node.domain == "" and node.op_type == op_type]


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """Return an attribute of a node, or what it is without."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def only_number(value: ir.Value | None) -> float | None:
    """Return the only element of a constant; None for everything else."""
    constant = None if value is None else value.const_value
    return constant.numpy().item() if constant is not None and constant.size == 1 else None


def fixed_size(value: ir.Value, axis: int) -> int:
    """Return the size of an axis.

    Raises:
        ValueError: It is not known.
    """
    size = None if value.shape is None else value.shape[axis]
    if not isinstance(size, int):
        raise ValueError(f"axis {axis} of {value.name!r} has no fixed size")
    return size
