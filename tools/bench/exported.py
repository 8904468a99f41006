"""Files that `rankbook export` wrote, in ONNX Runtime."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.tools.bench.contender import Contender, Setting
from rankbook.tools.inspect.onnx_file import OnnxFile, load_graph
from rankbook.tools.runtimes.ort import OrtModel

if TYPE_CHECKING:
    from rankbook.tools.runtimes.base import Tokens

_CONSTANTS = slice(1, 4)
"""Inputs of MatMulNBits: codes, scales, zero points."""


class Exported(Contender):
    """An exported folder or file."""

    def __init__(self, path: Path, kernels: str, setting: Setting) -> None:
        """Open it with one of `rankbook.tools.runtimes.ort.KERNELS`.

        Raises:
            MissingError: ONNX Runtime or the native library is missing.
            UsageError: It is not a language model.
        """
        entries = {"session.force_spinning_stop": "1"} if setting.shared else None
        self._model = OrtModel(path, threads=setting.threads, kernels=kernels, entries=entries, graph=self.graph(path))
        self.kernels = self._model.kernels
        self.file_bytes = self._model.file.file_bytes

    @cached_property
    def packed(self) -> tuple[int, int]:
        """Of our operators and of MatMulNBits."""
        file = self._model.file
        ours, others = packed_size(file), foreign_size(load_graph(file.path))
        return ours[0] + others[0], ours[1] + others[1]

    def graph(self, path: Path) -> bytes | None:  # noqa: ARG002
        """Return what to open in place of the file, or None."""
        return None

    def start(self, tokens: Tokens) -> int:
        """Begin with tokens (1, length)."""
        return int(self._model.start(tokens).argmax())

    def step(self, token: int) -> int:
        """Continue with one token."""
        return int(self._model.step(token).argmax())


def packed_size(file: OnnxFile) -> tuple[int, int]:
    """Return the bytes of the constants of our packed layers, each counted once, and the number of their weights."""
    seen: set[str] = set()
    packed = weights = 0
    for node in file.nodes:
        ports = node.ports()
        new = {name for name in ports.values() if name in file.initializers} - seen
        seen |= new
        packed += sum(file.initializers[name].bytes for name in new)
        if ports.get("codes") in new:
            weights += int(node.attributes["out_features"]) * int(node.attributes["in_features"])
    return packed, weights


def foreign_size(model: Any) -> tuple[int, int]:
    """Return the same of the MatMulNBits nodes of a ModelProto; an embedding shares the codes of the output layer."""
    from onnx import helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    packed = weights = 0
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        tensors = [constants[name] for name in list(node.input)[_CONSTANTS] if name in constants]
        packed += sum(
            math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize for tensor in tensors
        )
        sizes = {item.name: item.i for item in node.attribute}
        weights += sizes["N"] * sizes["K"]
    return packed, weights
