"""Tensors of an exported file, read when they are looked at, and where their bytes may lie."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from rankbook.plugins.contract import Array
from rankbook.plugins.forms import TensorSpec
from rankbook.plugins.merged import Part

if TYPE_CHECKING:
    import onnx

AGAIN = "; export it again"
"""Ends messages about damage."""


class ExportedFileError(ValueError):
    """A file that cannot be used; the message says which, why and what to do."""


class Stored:
    """One initializer, or one tensor of an attribute, as the file holds it."""

    def __init__(self, proto: onnx.TensorProto, path: Path) -> None:
        self.proto, self._path = proto, path

    @cached_property
    def array(self) -> Array:
        """Its elements: of an external one a view of the memory-mapped file."""
        import onnx_ir as ir

        try:
            if self.proto.data_location == self.proto.EXTERNAL:
                data, offset, length = external(self.proto, self._path)
                dtype, shape = ir.DataType(self.proto.data_type), ir.Shape(self.proto.dims)
                name = self.proto.name
                found = ir.ExternalTensor(str(data), offset, length, dtype, shape=shape, name=name).numpy()
            else:
                found = ir.serde.deserialize_tensor(self.proto).numpy()
        except (ValueError, TypeError, OSError) as error:
            raise ExportedFileError(f"{self._path}: {self.proto.name!r} cannot be read ({error}){AGAIN}") from error
        return found


@dataclass(frozen=True, eq=False)
class Tensor:
    """One stored tensor; a constant of a node of several products is a tensor of its own.

    Attributes:
        name: Its name.
        dtype: Element type by numpy name; of less than a byte by its ONNX name in lower case.
        shape: Its sizes.
        stored: What holds it.
        part: Where it lies there, if it is not all of it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: Stored
    part: Part | None = None

    @property
    def spec(self) -> TensorSpec:
        """Its shape and type."""
        return TensorSpec(self.shape, self.dtype)

    @property
    def bytes(self) -> int:
        """Its size."""
        return -(-math.prod(self.shape) * element_bits(self.dtype) // 8)

    def numpy(self) -> Array:
        """Return its elements; bytes are read from the data file where they are looked at.

        Raises:
            ExportedFileError: They cannot be read.
        """
        array = self.stored.array
        return array if self.part is None else self.part.of(array.reshape(-1))


def texts(model: onnx.ModelProto) -> Iterator[object]:
    """Yield every name and text of a model."""
    graph = model.graph
    for part in (graph, *model.functions):
        yield part.name
        for node in part.node:
            yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
            yield from (item.name for item in node.attribute)
    for function in model.functions:
        yield from (function.domain, *function.input, *function.output, *function.attribute)
    for tensor in graph.initializer:
        yield tensor.name
        yield from (text for item in tensor.external_data for text in (item.key, item.value))
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield value.name
        yield from (size.dim_param for size in value.type.tensor_type.shape.dim)
    yield from (text for item in model.metadata_props for text in (item.key, item.value))
    yield from (item.domain for item in model.opset_import)


def location(tensor: onnx.TensorProto) -> str:
    """Return the name of the data file of an external tensor, relative to the graph."""
    return next((item.value for item in tensor.external_data if item.key == "location"), "")


def external(tensor: onnx.TensorProto, path: Path) -> tuple[Path, int, int]:
    """Return the real path of the data file of an external tensor, its first byte and its length.

    The file lies in the folder of the graph or below it; behind links, in the folder where the graph really lies (as in
    the cache of the Hugging Face hub).

    Raises:
        ExportedFileError: It lies elsewhere, or an entry is missing or no number.
    """
    entries, name = {item.key: item.value for item in tensor.external_data}, location(tensor)
    plain = PurePosixPath(name)
    if not name or plain.is_absolute() or ".." in plain.parts or "\0" in name:
        raise ExportedFileError(f"the data file {name!r:.200} of {tensor.name!r} is not a path inside the folder")
    file = (path.parent / name).resolve()
    if not any(file.is_relative_to(folder) for folder in (path.parent.resolve(), path.resolve().parent)):
        raise ExportedFileError(f"the data file {name!r:.200} is a link to {file}, outside of {path.parent.resolve()}")
    numbers = [entries.get(key, "0") for key in ("offset", "length")]
    if not all(number.isascii() and number.isdigit() and len(number) < 20 for number in numbers):
        raise ExportedFileError(f"offset and length of {tensor.name!r} are {numbers!r:.200}, not numbers of bytes")
    return file, int(numbers[0]), int(numbers[1])


def dtype_name(number: int) -> str | None:
    """Return the numpy name of an element type by its number in ONNX, or None if it is not known."""
    import onnx

    if not number or number not in onnx.TensorProto.DataType.values():
        return None
    name: str = onnx.TensorProto.DataType.Name(number)
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(name, name.lower())


def element_bits(dtype: str) -> int:
    """Return the bits of an element; 0 where they are no fixed number."""
    if dtype.startswith(("bool", "float8")):
        return 8
    digits = dtype.removeprefix("bfloat").lstrip("abcdefghijklmnopqrstuvwxyz").partition("e")[0]
    return int(digits) if digits.isdigit() else 0
