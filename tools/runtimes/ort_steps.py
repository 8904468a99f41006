"""Steps of a session whose cache grows in place: what stays the same between two of them is bound once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from rankbook.tools.runtimes.base import Tokens

    Array = np.ndarray[Any, Any]


_ROWS = ("write_indices", "lengths")
"""Inputs of files with a cache of a fixed length, one element for each row: its tokens so far, and the new ones."""


class BoundSteps:
    """A binding of a session to the buffers of a cache, which serves every call as long as these buffers do.

    A model of 30 layers has 60 of them, each an input and an output: to bind them in every step of SmolLM2-135M took a
    tenth of the step. What runs here has left the processor's caches meanwhile, so that every call counts.
    """

    def __init__(self, session: Any, buffers: Mapping[str, tuple[str, Any]], types: Mapping[str, str]) -> None:
        """Bind the buffers.

        Args:
            session: An ``onnxruntime.InferenceSession``.
            buffers: By name of an input, the output that is written to the same memory, and that memory, an OrtValue
                (batch, heads, positions, size).
            types: The numpy type of every input, by name.
        """
        import numpy as np

        self._session = session
        self._binding = session.io_binding()
        self._binding.bind_output("logits")  # the first one, for `_run_first`
        for name, (output, value) in buffers.items():
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(output, value)
        batch, _, held, _ = next(iter(buffers.values()))[1].shape()
        self._positions = np.arange(held)
        self._mask = np.ones(batch * held, types["attention_mask"]) if "attention_mask" in types else None
        self._types = {name: types[name] for name in ("input_ids", "position_ids", *_ROWS) if name in types}
        self._inputs: dict[str, Array] = {}
        self._logits: Array = np.empty(0)

    def run(self, tokens: Tokens, past: int) -> Array:
        """Return the logits of tokens (batch, length) behind ``past`` positions; the next call may overwrite them."""
        import numpy as np

        batch, length = tokens.shape
        end = past + length
        known = bool(self._inputs) and self._inputs["input_ids"].shape == tokens.shape
        if not known:
            self._inputs = {
                name: np.full(batch, length, kind) if name in _ROWS else np.empty(tokens.shape, kind)
                for name, kind in self._types.items()
            }
        self._inputs["input_ids"][:] = tokens
        if "write_indices" in self._inputs:
            self._inputs["write_indices"][:] = past
        if "position_ids" in self._inputs:
            self._inputs["position_ids"][:] = self._positions[past:end]
        if self._mask is not None:
            self._binding.bind_cpu_input("attention_mask", self._mask[: batch * end].reshape(batch, end))
        if known:
            self._session.run_with_iobinding(self._binding)
        else:
            self._run_first()
        return self._logits

    def _run_first(self) -> None:
        """Run for a new shape; from now on the session reads and writes the same arrays."""
        for name, value in self._inputs.items():
            self._binding.bind_cpu_input(name, value)
        self._binding.bind_output("logits")
        self._session.run_with_iobinding(self._binding)
        value = self._binding.get_outputs()[0]
        self._binding.bind_ortvalue_output("logits", value)
        self._logits = value.numpy()
