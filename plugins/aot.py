"""TensorRT plugins without a library: kernels as PTX inside the engine, which then runs without our files or Python.

TensorRT calls this form quickly deployable plugins with an ahead-of-time implementation (``tensorrt.plugin``, 10.7 and
later): one kernel per layer that takes the inputs' addresses, 32-bit integers and the outputs' addresses, and no
scratch. `register` tells TensorRT about the operators; they have the names, the namespace and the attributes of the
library's plugins, so that the same ONNX file is built with one or the other.

The kernels (``csrc/kernels/cuda/aot.cuh``) are meant for decoding: up to 8 tokens decode the weight once, more decode
it once per 8 tokens; every block multiplies the error branch anew. TensorRT-RTX 1.7 does not know this form.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rankbook.plugins import contract, library
from rankbook.plugins.layout import BITS, PANEL

THREADS = 256
"""Threads of a block."""
TOKENS = 8
"""Tokens of a block."""
TYPES = ("fp16", "bf16")
"""Types of x and y."""
MOST_SHARED = 48 * 1024
"""Bytes of shared memory that a kernel may use without asking the driver for more."""
FORMS = (
    *("params full", "step full", "base full", "offset", "bias full", "step fp16"),
    *("down full", "down_scale full", "down_scale fp16", "up full", "up_scale full", "up_scale fp16"),
)
"""What the bits of the argument ``forms`` say; the order of `Form` in aot.cuh."""

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Launch:
    """How to call the kernel of one layer.

    Attributes:
        kernel: Its name in the PTX.
        bits: Width of the codes, which names the PTX.
        panels: Blocks in x (a product), or 0 for a look-up, where it is a block per index, at most 65535.
        shared: Bytes of dynamic shared memory.
        sizes: Integers after the number of tokens or indices.
    """

    kernel: str
    bits: int
    panels: int
    shared: int
    sizes: tuple[int, ...]

    @property
    def ptx(self) -> str:
        """The PTX of this kernel alone."""
        return kernel_text(library.library(f"aot-{self.bits}").read_text(encoding="ascii"), self.kernel)


def names() -> tuple[str, ...]:
    """Return the op_types that there are kernels for: all but those that round x, of which engines get the body."""
    kinds = (contract.MATMUL, contract.MATMUL_LOW_RANK, contract.GATHER)
    return tuple(name for name, operator in contract.OPERATORS.items() if operator.kind in kinds)


def unavailable() -> str | None:
    """Return why there is no PTX, with what to do about it, or None."""
    return next((reason for bits in BITS if (reason := library.unavailable(f"aot-{bits}"))), None)


@cache
def kernel_text(module: str, name: str) -> str:
    """Cut one kernel out of a module; kernels share nothing but the declaration of shared memory.

    Raises:
        ValueError: The module lacks it.
    """
    head, *entries = module.split(".visible .entry ")
    for entry in entries:
        if entry.startswith(f"{name}("):
            return f"{head}.visible .entry {entry}"
    raise ValueError(f"the PTX has no kernel {name}; build the library again with `make native-cuda`")


def launch(op_name: str, attributes: Mapping[str, Any], shapes: Shapes, types: Mapping[str, str]) -> Launch:
    """Choose the kernel of a layer and what it is called with.

    Args:
        op_name: One of `names`.
        attributes: ``in_features``, ``out_features``, ``offset``.
        shapes: Of the constants, by formal name.
        types: Of all inputs: ``fp16``, ``bf16``, ``fp32`` or another.

    Raises:
        ValueError: No kernel in this form serves the layer.
    """
    operator = contract.OPERATORS[op_name]
    rows, columns = attributes["out_features"], attributes["in_features"]
    bits = shapes["codes"][2]
    full = shapes["params"] if shapes["params"][3] == PANEL else shapes["step"]
    groups, planes = full[1], full[2]
    coefficients = planes - attributes["offset"]
    stored = 4 if coefficients == 3 else coefficients
    sizes: tuple[int, ...] = (rows, columns, groups, planes, _forms(attributes, shapes, types))
    if operator.kind == contract.GATHER:
        return Launch(f"rankbook_gather{bits}_{stored}", bits, 0, 4 * stored << bits, sizes)
    _check(columns, groups, bits, types["x"])
    shared = max(256 * 128 if bits in (4, 8) else 0, 4 * THREADS * TOKENS)
    name = "rankbook_matmul"
    if "up_scale" in shapes:
        rank = shapes["up_scale"][1]
        name, shared, sizes = f"{name}_low_rank", shared + 4 * TOKENS * rank, (*sizes, rank)
        if shared > MOST_SHARED:
            raise ValueError(f"an error branch of rank {rank} does not fit into shared memory; use the plugin library")
    return Launch(f"{name}{bits}_{stored}_{types['x']}", bits, -(-rows // PANEL), shared, sizes)


def _check(columns: int, groups: int, bits: int, type_: str) -> None:
    if type_ not in TYPES:
        raise ValueError(f"x is {type_}; kernels inside an engine take {' or '.join(TYPES)}: export with --dtype fp16")
    if columns % 8:
        raise ValueError(f"in_features is {columns}; kernels inside an engine need a multiple of 8")
    if bits == 3 and groups > 1 and columns // groups % 32:
        raise ValueError(
            f"groups of {columns // groups} inputs at 3 bits: kernels inside an engine need multiples of 32"
        )


def _forms(attributes: Mapping[str, Any], shapes: Shapes, types: Mapping[str, str]) -> int:
    rows, columns = attributes["out_features"], attributes["in_features"]
    rank = shapes["up_scale"][1] if "up_scale" in shapes else 0
    wide = {"params": PANEL, "step": PANEL}
    true = {f"{name} full" for name, size in wide.items() if shapes[name][3] == size}
    planes = (shapes["params"] if "params full" in true else shapes["step"])[2]
    if tuple(shapes["base"]) == (-(-rows // PANEL), 1, planes, 1):
        true.add("base full")
    if attributes["offset"]:
        true.add("offset")
    if tuple(shapes.get("bias", ())) == (rows,):
        true.add("bias full")
    for name, size in (("down", (rank, columns)), ("up", (rows, rank))):
        true |= {f"{part} full" for part in (name, f"{name}_scale") if tuple(shapes.get(part, ())) == size}
    # A factor of one column or row has one scale either way: as codes with a scale per rank it needs no more.
    true -= {name for name, size in (("down_scale full", columns), ("up_scale full", rows)) if size == 1}
    true |= {f"{name} fp16" for name in ("step", "down_scale", "up_scale") if types.get(name) == "fp16"}
    return sum(1 << bit for bit, form in enumerate(FORMS) if form in true)


def register(trt: Any, trtp: Any) -> None:
    """Register every operator with TensorRT, in this process.

    Args:
        trt: The module ``tensorrt``.
        trtp: The module ``tensorrt.plugin``.

    Raises:
        ValueError: This TensorRT does not know the form.
    """
    if not hasattr(trtp, "aot_impl") or not hasattr(trtp, "KernelLaunchParams"):
        raise ValueError(f"TensorRT {trt.__version__} has no ahead-of-time plugins; use the plugin library")
    for name in names():
        plugin = f"{contract.PLUGIN_NAMESPACE}::{name}"
        trtp.register(plugin)(_description(trt, trtp, name))
        trtp.aot_impl(plugin)(_implementation(trt, trtp, name))


def _description(trt: Any, trtp: Any, name: str) -> Any:
    """The function that infers type and shape of y."""
    operator = contract.OPERATORS[name]
    gather = operator.kind == contract.GATHER

    def describe(x: Any, *_: Any, **attributes: int) -> Any:
        sizes = list(x.shape_expr)
        if gather:
            return trtp.from_shape_expr((*sizes, attributes["in_features"]), trt.DataType.FLOAT)
        return trtp.from_shape_expr((*sizes[:-1], attributes["out_features"]), x.dtype)

    return _signed(describe, operator, trtp.TensorDesc, (), trtp.TensorDesc)


def _implementation(trt: Any, trtp: Any, name: str) -> Any:
    """The function that names kernel, PTX and launch of a layer."""
    operator = contract.OPERATORS[name]
    floats = {trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16", trt.DataType.FLOAT: "fp32"}

    def implement(*arguments: Any) -> tuple[str, str, Any, Any]:
        count = len(operator.inputs)
        inputs = dict(zip(operator.input_names(), arguments[:count], strict=True))
        attributes = dict(zip(_attributes(operator), arguments[count:-2], strict=True))
        first, *constants = inputs
        shapes = {c: [size.constant_value() for size in inputs[c].shape_expr] for c in constants}
        types = {key: floats.get(value.dtype, str(value.dtype)) for key, value in inputs.items()}
        found = launch(name, attributes, shapes, types)
        items = inputs[first].shape_expr.numel()
        params = trtp.KernelLaunchParams()
        params.block_x, params.shared_mem = THREADS, found.shared
        if found.panels:
            items = items // attributes["in_features"]
            params.grid_x, params.grid_z = found.panels, trtp.cdiv(items, TOKENS)
        else:
            params.grid_x = trtp.min(items, 65535)
        extras = trtp.SymIntExprs(1 + len(found.sizes))
        for i, value in enumerate((items, *found.sizes)):
            extras[i] = trtp.SymInt32(value)
        return found.kernel, found.ptx, params, extras

    result = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    return _signed(implement, operator, trtp.TensorDesc, ("outputs", "tactic"), result)


def _attributes(operator: contract.OpContract) -> tuple[str, ...]:
    """Integer attributes in the order of `contract`; the others are read by the parser itself."""
    return tuple(item.name for item in operator.attributes if item.name in ("in_features", "out_features", "offset"))


def _signed(function: Any, operator: contract.OpContract, desc: Any, more: Sequence[str], result: Any) -> Any:
    """Give a function the signature that TensorRT reads inputs and attributes from."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=desc) for name in operator.input_names()]
    parameters += [inspect.Parameter(name, kind, annotation=int) for name in _attributes(operator)]
    parameters += [inspect.Parameter(name, kind) for name in more]
    function.__signature__ = inspect.Signature(parameters, return_annotation=result)
    return function
