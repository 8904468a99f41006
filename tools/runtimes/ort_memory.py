"""Where ONNX Runtime finds the data of a graph, and buffers for its cache."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from rankbook.exporter.file import ExportedModel


def anchored(graph: bytes, file: ExportedModel) -> tuple[bytes, Path]:
    """Return a graph that names the data files of ``file`` where they really lie, and the folder that holds them.

    ONNX Runtime takes no data file from outside of the folder that it is given. Behind links, as in the cache of the
    Hugging Face hub, that is not the folder of the graph.
    """
    folder, files = file.path.parent.resolve(), file.data_files
    if all(real == folder / name for name, real in files.items()):
        return graph, folder
    import onnx

    folder = Path(os.path.commonpath([real.parent for real in files.values()]))
    model = onnx.load_from_string(graph)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = str(files[entry.value].relative_to(folder))
    return model.SerializeToString(), folder


def untouched(shape: tuple[int, ...], kind: str) -> np.ndarray[Any, Any]:
    """Return zeros of which only what is written takes memory; ``np.zeros`` fills memory that was used before."""
    import numpy as np

    size = np.dtype(kind).itemsize * math.prod(shape)
    return np.ndarray(shape, kind, buffer=mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
