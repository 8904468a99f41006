"""An engine folder as a language model: long prompts in pieces, several texts side by side, caches that stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.exporter import cache_names
from rankbook.exporter.options import BEST, NO_TOKEN
from rankbook.tools.deploy.manifest import Manifest
from rankbook.tools.errors import UsageError
from rankbook.tools.generation.settings import read_settings
from rankbook.tools.runtimes.base import NEXT_TOKEN, TOP, LanguageModel, check_chosen, check_tokens
from rankbook.tools.runtimes.trt_engine import Copy, Engine, Plan

if TYPE_CHECKING:
    import numpy as np

    from rankbook.tools.runtimes.base import Logits, Tokens, Top
    from rankbook.tools.runtimes.trt_engine import Bounds, Shapes
    from rankbook.tools.runtimes.trt_memory import DeviceMemory

    Array = np.ndarray[Any, Any]

_COMPILED = (1, 64)
"""Steps after which TensorRT-RTX has compiled the kernels of both profiles, and those that it makes meanwhile."""


@dataclass(frozen=True)
class _Call:
    """A run that is prepared.

    Attributes:
        uploads: Its inputs, in pinned memory.
        ends: Columns up to the last new token of each text, (batch,).
        lengths: Tokens of each text behind it, (batch,).
        mask: Which columns hold a token then, (batch, columns).
    """

    uploads: dict[str, Array]
    ends: Array
    lengths: Array
    mask: Array


class EngineModel(LanguageModel):
    """An engine of `rankbook build`, with caches of a fixed length that are written in place or with growing ones.

    A cache that the library does not write in place, and every state of a convolution or recurrence, is read from one
    piece of memory and written to another; the two change places.

    Attributes:
        manifest: What the engine folder says about itself.
        engine: The engine.
        caches: Outputs that hold keys, values and states, by the input that they become.
    """

    def __init__(self, folder: Path, bindings: Any, memory: DeviceMemory, kernels: str) -> None:
        """Load the engine and take its device memory.

        Args:
            folder: The engine folder.
            bindings: The module ``tensorrt`` or ``tensorrt_rtx``.
            memory: Where its tensors go.
            kernels: Name of the runtime.

        Raises:
            UsageError: It is for another GPU, of another version, of a file that takes no text, or does not fit.
            MissingError: The driver or the plugin library is missing or too old.
            CheckFailedError: The library refuses it for another reason.
        """
        self.manifest, self.kernels = Manifest.read(folder), kernels
        self.name = f"{kernels} {folder}"
        self.engine = Engine(self.manifest, bindings, memory)
        if "input_ids" not in self.engine.inputs or "logits" not in self.engine.outputs:
            raise UsageError(
                f"{folder} has no input_ids and logits, so it cannot be given text; build it from a file written by"
                " `rankbook export` (with --inputs ids)"
            )
        self.caches = {cache_names.past_of(name): name for name in self.engine.outputs if cache_names.is_present(name)}
        aliased = self.engine.aliased
        self._swapped = {output: past for past, output in self.caches.items() if output not in aliased}
        bounds = self.engine.profiles[0]
        self._growing = {name for name in self.caches if bounds[name][0][2] != bounds[name][1][2]}
        # A cache that grows has a column for padding too. Windows and biases count columns: within a text are none.
        self._pads_left = "attention_mask" in self.engine.inputs
        self.engine.reserve(Plan(self._largest, self._swapped))
        self._host: dict[str, Array] = {}
        self._turned, self._steps, self._spoiled = False, 0, False
        self._text: tuple[Array, Array] | None = None  # lengths and mask of a `_Call`

    @cached_property
    def tokenizer(self) -> Any:
        """That of the folder, or of the exported folder that it was built from."""
        from rankbook.calibration.model.tokenizer import read_tokenizer

        return read_tokenizer(str(self._texts))

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """That of the folder, or of the exported folder that it was built from."""
        return read_settings(self._texts)

    @property
    def _texts(self) -> Path:
        """Where tokenizer and configuration lie: engines of older versions have none."""
        folder, source = self.manifest.folder, self.manifest.source.parent
        return folder if (folder / "config.json").is_file() or not source.is_dir() else source

    @cached_property
    def context(self) -> int:
        """What the profiles hold, and what the file says that it is right for."""
        noted = self.manifest.metadata.context
        held = max(self._longest(bounds) for bounds in self.engine.profiles)
        return min(held, int(noted)) if noted.isdecimal() else held

    @property
    def most_batch(self) -> int:
        """Most texts that are decoded side by side."""
        return max(bounds["input_ids"][1][0] for bounds in self.engine.profiles)

    @property
    def file_bytes(self) -> int:
        """The engine."""
        return self.manifest.engine.stat().st_size

    @property
    def device_bytes(self) -> int:
        """See `Engine.device_bytes`."""
        return self.engine.device_bytes

    @cached_property
    def packed(self) -> tuple[int, int]:
        """Of the file that the engine was built from; nothing is known where it is gone."""
        if not self.manifest.source.is_file():
            return 0, 0
        from rankbook.exporter.file import ExportedModel
        from rankbook.tools.inspect.sizes import packed_size

        return packed_size(ExportedModel.open(self.manifest.source))

    @property
    def dialect(self) -> str:
        """That of the file that it was built from."""
        return self.manifest.metadata.dialect

    @property
    def dtype(self) -> str:
        """That of the file that it was built from."""
        return self.manifest.metadata.dtype

    @property
    def last_only(self) -> bool:
        """Whether it gives the logits of the last position only."""
        return self.manifest.metadata.logits == "last"

    def scores(self, tokens: Tokens) -> Logits:
        """Score tokens (batch, length) from an empty cache: float32 (batch, length or 1, vocabulary)."""
        import numpy as np

        if self.last_only:
            return self.start_batch(list(tokens))[:, None]
        self._begin(len(tokens))
        return np.concatenate([self._call(part) for part, _ in self._pieces(list(tokens))], axis=1)

    def start(self, tokens: Tokens) -> Logits:
        """Begin a generation with tokens (1, length): fill the cache, return the last logits (vocabulary,)."""
        last: Logits = self.start_batch(list(tokens))[0]
        return last

    def step(self, token: int) -> Logits:
        """Continue with one token, return the next logits (vocabulary,)."""
        last: Logits = self.step_batch([token])[0]
        return last

    def start_batch(self, rows: Sequence[Tokens]) -> Logits:
        """Begin several texts, see `LanguageModel.start_batch`; shorter ones are padded."""
        return self._start(rows, self._call)

    def step_batch(self, tokens: Sequence[int]) -> Logits:
        """Continue every text with one token, return the next logits (batch, vocabulary)."""
        return self._step(tokens, self._call)

    def start_best(self, rows: Sequence[Tokens]) -> Tokens:
        """Begin several texts; return the best next token of each, which the engine chooses where it can."""
        if NEXT_TOKEN not in self.engine.outputs:
            return super().start_best(rows)
        return self._start(rows, self._choose)

    def step_best(self, tokens: Sequence[int]) -> Tokens:
        """Continue every text with one token; return the best next one of each, see `start_best`."""
        return self._step(tokens, self._choose) if NEXT_TOKEN in self.engine.outputs else super().step_best(tokens)

    def start_top(self, rows: Sequence[Tokens], count: int) -> Top:
        """Begin several texts; return the best next tokens, which the engine chooses where it gives so many."""
        if not self._gives(count):
            return super().start_top(rows, count)
        return self._start(rows, self._rank)[..., :count]

    def step_top(self, tokens: Sequence[int], count: int) -> Top:
        """Continue every text with one token; return the best next ones, see `start_top`."""
        if not self._gives(count):
            return super().step_top(tokens, count)
        return self._step(tokens, self._rank)[..., :count]

    @property
    def in_place(self) -> bool:
        """Whether all keys and values stay where they are."""
        return bool(self.caches) and not self._growing and not self._swapped

    def _gives(self, count: int) -> bool:
        return set(TOP) <= set(self.engine.outputs) and count <= BEST

    def values(self, tokens: Tokens, names: Sequence[str]) -> dict[str, Array]:
        """Return inner values that are outputs of this engine, for tokens (batch, length) of one call, as float32."""
        self._begin(len(tokens))
        call = self._prepare(list(tokens))
        memory, outputs = self.engine.memory, self.engine.outputs
        held = {name: memory.pinned(self.engine.shape(name), outputs[name]) for name in names}
        self._run(call, [Copy(name, array) for name, array in held.items()])
        return {name: array.astype("float32") for name, array in held.items()}

    def _begin(self, batch: int) -> None:
        import numpy as np

        self._text = np.zeros(batch, np.int64), np.zeros((batch, 0), bool)
        places = self._places()
        if self._spoiled:  # a mask multiplies NaN that an earlier text left by 0, which is NaN
            self.engine.clear((*self.caches, *self.caches.values()))
            self._spoiled = False
        for name in filter(cache_names.is_state, self.caches):
            shape = (batch, *self.engine.profiles[0][name][1][1:])
            zeros = self.staged(name, np.zeros(shape, self.engine.inputs[name]))
            self.engine.memory.upload(places.get(name) or self.engine.region(name), zeros)
        self.engine.memory.finish()  # before another profile is chosen

    def _start(self, rows: Sequence[Tokens], call: Callable[..., Array]) -> Array:
        """Begin texts, see `_extend`; where that fails, none has begun."""
        if empty := [str(index) for index, row in enumerate(rows) if not len(row)]:
            raise UsageError(f"text {', '.join(empty)} of {len(rows)} has no tokens; give each at least one")
        self._begin(len(rows))
        try:
            return self._extend(rows, call)
        except BaseException:
            self._text = None
            raise

    def _step(self, tokens: Sequence[int], call: Callable[..., Array]) -> Array:
        """Append a token to every text, see `_extend`; where that fails, all are what they were."""
        import numpy as np

        found = self._extend([np.array([token]) for token in tokens], call)
        self._steps += 1
        if self._steps in _COMPILED:
            self.engine.keep_compiled()
        return found

    def _extend(self, rows: Sequence[Tokens], call: Callable[..., Array]) -> Array:
        """Append ``rows`` of tokens; return what `_call`, `_choose` or `_rank` gives behind the last of each."""
        import numpy as np

        pieces = [(ending, call(part, ending)) for part, ending in self._pieces(rows)]
        order = np.argsort([row for ending, _ in pieces for row in ending])
        return np.concatenate([found for _, found in pieces])[order]

    def _pieces(self, rows: Sequence[Tokens]) -> Iterator[tuple[list[Tokens], list[int]]]:
        """Cut padded rows into pieces of at most what a profile takes in one call; say which texts end in each."""
        most = max(bounds["input_ids"][1][1] for bounds in self.engine.profiles)
        longest = max(map(len, rows))
        padded = [(row, longest - len(row) if self._pads_left else 0) for row in rows]
        for begin in range(0, longest, most):
            end = min(begin + most, longest)
            part = [row[max(0, begin - before) : max(0, end - before)] for row, before in padded]
            yield part, [index for index, (row, before) in enumerate(padded) if begin < before + len(row) <= end]

    def _call(self, rows: Sequence[Tokens], ending: Sequence[int] | None = None) -> Logits:
        """Run the engine once.

        Args:
            rows: New tokens of each text; one that has ended, or begins later, has none.
            ending: Texts whose last logits are wanted, (len(ending), vocabulary); of all positions,
                (batch, length, vocabulary), when None.
        """
        prepared = self._prepare(rows)
        host, wanted = self.wanted(prepared.ends, ending)
        self._run(prepared, wanted)
        found: Logits = host.astype("float32")  # a copy: the next call writes there
        self._spoiled |= bool((found[..., 0] != found[..., 0]).any())  # NaN
        return found if ending is None else found[:, 0]

    def _choose(self, rows: Sequence[Tokens], ending: Sequence[int]) -> Tokens:
        """Run the engine once, see `_call`; return the best next tokens of the texts ``ending``, (len(ending),)."""
        prepared = self._prepare(rows)
        host = self._results(NEXT_TOKEN, self.engine.shape(NEXT_TOKEN))
        self._run(prepared, [Copy(NEXT_TOKEN, host)])
        self._spoiled |= NO_TOKEN in host[list(ending), 0]
        return check_chosen(host[list(ending), 0])

    def _rank(self, rows: Sequence[Tokens], ending: Sequence[int]) -> Top:
        """Run the engine once, see `_call`; return the best next tokens of the texts ``ending``, see `best_tokens`."""
        import numpy as np

        prepared = self._prepare(rows)
        hosts = [self._results(name, self.engine.shape(name)) for name in TOP]
        self._run(prepared, [Copy(name, host) for name, host in zip(TOP, hosts, strict=True)])
        self._spoiled |= bool(np.isnan(hosts[0]).any())
        return np.stack([host[list(ending), 0].astype(np.float64) for host in hosts], axis=1)

    def _prepare(self, rows: Sequence[Tokens]) -> _Call:
        """Set shapes and addresses for new tokens of each text."""
        import numpy as np

        if self._text is None:
            raise UsageError(f"{self.name}: a step comes after the start of a text")
        lengths, mask = self._text
        count = np.array([len(row) for row in rows])
        width = int(count.max())
        self.check_room(int(lengths.max()) + width, "the text")
        # Behind a text the mask hides padding, or the next tokens overwrite it.
        before = width - count if self._pads_left else np.zeros_like(count)
        place = np.arange(width) - before[:, None]
        new = (place >= 0) & (place < count[:, None])
        ids = np.zeros(new.shape, np.int64)
        ids[new] = np.concatenate(rows)
        grown = np.concatenate([mask, new], axis=1)
        positions = np.where(place < 0, 0, lengths[:, None] + place)
        values = {"input_ids": ids, "attention_mask": grown, "position_ids": positions}
        values |= {"write_indices": lengths, "lengths": count}
        given = [name for name in self.engine.inputs if name not in self.caches]
        shapes = {name: values[name].shape for name in given}
        for name in self.caches:
            _, heads, held, *size = self.engine.profiles[0][name][1]
            shapes[name] = (len(rows), heads, mask.shape[1] if name in self._growing else held, *size)
        self.engine.prepare(self.engine.choose(shapes), shapes, self._places())
        check_tokens(self.name, ids, self.engine.shape("logits")[-1])
        return _Call({name: self.staged(name, values[name]) for name in given}, before + count, lengths + count, grown)

    def _run(self, call: _Call, wanted: Sequence[Copy]) -> None:
        """Run the engine; only what ran counts."""
        self.engine.run(call.uploads, wanted)
        self._turned ^= bool(self._swapped)
        self._text = call.lengths, call.mask

    def staged(self, name: str, values: Array) -> Array:
        """Return an input in pinned memory; the same memory serves every call."""
        kind = self.engine.inputs[name]
        if name not in self._host:
            size = self.engine.region(name).size
            self._host[name] = self.engine.memory.pinned((size,), "uint8")
        flat = self._host[name].view(kind)[: values.size]
        flat[:] = values.reshape(-1)
        return flat.reshape(values.shape)

    def wanted(self, count: Array, ending: Sequence[int] | None) -> tuple[Array, list[Copy]]:
        """Return host memory for the logits that `_call` is asked for, and what to copy there."""
        batch, length, words = self.engine.shape("logits")
        rows = range(batch) if ending is None else ending
        host = self._results("logits", (len(rows), length if ending is None else 1, words))
        if ending is None or (length == 1 and list(rows) == list(range(batch))):
            return host, [Copy("logits", host)]
        size = words * host.itemsize
        places = [(row * length + min(int(count[row]), length) - 1) * size for row in rows]
        return host, [Copy("logits", host[index], place) for index, place in enumerate(places)]

    def _results(self, name: str, shape: tuple[int, ...]) -> Array:
        """Return pinned memory for an output; as much as was needed at most so far is kept."""
        import numpy as np

        kind = np.dtype(self.engine.outputs[name])
        size = int(np.prod(shape)) * kind.itemsize
        if name not in self._host or self._host[name].size < size:
            self._host[name] = self.engine.memory.pinned((size,), "uint8")
        return self._host[name][:size].view(kind).reshape(shape)

    def _places(self) -> dict[str, Any]:
        """The memory of caches that change places: every other call reads where an output was written."""
        if not self._turned:
            return {}
        both = [*self._swapped.items(), *((past, output) for output, past in self._swapped.items())]
        return {name: self.engine.region(other) for name, other in both}

    def _longest(self, bounds: Bounds) -> int:
        """Positions that a profile holds."""
        if self._pads_left:
            return bounds["attention_mask"][1][1]
        slots = [bounds[name][1][2] for name in self.caches if not cache_names.is_state(name)]
        return min(slots, default=int(self.manifest.metadata.max_context or bounds["input_ids"][1][1]))

    def _largest(self, bounds: Bounds) -> Shapes:
        """Shapes that fit each other: behind the longest past of growing caches the longest prompt has no room."""
        shapes = {name: high for name, (_, high) in bounds.items()}
        if self._growing:
            tokens, total = shapes["input_ids"][1], self._longest(bounds)
            for name in self._growing:
                batch, heads, _, *size = shapes[name]
                shapes[name] = (batch, heads, total - tokens, *size)
        return shapes
