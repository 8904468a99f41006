"""Rows of the caches of an engine: a call works on some of them, which the addresses say; the others stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankbook.exporter.cache_names import is_state
from rankbook.tools.errors import UsageError
from rankbook.tools.runtimes.base import check_tokens
from rankbook.tools.runtimes.trt_memory import Part
from rankbook.tools.serve.slots import Slots

if TYPE_CHECKING:
    import numpy as np

    from rankbook.tools.runtimes.trt_model import EngineModel

    Array = np.ndarray[Any, Any]

_ALIGNMENT = 256
"""Bytes on multiples of which the memory of a tensor begins, as that of every allocation does."""


class EngineSlots(Slots):
    """Rows of the caches of an engine, in its device memory."""

    def __init__(self, model: EngineModel, count: int) -> None:
        """Take rows of an engine.

        Raises:
            UsageError: The caches are not written in place, rows do not begin where the library allows it, or the
                engine was built for fewer sequences at the same time.
        """
        super().__init__(count, model.context)
        self._model = model
        self._parts: dict[tuple[str, int], Part] = {}
        if any(map(is_state, model.caches)):
            raise UsageError(
                f"{model.name} keeps states of convolutions and recurrences, whose rows change places at every call;"
                " serve the exported file in ONNX Runtime, or give the engine to generate"
            )
        if not model.in_place:
            raise UsageError(
                f"{model.name} has caches that are not written in place; build it from a checkpoint, or from a file of"
                " `rankbook export --graph static`"
            )
        if count > model.most_batch:
            raise UsageError(
                f"{model.name} decodes at most {model.most_batch} sequences at the same time, and {count} were asked"
                f" for; build it with --max-batch {count}"
            )
        odd = next((name for name in model.caches if self._row_bytes(name) % _ALIGNMENT), None)
        if odd and count > 1:
            raise UsageError(
                f"a row of {odd} of {model.name} has {self._row_bytes(odd)} bytes, no multiple of {_ALIGNMENT}; build"
                " it with a --max-context that is a multiple of 64"
            )

    def _compute(self, begin: int, tokens: Array, past: Array) -> Array:
        import numpy as np

        most = max(bounds["input_ids"][1][1] for bounds in self._model.engine.profiles)
        scores = np.empty(0, np.float32)
        for first in range(0, tokens.shape[1], most):
            scores = self._call(begin, tokens[:, first : first + most], past + first)
        return scores

    def _call(self, begin: int, tokens: Array, past: Array) -> Array:
        import numpy as np

        model, engine = self._model, self._model.engine
        rows, length = tokens.shape
        values = {"input_ids": tokens, "position_ids": past[:, None] + np.arange(length)}
        values |= {"write_indices": past, "lengths": np.full(rows, length)}
        given = [name for name in engine.inputs if name not in model.caches]
        shapes = {name: values[name].shape for name in given}
        shapes |= {name: (rows, *engine.profiles[0][name][1][1:]) for name in model.caches}
        places: dict[str, Any] = {}
        for name, present in model.caches.items() if begin else ():
            places |= dict.fromkeys((name, present), self._part(name, begin))
        engine.prepare(engine.choose(shapes), shapes, places)
        check_tokens(model.name, tokens, engine.shape("logits")[-1])
        uploads = {name: model.staged(name, values[name]) for name in given}
        host, wanted = model.wanted(values["lengths"], range(rows))
        engine.run(uploads, wanted)
        last: Array = host.astype("float32")[:, 0]
        return last

    def _wipe(self, slot: int) -> None:
        memory, sizes = self._model.engine.memory, {name: self._row_bytes(name) for name in self._model.caches}
        zeros = memory.pinned((max(sizes.values()),), "uint8")
        for name, size in sizes.items():
            memory.upload(self._part(name, slot), zeros[:size])
        memory.finish()

    def _part(self, name: str, row: int) -> Part:
        """Return the memory of a cache from a row on; the same object each time, so that nothing is told twice."""
        if (name, row) not in self._parts:
            self._parts[name, row] = Part(self._model.engine.region(name), row * self._row_bytes(name))
        return self._parts[name, row]

    def _row_bytes(self, name: str) -> int:
        import numpy as np

        engine = self._model.engine
        return int(np.prod(engine.profiles[0][name][1][1:])) * np.dtype(engine.inputs[name]).itemsize
