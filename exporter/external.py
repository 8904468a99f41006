"""Writes the large tensors of a model into one data file, one tensor in memory at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

THRESHOLD_BYTES = 256
"""Tensors up to this size stay in the graph's own file."""
ALIGNMENT_BYTES = 64
"""Every tensor starts at a multiple of this: a cache line, so that kernels may read a memory-mapped file in place."""
_CHUNK_BYTES = 1 << 24


def write(model: ir.Model, path: Path, progress: Callable[[int, int], None] | None = None) -> str:
    """Write the initializers of ``model`` to ``path`` and make them refer to it.

    Args:
        model: Its large initializers become external; lazy ones are read here.
        path: New file; the graph must be saved into the same folder.
        progress: Called with bytes written and bytes in all.

    Returns:
        The SHA-256 of the file in hexadecimal.

    Raises:
        OSError: Writing failed.
    """
    values = [value for value in model.graph.initializers.values() if _size(value) > THRESHOLD_BYTES]
    total, digest = sum(_size(value) for value in values), hashlib.sha256()
    with path.open("xb") as stream:
        for value in values:
            tensor = value.const_value
            if tensor is None:
                continue
            padding = bytes(-stream.tell() % ALIGNMENT_BYTES)
            stream.write(padding)
            digest.update(padding)
            offset = stream.tell()
            data = _bytes(tensor)
            for start in range(0, len(data), _CHUNK_BYTES):
                stream.write(data[start : start + _CHUNK_BYTES])
                digest.update(data[start : start + _CHUNK_BYTES])
                if progress is not None:
                    progress(min(stream.tell(), total), total)
            value.const_value = ir.ExternalTensor(
                path.name,
                offset,
                len(data),
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=str(value.name),
                base_dir=path.parent,
            )
    return digest.hexdigest()


def _bytes(tensor: ir.TensorProtocol) -> memoryview:
    if tensor.dtype.bitwidth < 8:  # numpy keeps such elements in a byte each
        return memoryview(tensor.tobytes())
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data


def _size(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes
