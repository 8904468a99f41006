"""Run as a program: asks TensorRT's own plugin registry and templates about one layer, as its builder would.

Reads ``{"op", "attributes", "shapes", "types"}`` from the first argument and writes what TensorRT was told. Expressions
of sizes are numbers here; in a build they are TensorRT's.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import numpy as np

from rankbook.plugins import aot, contract

trt: Any = importlib.import_module("tensorrt_bindings")
sys.modules["tensorrt"] = trt  # the spec package of that name is not on the package index
trtp: Any = importlib.import_module("tensorrt_bindings.plugin")
tensors: Any = importlib.import_module("tensorrt_bindings.plugin._tensor")


class Size(trt.IDimensionExpr):  # type: ignore[misc]
    """A size that is known. TensorRT makes its own; only their type counts here."""

    value: int

    @classmethod
    def of(cls, value: int) -> Size:
        size: Size = cls.__new__(cls)  # its constructor is TensorRT's alone
        size.value = value
        return size

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


class Builder:
    """Evaluates expressions of sizes at once."""

    def constant(self, value: int) -> Size:
        return Size.of(value)

    def operation(self, operation: Any, a: Size, b: Size) -> Size:
        kinds = trt.DimensionOperation
        return Size.of(
            {
                kinds.PROD: lambda: a.value * b.value,
                kinds.FLOOR_DIV: lambda: a.value // b.value,
                kinds.CEIL_DIV: lambda: -(-a.value // b.value),
                kinds.MIN: lambda: min(a.value, b.value),
            }[operation]()
        )


class Record:
    """Takes attributes and items: stands for the structures that TensorRT fills."""

    def __setitem__(self, index: int, value: Any) -> None:
        self.__dict__[f"item {index}"] = value


def describe(shape: list[int], type_: str) -> Any:
    """A tensor of one shape as TensorRT describes it to a plugin."""
    desc = trt.DynamicPluginTensorDesc()
    inner = trt.PluginTensorDesc()
    inner.type, inner.format, inner.dims = getattr(trt.DataType, type_), trt.TensorFormat.LINEAR, trt.Dims(shape)
    desc.desc, desc.min, desc.opt, desc.max = inner, trt.Dims(shape), trt.Dims(shape), trt.Dims(shape)
    return desc


def main() -> None:
    request = json.loads(sys.argv[1])
    # The expression that goes back to TensorRT wraps one of its own; this one is kept as it is.
    tensors.SymExprImpl = lambda expression: expression._expr
    aot.register(trt, trtp)
    registry = trt.get_plugin_registry()
    names = [c.name for c in registry.all_creators if c.plugin_namespace == contract.PLUGIN_NAMESPACE]
    creator = registry.get_creator(request["op"], contract.PLUGIN_VERSION, contract.PLUGIN_NAMESPACE)
    kind = trt.PluginFieldType.INT32  # what the ONNX parser makes of integer attributes
    fields = [trt.PluginField(n, np.array([v], np.int32), kind) for n, v in request["attributes"].items()]
    plugin = creator.create_plugin(
        request["op"],
        contract.PLUGIN_NAMESPACE,
        trt.PluginFieldCollection(fields),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    shapes, types = request["shapes"], [getattr(trt.DataType, type_) for type_ in request["types"]]
    (y_type,) = plugin.get_output_data_types(types, [len(shape) for shape in shapes])
    sizes = [[Size.of(size) for size in shape] for shape in shapes]
    trt.DimsExprs = lambda count: [None] * count
    (y_shape,) = plugin.get_output_shapes(sizes, [], Builder())
    y_sizes = [size.value for size in y_shape]
    ports = [describe(shape, type_) for shape, type_ in zip(shapes, request["types"], strict=True)]
    ports.append(describe(y_sizes, y_type.name))
    plugin.configure_plugin(ports[:-1], ports[-1:])
    formats = plugin.get_supported_format_combinations(ports, len(ports) - 1)
    plugin.set_tactic(0)
    params, extras = Record(), Record()
    plugin.get_launch_params(sizes, ports, len(ports) - 1, params, extras, Builder())
    name, ptx = plugin.get_kernel([port.desc for port in ports[:-1]], [ports[-1].desc])
    report = {
        "version": trt.__version__,
        "creators": names,
        "y": [y_type.name, y_sizes],
        "formats": [f.format.name for f in formats],
        "kernel": name,
        "ptx": ptx.decode(),
        "launch": {key: value.value for key, value in vars(params).items()},
        "integers": [vars(extras)[f"item {i}"].value for i in range(extras.__dict__["nbSymExprs"])],
    }
    sys.stdout.write(json.dumps(report) + "\n")


main()
