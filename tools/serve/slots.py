"""Sequences of different lengths, decoded together: rows of a cache that is written in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rankbook.exporter.cache_names import is_state, past_of
from rankbook.tools.errors import UsageError
from rankbook.tools.runtimes.ort_memory import untouched
from rankbook.tools.runtimes.ort_steps import BoundSteps, Where

if TYPE_CHECKING:
    import numpy as np

    from rankbook.tools.runtimes.base import LanguageModel, Logits
    from rankbook.tools.runtimes.ort import OrtModel

    Array = np.ndarray[Any, Any]

_LOGITS = "logits"
CONTEXT = 4096
"""Positions of a row where neither the file nor the user says how many."""


class Slots(ABC):
    """The rows of the cache; a row holds one text, or none.

    A step computes the first rows up to the last one in use: a native kernel decodes each code once for up to 16
    tokens, so that an idle row among them costs little. What it writes lies behind the text of the row, where nothing
    looks.

    Attributes:
        count: Rows.
        context: Positions of a row.
    """

    def __init__(self, count: int, context: int) -> None:
        import numpy as np

        self.count, self.context = count, context
        self._lengths = np.zeros(count, np.int64)
        self._spoiled: set[int] = set()

    def length(self, slot: int) -> int:
        """Return how many tokens a row holds."""
        return int(self._lengths[slot])

    def clear(self, slot: int) -> None:
        """Forget the text of a row."""
        self._lengths[slot] = 0

    def extend(self, slot: int, tokens: Array) -> Logits:
        """Put tokens (length,) behind the text of a row; return the logits (vocabulary,) of the next one.

        Raises:
            UsageError: The row has no room for them.
        """
        self._check_room(slot, len(tokens))
        if slot in self._spoiled and not self._lengths[slot]:
            self._wipe(slot)
            self._spoiled.remove(slot)
        scores = self._run(slot, slot + 1, tokens[None])
        self._lengths[slot] += len(tokens)
        last: Logits = scores[0]
        return last

    def step(self, tokens: Mapping[int, int]) -> dict[int, Logits]:
        """Put one token behind the text of each given row; return the logits (vocabulary,) of the next ones.

        Raises:
            UsageError: A row has no room for it.
        """
        import numpy as np

        for slot in tokens:
            self._check_room(slot, 1)
        end = max(tokens) + 1
        given = np.zeros((end, 1), np.int64)
        for slot, token in tokens.items():
            given[slot] = token
        scores = self._run(0, end, given)
        for slot in tokens:
            self._lengths[slot] += 1
        return {slot: scores[slot] for slot in tokens}

    def _check_room(self, slot: int, count: int) -> None:
        if self._lengths[slot] + count > self.context:
            raise UsageError(
                f"row {slot} holds {self._lengths[slot]} tokens and was given {count} more; a row has {self.context}"
                " positions: end its text before, or serve with a larger --max-context"
            )

    def _run(self, begin: int, end: int, tokens: Array) -> Array:
        """Compute rows ``begin`` to ``end``; return their last logits (rows, vocabulary) in float32."""
        import numpy as np

        # An idle row that is full has no room for the token that nobody reads; its text cannot go on anyway.
        past = np.minimum(self._lengths[begin:end], self.context - tokens.shape[1])
        scores = self._compute(begin, tokens, past)
        # States that are NaN make every logit NaN, and stay in the cache: a mask multiplies them by 0, which is NaN.
        self._spoiled |= {begin + int(row) for row in np.flatnonzero(np.isnan(scores[:, 0]))}
        return scores

    @abstractmethod
    def _compute(self, begin: int, tokens: Array, past: Array) -> Array:
        """Do `_run` for tokens (rows, length) of the rows from ``begin`` on, behind ``past`` (rows,) positions."""

    @abstractmethod
    def _wipe(self, slot: int) -> None:
        """Fill a row of every cache with zeros."""


class OrtSlots(Slots):
    """Rows of a cache in ONNX Runtime on the CPU."""

    def __init__(self, model: OrtModel, count: int, context: int | None) -> None:
        """Allocate the cache; only what is written of it takes memory.

        Args:
            model: A file whose cache is written in place, of ``--graph ort`` or ``static``.
            count: Rows.
            context: Positions of a row; what the file or the model holds, at most `CONTEXT`, when None.

        Raises:
            UsageError: It was exported otherwise, holds fewer positions, or states besides keys and values.
        """
        if not model.file.metadata.in_place:
            other = "static --max-context N" if model.file.metadata.graph == "ort" else "ort"
            raise UsageError(
                f"the cache of {model.file.path} is not written in place, which the server needs;"
                f" export the checkpoint with `rankbook export --graph {other}`"
            )
        if model.cuda:
            raise UsageError(f"{model.name} is not served on a GPU; build an engine, or give --kernels native")
        super().__init__(count, _positions(model, context))
        types = model.file.input_types
        self._where = Where(model.session, "cpu", types)
        names = [past_of(name) for name in model.file.outputs]
        caches = [name for name in names if name in types]
        if states := [name for name in caches if is_state(name)]:
            raise UsageError(f"{model.file.path} holds states ({states[0]}), which are not served yet; use `generate`")
        self._cache = {name: untouched(self._shape(model.file.inputs[name]), types[name]) for name in caches}
        self._steps: dict[tuple[int, int], BoundSteps] = {}

    def _shape(self, declared: Sequence[Any]) -> tuple[int, ...]:
        """Return the shape of a cache (rows, heads, positions, size) of a file's input."""
        _, heads, slots, size = declared  # of a fixed length, with one slot more for attention sinks
        return self.count, int(heads), slots if isinstance(slots, int) else self.context, int(size)

    def _compute(self, begin: int, tokens: Array, past: Array) -> Array:
        import numpy as np
        from onnxruntime import OrtValue

        end = begin + len(tokens)
        if (begin, end) not in self._steps:
            # A slice of rows is one piece of memory: the same buffers serve every number of rows.
            cache = {name: OrtValue.ortvalue_from_numpy(value[begin:end]) for name, value in self._cache.items()}
            self._steps[begin, end] = BoundSteps(self._where, cache, self.context, _LOGITS)
        scores: Array = self._steps[begin, end].run(tokens, past)[:, -1].astype(np.float32)
        return scores

    def _wipe(self, slot: int) -> None:
        for values in self._cache.values():
            values[slot] = 0


def _positions(model: OrtModel, wanted: int | None) -> int:
    """Return how many positions a row has."""
    fixed = int(model.file.metadata.max_context or 0)
    most = fixed or model.context
    if wanted is not None and most is not None and wanted > most:
        raise UsageError(f"--max-context {wanted}: {model.file.path} holds {most} positions; give at most that")
    if fixed and wanted not in (None, fixed):
        raise UsageError(f"--max-context {wanted}: the cache of {model.file.path} has {fixed} positions; leave it out")
    return wanted or fixed or min(CONTEXT, most or CONTEXT)


def slots_of(model: LanguageModel, count: int, context: int | None = None) -> Slots:
    """Return rows for the texts of a server.

    Args:
        model: The model, opened.
        count: Rows.
        context: Positions of a row, None for what the file or the model holds.

    Raises:
        UsageError: The runtime has none, or the model's cache cannot be cut into them.
    """
    from rankbook.tools.runtimes.ort import OrtModel
    from rankbook.tools.runtimes.trt_model import EngineModel
    from rankbook.tools.serve.engine_slots import EngineSlots

    if isinstance(model, OrtModel):
        return OrtSlots(model, count, context)
    if isinstance(model, EngineModel):
        if context not in (None, model.context):
            raise UsageError(f"--max-context {context}: {model.name} was built for {model.context}; leave it out")
        return EngineSlots(model, count)
    raise UsageError(f"{model.name} cannot be served; export it with `rankbook export MODEL --graph ort`")
