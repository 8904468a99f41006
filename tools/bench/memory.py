"""The memory of a model, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rankbook.tools.bench.subject import ModelSubject, random_tokens
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
    command = [sys.executable, "-m", "rankbook.tools.bench.memory", str(subject.path), subject.runtime]
    done = subprocess.run([*command, str(threads or 0)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckFailedError(f"measuring the memory of {subject.name} failed: {done.stderr.strip()[-500:]}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def _most_resident() -> int:
    """Largest resident memory of this process in bytes; getrusage would count the process that started this one."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise CheckFailedError("/proc/self/status has no VmHWM: memory cannot be measured here")


def _main(arguments: Sequence[str]) -> None:
    """Print the `Memory` of this process as JSON: the other half of `measure_memory`."""
    path, runtime, threads = arguments
    subject = ModelSubject(Path(path), runtime)
    subject.prepare()
    tokens = random_tokens(_PROMPT)
    baseline = _most_resident()
    model = subject.open(Setting(int(threads) or None, _PROMPT + _STEPS + 1, shared=False))
    scores = model.start(tokens)
    for _ in range(_STEPS):
        scores = model.step(int(scores.argmax()))
    print(json.dumps(asdict(Memory(model.file_bytes, _most_resident(), baseline))))


if __name__ == "__main__":
    _main(sys.argv[1:])
