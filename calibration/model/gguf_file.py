"""Reading a GGUF file once, where transformers reads it for configuration, tokenizer and weights anew."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Let everything inside share one parsed file, and one map of names for each size of model.

    SmolLM2-135M: its 49,152 tokens and as many merges are parsed once instead of three times, and one map of names
    serves 397 modules.
    """
    try:
        import gguf
    except ImportError:  # transformers says it
        yield
        return
    library: Any = gguf
    reader, name_map = library.GGUFReader, library.get_tensor_name_map
    if isinstance(reader, functools.partial):  # inside another one
        yield
        return
    library.GGUFReader = functools.partial(_parsed, _fast(reader), {})
    library.get_tensor_name_map = functools.cache(name_map)
    try:
        yield
    finally:
        library.GGUFReader, library.get_tensor_name_map = reader, name_map


def expert_sizes(path: str | os.PathLike[str]) -> dict[str, int]:
    """Return the inner sizes of experts that a file names and transformers leaves at the default of their family."""
    import gguf

    library: Any = gguf
    fields = library.GGUFReader(path).fields
    family = bytes(fields["general.architecture"].parts[-1]).decode()
    names = {"moe_intermediate_size": "expert_feed_forward_length"}
    names["shared_expert_intermediate_size"] = "expert_shared_feed_forward_length"
    found = {name: fields.get(f"{family}.{key}") for name, key in names.items()}
    if family not in ("qwen2moe", "qwen3moe"):
        return {}
    return {name: int(field.parts[-1][0]) for name, field in found.items() if field is not None}


def _parsed(kind: Any, known: dict[str, Any], path: os.PathLike[str] | str, mode: str = "r") -> Any:
    """Return the reader of a file, the same for the same one."""
    if mode != "r":
        return kind(path, mode)
    key = os.path.realpath(path)
    if key not in known:
        known[key] = kind(path)
    return known[key]


def _fast(reader: Any) -> Any:
    """Return a reader that parses a plain array: each part of a `numpy.memmap` costs as much again.

    It ends where the file ends: gguf itself goes on with empty elements for as many as an array claims to have.
    """

    class Reader(reader):  # type: ignore[misc]
        data: Any

        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **kwargs: Any) -> Any:
            import numpy as np

            if type(self.data) is not np.ndarray:
                self.data = self.data.view(np.ndarray)
            found = super()._get(offset, dtype, count, *args, **kwargs)
            if len(found) < int(count):
                raise ValueError(f"the file ends within a field at byte {offset}; it is truncated or damaged")
            return found

    return Reader
