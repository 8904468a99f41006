"""Rows of an engine, over the stand-in of TensorRT: each text is what it is in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankbook.tools.deploy.options import BuildOptions
from rankbook.tools.errors import UsageError
from rankbook.tools.runtimes import open_model
from rankbook.tools.serve.engine_slots import EngineSlots
from rankbook.tools.serve.slots import OrtSlots, Slots, slots_of
from tests import tensorrt_stand_in as stand_in
from tests.tensorrt_stand_in import State
from tests.tiny import tiny_model, write_text
from tests.tools.files import run_cli

CONTEXT = 64
LIBRARIES = {"tensorrt": "trt", "tensorrt_rtx": "rtx"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint ``q`` and its file with a cache of a fixed length."""
    folder = tmp_path_factory.mktemp("rows")
    tiny_model("llama", folder / "model")
    write_text(folder / "text.txt")
    assert run_cli("quantize", folder / "model", "--method", "rtn", "--bits", 4, "-o", folder / "q", "--quiet") == 0
    how = ["--graph", "static", "--max-context", CONTEXT, "--quiet"]
    assert run_cli("export", folder / "q", "-o", folder / "static", *how) == 0
    return folder


@pytest.fixture(params=LIBRARIES)
def state(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> State:
    return stand_in.install(monkeypatch, request.param)


def build(state: State, source: Path, output: Path, **more: Any) -> Path:
    options = BuildOptions(target=LIBRARIES[state.module.__name__], max_sequence=8, **{"max_batch": 3, **more})
    return stand_in.build(state, source, output, options)


def texts(slots: Slots) -> list[np.ndarray[Any, Any]]:
    """Fill rows in turns, step some of them, leave one and fill it anew; return every row of logits."""
    tokens = np.random.default_rng(0).integers(0, 256, 40)
    found = [slots.extend(0, tokens[:19])]  # three pieces of at most 8
    found += [slots.extend(2, tokens[20:25])]
    found += slots.step({0: 1, 2: 2}).values()  # row 1 is idle between them
    found += [slots.extend(1, tokens[30:33])]
    found += slots.step({0: 3, 1: 4, 2: 5}).values()
    slots.clear(0)
    found += [slots.extend(0, tokens[33:36])]
    found += slots.step({0: 6}).values()
    found += slots.step({0: 7, 1: 8, 2: 9}).values()
    assert [slots.length(row) for row in range(3)] == [5, 5, 8]
    return found


def test_rows_of_an_engine_are_those_of_onnx_runtime(work: Path, tmp_path: Path, state: State) -> None:
    engine = slots_of(open_model(build(state, work / "static", tmp_path / "engine")), 3)
    file = slots_of(open_model(work / "static", "bodies"), 3)
    assert isinstance(engine, EngineSlots)
    assert isinstance(file, OrtSlots)
    for one, other in zip(texts(engine), texts(file), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_rows_do_not_see_each_other(work: Path) -> None:
    alone, many = (slots_of(open_model(work / "static", "bodies"), count) for count in (1, 3))
    tokens = np.arange(20)
    many.extend(0, tokens[5:])
    many.extend(2, tokens[:9])
    np.testing.assert_allclose(many.extend(1, tokens), alone.extend(0, tokens), atol=1e-5)
    np.testing.assert_allclose(many.step({0: 1, 1: 2, 2: 3})[1], alone.step({0: 2})[0], atol=1e-5)


def test_a_row_that_is_full_is_refused(work: Path) -> None:
    slots, same = (slots_of(open_model(work / "static", "bodies"), 2) for _ in range(2))
    for held in (slots, same):
        held.extend(0, np.arange(CONTEXT - 2))
        held.extend(1, np.arange(3))
    with pytest.raises(UsageError, match=rf"row 0 holds 62 tokens and was given 3 more; a row has {CONTEXT} positions"):
        slots.extend(0, np.arange(3))
    for token in (4, 5):
        found, want = (held.step({0: token, 1: token}) for held in (slots, same))
        np.testing.assert_array_equal(found[0], want[0])
    with pytest.raises(UsageError, match="row 0 holds 64 tokens and was given 1 more"):
        slots.step({0: 6, 1: 6})
    assert [slots.length(row) for row in range(2)] == [CONTEXT, 5]
    np.testing.assert_array_equal(slots.step({1: 7})[1], same.step({1: 7})[1])


@pytest.mark.parametrize("kind", ["file", "engine"])
def test_a_row_that_held_nan_is_clean_for_the_next_text(
    kind: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask multiplies what it hides by 0, which leaves NaN; the row beside it goes on meanwhile."""
    if kind == "file":
        slots = slots_of(open_model(work / "static", "bodies"), 2)
        assert isinstance(slots, OrtSlots)
        caches = [*slots._cache.values()]
    else:
        state = stand_in.install(monkeypatch)
        slots = slots_of(open_model(build(state, work / "static", tmp_path / "engine")), 2)
        assert isinstance(slots, EngineSlots)
        regions: list[Any] = [slots._model.engine.region(name) for name in slots._model.caches]
        caches = [region.array.view(np.float32).reshape(3, -1) for region in regions]
    want = slots.extend(1, np.arange(9)), slots.step({1: 1})[1]
    slots.clear(1)
    other = slots.extend(0, np.arange(5))
    slots.extend(1, np.arange(40))
    for cache in caches:
        cache[1] = np.nan
    assert np.isnan(slots.step({1: 2})[1]).all()
    slots.clear(1)
    np.testing.assert_array_equal(slots.extend(1, np.arange(9)), want[0])
    np.testing.assert_array_equal(slots.step({0: 3, 1: 1})[1], want[1])
    slots.clear(0)
    np.testing.assert_array_equal(slots.extend(0, np.arange(5)), other)


def test_engines_that_cannot_be_served_say_what_would(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = stand_in.install(monkeypatch)
    small = open_model(build(state, work / "static", tmp_path / "small", max_batch=1))
    with pytest.raises(
        UsageError, match="at most 1 sequences at the same time, and 2 were asked for; build it with --max-batch 2"
    ):
        slots_of(small, 2)
    with pytest.raises(UsageError, match="cannot be served; export it"):
        slots_of(open_model(work / "q"), 2)
