"""What a dialect is given and what it must return."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor

from rankbook.calibration.activations.inputs import StaticRange
from rankbook.calibration.record import halves
from rankbook.calibration.record.group_params import GroupParams
from rankbook.calibration.record.quantized_linear import Factor
from rankbook.exporter.refusal import by_reason
from rankbook.exporter.rewrite import Writer, lazy_tensor
from rankbook.plugins.forms import Form
from rankbook.plugins.layer_spec import LayerSpec


class DialectError(ValueError):
    """A checkpoint that a dialect cannot express; the message says why and what to do."""


@dataclass(frozen=True)
class PackedLayer:
    """One use of a packed layer.

    Attributes:
        name: Dotted name of the torch module, which becomes the name of the node that gives the layer's output.
        owner: Name of the layer that holds the tensors: another one where weights are tied.
        spec: Shapes and types of the owner.
        embedding: Whether rows are looked up; otherwise x is multiplied by the matrix.
        read: Returns a packed tensor of the owner by name, see `QuantizedLinear.pack`.
        dtype: Dtype of the activations.
        input_range: Static range of the input, or None where the input is not quantized.
        symmetric_input: Whether that range is symmetric: INT8 with zero point 0, otherwise UINT8.
        int8_activations: Whether the operator rounds its input to 8 bits, with one scale per token and group.
        experts: How many layers of experts are stacked in what is read; 0 where it is one layer.
    """

    name: str
    owner: str
    spec: LayerSpec
    embedding: bool
    read: Callable[[str], Tensor]
    dtype: torch.dtype = torch.float32
    input_range: StaticRange | None = None
    symmetric_input: bool = True
    int8_activations: bool = False
    experts: int = 0


class LayerWriter(Writer):
    """The nodes that take the place of one layer; names begin with its name.

    Attributes:
        layer: The layer.
    """

    def __init__(self, graph: ir.Graph, layer: PackedLayer) -> None:
        super().__init__(graph, layer.name)
        self.layer = layer

    def lazy(self, part: str, dtype: ir.DataType, shape: tuple[int, ...], load: Callable[[], Tensor]) -> ir.Value:
        """Return a constant ``<layer>.<part>`` whose values are computed when the file is written."""
        return self.constant(lazy_tensor(f"{self.layer.name}.{part}", dtype, shape, load))

    def floats(
        self, part: str, shape: tuple[int, ...], load: Callable[[], Tensor], owner: str | None = None
    ) -> ir.Value:
        """Return a constant in the dtype of the activations, which must hold it when the file is written.

        With ``owner`` it is ``<owner>.<part>``, shared with whoever asks for that.
        """
        dtype = self.layer.dtype
        name = f"{owner or self.layer.name}.{part}"
        kind = from_torch_dtype(dtype)
        return self.constant(lazy_tensor(name, kind, shape, lambda: halves.narrowed(name, load(), dtype)))

    def quantized_input(self, x: ir.Value) -> ir.Value:
        """Return x after QuantizeLinear and DequantizeLinear where the layer has an input range, else x itself.

        Equal ranges share their constants, so that the nodes of layers with one input merge.
        """
        found = self.layer.input_range
        if found is None:
            return x
        kind = ir.DataType.INT8 if self.layer.symmetric_input else ir.DataType.UINT8
        step = ir.tensor(torch.tensor(found.step).to(self.layer.dtype), name=f"input_step.{found.step!r}")
        zero = ir.tensor(np.array(found.zero, kind.numpy()), name=f"input_zero.{kind.name}.{found.zero}")
        constants = [self.constant(step), self.constant(zero)]
        codes = self.op("QuantizeLinear", x, *constants)
        values = self.op("DequantizeLinear", codes, *constants, like=x)
        codes.type, codes.shape = ir.TensorType(kind), x.shape
        return values

    def finish(self, product: ir.Value, x: ir.Value) -> list[ir.Node]:
        """Add error branch and bias to a product and return all nodes; the last one gets the layer's name."""
        spec = self.layer.spec
        if spec.branch_rank:
            inner = self.op("MatMul", x, self._factor("down", (spec.in_features, spec.branch_rank), rank_axis=1))
            outer = self.op("MatMul", inner, self._factor("up", (spec.branch_rank, spec.out_features), rank_axis=0))
            product = self.op("Add", product, outer)
        if spec.bias:
            bias = self.floats("bias", (spec.out_features,), lambda: self.layer.read("bias"))
            self.op("Add", product, bias)
        self.nodes[-1].name = self.layer.name
        return self.nodes

    def _factor(self, name: str, shape: tuple[int, int], *, rank_axis: int) -> ir.Value:
        """Return a factor of the error branch, transposed for a product from the right."""
        read, spec = self.layer.read, self.layer.spec
        if spec.factors is not Form.INT8:
            return self.floats(name, shape, lambda: read(f"{name}_scale").T)
        codes = self.lazy(name, ir.DataType.INT8, shape, lambda: read(name).T)
        scale = self.floats(f"{name}_scale", (spec.branch_rank,), lambda: read(f"{name}_scale").reshape(-1))
        return self.op("DequantizeLinear", codes, scale, axis=rank_axis)


@dataclass(frozen=True)
class Dialect:
    """A way to write packed layers: one module in this package that ends in ``DIALECT = Dialect(...)``.

    Attributes:
        name: What ``--dialect`` takes.
        summary: One line for the documentation.
        refuse: Returns why a layer cannot be expressed and what to do, or an empty string.
        lower: Returns the nodes that compute a layer from its input; the last one gives the output and has the name
            of the layer.
        lower_experts: As ``lower``, of stacked experts, from the rows of x and the expert of each; None where the
            dialect has no operator for them.
    """

    name: str
    summary: str
    refuse: Callable[[PackedLayer], str]
    lower: Callable[[LayerWriter, ir.Value], list[ir.Node]]
    lower_experts: Callable[[LayerWriter, ir.Value, ir.Value], list[ir.Node]] | None = None


def check_layers(dialect: Dialect, layers: Iterable[PackedLayer]) -> None:
    """Check that a dialect can express every layer.

    Raises:
        DialectError: It cannot; each reason is given once, with a layer as an example.
        NotHeldError: Activations are float16, which does not hold a layer's weights.
    """
    refused: dict[str, str] = {}
    for layer in layers:
        if layer.dtype == torch.float16:
            _check_half(layer)
        if reason := _no_experts(dialect, layer) or dialect.refuse(layer):
            refused[layer.name] = reason
    if refused:
        raise DialectError(f"dialect {dialect.name!r} cannot express this checkpoint: {by_reason(refused)}")


def _no_experts(dialect: Dialect, layer: PackedLayer) -> str:
    if not layer.experts or dialect.lower_experts is not None:
        return ""
    return "it has no operator for the experts of a mixture; export in the dialect rankbook"


def _of_expert(layer: PackedLayer, expert: int, part: str) -> Tensor:
    return layer.read(part)[expert]


def _check_half(layer: PackedLayer) -> None:
    """Refuse a layer whose decoded weight, error branch or bias float16 does not hold."""
    for expert in range(layer.experts):
        _check_half(replace(layer, experts=0, read=functools.partial(_of_expert, layer, expert)))
    if layer.experts:
        return
    spec, read = layer.spec, layer.read
    held = {name: read(name) for name in spec.tensors() if name != "codes"}
    params = GroupParams.unpack(held, spec).dense()
    peaks = torch.cat([held["levels"].float().abs().amax(1), torch.ones(int(spec.has_offset))])
    largest = float((params.abs().amax((0, 1)) * peaks).sum())  # of a weight, or more
    if 0 < largest < halves.SMALLEST:
        raise halves.NotHeldError(
            f"float16 does not hold the weights of {layer.name}, which are at most {largest:.3g}; export with --dtype"
            " bf16 or fp32"
        )
    if spec.branch_rank and not layer.embedding:
        for name in ("down", "up"):
            halves.narrowed(f"{layer.name}.{name}", Factor.unpack(name, held, spec.factors).dense(), torch.float16)
    if spec.bias:
        halves.narrowed(f"{layer.name}.bias", held["bias"], torch.float16)
