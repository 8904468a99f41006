"""Sessions of the native library among threads, processes and each other; how the built files are hardened."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankbook.plugins import library
from tests.ops.cases import Array, Case
from tests.ops.runners import built, ort_session
from tests.plugins.merged_ops import draw_several, model_of
from tests.plugins.toolchain import ort_headers, output, required_tool

CASE = Case(bits=3, out_features=96, in_features=128, rank=4, bias=True, tokens=(2, 3))
ROOT = Path(__file__).resolve().parents[2]
CALLERS, SESSIONS, CALLS = 8, 16, 20


def subject(**entries: str) -> tuple[Any, Any]:
    """Return a session of a node of two products, and its input."""
    ops = draw_several(CASE, 2)
    return ort_session(model_of(ops), str(library.library("ort")), threads=2, **entries), {"x": ops[0].x}


def same(one: list[Array], other: list[Array]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@built
@pytest.mark.parametrize("activations", ["fp32", "int8"])
def test_one_session_gives_eight_threads_the_same_bits(activations: str) -> None:
    session, feeds = subject(activations=activations)
    scaled = [{"x": (feeds["x"] * (i + 1)).astype(np.float32)} for i in range(CALLERS)]  # each its own input
    wanted = [session.run(None, feed) for feed in scaled]
    with ThreadPoolExecutor(CALLERS) as pool:
        found = [list(pool.map(lambda feed: session.run(None, feed), scaled)) for _ in range(CALLS)]
    assert all(same(one, other) for results in found for one, other in zip(results, wanted, strict=True))


@built
def test_sessions_begin_run_and_end_beside_each_other() -> None:
    """Sixteen at once, each closed while the others run, with copies in huge pages and without."""
    first, feeds = subject()
    wanted, begin = first.run(None, feeds), threading.Barrier(SESSIONS)

    def live(index: int) -> bool:
        begin.wait()
        return all(
            same(subject(memory="mapped" if index % 2 else "huge")[0].run(None, feeds), wanted) for _ in range(3)
        )

    with ThreadPoolExecutor(SESSIONS) as pool:
        assert all(pool.map(live, range(SESSIONS)))
    assert same(first.run(None, feeds), wanted)


@built
def test_a_child_of_fork_opens_sessions_of_its_own() -> None:
    """What the library holds of its parent does not stop it: no lock, no thread that is not there any more."""
    code = """
import os, numpy as np
from tests.plugins.test_native_safety import same, subject
session, feeds = subject()
wanted = session.run(None, feeds)
child = os.fork()
if child == 0:
    os._exit(0 if same(subject()[0].run(None, feeds), wanted) else 7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert same(session.run(None, feeds), wanted)
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / '.pkg'}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


@built
def test_a_library_that_is_registered_twice_is_refused_and_harms_nobody() -> None:
    import onnxruntime as ort

    def twice() -> None:
        options = ort.SessionOptions()
        for _ in range(2):
            options.register_custom_ops_library(str(library.library("ort")))
        ort.InferenceSession(model_of(draw_several(CASE, 2)).SerializeToString(), options)

    session, feeds = subject()
    wanted = session.run(None, feeds)
    with pytest.raises(Exception, match=r"(?i)already|duplicate|registered"):
        twice()
    assert same(session.run(None, feeds), wanted)
    assert same(subject()[0].run(None, feeds), wanted)


@pytest.mark.parametrize("name", ["ort", "ort-cuda", "trt"])
def test_built_files_are_hardened(name: str) -> None:
    """Tables of addresses are read-only once it is loaded, no memory is both written and run, stacks are watched."""
    if reason := library.unavailable(name):
        pytest.skip(reason)
    path, readelf = library.library(name), required_tool("readelf")
    segments, dynamic = output(readelf, "-lW", path), output(readelf, "-dW", path)
    assert "GNU_RELRO" in segments
    assert re.search(r"GNU_STACK .* RW +0x", segments), "the stack may be run"
    assert not re.search(r"LOAD .* RWE ", segments), "memory is both written and run"
    assert re.search(r"FLAGS.*NOW", dynamic), "addresses are looked up late, so their table stays writable"
    assert "TEXTREL" not in dynamic
    symbols = output(required_tool("nm"), "-D", "--undefined-only", path)
    assert "__stack_chk_fail" in symbols, "stacks are not watched"
    if name != "trt":  # none of what that library calls has a form that checks sizes
        assert "__memcpy_chk" in symbols, "copies are not checked against the size of what they write to"


def test_files_of_a_release_are_compiled_with_every_check_of_sizes(tmp_path: Path) -> None:
    """A built file does not show the level of `_FORTIFY_SOURCE`; the commands that CMake makes do."""
    cmake, ninja = required_tool("cmake"), required_tool("ninja")
    command = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path), f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    headers = [f"-DONNXRUNTIME_INCLUDE_DIR={found}"] if (found := ort_headers()) else []
    output(*command, "-DRANKBOOK_CUDA=OFF", "-DRANKBOOK_KERNEL_CHECK=ON", *headers)
    built = (tmp_path / "build.ninja").read_text("utf-8")
    flags = re.findall(r"^build \S+\.o: .*\n(?:  (?!FLAGS).*\n)*  FLAGS = (.*)$", built, re.MULTILINE)
    assert len(flags) > 10
    for line in flags:
        assert "-U_FORTIFY_SOURCE" in line
        assert "-D_FORTIFY_SOURCE=3" in line
        assert "-fstack-protector-strong" in line
