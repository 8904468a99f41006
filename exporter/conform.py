"""Checks the nodes of the domain ``rankbook`` in a model against their operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rankbook.exporter.dialects import NATIVE
from rankbook.exporter.file import ExportedModel, Node
from rankbook.exporter.properties import PREFIX
from rankbook.exporter.stored import ExportedFileError, dtype_name
from rankbook.plugins import contract, forms
from rankbook.plugins.operators import OPERATORS

if TYPE_CHECKING:
    import onnx

_MAX_LISTED = 100


def check_model(path: str | Path) -> list[str]:
    """Return the problems of the model at ``path``, each naming its node and port; an empty list if there are none.

    Reads the graph only, not the data file (whose presence and size are checked).
    """
    try:
        model = ExportedModel.examine(Path(path))
    except ExportedFileError as error:
        return [str(error)]
    return [*check(model), *model.data_problems()][:_MAX_LISTED]


def check_proto(proto: onnx.ModelProto) -> list[str]:
    """Return the problems of a model in memory."""
    return check(ExportedModel(Path("model.onnx"), proto))


def check(model: ExportedModel) -> list[str]:
    """Return the problems of an opened model but those of its data files."""
    problems = list(model.damage)
    if model.metadata.dialect != NATIVE:
        problems += _check_dialect(model)
    elif not any(node.domain == contract.DOMAIN for node in model.proto.graph.node):
        return [
            f"the model has no node of domain {contract.DOMAIN!r}, so it is not a file of rankbook;"
            " give one written by 'rankbook export'"
        ]
    problems += _check_imports(model)
    values = _Values(model)
    for node in model.nodes:
        where = f"{node.op_type} node {node.name or ', '.join(node.outputs)!r}"
        problems += [f"{where}: {problem}" for problem in _check_node(node, values)]
    return problems


def _check_dialect(model: ExportedModel) -> Iterator[str]:
    """Check a file in operators of other domains: every packed layer has its node."""
    layers = model.metadata.layers
    if not layers:
        yield f"the metadata {PREFIX}layers is missing or damaged; export the model again"
        return
    for layer in sorted(set(layers) - {node.name for node in model.proto.graph.node}):
        yield f"there is no node for the packed layer {layer!r}; export the model again"


class _Values:
    """Types and shapes of the values of a graph."""

    def __init__(self, model: ExportedModel) -> None:
        graph = model.proto.graph
        self.tensors = model.tensors
        infos = [*graph.input, *graph.output, *graph.value_info]
        self._infos = {info.name: info.type.tensor_type for info in infos}

    def dtype(self, name: str) -> str | None:
        """Return the numpy name of an element type, or None if it is unknown."""
        if name in self.tensors:
            return self.tensors[name].dtype
        info = self._infos.get(name)
        return None if info is None else dtype_name(info.elem_type)

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Return a shape with None for dynamic sizes, or None if it is unknown."""
        if name in self.tensors:
            return self.tensors[name].shape
        info = self._infos.get(name)
        if info is None or not info.HasField("shape"):
            return None
        return tuple(size.dim_value if size.HasField("dim_value") else None for size in info.shape.dim)


def _check_imports(model: ExportedModel) -> Iterator[str]:
    names = {node.op_type for node in model.proto.graph.node if node.domain == contract.DOMAIN}
    if not names:
        return
    version = next((item.version for item in model.proto.opset_import if item.domain == contract.DOMAIN), None)
    if version != contract.VERSION:
        yield (
            f"the model imports version {version} of domain {contract.DOMAIN!r}; this rankbook knows version"
            f" {contract.VERSION}: export the model again"
        )
    bodies = {function.name for function in model.proto.functions if function.domain == contract.DOMAIN}
    for name in sorted(names - bodies):
        yield f"the model has no function for {name}, so stock runtimes cannot run it; export it again"


def _check_node(node: Node, values: _Values) -> Iterator[str]:
    operator = node.operator
    if operator is None:
        yield f"unknown operator; known are {', '.join(OPERATORS)}"
        return
    # Files of before there were plugins for experts do not name them; all else runs them.
    asked = [item for item in operator.attributes if item.kind != "string" or not operator.one_of or node.names_plugin]
    found = [item.problem(node.attributes.get(item.name)) for item in asked]
    broken = [problem for problem in found if problem]
    yield from broken
    if unknown := sorted(set(node.attributes) - {item.name for item in operator.attributes}):
        yield f"unknown attributes {unknown}"
    inputs = operator.given(node.attributes)
    counts = (len(node.inputs), len(node.outputs))
    if counts != (len(inputs), len(operator.outputs)) or not all((*node.inputs, *node.outputs)):
        names = (", ".join(port.name for port in ports) for ports in (inputs, operator.outputs))
        yield f"has {counts[0]} inputs and {counts[1]} outputs; the contract asks for {' and '.join(names)}"
        return
    if broken:
        return
    sizes = operator.sizes(node.attributes)
    ports = zip((*inputs, *operator.outputs), (*node.inputs, *node.outputs), strict=True)
    broken = [problem for port, name in ports for problem in _check_port(port, name, values, sizes)]
    yield from broken
    together = "" if broken else operator.check(node.attributes, {k: item.spec for k, item in node.constants.items()})
    if together:
        yield together


def _check_port(port: contract.Port, name: str, values: _Values, sizes: dict[str, int]) -> Iterator[str]:
    """Check one port; letters that its shape binds are added to ``sizes``."""
    where = f"port {port.name!r} ({name})"
    if port.constant and name not in values.tensors:
        yield f"{where} must be an initializer, so that engines keep it packed"
        return
    dtype, shape = values.dtype(name), values.shape(name)
    if dtype is not None and dtype not in port.dtypes:
        yield f"{where} is {dtype}; allowed are {', '.join(port.dtypes)}"
    if shape is None:
        yield f"{where} has no known shape"
        return
    for allowed in port.shapes:
        found = forms.match_shape(allowed, shape, sizes)
        if found is not None:
            sizes |= found
            return
    yield f"{where} has shape {shape}; allowed are {_spell(port.shapes)} with {sizes}"


def _spell(shapes: Sequence[forms.Shape]) -> str:
    return " or ".join(f"({', '.join(map(str, shape))})" for shape in shapes)
