"""Steps of a session whose cache grows in place: what stays the same between two of them is bound once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankbook.exporter.cache_names import is_state, past_of

if TYPE_CHECKING:
    import numpy as np

    from rankbook.tools.runtimes.base import Tokens

    Array = np.ndarray[Any, Any]


_ROWS = ("write_indices", "lengths")
"""Inputs of files with a cache of a fixed length, one element for each row: its tokens so far, and the new ones."""


@dataclass(frozen=True)
class Where:
    """What steps work on.

    Attributes:
        session: An ``onnxruntime.InferenceSession``.
        device: ``cpu`` or ``cuda``, as ONNX Runtime names it: where the cache lies.
        types: The numpy type of every input, by name.
    """

    session: Any
    device: str
    types: Mapping[str, str]


class BoundSteps:
    """A binding of a session to the buffers of a cache, which serves every call as long as these buffers do.

    A model of 30 layers has 60 of them, each an input and an output: to bind them in every step of SmolLM2-135M took a
    tenth of the step. What runs here has left the processor's caches meanwhile, so that every call counts. On a GPU
    what is bound lies there already, so that a step moves its new tokens, their positions, and what is wanted.
    """

    def __init__(self, where: Where, cache: dict[str, Any], held: int, wanted: str) -> None:
        """Bind the buffers.

        Args:
            where: The session and its device.
            cache: OrtValues on the device, by name of the input. Keys and values (batch, heads, positions, size) are
                written in place; a state is written elsewhere, and that takes its place here after every call.
            held: Positions that the buffers hold.
            wanted: Name of the output that comes to the host; nothing else but the cache is given out.
        """
        import numpy as np

        self._where, self._wanted, self._cache = where, wanted, cache
        types = where.types
        self._binding = where.session.io_binding()
        self._binding.bind_output(wanted)  # the first one, for `_run_first`
        outputs = {past_of(value.name): value.name for value in where.session.get_outputs()}
        self._outputs = {name: outputs[name] for name in cache}
        states = {name: value for name, value in cache.items() if is_state(name)}
        self._spare = {name: self._placed(np.empty(value.shape(), types[name])) for name, value in states.items()}
        for name in cache.keys() - states.keys():
            self._bind(name, cache[name], cache[name])
        batch = next(iter(cache.values())).shape()[0]
        self._positions = np.arange(held)
        self._mask = self._placed(np.ones(batch * held, types["attention_mask"])) if "attention_mask" in types else None
        self._types = {name: types[name] for name in ("input_ids", "position_ids", *_ROWS) if name in types}
        self._inputs: dict[str, Array] = {}
        self._bound: dict[str, Any] = {}
        self._found: Array = np.empty(0)

    def run(self, tokens: Tokens, past: Any) -> Array:
        """Return what is wanted of tokens (batch, length) behind ``past`` positions; the next call may overwrite it.

        ``past`` is a number, or one for each row (batch,) where they differ.
        """
        import numpy as np

        batch, length = tokens.shape
        own_pace = np.ndim(past) > 0
        end = int(np.max(past)) + length
        known = bool(self._inputs) and self._inputs["input_ids"].shape == tokens.shape
        inputs = self._inputs
        if not known:
            inputs = {
                name: np.full(batch, length, kind) if name in _ROWS else np.empty(tokens.shape, kind)
                for name, kind in self._types.items()
            }
        inputs["input_ids"][:] = tokens
        for name, value in self._spare.items():  # other steps on the same cache leave states elsewhere
            self._bind(name, self._cache[name], value)
        if "write_indices" in inputs:
            inputs["write_indices"][:] = past
        if "position_ids" in inputs:
            new = self._positions[:length]
            inputs["position_ids"][:] = np.add.outer(past, new) if own_pace else past + new
        if self._mask is not None and own_pace:
            mask = self._positions[:end] < np.add(past, length)[:, None]
            self._binding.bind_cpu_input("attention_mask", mask.astype(self._where.types["attention_mask"]))
        elif self._mask is not None:
            kind, place = np.dtype(self._where.types["attention_mask"]).type, self._mask.data_ptr()
            self._binding.bind_input("attention_mask", self._where.device, 0, kind, (batch, end), place)
        if known:
            for name, value in inputs.items():
                self._bound[name].update_inplace(value)
            self._where.session.run_with_iobinding(self._binding)
        else:
            self._inputs = {}  # a shape is known once it has run
            self._run_first(inputs)
            self._inputs = inputs
        for name, value in self._spare.items():
            self._cache[name], self._spare[name] = value, self._cache[name]
        return self._found

    def _bind(self, name: str, read: Any, written: Any) -> None:
        self._binding.bind_ortvalue_input(name, read)
        self._binding.bind_ortvalue_output(self._outputs[name], written)

    def _run_first(self, inputs: Mapping[str, Array]) -> None:
        """Run for a new shape; from now on the session reads and writes the same memory."""
        self._bound = {name: self._placed(value) for name, value in inputs.items()}
        for name, value in self._bound.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_output(self._wanted)
        self._where.session.run_with_iobinding(self._binding)
        value = self._binding.get_outputs()[0]
        self._binding.bind_ortvalue_output(self._wanted, value)
        self._found = value.numpy()

    def _placed(self, values: Array) -> Any:
        """Return a copy on the device, an OrtValue."""
        from onnxruntime import OrtValue

        made = OrtValue.ortvalue_from_shape_and_type(values.shape, values.dtype.type, self._where.device)
        made.update_inplace(values)
        return made
