"""What a user chooses about evaluation and parity checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rankbook.calibration.device import DeviceOptions
from rankbook.calibration.option import Options, Seeded, Threaded, option


@dataclass(frozen=True)
class EvalOptions(Options):
    """What to evaluate on."""

    context: int = option(512, "tokens per window; windows do not overlap", metavar="N", least=2)
    max_tokens: int | None = option(
        None, "tokens to evaluate on, rounded up to windows; default: all", metavar="N", least=1
    )
    batch: int = option(1, "windows per call", metavar="N", least=1)
    chat: bool = option(False, "the text holds chats ('messages'): apply the model's chat template")


@dataclass(frozen=True)
class HarnessOptions(Options):
    """What of lm-evaluation-harness to run."""

    tasks: tuple[str, ...] = option((), "tasks of lm-evaluation-harness, instead of --text", metavar="TASK")
    task_folder: Path | None = option(None, "folder with YAML files of further tasks", metavar="DIR")
    limit: int | None = option(None, "documents of each task; default: all", metavar="N", least=1)
    fewshot: int | None = option(None, "examples before each question; default: the task's", metavar="N")


@dataclass(frozen=True)
class ParityOptions(Seeded, Threaded, DeviceOptions):
    """What to check."""

    tokens: int = option(32, "tokens to compare on, in each of two sequences", metavar="N")
    tolerance: float | None = option(
        None, "largest difference, relative to the largest value; default: by dtype", metavar="X"
    )
    every_node: bool = option(False, "check every custom node, instead of one of each kind")
    no_layers: bool = option(False, "leave out the comparison layer by layer")
    greedy: int = option(
        0, "also continue five prompts greedily by N tokens and compare the tokens", metavar="N", least=0
    )
