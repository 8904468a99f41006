"""TensorRT plugins without a library: kernels as PTX inside the engine, which runs without Python or another file.

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
from rankbook.plugins.forms import Form, TensorSpec
from rankbook.plugins.layer_spec import LayerSpec
from rankbook.plugins.layout import BITS

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
"""What the bits of the argument ``forms`` say; contract.h has them for the kernels."""

_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}

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
    return tuple(name for name, operator in contract.PACKED.items() if operator.kind in kinds)


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
        types: Of all inputs: ``fp16``, ``bf16``, ``fp32``, ``int8`` or another.

    Raises:
        ValueError: No kernel in this form serves the layer.
    """
    operator = contract.PACKED[op_name]
    held = {name: TensorSpec(tuple(shape), _DTYPES.get(types[name], types[name])) for name, shape in shapes.items()}
    spec = LayerSpec.of_constants(operator.bits, attributes, held)
    sizes: tuple[int, ...] = (*(spec.sizes[letter] for letter in "NKGQ"), _forms(spec))
    stored = 4 if spec.planes == 3 else spec.planes
    if operator.kind == contract.GATHER:
        return Launch(f"rankbook_gather{spec.bits}_{stored}", spec.bits, 0, 4 * stored << spec.bits, sizes)
    _check(spec, types["x"])
    shared = max(256 * 128 if spec.bits in (4, 8) else 0, 4 * THREADS * TOKENS)
    name, rank = "rankbook_matmul", spec.branch_rank
    if rank:
        name, shared, sizes = f"{name}_low_rank", shared + 4 * TOKENS * rank, (*sizes, rank)
        if shared > MOST_SHARED:
            raise ValueError(f"an error branch of rank {rank} does not fit into shared memory; use the plugin library")
    return Launch(f"{name}{spec.bits}_{stored}_{types['x']}", spec.bits, spec.sizes["NP"], shared, sizes)


def _check(spec: LayerSpec, type_: str) -> None:
    if type_ not in TYPES:
        raise ValueError(f"x is {type_}; kernels inside an engine take {' or '.join(TYPES)}: export with --dtype fp16")
    if spec.in_features % 8:
        raise ValueError(f"in_features is {spec.in_features}; kernels inside an engine need a multiple of 8")
    if spec.bits == 3 and spec.sizes["G"] > 1 and spec.group % 32:
        raise ValueError(f"groups of {spec.group} inputs at 3 bits: kernels inside an engine need multiples of 32")


def _forms(spec: LayerSpec) -> int:
    coded, branch = spec.params is Form.INT8, spec.branch_rank > 0
    coded_branch = branch and spec.factors is Form.INT8
    true = {"params full": coded, "step full": not coded, "base full": coded, "offset": spec.has_offset}
    true |= {"bias full": bool(spec.bias), "step fp16": spec.params is Form.FLOAT16}
    for name in ("down", "up"):
        true |= {f"{name} full": coded_branch, f"{name}_scale full": branch and not coded_branch}
        true |= {f"{name}_scale fp16": branch and spec.factors is Form.FLOAT16}
    return sum(1 << bit for bit, form in enumerate(FORMS) if true[form])


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
    operator = contract.PACKED[name]
    gather = operator.kind == contract.GATHER

    def describe(x: Any, *_: Any, **attributes: int) -> Any:
        sizes = list(x.shape_expr)
        if gather:
            return trtp.from_shape_expr((*sizes, attributes["in_features"]), trt.DataType.FLOAT)
        return trtp.from_shape_expr((*sizes[:-1], attributes["out_features"]), x.dtype)

    return _signed(describe, operator, trtp.TensorDesc, (), trtp.TensorDesc)


def _implementation(trt: Any, trtp: Any, name: str) -> Any:
    """The function that names kernel, PTX and launch of a layer."""
    operator = contract.PACKED[name]
    dtypes = {trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16", trt.DataType.FLOAT: "fp32"}
    dtypes[trt.DataType.INT8] = "int8"

    def implement(*arguments: Any) -> tuple[str, str, Any, Any]:
        count = len(operator.inputs)
        inputs = dict(zip(operator.input_names(), arguments[:count], strict=True))
        attributes = dict(zip(_attributes(operator), arguments[count:-2], strict=True))
        first, *constants = inputs
        shapes = {c: [size.constant_value() for size in inputs[c].shape_expr] for c in constants}
        types = {key: dtypes.get(value.dtype, str(value.dtype)) for key, value in inputs.items()}
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


def _attributes(operator: contract.Operator) -> tuple[str, ...]:
    """Integer attributes in the order of `contract`; the others are read by the parser itself."""
    return tuple(item.name for item in operator.attributes if item.name in ("in_features", "out_features", "offset"))


def _signed(function: Any, operator: contract.Operator, desc: Any, more: Sequence[str], result: Any) -> Any:
    """Give a function the signature that TensorRT reads inputs and attributes from."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=desc) for name in operator.input_names()]
    parameters += [inspect.Parameter(name, kind, annotation=int) for name in _attributes(operator)]
    parameters += [inspect.Parameter(name, kind) for name in more]
    function.__signature__ = inspect.Signature(parameters, return_annotation=result)
    return function
