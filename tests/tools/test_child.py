"""Modules in child processes: what goes in and out, what is measured, and that none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankbook.calibration.memory import peak_rss_bytes
from rankbook.tools import child
from rankbook.tools.child import Finished, run_module
from rankbook.tools.errors import CheckFailedError


def run(folder: Path, code: str, **more: object) -> Finished:
    """Run code as a module of its own."""
    (folder / "child_module.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return run_module("child_module", environment=environment, **more)  # type: ignore[arg-type]


def test_json_goes_in_and_out(tmp_path: Path) -> None:
    code = """
import sys
from rankbook.tools import child
request = child.request()
print("{not json")
child.say({"progress": 0.5, "phase": "half"})
print("loading", file=sys.stderr)
child.say({"twice": 2 * request["x"], "arguments": sys.argv[1:]})
print("bye")
"""
    seen: list[tuple[float, str | None]] = []
    done = run(tmp_path, code, request={"x": 3}, arguments=["a b"], progress=lambda *event: seen.append(event))
    assert done.report == {"twice": 6, "arguments": ["a b"]}
    assert seen == [(0.5, "half")]
    assert (done.code, done.message) == (0, "loading")


def test_a_report_may_have_many_lines(tmp_path: Path) -> None:
    code = "import json\nprint(json.dumps({'a': {'b': [1, {'c': 2}]}}, indent=2))"
    assert run(tmp_path, code).report == {"a": {"b": [1, {"c": 2}]}}


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    done = run(tmp_path, "import sys; print('it broke', file=sys.stderr); sys.exit(3)", log=log)
    assert (done.code, done.report) == (3, None)
    assert done.message.endswith("it broke")
    assert log.read_text().startswith("before\n")


def test_memory_and_time_are_those_of_the_child(tmp_path: Path) -> None:
    """This process is larger than the child; what Linux tells a parent of its child would begin with its own size."""
    held = b"x" * (600 << 20)
    done = run(tmp_path, "import time\nx = b'x' * (200 << 20)\nwhile time.process_time() < 0.2: pass")
    assert peak_rss_bytes() > len(held)
    assert 200 << 20 < done.peak_rss_bytes < 400 << 20
    assert done.cpu_seconds >= 0.19  # the kernel counts in steps of 10 ms
    assert done.seconds > 0


def test_memory_of_its_own_children_counts(tmp_path: Path) -> None:
    code = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', \"x = b'x' * (300 << 20)\"], check=True)"
    assert run(tmp_path, code).peak_rss_bytes > 300 << 20


def test_too_much_output_ends_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "MOST_OUTPUT_BYTES", 1000)
    with pytest.raises(CheckFailedError, match="printed more than"):
        run(tmp_path, "while True: print('x' * 100)")


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def ends(pid: int) -> bool:
    """Wait until a process is gone."""
    for _ in range(200):
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False


SLEEPER = """
import os, subprocess, sys, time
from rankbook.tools import child
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
child.say({"progress": 0.0, "phase": f"{os.getpid()} {inner.pid}"})
time.sleep(600)
"""


def test_an_interrupt_ends_the_child_and_what_it_started(tmp_path: Path) -> None:
    pids: list[int] = []

    def interrupt(_: float, phase: str | None) -> None:
        pids.extend(map(int, str(phase).split()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, SLEEPER, progress=interrupt)
    assert len(pids) == 2
    assert all(map(ends, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a child that its parent ended")
def test_a_killed_parent_takes_its_child_along_and_what_that_started(tmp_path: Path) -> None:
    (tmp_path / "child_module.py").write_text(SLEEPER)
    code = (
        "import os, signal, sys\nfrom rankbook.tools.child import run_module\n"
        "def stop(_, phase):\n    print(phase, flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "run_module('child_module', progress=stop)"
    )
    environment = child.package_environment({**os.environ, "PYTHONPATH": str(tmp_path)})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    first, second = map(int, done.stdout.split())
    assert ends(first)
    assert ends(second)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a child that its parent ended")
def test_a_child_that_is_killed_takes_along_what_it_started(tmp_path: Path) -> None:
    """A builder that crashes leaves no compiler behind."""
    pids: list[int] = []

    def kill(_: float, phase: str | None) -> None:
        pids.extend(map(int, str(phase).split()))
        os.kill(pids[0], signal.SIGKILL)

    assert run(tmp_path, SLEEPER, progress=kill).code == -signal.SIGKILL
    assert all(map(ends, pids))


def test_no_process_is_left_after_a_usual_end(tmp_path: Path) -> None:
    done = run(tmp_path, "import os\nfrom rankbook.tools import child\nchild.say({'group': os.getpgid(0)})")
    with pytest.raises(ProcessLookupError):
        os.killpg(done.report["group"], 0)
