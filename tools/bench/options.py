"""What a user chooses about a measurement of speed."""

from __future__ import annotations

from dataclasses import dataclass

from rankbook.calibration.option import Threaded, option
from rankbook.plugins.widths import BITS
from rankbook.tools.errors import UsageError

LAYERS, MODELS, DEVICE = "single layers", "exported models", "models with --device cuda"
"""Titles of the groups of options."""


@dataclass(frozen=True, kw_only=True)
class TurnOptions(Threaded):
    """Subjects are measured in interleaved turns."""

    repeats: int = option(15, "turns; everything that is measured runs once in each", metavar="N", least=1)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(TurnOptions):
    """How whole models are measured."""

    prompt: int = option(64, "tokens before decoding begins", metavar="N", least=1, group=MODELS)
    steps: int = option(32, "tokens decoded in a turn", metavar="N", least=1, group=MODELS)
    prefill: int = option(512, "tokens of the prefill; 0 leaves it out", metavar="N", least=0, group=MODELS)


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(ModelOptions):
    """How whole models are measured on a GPU: every size with every model."""

    contexts: tuple[int, ...] = option(
        (128, 1024), "tokens in the cache before decoding begins", metavar="N", least=1, group=DEVICE
    )
    batches: tuple[int, ...] = option((1,), "sequences decoded at the same time", metavar="N", least=1, group=DEVICE)
    prompts: tuple[int, ...] = option(
        (128, 512), "tokens of the prompts", metavar="N", least=1, flags=("--prompt-lengths",), group=DEVICE
    )


@dataclass(frozen=True, kw_only=True)
class LayerOptions(TurnOptions):
    """Which single layers are measured, and how."""

    shapes: tuple[str, ...] = option(("4096x4096", "4096x14336"), "sizes of the weight", metavar="NxK", group=LAYERS)
    bits: tuple[int, ...] = option((4, 3, 2), "bits of a code", choices=BITS, metavar="B", group=LAYERS)
    ranks: tuple[int, ...] = option((1, 2), "planes of the codebooks", metavar="R", least=1, group=LAYERS)
    branch: int = option(0, "also with an error branch of this rank", metavar="R", least=0, group=LAYERS)
    group_size: int = option(64, "inputs per group", metavar="G", group=LAYERS)
    tokens: tuple[int, ...] = option(
        (1,), "tokens of x; 1 is decoding", metavar="M", least=1, flags=("--tokens", "--rows"), group=LAYERS
    )
    exact: bool = option(False, "also with fp32 activations", group=LAYERS)
    stream: int = option(160, "read at least this much per run", metavar="MB", least=1, group=LAYERS)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(N, K) of each layer.

        Raises:
            UsageError: A shape is not written as NxK.
        """
        return tuple(_size(text) for text in self.shapes)

    @property
    def stream_bytes(self) -> int:
        """Bytes of constants that one run reads at least."""
        return self.stream * 1_000_000


def _size(text: str) -> tuple[int, int]:
    rows, _, columns = text.lower().partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise UsageError(f"--shapes {text}: give out features x in features, e.g. 4096x14336")
    return int(rows), int(columns)
