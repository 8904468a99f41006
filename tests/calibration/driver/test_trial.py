"""How long a run takes follows from one block, linearly in windows and training steps."""

from __future__ import annotations

import pytest

from rankbook.calibration.driver import trial
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.selection import select
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.placement import Placement
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("windows", "steps", "want", "calls"),
    [
        (0, 0, 2.0, [(0, 0)] * 2),
        (64, 0, 2 + 64 * 0.5, [(1, 0), (1, 0), (4, 0)]),
        (64, 100, 2 + 64 * 0.5 + 100 * 0.25, [(1, 1), (1, 1), (4, 1), (1, 4)]),
    ],
)
def test_times_are_extrapolated(windows: int, steps: int, want: float, calls: list[tuple[int, int]]) -> None:
    tried: list[tuple[int, int]] = []

    def seconds(few: int, little: int) -> float:
        tried.append((few, little))
        return 2 + 0.5 * few + 0.25 * little

    assert trial.extrapolated(seconds, windows, steps) == pytest.approx(want)
    assert tried == calls


def test_what_is_long_is_tried_once_less() -> None:
    tried: list[int] = []

    def seconds(few: int, _: int) -> float:
        tried.append(few)
        return 10.0

    assert trial.extrapolated(seconds, 8, 0) == 10.0
    assert tried == [1, 4]


@pytest.mark.parametrize(
    ("values", "runs"),
    [
        ({"method": "rtn"}, [(0, 0)]),
        ({"method": "gptq", "bits": 4}, [(1, 0), (4, 0)]),
        ({"method": "lcq", "rank": 1, "target_bits": 4.0}, [(1, 1), (4, 1), (1, 4)]),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_a_block_is_run_as_in_a_run(
    values: dict[str, object], runs: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks count, one is run, with the windows and the steps that were chosen; the budget is not spent."""
    adapter, found = adapter_of(tiny_model("llama")), []
    tried = trial._Trial.seconds

    def seconds(self: trial._Trial, windows: int, steps: int) -> float:
        found.append((windows, steps))
        assert tried(self, windows, steps) > 0
        return 7.0

    monkeypatch.setattr(trial._Trial, "seconds", seconds)
    options = QuantizeOptions(**values, calib_sequences=8, calib_length=16)  # type: ignore[arg-type]
    layers = select(adapter.model, adapter.blocks(), options).layers
    assert trial.seconds(adapter, layers, options, Placement()) == pytest.approx(14.0)
    assert found == runs
