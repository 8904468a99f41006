"""An exported file as a language model, whatever computes it: its inputs, its cache, and what lies beside it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.exporter import cache_names
from rankbook.tools.errors import UsageError
from rankbook.tools.generation.settings import read_json, read_settings
from rankbook.tools.inspect.sizes import packed_size
from rankbook.tools.runtimes.base import LanguageModel, check_tokens

if TYPE_CHECKING:
    import numpy as np

    from rankbook.exporter.file import ExportedModel
    from rankbook.tools.runtimes.base import Logits, Tokens

    Array = np.ndarray[Any, Any]


class FileModel(LanguageModel):
    """An exported file; a runtime adds how its outputs are computed.

    Attributes:
        file: The file.
        is_reference: Whether its operators are the numpy references themselves, so that they need no comparison.
    """

    is_reference = False

    def __init__(self, path: Path | ExportedModel) -> None:
        """Open a file or an exported folder.

        Raises:
            UsageError: Not a file with ``input_ids`` and ``logits``.
        """
        from rankbook.exporter.file import ExportedModel

        self.file = path if isinstance(path, ExportedModel) else ExportedModel.open(path)
        if "input_ids" not in self.file.inputs or "logits" not in self.file.outputs:
            raise UsageError(
                f"{self.file.path} has no input_ids and logits, so it cannot be given text; give a file written by"
                " `rankbook export` (with --inputs ids)"
            )
        self._cache: dict[str, Any] = {}
        self._length = 0

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the file, or None; read when it is asked for, since transformers loads for seconds."""
        from rankbook.calibration.model.tokenizer import read_tokenizer

        return read_tokenizer(str(self.file.path.parent))

    @cached_property
    def context(self) -> int | None:
        """What the file says; for files that do not, the configuration beside them."""
        folder = self.file.path.parent
        noted = self.file.metadata.context
        value = noted if noted.isdecimal() else read_json(folder / "config.json").get("max_position_embeddings")
        return int(value) if value else None

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """That of the folder."""
        return read_settings(self.file.path.parent)

    @cached_property
    def packed(self) -> tuple[int, int]:
        """Of operators of this project and of MatMulNBits."""
        return packed_size(self.file)

    @property
    def file_bytes(self) -> int:
        """The graph and its data files."""
        return self.file.file_bytes

    @property
    def dialect(self) -> str:
        """Operators of its packed layers."""
        return self.file.metadata.dialect

    @property
    def dtype(self) -> str:
        """Type of its activations."""
        return self.file.metadata.dtype

    @property
    def last_only(self) -> bool:
        """Whether the file gives the logits of the last position only."""
        return self.file.metadata.logits == "last"

    def scores(self, tokens: Tokens) -> Logits:
        """Score tokens (batch, length) without a cache: float32 (batch, length or 1, vocabulary)."""
        self._reset(tokens.shape[0])
        scores: Logits = self._compute(tokens, ["logits"])["logits"].astype("float32", copy=False)
        return scores

    def start(self, tokens: Tokens) -> Logits:
        """Begin a generation with tokens (1, length): fill the cache, return the last logits (vocabulary,)."""
        self._reset(tokens.shape[0])
        return self._advance(tokens)

    def step(self, token: int) -> Logits:
        """Continue with one token, return the next logits (vocabulary,)."""
        return self._advance(self._next([token]))

    def start_batch(self, rows: Sequence[Tokens]) -> Logits:
        """Begin several texts of one length side by side, see `LanguageModel.start_batch`.

        Raises:
            UsageError: Their lengths differ.
        """
        import numpy as np

        self._check_rows(rows)
        self._reset(len(rows))
        self._advance(np.stack(rows))
        return self._ends

    def step_batch(self, tokens: Sequence[int]) -> Logits:
        """Continue every text with one token, return the next logits (batch, vocabulary)."""
        self._advance(self._next(tokens))
        return self._ends

    def _next(self, tokens: Sequence[int]) -> Tokens:
        """Return the tokens of a step, (batch, 1).

        Raises:
            UsageError: No text has begun: without a start, or since that failed.
        """
        import numpy as np

        if not self._length:
            raise UsageError(f"{self.name}: a step comes after the start of a text")
        return np.array(tokens, np.int64)[:, None]

    def _check_rows(self, rows: Sequence[Tokens]) -> None:
        if len({len(row) for row in rows}) != 1:
            raise UsageError(f"{self.name} takes sequences of one length in a batch; give them one by one")

    def feeds(self, tokens: Tokens) -> dict[str, Array]:
        """Return the inputs of one call without a cache, by name."""
        self._reset(tokens.shape[0])
        return self._inputs(tokens) | self._empty_cache(tokens.shape[0])

    @abstractmethod
    def run_graph(self, graph: bytes, outputs: Mapping[str, str], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Compute another graph whose data files are those of the file.

        Args:
            graph: A serialized model.
            outputs: Names of values of the graph, by the names that they have in what is returned.
            feeds: Inputs by name.
        """

    @abstractmethod
    def _compute(self, tokens: Tokens, outputs: Collection[str]) -> dict[str, Any]:
        """Return outputs by name for tokens behind the cache: logits as an array, the others as the cache has them."""

    def _advance(self, tokens: Tokens) -> Logits:
        values = self._compute(tokens, list(self.file.outputs))
        self._cache = {
            cache_names.past_of(name): value for name, value in values.items() if cache_names.is_present(name)
        }
        return self._last(tokens, values["logits"])

    def _last(self, tokens: Tokens, scores: Array) -> Logits:
        """Count tokens, and return the last scores of the first text; copies, since the next step may write there."""
        self._length += tokens.shape[1]
        self._ends: Logits = scores[:, -1].astype("float32")
        last: Logits = self._ends[0]
        return last

    def _reset(self, batch: int) -> None:
        self._length, self._cache = 0, dict(self._empty_cache(batch))

    def _empty_cache(self, batch: int) -> dict[str, Array]:
        """Return tensors without a past, by the names of the inputs."""
        import numpy as np

        return {
            name: np.zeros([batch, *(size if isinstance(size, int) else 0 for size in shape[1:])], self._types[name])
            for name, shape in self.file.inputs.items()
            if cache_names.is_past(name)
        }

    def _inputs(self, tokens: Tokens) -> dict[str, Array]:
        """Return the inputs of one call by name, the cache left out.

        Raises:
            UsageError: A cache of a fixed length does not hold so many tokens, or the model has no such token.
        """
        import numpy as np

        batch, length = tokens.shape
        self._check_slots(self._length + length)
        self._check_known(tokens)
        values = {
            "input_ids": tokens,
            "attention_mask": np.ones((batch, self._length + length)),
            "position_ids": np.tile(np.arange(self._length, self._length + length), (batch, 1)),
            "write_indices": np.full(batch, self._length),
            "lengths": np.full(batch, length),
        }
        types = self._types
        return {name: np.ascontiguousarray(value, types[name]) for name, value in values.items() if name in types}

    def _check_slots(self, positions: int) -> None:
        """Check that a cache of a fixed length, which the graph does not check, holds so many positions."""
        if self.file.metadata.max_context:
            self.check_room(positions, "the text")

    def _check_known(self, tokens: Tokens) -> None:
        """Check tokens where the file says how many there are: runtimes look up some of the others without a word."""
        if isinstance(self._vocabulary, int):
            check_tokens(self.name, tokens, self._vocabulary)

    @cached_property
    def _vocabulary(self) -> int | str:
        return self.file.outputs["logits"][-1]

    @cached_property
    def _types(self) -> dict[str, str]:
        return self.file.input_types
