"""What a runtime is, and what it offers to the commands: a language model that scores tokens and continues them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankbook.calibration.device import AUTO
from rankbook.calibration.source import Kind, Source
from rankbook.tools.errors import CheckFailedError, MissingError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from rankbook.exporter.file import ExportedModel
    from rankbook.tools.deploy.manifest import EngineReport
    from rankbook.tools.deploy.options import BuildOptions
    from rankbook.tools.runtimes.exported import FileModel

    Tokens = npt.NDArray[np.int64]
    Logits = npt.NDArray[np.float32]
    Top = npt.NDArray[np.float64]


NEXT_TOKEN = "next_token"
"""Output of files of ``--sample greedy``, and of engines built from them: the best token of each text (batch, 1).

It is `rankbook.exporter.options.NO_TOKEN` where logits are NaN or infinite.
"""
TOP = ("top_logits", "top_tokens")
"""Outputs of those of ``--sample top-k``: the best ones in falling order (batch, 1, k); logits NaN where one is."""
_NO_CHOICE = (
    "the model gives logits that are NaN or infinite, from which no token can be chosen: its activations overflow"
    " (export with --dtype fp32 where it is fp16), or its weights are damaged"
)


@dataclass(frozen=True)
class Setting:
    """How a model is opened.

    Attributes:
        threads: CPU threads; the runtime's choice when None.
        capacity: Most tokens of prompt and answer together, for runtimes that reserve them; the model's when None.
        shared: Other models wait in the same process: workers must not spin between calls.
        device: Where PyTorch computes, see `rankbook.calibration.device.DeviceOptions`; other runtimes have none to
            choose.
    """

    threads: int | None = None
    capacity: int | None = None
    shared: bool = False
    device: str = AUTO


class LanguageModel(ABC):
    """A loaded model, whatever runs it.

    Attributes:
        name: For messages and reports.
        kernels: What computes packed layers: ``dense`` (decoded once), a runtime's name, or a peer with its version.
        tokenizer: The model's tokenizer, or None where none was found.
    """

    name: str
    kernels: str = "dense"
    tokenizer: Any = None

    @property
    def file_bytes(self) -> int:
        """Bytes of the files that were opened; 0 where there are none."""
        return 0

    @property
    def packed(self) -> tuple[int, int]:
        """Bytes of all packed layers and embeddings, each counted once, and the number of their weights.

        Not read before it is asked for: the memory that this takes is not the model's.
        """
        return 0, 0

    @abstractmethod
    def start(self, tokens: Tokens) -> Logits:
        """Begin a generation with tokens (1, length): fill the cache, return the last logits (vocabulary,)."""

    @abstractmethod
    def step(self, token: int) -> Logits:
        """Continue with one token, return the next logits (vocabulary,). `start` comes first."""

    def start_batch(self, rows: Sequence[Tokens]) -> Logits:
        """Begin several texts side by side, given as tokens (length,) each; return the last logits (batch, vocabulary).

        Raises:
            UsageError: The runtime decodes one text at a time.
        """
        if len(rows) != 1:
            raise UsageError(f"{self.name} decodes one text at a time; {len(rows)} were given")
        return self.start(rows[0][None])[None]

    def step_batch(self, tokens: Sequence[int]) -> Logits:
        """Continue every text of `start_batch` with one token, return the next logits (batch, vocabulary)."""
        (token,) = tokens
        return self.step(token)[None]

    def start_best(self, rows: Sequence[Tokens]) -> Tokens:
        """Begin as `start_batch`, return the best next token of each text (batch,).

        A runtime whose model chooses it, beside its logits, copies nothing else to the host.
        """
        return best_token(self.start_batch(rows))

    def step_best(self, tokens: Sequence[int]) -> Tokens:
        """Continue as `step_batch`, return the best next token of each text (batch,), see `start_best`."""
        return best_token(self.step_batch(tokens))

    def start_top(self, rows: Sequence[Tokens], count: int) -> Top:
        """Begin as `start_batch`, return logits and numbers of the ``count`` best next tokens, see `best_tokens`."""
        return best_tokens(self.start_batch(rows), count)

    def step_top(self, tokens: Sequence[int], count: int) -> Top:
        """Continue as `step_batch`, return what `start_top` does."""
        return best_tokens(self.step_batch(tokens), count)

    def generated(self, tokens: Tokens, count: int) -> list[int] | None:
        """Continue tokens (1, length) greedily by ``count`` tokens with the loop of the library that defines the model.

        None where there is no such loop; `step` is this project's.
        """
        del tokens, count
        return None

    @property
    def dialect(self) -> str:
        """Operators of packed layers of an exported file or of an engine built from one; empty for other models."""
        return ""

    @property
    def dtype(self) -> str:
        """Type of the activations of an exported file or of an engine built from one; empty for other models."""
        return ""

    @property
    def context(self) -> int | None:
        """Positions that the model holds, prompt and answer together; None where nothing limits them."""
        return None

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The fields of the model's generation_config.json."""
        return {}

    def check_room(self, positions: int, what: str) -> None:
        """Check that the model holds so many positions.

        Raises:
            UsageError: ``what``, the flag that asks for them, wants more than there are.
        """
        if self.context is not None and positions > self.context:
            raise UsageError(
                f"{what} asks for {positions} positions; {self.name} holds {self.context}: give at most that many"
            )

    def scores(self, tokens: Tokens) -> Logits:
        """Score tokens (batch, length) without a cache: float32 (batch, length, vocabulary).

        A model that gives the last position only returns (batch, 1, vocabulary).
        """
        import numpy as np

        return np.stack([self.start(row[None])[None] for row in tokens])

    def logits(self, tokens: Tokens) -> Logits:
        """Score every position of tokens (batch, length): float32 (batch, length, vocabulary).

        Raises:
            UsageError: The model gives the last position only.
        """
        scores = self.scores(tokens)
        if scores.shape[1] != tokens.shape[1]:
            raise UsageError(
                f"{self.name} gives the logits of the last position only; all positions are needed: export with"
                " `--logits all`"
            )
        return scores

    def override(self, kind: str | None, kv_bits: int | None) -> None:  # noqa: ARG002
        """Replace the settings of activations and cache that the model was stored with; None leaves one as it is.

        Raises:
            UsageError: They cannot be changed any more.
        """
        raise UsageError(
            f"--activations and --kv-bits apply to PyTorch models; {self.name} has its own settings: evaluate the"
            " checkpoint that it was made from"
        )


def check_finite(logits: Any) -> None:
    """Check the largest logits of texts: a token that is chosen among NaN or infinities is any one.

    Raises:
        CheckFailedError: One is not a finite number.
    """
    import numpy as np

    if not np.isfinite(logits).all():
        raise CheckFailedError(_NO_CHOICE)


def check_chosen(tokens: Tokens) -> Tokens:
    """Return tokens that a graph chose (`NEXT_TOKEN`).

    Raises:
        CheckFailedError: It found logits that are NaN or infinite.
    """
    from rankbook.exporter.options import NO_TOKEN

    if (tokens == NO_TOKEN).any():
        raise CheckFailedError(_NO_CHOICE)
    return tokens


def best_token(logits: Logits) -> Tokens:
    """Return the best token of each text (batch,) of logits (batch, vocabulary).

    Raises:
        CheckFailedError: Logits are NaN or infinite.
    """
    best: Tokens = logits.argmax(-1)  # of a NaN, where there is one
    check_finite(logits[range(len(best)), best])
    return best


def check_tokens(name: str, tokens: Tokens, vocabulary: int) -> None:
    """Check tokens that a model is given, where looking up others would read any memory.

    Raises:
        UsageError: The model ``name`` has no such token.
    """
    if wrong := [int(token) for token in (tokens.min(), tokens.max()) if not 0 <= token < vocabulary]:
        raise UsageError(f"token {wrong[0]} is not one of {name}, whose tokens are 0 to {vocabulary - 1}")


def best_tokens(logits: Logits, count: int) -> Top:
    """Return logits and numbers of the best tokens, (batch, 2, count) in falling order, of logits (batch, vocabulary).

    Of equal ones the lower number comes first. There are no more than the vocabulary has.

    Raises:
        CheckFailedError: Logits are NaN or infinite.
    """
    import numpy as np

    check_finite(logits.max(-1))
    count = min(count, logits.shape[-1])
    tokens = np.sort(np.argpartition(-logits, count - 1, axis=-1)[:, :count], axis=-1)
    scores = np.take_along_axis(logits, tokens, axis=-1)
    order = np.argsort(-scores, axis=-1, kind="stable")
    return np.stack([np.take_along_axis(part, order, axis=-1).astype(np.float64) for part in (scores, tokens)], axis=1)


@dataclass(frozen=True)
class Runtime:
    """One way to run a model, or to build what runs it; a module of this folder lists its own in ``RUNTIMES``.

    Attributes:
        name: What users type.
        title: The package, for people.
        enables: What it is for.
        unavailable: Returns a sentence why it cannot be used on this machine and what to do, or None.
        version: Returns the version of what runs it; called where it is available.
        kinds: The kinds of model that it opens.
        opens: What it opens, for messages; empty where the kinds say it all.
        open: Loads a model, or None where it only builds. Raises UsageError for a model that it refuses.
        prepare: Imports what `open` imports and reads what the file says about itself: memory that is not the model's.
        build: Builds an engine: (exported file, output folder, `BuildOptions`, progress) to a report. None where there
            is nothing to build.
        open_file: As `open`, of an exported file that is open already; None where it opens none.
        automatic: Taken for its kinds where no runtime is named; of several, the first that is available.
        fits: Whether it opens this model of its kinds, e.g. an engine of its own builder.
        exact: Computes what the file says, so that parity can be asked of it.
        peer: Of somebody else: what the bench compares with.
        cuda: Runs on an NVIDIA GPU.
        devices: Takes the device of a `Setting`.
    """

    name: str
    title: str
    enables: str
    unavailable: Callable[[], str | None]
    version: Callable[[], str]
    kinds: frozenset[Kind]
    opens: str = ""
    open: Callable[[Source, Setting], LanguageModel] | None = None
    prepare: Callable[[Source], object] = lambda _: None
    build: Callable[[Path, Path, BuildOptions, Callable[[float, str | None], None]], EngineReport] | None = None
    open_file: Callable[[ExportedModel, Setting], FileModel] | None = None
    automatic: bool = False
    fits: Callable[[Source], bool] = lambda _: True
    exact: bool = True
    peer: bool = False
    cuda: bool = False
    devices: bool = False

    def require(self) -> None:
        """Check that it can be used.

        Raises:
            MissingError: It cannot.
        """
        if reason := self.unavailable():
            raise MissingError(reason)
