"""What a call of an engine does on the GPU: its kernels, its cache, and the bytes that decoding a token must move."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rankbook.exporter.cache_names import PAST, PRESENT, is_past, is_present, is_state
from rankbook.tools.deploy.engine_log import EngineLog, Kernel
from rankbook.tools.deploy.profiles import Shapes

if TYPE_CHECKING:
    from rankbook.exporter.file import ExportedModel

ATTENTION, COPIES = ("gemv attention", "gemm attention"), "copies of a cache"
"""Kinds of kernels that are counted: fused attention of one token and of many, and what `copies_cache` tells."""


def kernels(log: EngineLog, shapes: Mapping[str, Shapes], slots: int = 0) -> dict[str, dict[str, int]]:
    """Return by profile how many kernels a call starts: all, those of fused attention, and copies of a cache.

    Args:
        log: The builder's log.
        shapes: The profiles by name, in the order of their numbers.
        slots: Length of the cache where it is fixed, else 0.
    """
    found = {}
    for index, (name, bounds) in enumerate(shapes.items()):
        caches = [high for cache, (_, _, high) in bounds.items() if cache.startswith(PAST)]
        size = min((slots * high[3] for high in caches), default=0)
        launches = log.launches(index)
        kinds = Counter(f"{kernel.attention} attention" for kernel in launches if kernel.attention)
        found[name] = {"all": len(launches), **kinds, COPIES: sum(copies_cache(kernel, size) for kernel in launches)}
    return found


def copies_cache(kernel: Kernel, size: int) -> bool:
    """Return whether a kernel copies a cache, to join it with what is new, repeat it for more heads, or turn it.

    Where it grows (``size`` is 0), that is every kernel but attention that reads one. Where its length is fixed, it
    writes as many elements elsewhere as a head of the cache has, ``size``; the number of rows may be unknown.
    """
    if kernel.attention or not any(name.startswith((PAST, PRESENT)) for name in kernel.inputs):
        return False
    written = [count for name, count in kernel.outputs.items() if not name.startswith(PRESENT)]
    return not size or max(written, default=0) >= size


def step_bytes(model: ExportedModel, shapes: Shapes) -> dict[str, int]:
    """Return what decoding one token of one text must move when its cache is full.

    Attention reads a cache of a fixed length as a whole at every position. Of embeddings that nothing multiplies with,
    one row is read; of a mixture all experts are counted.

    Args:
        model: The file.
        shapes: The profile of decoding.
    """
    from rankbook.exporter.stored import dtype_name, element_bits  # with numpy, for which --help does not wait

    graph = model.proto.graph
    types = {value.name: dtype_name(value.type.tensor_type.elem_type) or "" for value in (*graph.input, *graph.output)}

    def moved(name: str, shape: Sequence[int]) -> int:
        return math.prod(shape) * element_bits(types[name]) // 8

    kept = {name: [1, *bounds[2][1:]] for name, bounds in shapes.items() if is_past(name)}
    given = {name: _ones(size) for name, size in model.outputs.items() if not is_present(name)}
    states = sum(moved(*item) for item in kept.items() if is_state(item[0]))
    return {
        "weights": model.stored_bytes - _rows_not_read(model),
        "cache": sum(moved(*item) for item in kept.items() if not is_state(item[0])),
        **({"states": 2 * states} if states else {}),  # each is read and written
        "outputs": sum(moved(*item) for item in given.items()),
    }


def _ones(shape: Sequence[int | str]) -> list[int]:
    """Return a shape whose dynamic axes are 1."""
    return [size if isinstance(size, int) else 1 for size in shape]


def _rows_not_read(model: ExportedModel) -> int:
    from rankbook.plugins.contract import GATHER

    users: dict[str, set[str]] = {}
    for node in model.proto.graph.node:
        for name in node.input:
            users.setdefault(name, set()).add("" if node.op_type.startswith((GATHER, "Gather")) else node.op_type)
    gathered = [tensor for name, tensor in model.tensors.items() if users.get(name) == {""} and tensor.shape]
    return sum(tensor.bytes - tensor.bytes // tensor.shape[0] for tensor in gathered)
