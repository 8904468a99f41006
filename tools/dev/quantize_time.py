"""Measures what `quantize` spends its processor time on, by stage, beside another version of the package.

    python -m rankbook.tools.dev.quantize_time MODEL --calib FILE --blocks 4 -o time -- --method lcq --bits 3
    python -m rankbook.tools.dev.quantize_time MODEL --calib FILE --threads 1 2 --beside OTHER-CHECKOUT -o time

The model is cut to its first blocks. Every run is a process of its own; versions take turns. Threads that wait for each
other in a loop count as busy, so on a machine with other work the figures of one thread are the ones to compare. What
several threads do at once is counted where they were started. The table ends with the share of codes that differ from
those of the first run.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rankbook.tools.child import package_environment

_CALIBRATION = "rankbook.calibration"
_CHILD = "--as-child"
_START = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
"""Runs this file, not that of the version which is measured."""
STAGES: dict[str, tuple[str, ...]] = {
    "model and text": ("driver.run:_load_original", "driver.run:_calibration", "driver.run:model_hash"),
    "calibration passes": ("model.capture:advance", "model.capture:collect", "model.capture:first_inputs"),
    "Gram matrices": ("fitting.statistics:LayerStatistics.update",),
    "closed form": ("driver.block:BlockSolver._closed_forms",),
    "codebooks": ("fitting.codebook_fit:fit",),
    "error feedback": ("fitting.feedback:assign", "fitting.feedback:plan"),
    "refits": ("fitting.codebook_store:refit_params",),
    "training: codes": (
        "training.reconstruct:train_block",
        "training.learned_rounding:LearnedRounding.__init__",
        "training.learned_rounding:LearnedRounding.weight",
    ),
    "training: gradients": ("training.reconstruct:_gradients",),
    "training: comparing states": ("training.reconstruct:_loss",),
    "checkpoint": (
        *("driver.resume:PartialState.save", "driver.resume:PartialState.load"),
        *("driver.run:write_checkpoint", "driver.run:checkpoint_parts"),
    ),
}
"""Functions of calibration by stage; what one calls of another stage counts there."""


class Clock:
    """Sums up the processor time of functions, without that of other ones of it that they call."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._inside: list[float] = []

    def timed(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """Return a function that adds its time to a stage where the main thread calls it."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return function(*args, **kwargs)
            begin = time.process_time()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.process_time() - begin
                self.seconds[stage] += spent - self._inside.pop()
                if self._inside:
                    self._inside[-1] += spent

        return call

    def install(self) -> None:
        """Time the functions of all stages."""
        for stage, places in STAGES.items():
            for place in places:
                module, _, path = place.partition(":")
                holder: Any = importlib.import_module(f"{_CALIBRATION}.{module}")
                *outer, name = path.split(".")
                for part in outer:
                    holder = getattr(holder, part)
                setattr(holder, name, self.timed(holder.__dict__[name], stage))


@dataclass(frozen=True)
class Run:
    """One run of `quantize`.

    Attributes:
        version: Name of the checkout.
        threads: What it was given.
        seconds: Processor time of `quantize` by stage; ``rest`` is what no stage counts.
        weights: Weights that were quantized.
        changed: Share of codes that differ from the first run's.
    """

    version: str
    threads: int
    seconds: dict[str, float]
    weights: int
    changed: float = 0.0


def child(words: Sequence[str], result: Path) -> int:
    """Run `quantize` in this process and write the seconds of its stages."""
    from rankbook.tools import cli
    from rankbook.tools.commands import quantize

    clock, spent = Clock(), [0.0]

    def run(options: Any) -> Any:
        clock.install()  # loads PyTorch, so not before the command line has set the environment
        begin = time.process_time()
        try:
            return quantize.COMMAND.run(options)
        finally:
            spent[0] = time.process_time() - begin

    cli.discover = lambda: {"quantize": replace(quantize.COMMAND, run=run)}  # type: ignore[attr-defined]
    code = cli.main(["quantize", *words])
    result.write_text(json.dumps(clock.seconds | {"rest": spent[0] - sum(clock.seconds.values())}))
    return code


def cut(source: str, blocks: int, folder: Path) -> None:
    """Write a model of the first blocks of another."""
    import torch

    from rankbook.calibration.model.adapter import adapter_of
    from rankbook.calibration.model.loading import load_model

    model, tokenizer = load_model(source)
    found = adapter_of(model).blocks()
    owner, _, name = found.name.rpartition(".")
    setattr(model.get_submodule(owner), name, torch.nn.ModuleList(found.modules[:blocks]))
    model.config.num_hidden_layers = blocks
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:blocks]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def codes_of(checkpoint: Path) -> dict[str, Any]:
    """Return the codes (N, K) of every packed layer of a checkpoint."""
    from rankbook.calibration.model.loading import load_model
    from rankbook.calibration.model.packed_modules import packed_modules

    return {name: module.record().codes for name, module in packed_modules(load_model(checkpoint)[0]).items()}


def changed(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the share of codes that differ.

    Raises:
        ValueError: Not the same layers were quantized.
    """
    if one.keys() != other.keys():
        raise ValueError(f"{sorted(one.keys() ^ other.keys())[0]} was not quantized in both runs")
    differing = sum(int((one[name] != other[name]).sum()) for name in one)
    return differing / sum(int(codes.numel()) for codes in one.values())


def measure(package: Path, threads: int, words: Sequence[str], output: Path) -> Run:
    """Quantize with the package of a checkout.

    Raises:
        RuntimeError: It failed; its last lines.
    """
    result = output.with_suffix(".json")
    given = [*words, "--threads", str(threads), "-o", str(output), "--quiet"]
    environment = package_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(package / ".pkg"), environment["PYTHONPATH"]])
    command = [sys.executable, "-c", _START, __file__, _CHILD, str(result), *given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"quantize with {package}: {done.stderr[-2000:]}")
    weights = sum(codes.numel() for codes in codes_of(output).values())
    return Run(package.name, threads, json.loads(result.read_text()), weights)


def table(runs: Sequence[Run]) -> str:
    """Return seconds by stage, and per million weights in all, as Markdown."""
    heads = [f"{run.version}, {run.threads} thread{'s' * (run.threads > 1)}" for run in runs]
    lines = [f"| CPU seconds | {' | '.join(heads)} |", "|---" * (len(runs) + 1) + "|"]
    rows = {stage: [f"{run.seconds[stage]:.1f}" for run in runs] for stage in runs[0].seconds}
    rows["all"] = [f"{sum(run.seconds.values()):.1f}" for run in runs]
    rows["per million weights"] = [f"{sum(run.seconds.values()) / run.weights * 1e6:.2f}" for run in runs]
    rows["codes that differ from the first run's"] = [f"{run.changed:.2%}" for run in runs]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print a table."""
    words = list(sys.argv[1:] if words is None else words)
    if words[:1] == [_CHILD]:
        return child(words[2:], Path(words[1]))
    own, options = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True, metavar="FILE")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the model that are kept")
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="checkouts of other versions, run before")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new folder for models and runs.json")
    parser.epilog = "What follows -- are flags of quantize; without, its defaults hold."
    given = parser.parse_args(own)
    given.output.mkdir(parents=True)
    cut(given.model, given.blocks, given.output / "model")
    versions = [*(path.resolve() for path in given.beside), Path(__file__).parents[2]]
    flags = [str(given.output / "model"), "--calib", given.calib, *options]
    runs: list[Run] = []
    first: dict[str, Any] = {}
    for turn in range(given.turns):
        for threads in given.threads:
            for number, package in enumerate(versions):
                output = given.output / f"{turn}-{threads}-{number}"
                run = measure(package, threads, flags, output)
                first = first or codes_of(output)
                runs.append(replace(run, changed=changed(first, codes_of(output))))
                print(json.dumps(asdict(runs[-1])), file=sys.stderr)
                (given.output / "runs.json").write_text(json.dumps([asdict(run) for run in runs], indent=1))
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
