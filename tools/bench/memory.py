"""The memory of a model, in a process of its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rankbook.calibration.memory import peak_rss_bytes
from rankbook.tools import child
from rankbook.tools.bench.subject import ModelSubject, random_tokens
from rankbook.tools.child import run_module
from rankbook.tools.errors import CheckFailedError
from rankbook.tools.runtimes import Setting

_PROMPT, _STEPS = 16, 4


@dataclass(frozen=True)
class Memory:
    """What a fresh process needed to open a model and decode.

    Attributes:
        file_bytes: The model and its external data.
        peak_rss: Largest resident memory, bytes; mapped files count.
        baseline_rss: The same before the model was opened: Python, its libraries, the description of the file.
    """

    file_bytes: int
    peak_rss: int
    baseline_rss: int

    @property
    def ratio(self) -> float:
        """What the model added to the process, in files; its cache of a few tokens is among it."""
        return (self.peak_rss - self.baseline_rss) / self.file_bytes


def measure_memory(subject: ModelSubject, threads: int | None) -> Memory:
    """Open the model and decode a few tokens in a fresh process.

    Raises:
        CheckFailedError: The process failed.
    """
    request = {"path": str(subject.path), "runtime": subject.runtime, "threads": threads}
    done = run_module("rankbook.tools.bench.memory", request=request)
    if done.code or done.report is None:
        raise CheckFailedError(f"measuring the memory of {subject.name} failed: {done.message[-500:]}")
    return Memory(**done.report)


def _main() -> None:
    """Report the `Memory` of this process: the other half of `measure_memory`."""
    given = child.request()
    subject = ModelSubject(Path(given["path"]), given["runtime"])
    subject.prepare()
    tokens = random_tokens(_PROMPT)
    baseline = peak_rss_bytes()
    model = subject.open(Setting(given["threads"], _PROMPT + _STEPS + 1))
    scores = model.start(tokens)
    for _ in range(_STEPS):
        scores = model.step(int(scores.argmax()))
    child.say(asdict(Memory(model.file_bytes, peak_rss_bytes(), baseline)))


if __name__ == "__main__":
    _main()
