"""The operators as data: what each takes, gives and computes. No other file spells these strings.

`Operator` is the type of all of them; they stand in one list, `rankbook.plugins.operators.OPERATORS`. This module holds
the type, and the operators with packed weights: products and gathers. Those have one name per code width and arity,
because the ONNX parser of TensorRT finds model-local functions by name only and knows no optional inputs:
``CodebookMatMul3`` multiplies by a matrix of 3-bit codes, exactly, and ``CodebookMatMul3A8`` rounds x to 8 bits first,
with one scale per token and group (`rankbook.plugins.int8`).

Letters in the shapes, and the forms of constants, are those of `rankbook.plugins.forms`; ``...`` stands for any
leading dimensions. The last of the Q parameter planes is the offset where the attribute ``offset`` is 1, and its row of
levels is all ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rankbook.plugins import forms, int8, layout, reference
from rankbook.plugins.forms import Shape, TensorSpec
from rankbook.plugins.layer_spec import LayerSpec

DOMAIN = "rankbook"
"""ONNX domain of the operators and of the functions that hold their standard-ONNX bodies."""
VERSION = 1
"""Version of the operator set."""
STOCK_DOMAIN = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""
PLUGIN_NAMESPACE = "rankbook"
"""Namespace of the TensorRT plugins."""
PLUGIN_VERSION = "1"
"""Version string of the TensorRT plugins."""

INT8_SUFFIX = "A8"
"""Ends the names of operators that round x to 8 bits."""
MATMUL, MATMUL_LOW_RANK, GATHER = "CodebookMatMul", "CodebookMatMulLowRank", "CodebookGather"
MATMUL_INT8, MATMUL_LOW_RANK_INT8 = MATMUL + INT8_SUFFIX, MATMUL_LOW_RANK + INT8_SUFFIX
KINDS = (MATMUL, MATMUL_LOW_RANK, GATHER, MATMUL_INT8, MATMUL_LOW_RANK_INT8)
"""Kinds of operators with packed weights; a name is a kind with its bits at the end, or before `INT8_SUFFIX`."""

FLOATS = ("float32", "float16", "bfloat16")

CUDA_PLANES, CUDA_COLUMNS = 4, 1 << 20
"""Most planes of levels and most inputs of a row that the CUDA kernels take; the CPU's take 2**bits planes."""

Array = npt.NDArray[np.generic]
Reference = Callable[[Mapping[str, Array], Mapping[str, Any]], tuple[Array, ...]]
"""Takes inputs by formal name and attributes, returns the outputs in order."""


@dataclass(frozen=True)
class Port:
    """One input or output.

    Attributes:
        name: Formal name.
        shapes: Allowed shapes; sizes are numbers or letters.
        dtypes: Allowed element types, by numpy name.
        constant: Whether it must be an initializer (a weight the engines keep packed).
        doc: What it holds.
        given_if: Integer attribute without which (where it is 0) nodes end before this port; empty for a port that
            every node has.
    """

    name: str
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    constant: bool
    doc: str
    given_if: str = ""


@dataclass(frozen=True)
class Attribute:
    """One attribute.

    Attributes:
        name: Name.
        kind: ``int``, ``float``, ``string``, ``ints`` or ``tensor``.
        low: Smallest number allowed.
        high: Largest number allowed.
        value: The only string allowed.
        doc: What it says.
    """

    name: str
    kind: str
    doc: str
    low: float = 0
    high: float = 2**31 - 1
    value: str = ""

    def problem(self, value: object) -> str:
        """Return what is wrong with a value, or an empty string."""
        what = f"attribute {self.name!r} is"
        if value is None:
            return f"{what} missing"
        if self.kind == "string":
            return "" if value == self.value else f"{what} {value!r:.80}; it must be {self.value!r}"
        if self.kind in ("int", "float"):
            types, article = ((int,), "an integer") if self.kind == "int" else ((int, float), "a number")
            right = isinstance(value, types) and self.low <= value <= self.high
            return "" if right else f"{what} {value!r:.80}; it must be {article} in [{self.low}, {self.high}]"
        if self.kind == "ints":
            right = isinstance(value, Sequence) and all(isinstance(item, int) and item >= 0 for item in value)
            return "" if right else f"{what} {value!r:.80}; it must be integers of at least 0"
        return "" if hasattr(value, "shape") else f"{what} {type(value).__name__}; it must be a tensor"


@dataclass(frozen=True)
class Stock:
    """An operator of ONNX Runtime, in `STOCK_DOMAIN`, that computes the same from the same inputs and attributes.

    Attributes:
        name: Its op_type.
        places: Which of its outputs each output is, in order; it has none behind the last one.
    """

    name: str
    places: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Operator:
    """One operator.

    Attributes:
        name: The op_type.
        kind: The name without the width of its codes; the C++ header has one entry a kind.
        inputs: Inputs in order; those that not every node has come last.
        outputs: Outputs in order.
        attributes: Attributes, all required.
        reference: What it computes, in numpy: the definition that every runtime is compared with.
        body: Module of `rankbook.exporter.bodies` that writes it in standard ONNX.
        bits: Bits of a code; 0 for an operator without packed weights.
        sizes: Returns the sizes that follow from the attributes, by the letters of the shapes.
        check: Returns what is wrong with attributes and constants together, each being right alone, or nothing.
        stock: The operator of ONNX Runtime for it, which takes other types too; None where it has none.
        limits: Limits of the kernels by name, for the C++ header.
        member: What each of its products is alone, for an operator of several (`rankbook.plugins.merged`).
        count: How many products it has.
        one_of: The product of one expert, for an operator whose constants are stacked (`rankbook.plugins.experts`).
    """

    name: str
    kind: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attributes: tuple[Attribute, ...]
    reference: Reference
    body: str
    bits: int = 0
    sizes: Callable[[Mapping[str, Any]], dict[str, int]] = lambda _: {}
    check: Callable[[Mapping[str, Any], Mapping[str, TensorSpec]], str] = lambda *_: ""
    stock: Stock | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    member: Operator | None = None
    count: int = 1
    one_of: Operator | None = None

    @property
    def int8_activations(self) -> bool:
        """Whether x is rounded to 8 bits, as `rankbook.plugins.int8` defines."""
        return self.kind.endswith(INT8_SUFFIX)

    @property
    def low_rank(self) -> bool:
        """Whether there is an error branch."""
        return "down" in self.constants()

    @property
    def has_plugin(self) -> bool:
        """Whether the TensorRT plugin library has a creator for it; of others the parser takes the function body."""
        return any(attribute.name == "plugin_namespace" for attribute in self.attributes)

    def input_names(self) -> tuple[str, ...]:
        """Formal names of all inputs, in order."""
        return tuple(port.name for port in self.inputs)

    def constants(self) -> tuple[str, ...]:
        """Formal names of the inputs that must be initializers, in order."""
        return tuple(port.name for port in self.inputs if port.constant)

    def layer(self, attributes: Mapping[str, Any], constants: Mapping[str, TensorSpec]) -> tuple[LayerSpec, int]:
        """Return the layer whose constants these are by formal name, and how many of the kind are stacked in them.

        Raises:
            ValueError: They are those of no layer.
        """
        if self.one_of is None:
            return LayerSpec.of_constants(self.bits, attributes, constants), 1
        counts = {part.shape[0] if part.shape else 0 for part in constants.values()}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(f"the constants are of {', '.join(map(str, sorted(counts)))} experts; they must agree")
        one = {name: replace(part, shape=part.shape[1:]) for name, part in constants.items()}
        return LayerSpec.of_constants(self.bits, attributes, one), counts.pop()

    def given(self, attributes: Mapping[str, Any]) -> tuple[Port, ...]:
        """Return the inputs that a node with these attributes has."""
        return tuple(port for port in self.inputs if not port.given_if or attributes.get(port.given_if))

    def compute(self, inputs: Sequence[Array], attributes: Mapping[str, Any]) -> tuple[Array, ...]:
        """Return the outputs of the numpy reference for the inputs that a node has, in order.

        Raises:
            ValueError: The number of inputs is wrong.
        """
        names = [port.name for port in self.given(attributes)]
        if len(inputs) != len(names):
            raise ValueError(f"{self.name} has {len(names)} inputs {tuple(names)}; {len(inputs)} were given")
        return self.reference(dict(zip(names, inputs, strict=True)), attributes)


def op_name(kind: str, bits: int) -> str:
    """Return the op_type of an operator kind at ``bits`` per code.

    Raises:
        ValueError: The kind or the width does not exist.
    """
    if kind not in KINDS or bits not in layout.BITS:
        raise ValueError(f"there is no operator {kind!r} for {bits} bits; kinds are {KINDS}, bits are {layout.BITS}")
    return f"{kind.removesuffix(INT8_SUFFIX)}{bits}{INT8_SUFFIX * kind.endswith(INT8_SUFFIX)}"


def matmul_kind(*, low_rank: bool, int8_activations: bool) -> str:
    """Return the kind of a product with or without an error branch, with or without rounding x to 8 bits."""
    return (MATMUL_LOW_RANK if low_rank else MATMUL) + INT8_SUFFIX * int8_activations


def _constant(name: str, doc: str) -> Port:
    parts = forms.CONSTANTS[name]
    shapes, dtypes = (tuple(dict.fromkeys(getattr(part, field) for part in parts)) for field in ("shape", "dtype"))
    return Port(name, shapes, dtypes, True, doc)


_WEIGHT = (
    _constant("codes", "packed codes, each byte minus 128 (plugins/layout.py)"),
    _constant("levels", "rows of levels; the row of the offset is all ones"),
    _constant("params", "group parameters before step and base"),
    _constant("step", "factor of params, or, where params is a single 1, the parameters themselves"),
    _constant("base", "added to params * step"),
)
_BIAS = _constant("bias", "added to the product; a single 0 where the layer has none")
_BRANCH = (
    _constant("down", "first factor of the error branch before its scale"),
    _constant("down_scale", "factor of down, or down itself"),
    _constant("up", "second factor of the error branch before its scale"),
    _constant("up_scale", "factor of up, or up itself"),
)
_X = Port("x", (("...", "K"),), FLOATS, False, "activations")
_INDICES = Port("indices", (("...",),), ("int64",), False, "rows to look up, each in [0, N)")
_Y = Port("y", (("...", "N"),), FLOATS, False, "x @ W.T (+ (x @ down.T) @ up.T) + bias, in the type of x")
_ROWS = Port("y", (("...", "K"),), ("float32",), False, "rows of W")

_ATTRIBUTES = (
    Attribute("in_features", "int", "K", low=1),
    Attribute("out_features", "int", "N", low=1),
    Attribute("offset", "int", "1 if the last parameter plane is the offset, else 0", high=1),
    Attribute("plugin_namespace", "string", "namespace of the TensorRT plugin", value=PLUGIN_NAMESPACE),
    Attribute("plugin_version", "string", "version of the TensorRT plugin", value=PLUGIN_VERSION),
)


def _packed(kind: str, bits: int) -> Operator:
    def sizes(attributes: Mapping[str, Any]) -> dict[str, int]:
        return known_sizes(bits, attributes["out_features"], attributes["in_features"])

    name, outputs = op_name(kind, bits), (_ROWS if kind == GATHER else _Y,)
    inputs: tuple[Port, ...] = (_INDICES, *_WEIGHT)
    computes, body = reference.codebook_gather, "gather"
    if kind != GATHER:
        branch = _BRANCH if kind in (MATMUL_LOW_RANK, MATMUL_LOW_RANK_INT8) else ()
        inputs, body = (_X, *_WEIGHT, _BIAS, *branch), "product"
        computes = int8.codebook_matmul if kind.endswith(INT8_SUFFIX) else reference.codebook_matmul

    def compute(given: Mapping[str, Array], attributes: Mapping[str, Any]) -> tuple[Array, ...]:
        return (computes(given, attributes),)

    def check(attributes: Mapping[str, Any], constants: Mapping[str, TensorSpec]) -> str:
        try:  # each part alone is one that is allowed; together they must be a layer
            LayerSpec.of_constants(bits, attributes, constants)
        except ValueError as error:
            return str(error)
        return ""

    return Operator(name, kind, inputs, outputs, _ATTRIBUTES, compute, body, bits, sizes, check)


PACKED: dict[str, Operator] = {op_name(kind, bits): _packed(kind, bits) for kind in KINDS for bits in layout.BITS}
"""The operators with packed weights by op_type; several products in one node are in `rankbook.plugins.merged`."""


def known_sizes(bits: int, out_features: int, in_features: int) -> dict[str, int]:
    """Return the sizes that follow from the attributes, by the letters of the module docstring."""
    panels, blocks, _, _, _ = layout.packed_shape(out_features, in_features, bits)
    return {"N": out_features, "K": in_features, "NP": panels, "KB": blocks, "b": bits, "L": 1 << bits}
