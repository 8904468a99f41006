"""Constants are copied to huge pages where the system has them, counted, and given back with the session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from rankbook.plugins import library
from tests.ops.cases import WIDE
from tests.ops.runners import built

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
huge = pytest.mark.skipif(
    not HUGE.is_file() or "[never]" in HUGE.read_text("utf-8"), reason="the system has no transparent huge pages"
)


def session(model: onnx.ModelProto | Path, memory: str | None) -> Any:
    """Return a session with the library and this setting."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    if memory is not None:
        options.add_session_config_entry("rankbook.memory", memory)
    options.register_custom_ops_library(str(library.library("ort")))
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def copied() -> int:
    """Return the bytes that sessions hold as copies."""
    return int(library.native_info("ort")["copied_bytes"])


@built
@huge
def test_copies_are_counted_and_given_back() -> None:
    """The copy holds codes and params, each on a cache line; it ends with the session."""
    op = WIDE.draw(out_features=96, in_features=256)
    before = copied()
    held = session(op.model(), None)
    expected = sum(-(-op.inputs[name].nbytes // 64) * 64 for name in ("codes", "params"))
    assert copied() - before == expected
    del held
    assert copied() == before


@built
@pytest.mark.parametrize("param_bits", [8, 16, 32])
def test_the_same_bits_from_the_file_and_from_copies(tmp_path: Path, param_bits: int) -> None:
    """External data that is mapped, and dropped after the copy, reads as before for other sessions."""
    op = WIDE.draw(out_features=512, in_features=512, param_bits=param_bits)
    path = tmp_path / "model.onnx"
    onnx.save(op.model(), path, save_as_external_data=True, location="model.data", size_threshold=0)
    sessions = [session(path, memory) for memory in ("mapped", "huge", "mapped", "huge")]
    results = [one.run(None, {"x": op.inputs["x"]})[0] for one in sessions]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def resident(name: str) -> int:
    """Return the bytes of a mapped file that this process holds in memory."""
    sizes = {True: 0, False: 0}
    inside = False
    for line in Path("/proc/self/smaps").read_text("utf-8").splitlines():
        if not line.split()[0].endswith(":"):  # the line of a mapping, which may end with a name
            inside = line.endswith(name)
        elif line.startswith("Rss:"):
            sizes[inside] += 1024 * int(line.split()[1])
    return sizes[True]


@built
@huge
def test_a_file_is_not_held_twice(tmp_path: Path) -> None:
    """What was copied leaves memory even where the file has just been written; what a session reads in place stays."""
    op = WIDE.draw(out_features=1024, in_features=2048)
    path = tmp_path / "model.onnx"
    onnx.save(op.model(), path, save_as_external_data=True, location="model.data", size_threshold=0)
    held = [session(path, "huge")]
    assert resident("model.data") < 0.1 * op.inputs["codes"].nbytes
    held.append(session(path, "mapped"))
    held[-1].run(None, {"x": op.inputs["x"]})
    assert resident("model.data") > op.inputs["codes"].nbytes


@built
def test_mapped_copies_nothing() -> None:
    """With the entry, the bytes of the file are used where they are."""
    before = copied()
    held = session(WIDE.draw().model(), "mapped")
    assert copied() == before
    del held


@built
def test_unknown_memory_is_refused() -> None:
    """A typing error is an error."""
    with pytest.raises(Exception, match=r"rankbook\.memory must be huge or mapped"):
        session(WIDE.draw().model(), "big")
