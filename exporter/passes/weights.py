"""Gives the placeholders of a traced graph their weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor

from rankbook.calibration.activations.inputs import ActivationConfig
from rankbook.calibration.checkpoint.format import Checkpoint
from rankbook.calibration.model.experts import matrix_of, stacks
from rankbook.calibration.record import halves
from rankbook.exporter.dialects.base import Dialect, DialectError, LayerWriter, PackedLayer
from rankbook.exporter.rewrite import TRACE_DOMAIN, Writer, lazy_tensor
from rankbook.exporter.skeleton import DENSE, EXPERTS, LAYER, PACKED, SMALL_BYTES, Skeleton


class BindWeights(ir.passes.InPlacePass):
    """Completes every node that `rankbook.exporter.skeleton` left without weights.

    * A packed layer: the nodes and constants of a dialect (`rankbook.exporter.dialects`).
    * ``Experts``: the packed layers of all experts of a matrix, as one node of the dialect.
    * ``Dense``: Transpose, MatMul and Add on the stored weight, which an embedding may use too.
    * A large parameter that was traced as an expanded zero: its stored values.

    All large tensors are lazy: they are read when the file is written.
    """

    def __init__(
        self, checkpoint: Checkpoint, skeleton: Skeleton, dialect: Dialect, *, int8_activations: bool = False
    ) -> None:
        super().__init__()
        self._int8_activations = int8_activations
        self._calls: Counter[str] = Counter()
        self._checkpoint = checkpoint
        self._skeleton = skeleton
        self._dialect = dialect

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place."""
        graph = model.graph
        for node in list(graph):
            if node.domain == TRACE_DOMAIN and node.op_type in (PACKED, EXPERTS):
                self._lower_packed(graph, node)
            elif (node.domain, node.op_type) == (TRACE_DOMAIN, DENSE):
                self._lower_dense(graph, node)
        for value in list(graph.initializers.values()):
            self._restore(value)
        model.opset_imports.pop(TRACE_DOMAIN, None)
        return ir.passes.PassResult(model, modified=True)

    def _lower_packed(self, graph: ir.Graph, node: ir.Node) -> None:
        name, (x, *numbers) = node.attributes[LAYER].as_string(), node.inputs
        find = expert_layers if node.op_type == EXPERTS else packed_layer
        layer = find(self._checkpoint, name, self._skeleton.dtype, int8_activations=self._int8_activations)
        writer = LayerWriter(graph, layer)
        if x is None:
            raise ValueError(f"the placeholder of {name} has no input")
        lower, lower_experts = self._dialect.lower, self._dialect.lower_experts
        if numbers and numbers[0] is not None and lower_experts is not None:  # what `check_layers` has seen to
            nodes = lower_experts(writer, x, numbers[0])
        else:
            nodes = lower(writer, writer.quantized_input(x))
        self._replace(writer, node, nodes)

    def _lower_dense(self, graph: ir.Graph, node: ir.Node) -> None:
        layer = node.attributes[LAYER].as_string()
        calls = self._calls[layer]
        self._calls[layer] += 1
        name = f"{layer}.call.{calls}" if calls else layer  # a router may be called twice in a block
        writer = Writer(graph, name)
        weight = writer.constant(self._stored(f"{layer}.weight"))
        if weight.shape is None:
            raise ValueError(f"{layer}.weight has no shape")
        transposed = writer.op("Transpose", weight, perm=[1, 0])
        transposed.type, transposed.shape = weight.type, ir.Shape(reversed(weight.shape.dims))
        product = writer.op("MatMul", node.inputs[0], transposed, like=node.outputs[0])
        writer.nodes[-1].name = name
        if f"{layer}.bias" in self._skeleton.owners:
            writer.op("Add", product, writer.constant(self._stored(f"{layer}.bias")))
        self._replace(writer, node, writer.nodes)

    def _replace(self, writer: Writer, old: ir.Node, nodes: list[ir.Node]) -> None:
        writer.replace(old, {old.outputs[0]: nodes[-1].outputs[0]})

    def _restore(self, value: ir.Value) -> None:
        """Give a large parameter its stored values."""
        name, shape = value.name or "", value.shape
        if name not in self._skeleton.owners or value.const_value is None or shape is None:
            return
        if math.prod(shape.numpy()) * self._skeleton.dtype.itemsize > SMALL_BYTES:
            value.const_value = self._stored(name)

    def _stored(self, parameter: str) -> ir.LazyTensor:
        """Return a parameter of a layer that is not quantized, in the dtype of the activations."""
        owner, dtype = self._skeleton.owners[parameter], self._skeleton.dtype

        def load() -> Tensor:
            return halves.narrowed(owner, self._checkpoint.tensor(owner), dtype)

        return lazy_tensor(owner, from_torch_dtype(dtype), self._checkpoint.tensor(owner).shape, load)


def packed_layers(
    checkpoint: Checkpoint, dtype: torch.dtype, *, int8_activations: bool = False
) -> Iterator[PackedLayer]:
    """Yield every packed layer as dialects see it, the experts of one matrix as one."""
    for name in checkpoint.layers:
        if not matrix_of(name):
            yield packed_layer(checkpoint, name, dtype, int8_activations=int8_activations)
    for matrix in stacks(checkpoint.layers):
        yield expert_layers(checkpoint, matrix, dtype, int8_activations=int8_activations)


def expert_layers(
    checkpoint: Checkpoint, matrix: str, dtype: torch.dtype, *, int8_activations: bool = False
) -> PackedLayer:
    """Return the packed layers of all experts of a matrix, stacked.

    Raises:
        DialectError: They differ in what is stored, or have ranges of their own for what enters them.
    """
    names = stacks(checkpoint.layers)[matrix]
    first = packed_layer(checkpoint, names[0], dtype, int8_activations=int8_activations)
    if odd := [name for name in names if checkpoint.layers[name] != first.spec]:
        raise DialectError(
            f"{odd[0]} is stored in another form than {names[0]}, and the experts of a matrix are one operator;"
            " quantize all of them alike"
        )
    if first.input_range is not None:
        raise DialectError(f"the inputs of {names[0]} have a static range for each expert; export with --weights-only")

    def read(part: str) -> torch.Tensor:
        return torch.stack([checkpoint.part(name, part) for name in names])

    return replace(first, name=matrix, owner=matrix, read=read, experts=len(names))


def packed_layer(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype, *, int8_activations: bool = False
) -> PackedLayer:
    """Return a packed layer as dialects see it; ``int8_activations`` is for products, not for embeddings."""
    owner = checkpoint.layers[name].shared_with or name
    embedding = checkpoint.layers[name].kind == "embedding"
    spec = checkpoint.layers[owner]
    config = ActivationConfig.from_json(None if embedding else checkpoint.settings.get("activations"))
    return PackedLayer(
        name,
        owner,
        spec,
        embedding,
        lambda part: checkpoint.part(owner, part),
        dtype,
        config.ranges.get(name),
        config.symmetric,
        int8_activations and not embedding,
    )
