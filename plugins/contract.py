"""The operators as data: names, ports, attributes. No other file spells these strings.

An operator has one name per code width and arity, because the ONNX parser of TensorRT finds model-local functions by
name only and knows no optional inputs: ``CodebookMatMul3`` multiplies by a matrix of 3-bit codes, exactly, and
``CodebookMatMul3A8`` rounds x to 8 bits first, with one scale per token and group (`rankbook.plugins.int8`).

Letters in the shapes, and the forms of constants, are those of `rankbook.plugins.forms`; ``...`` stands for any
leading dimensions. The last of the Q parameter planes is the offset where the attribute ``offset`` is 1, and its row of
levels is all ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from rankbook.plugins import forms, layout
from rankbook.plugins.forms import Shape

DOMAIN = "rankbook"
"""ONNX domain of the operators and of the functions that hold their standard-ONNX bodies."""
VERSION = 1
"""Version of the operator set."""
PLUGIN_NAMESPACE = "rankbook"
"""Namespace of the TensorRT plugins."""
PLUGIN_VERSION = "1"
"""Version string of the TensorRT plugins."""

INT8_SUFFIX = "A8"
"""Ends the names of operators that round x to 8 bits."""
MATMUL, MATMUL_LOW_RANK, GATHER = "CodebookMatMul", "CodebookMatMulLowRank", "CodebookGather"
MATMUL_INT8, MATMUL_LOW_RANK_INT8 = MATMUL + INT8_SUFFIX, MATMUL_LOW_RANK + INT8_SUFFIX
KINDS = (MATMUL, MATMUL_LOW_RANK, GATHER, MATMUL_INT8, MATMUL_LOW_RANK_INT8)
"""Operator kinds; the name of an operator is its kind with its bits at the end, or before `INT8_SUFFIX`."""
PLUGIN_KINDS = KINDS
"""Kinds that the TensorRT plugin library has creators for; of others the parser takes the function body."""

FLOATS = ("float32", "float16", "bfloat16")

CUDA_PLANES, CUDA_COLUMNS = 4, 1 << 20
"""Most planes of levels and most inputs of a row that the CUDA kernels take; the CPU's take 2**bits planes."""


@dataclass(frozen=True)
class Port:
    """One input or output.

    Attributes:
        name: Formal name.
        shapes: Allowed shapes; sizes are numbers or the letters of the module docstring.
        dtypes: Allowed element types, by numpy name.
        constant: Whether it must be an initializer (a weight the engines keep packed).
        doc: What it holds.
    """

    name: str
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    constant: bool
    doc: str


@dataclass(frozen=True)
class Attribute:
    """One attribute.

    Attributes:
        name: Name.
        kind: ``int`` or ``string``.
        low: Smallest integer allowed.
        high: Largest integer allowed.
        value: The only string allowed.
        doc: What it says.
    """

    name: str
    kind: str
    doc: str
    low: int = 0
    high: int = 2**31 - 1
    value: str = ""


@dataclass(frozen=True)
class OpContract:
    """One operator.

    Attributes:
        kind: One of `KINDS`.
        bits: Bits per code.
        inputs: Inputs in order, all required.
        outputs: Outputs in order.
        attributes: Attributes, all required.
    """

    kind: str
    bits: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attributes: tuple[Attribute, ...]

    @property
    def name(self) -> str:
        """The op_type."""
        return op_name(self.kind, self.bits)

    @property
    def int8_activations(self) -> bool:
        """Whether x is rounded to 8 bits, as `rankbook.plugins.int8` defines."""
        return self.kind in (MATMUL_INT8, MATMUL_LOW_RANK_INT8)

    @property
    def low_rank(self) -> bool:
        """Whether there is an error branch."""
        return self.kind in (MATMUL_LOW_RANK, MATMUL_LOW_RANK_INT8)

    def input_names(self) -> tuple[str, ...]:
        """Formal names of the inputs, in order."""
        return tuple(port.name for port in self.inputs)

    def constants(self) -> tuple[str, ...]:
        """Formal names of the inputs that must be initializers, in order."""
        return tuple(port.name for port in self.inputs if port.constant)


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


def _contract(kind: str, bits: int) -> OpContract:
    if kind == GATHER:
        return OpContract(kind, bits, (_INDICES, *_WEIGHT), (_ROWS,), _ATTRIBUTES)
    branch = _BRANCH if kind in (MATMUL_LOW_RANK, MATMUL_LOW_RANK_INT8) else ()
    return OpContract(kind, bits, (_X, *_WEIGHT, _BIAS, *branch), (_Y,), _ATTRIBUTES)


OPERATORS: dict[str, OpContract] = {
    op_name(kind, bits): _contract(kind, bits) for kind in KINDS for bits in layout.BITS
}
"""Every operator by its op_type."""


def plugin_names() -> tuple[str, ...]:
    """Return the op_types that the TensorRT plugin library has creators for."""
    return tuple(name for name, operator in OPERATORS.items() if operator.kind in PLUGIN_KINDS)


def known_sizes(bits: int, out_features: int, in_features: int) -> dict[str, int]:
    """Return the sizes that follow from the attributes, by the letters of the module docstring."""
    panels, blocks, _, _, _ = layout.packed_shape(out_features, in_features, bits)
    return {"N": out_features, "K": in_features, "NP": panels, "KB": blocks, "b": bits, "L": 1 << bits}
