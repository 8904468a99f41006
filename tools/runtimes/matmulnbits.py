"""ONNX Runtime's MatMulNBits in an exported graph: what its own operator gives where nothing else differs."""

from __future__ import annotations

from pathlib import Path

from rankbook.calibration.source import Kind, Source
from rankbook.tools.errors import UsageError
from rankbook.tools.runtimes import ort
from rankbook.tools.runtimes.base import LanguageModel, Runtime, Setting

LEVEL = 4
"""Accuracy level: activations are rounded to 8 bits, which is the fast form. The file itself asks for exact ones."""


def fast_graph(path: Path) -> bytes:
    """Return the graph of a file of the dialect ``ort`` with `LEVEL`.

    Raises:
        UsageError: It has no such operator.
    """
    from rankbook.exporter.file import load

    model = load(path)
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    if not nodes:
        raise UsageError(f"{path} has no MatMulNBits; export with --dialect ort")
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = LEVEL
    serialized: bytes = model.SerializeToString()
    return serialized


def _open(source: Source, setting: Setting) -> LanguageModel:
    kernels = "bodies" if ort.native_unavailable() else "native"
    model = ort.OrtModel(
        source.path,
        threads=setting.threads,
        kernels=kernels,
        entries=ort.model_entries(setting),
        graph=fast_graph(source.path),
    )
    model.kernels = f"onnxruntime {ort.version_name()}, accuracy level {LEVEL}"
    return model


RUNTIMES = (
    Runtime(
        "matmulnbits",
        "onnxruntime, MatMulNBits",
        "bench --peers: the operator of ONNX Runtime in the same graph",
        ort.unavailable,
        ort.version_name,
        frozenset({Kind.ONNX}),
        f"a folder written by `rankbook export --dialect ort`, run at accuracy level {LEVEL}",
        _open,
        ort.prepare,
        exact=False,
        peer=True,
    ),
)
