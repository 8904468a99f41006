"""An exported file: opened once, and shared by everything that looks into it.

The graph is read as a protobuf message, without its weights, and not by onnx_ir: importing it takes 0.35 s of CPU time
beside 0.27 s for onnx (sympy, which it wants for dimensions), and its reader stops at the first damage where
`ExportedModel.examine` lists all. Tensors are views of the memory-mapped data file, and so are the constants of a node
of several products (`rankbook.plugins.merged`), which is shown as its products.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.calibration.source import Kind, identify
from rankbook.exporter.properties import Metadata
from rankbook.exporter.stored import (
    AGAIN,
    ExportedFileError,
    Stored,
    Tensor,
    dtype_name,
    element_bits,
    external,
    location,
    texts,
)
from rankbook.plugins import contract, merged
from rankbook.plugins.contract import Operator
from rankbook.plugins.operators import OPERATORS

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, eq=False)
class Node:
    """One node of the domain ``rankbook``, or one product of a node of several.

    Attributes:
        name: Name of the layer, which is the dotted name of the torch module it came from.
        op_type: E.g. ``CodebookMatMul3``.
        inputs: Names of its inputs; a constant of a product has the name of its layer with its formal name behind it.
        outputs: Names of its outputs.
        attributes: By name.
        constants: Stored tensors that it reads, by formal name.
    """

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    constants: Mapping[str, Tensor]

    @property
    def operator(self) -> Operator | None:
        """Its operator, or None if it is not in the list."""
        return OPERATORS.get(self.op_type)

    @property
    def names_plugin(self) -> bool:
        """Whether TensorRT's parser finds the plugin of its operator; files of before there was one lack the name."""
        return "plugin_namespace" in self.attributes

    def ports(self) -> dict[str, str]:
        """Return the name of each input by the formal name of its port; empty for an operator that is not known."""
        given = self.operator.given(self.attributes) if self.operator else ()
        return {port.name: name for port, name in zip(given, self.inputs, strict=False)}


class ExportedModel:
    """An exported file without its weights.

    Attributes:
        path: The ``.onnx`` file.
        proto: The graph as it is; not to be changed.
        metadata: What the exporter wrote about it.
        nodes: Nodes of the domain ``rankbook``, in graph order, products one by one.
        tensors: Stored tensors by name; constants of a node of several products one by one.
        damage: What is wrong with nodes and tensors, one sentence each; empty after `open`.
    """

    def __init__(self, path: Path, proto: onnx.ModelProto) -> None:
        """Read a graph; use `open` or `examine`."""
        self.path, self.proto = path, proto
        self.metadata = Metadata.of({entry.key: entry.value for entry in proto.metadata_props})
        self.damage: list[str] = []
        self.tensors: dict[str, Tensor] = {}
        for tensor in proto.graph.initializer:
            self._store(Stored(tensor, path), tensor.name)
        if doubles := _doubles(tensor.name for tensor in proto.graph.initializer):
            self.damage.append(f"several tensors are named {doubles}")
        held: set[str] = set()
        self.nodes = tuple(part for node in proto.graph.node for part in self._parts(node, held))
        if doubles := _doubles(node.name for node in self.packed):
            self.damage.append(f"several layers are named {doubles}")
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name not in held}

    @classmethod
    def open(cls, path: Path) -> ExportedModel:
        """Open a file or an exported folder.

        Raises:
            ExportedFileError: There is none, it is not an ONNX model or damaged, or a data file is missing or short.
        """
        model = cls.examine(path)
        for problem in (*model.damage, *model.data_problems()):
            raise ExportedFileError(f"{model.path}: {problem}{AGAIN}")
        return model

    @classmethod
    def examine(cls, path: Path) -> ExportedModel:
        """Open a file of which nodes, tensors and data files may be damaged.

        Raises:
            ExportedFileError: There is none, or it is not an ONNX model.
        """
        file = find(path)
        return cls(file, load(file))

    @cached_property
    def packed(self) -> tuple[Node, ...]:
        """The nodes that hold packed weights, or whose operator is not known."""
        return tuple(node for node in self.nodes if node.operator is None or node.operator.bits)

    @cached_property
    def outputs_of(self) -> dict[str, str]:
        """Output of the node that gives each packed layer's output, by the layer's name, in graph order."""
        own = {node.name: node.outputs[0] for node in self.packed if node.outputs}
        found: dict[str, str] = {}
        for node in self.proto.graph.node:
            names = node.name.split(merged.JOINT) if node.domain == contract.DOMAIN else [node.name]
            found |= {name: own[name] for name in names if name in own}
            if node.name in self.metadata.layers and node.name not in own and node.output:
                found[node.name] = node.output[0]
        return found

    @property
    def inputs(self) -> dict[str, list[int | str]]:
        """Shape of each graph input by name; dynamic dimensions are strings."""
        return {value.name: _shape(value) for value in self.proto.graph.input}

    @property
    def input_types(self) -> dict[str, str]:
        """Element type of each graph input by name, by its numpy name; empty where it is not known."""
        return {value.name: dtype_name(value.type.tensor_type.elem_type) or "" for value in self.proto.graph.input}

    @property
    def outputs(self) -> dict[str, list[int | str]]:
        """The same of the outputs."""
        return {value.name: _shape(value) for value in self.proto.graph.output}

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        versions = [item.version for item in self.proto.opset_import if item.domain in ("", "ai.onnx")]
        return max(versions, default=0)

    @property
    def domains(self) -> frozenset[str]:
        """Domains of the graph's nodes and of those in its functions; the standard one is empty."""
        parts = (self.proto.graph, *self.proto.functions)
        return frozenset(node.domain.removeprefix("ai.onnx") for part in parts for node in part.node)

    @property
    def code_tensors(self) -> frozenset[str]:
        """Names of the tensors that hold codes."""
        own = {node.ports().get("codes", "") for node in self.packed}
        others = {f"{layer}.codes" for layer in self.outputs_of}
        return frozenset((own | others) & set(self.tensors))

    @property
    def code_bytes(self) -> dict[str, int]:
        """Bytes of the packed layers' codes by element type."""
        total: dict[str, int] = {}
        for name in self.code_tensors:
            tensor = self.tensors[name]
            total[tensor.dtype] = total.get(tensor.dtype, 0) + tensor.bytes
        return total

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(item.bytes for item in self.tensors.values())

    @property
    def data_files(self) -> dict[str, Path]:
        """Real paths of the external data files by their names in the graph."""
        tensors = (item for item in self.proto.graph.initializer if item.data_location == item.EXTERNAL)
        return {location(tensor): external(tensor, self.path)[0] for tensor in tensors}

    @property
    def file_bytes(self) -> int:
        """Bytes of the graph and its data files on disk."""
        return sum(file.stat().st_size for file in (self.path, *self.data_files.values()))

    def data_problems(self) -> list[str]:
        """Return what is wrong with the data files: missing, too short, or outside of the folder."""
        needed: dict[Path, int] = {}
        for tensor in self.proto.graph.initializer:
            if tensor.data_location == tensor.EXTERNAL:
                try:
                    file, offset, length = external(tensor, self.path)
                except ExportedFileError as error:
                    return [str(error)]
                needed[file] = max(needed.get(file, 0), offset + length)
        problems = []
        for file, end in needed.items():
            if not file.is_file():
                problems.append(f"{file} is missing; the weights are there: copy both files")
            elif file.stat().st_size < end:
                problems.append(f"{file} has {file.stat().st_size} bytes and {end} are needed: truncated")
        return problems

    def verify(self) -> None:
        """Compare the data file with the hash that the exporter wrote down, and check the numbers of packed layers.

        Reads all of the data.

        Raises:
            ExportedFileError: It is another file (one without data, or of a version that wrote no hash, passes), or a
                constant of a packed layer is NaN, infinite, or a placeholder that would change the result.
        """
        from rankbook.calibration.checkpoint.files import sha256_file

        wanted = self.metadata.data_sha256
        for file in self.data_files.values():
            if wanted and sha256_file(file) != wanted:
                raise ExportedFileError(
                    f"{file} is not the file that {self.path.name} was written with (SHA-256 differs): it was changed,"
                    " or belongs to another export; copy both files again, or export again"
                )

        for node in self.packed:
            if node.operator is not None and node.operator.bits:
                self._check_numbers(node, node.operator)

    def _check_numbers(self, node: Node, operator: Operator) -> None:
        try:
            given = {port: tensor.spec for port, tensor in node.constants.items()}
            spec, _ = operator.layer(node.attributes, given)
            for port, form in spec.constants().items():
                if port in node.constants and port != "codes":
                    values = node.constants[port].numpy()
                    for one in values if operator.one_of else [values]:
                        form.check(f"{node.name}.{port}", one)
        except ValueError as error:
            raise ExportedFileError(f"{self.path}: {error}{AGAIN}") from None

    def require_packed(self) -> None:
        """Check that the file was written by this project.

        Raises:
            ExportedFileError: It has neither a node of the domain ``rankbook`` nor a packed layer in another dialect.
        """
        if not self.outputs_of:
            raise ExportedFileError(
                f"{self.path} has no node of domain {contract.DOMAIN!r} and no packed layers in another dialect, so it"
                " is not a file of rankbook; give one written by `rankbook export`"
            )

    def require_standard(self) -> None:
        """Check that TensorRT can know every operator of the file.

        Raises:
            ExportedFileError: It has operators of another domain than the standard one and ``rankbook``.
        """
        if foreign := sorted(self.domains - {"", contract.DOMAIN}):
            raise ExportedFileError(
                f"{self.path} has operators of {', '.join(foreign)}, which TensorRT does not know (--dialect"
                " ort and --graph ort are for ONNX Runtime); export with --dialect rankbook or qdq and --graph standard"
            )

    def _store(self, stored: Stored, name: str, part: merged.Part | None = None) -> Tensor | None:
        """Note a tensor by name; one of a type that is not known is damage."""
        proto = stored.proto
        shape = tuple(proto.dims) if part is None else part.shape
        dtype = dtype_name(proto.data_type)
        if dtype is None or not element_bits(dtype):
            self.damage.append(f"tensor {name!r} has the element type {proto.data_type}, which is not known")
            return None
        if any(size < 0 for size in shape):
            self.damage.append(f"tensor {name!r} has the shape {shape}")
            return None
        self.tensors[name] = Tensor(name, dtype, shape, stored, part)
        return self.tensors[name]

    def _parts(self, proto: onnx.NodeProto, held: set[str]) -> Iterator[Node]:
        """Yield a packed node, or its products; ``held`` gets the names of tensors of several constants."""
        if proto.domain != contract.DOMAIN:
            return
        try:
            attributes = _attributes(proto)
            operator = OPERATORS.get(proto.op_type)
            if operator is not None and operator.member is not None:
                yield from self._products(proto, operator, attributes, held)
                return
        except ValueError as error:
            self.damage.append(f"{proto.op_type} node {proto.name!r} {error}")
            return
        ports = zip(operator.given(attributes), proto.input, strict=False) if operator else ()
        constants = {port.name: self.tensors[name] for port, name in ports if name in self.tensors}
        inputs, outputs = tuple(proto.input), tuple(proto.output)
        yield Node(proto.name, proto.op_type, inputs, outputs, attributes, constants)

    def _products(
        self, proto: onnx.NodeProto, operator: Operator, attributes: Mapping[str, Any], held: set[str]
    ) -> Iterator[Node]:
        import onnx

        names, member = proto.name.split(merged.JOINT), operator.member or operator
        wanted = (operator.count, operator.count, len(operator.inputs))
        if (len(names), len(proto.output), len(proto.input)) != wanted:
            raise ValueError(
                f"has {len(names)} names, {len(proto.output)} outputs and {len(proto.input)} inputs; it must have"
                f" {wanted[0]}, {wanted[1]} and {wanted[2]}"
            )
        x, data = proto.input
        holder = self.tensors.get(data)
        products = merged.unpack(operator, attributes)
        for layer, product, output in zip(names, products, proto.output, strict=True):
            constants: dict[str, Tensor] = {}
            for port, value in product.constants.items():
                name = f"{layer}.{port}"
                if isinstance(value, merged.Part):
                    if holder is None or len(holder.shape) != 1 or value.end > holder.shape[0]:
                        is_there = "not an initializer" if holder is None else holder.shape
                        raise ValueError(f"({layer}): {name} ends at byte {value.end} of {data!r}, which is {is_there}")
                    held.add(data)
                    made = self._store(holder.stored, name, value)
                elif isinstance(value, onnx.TensorProto):
                    made = self._store(Stored(value, self.path), name)
                else:  # the port has no initializer, which `rankbook.exporter.conform` names
                    made = None
                if made is not None:
                    constants[port] = made
            inputs = (x, *(f"{layer}.{port}" for port in product.constants))
            yield Node(layer, member.name, inputs, (output,), product.attributes, constants)


def find(path: Path) -> Path:
    """Return the ``.onnx`` file that ``path`` (a file or an exported folder) means.

    Raises:
        ExportedFileError: There is none, or more than one.
    """
    try:
        return identify(path, {Kind.ONNX}).path
    except ValueError as error:
        raise ExportedFileError(str(error)) from None


def load(path: Path) -> onnx.ModelProto:
    """Return the graph of a file without external data.

    Raises:
        ExportedFileError: It is not an ONNX model.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise ExportedFileError(f"{path} cannot be read: {error}") from None
    except Exception as error:  # protobuf has several error types, which differ between its versions
        raise ExportedFileError(
            f"{path} is not a readable ONNX model ({error}); it is truncated or another format{AGAIN}"
        ) from None
    if any(isinstance(text, bytes) for text in texts(model)):  # what protobuf returns for them
        raise ExportedFileError(f"{path} holds names that are not UTF-8, so it is damaged{AGAIN}")
    if not model.graph.node:
        raise ExportedFileError(f"{path} holds an empty graph; it is truncated or not an ONNX model{AGAIN}")
    return model


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    import onnx

    found = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    return {
        name: value.decode(errors="replace") if isinstance(value, bytes) else value for name, value in found.items()
    }


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [
        dimension.dim_value if dimension.HasField("dim_value") else dimension.dim_param or f"axis{axis}"
        for axis, dimension in enumerate(value.type.tensor_type.shape.dim)
    ]


def _doubles(names: Iterable[str]) -> str:
    """Return the names that come more than once, a few of them, as text."""
    return ", ".join(repr(name) for name, count in Counter(names).items() if count > 1)[:200]
