"""ONNX Runtime's MatMulNBits in our graph: what its own operator gives where nothing else differs."""

from __future__ import annotations

from pathlib import Path

from rankbook.tools.bench.contender import Setting
from rankbook.tools.bench.exported import Exported
from rankbook.tools.errors import UsageError
from rankbook.tools.inspect import onnx_file
from rankbook.tools.runtimes.ort import unavailable

__all__ = ["Model", "unavailable"]


LEVEL = 4
"""Accuracy level: activations are rounded to 8 bits, which is the fast form. The file itself asks for exact ones."""


class Model(Exported):
    """A file of the dialect ``ort``."""

    def __init__(self, path: Path, setting: Setting) -> None:
        """Open it.

        Raises:
            UsageError: It has no such operator.
        """
        import onnxruntime

        super().__init__(path, "auto", setting)
        self.kernels = f"onnxruntime {onnxruntime.__version__}, accuracy level {LEVEL}"

    def graph(self, path: Path) -> bytes:
        """Return the graph with `LEVEL`."""
        file = onnx_file.find_model(path)
        model = onnx_file.load_graph(file)
        nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
        if not nodes:
            raise UsageError(f"{file} has no MatMulNBits; export with --dialect ort")
        for node in nodes:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = LEVEL
        serialized: bytes = model.SerializeToString()
        return serialized
