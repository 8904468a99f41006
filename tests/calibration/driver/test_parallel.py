"""Blocks that are solved with what the original model gives: each as if those before it had not been quantized."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rankbook.calibration.checkpoint.format import load_records
from rankbook.calibration.device import DeviceError
from rankbook.calibration.driver.block import Site
from rankbook.calibration.driver.cluster import Cluster
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.parallel import BlockTask
from rankbook.calibration.driver.report import Progress, Reporter
from rankbook.calibration.driver.resume import BlockResult
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.driver.solve import InProcess
from rankbook.calibration.methods import METHODS
from rankbook.calibration.model import capture
from rankbook.calibration.model.calls import BlockCall
from rankbook.calibration.model.placement import Placement
from tests.calibration import toy_method
from tests.calibration.runs import files, options
from tests.tiny import tiny_model

RUNS: dict[str, dict[str, Any]] = {
    "closed form": {"method": "gptq", "scale_inputs": "awq"},
    "training, rounded inputs": {
        **{"method": "lcq", "rank": 1, "activations": "static8"},
        "method_options": {"steps": 2, "compute": "float32"},
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_block_does_not_see_what_became_of_those_before_it(name: str, tmp_path: Path) -> None:
    """Where the first block is not quantized, what enters the second is the same in any order."""
    tiny_model("llama", tmp_path / "model")
    chosen = {"bits": 2, **RUNS[name]}
    skipped = options(tmp_path, rules=("*.layers.0.*: skip",), allow_partial=True, **chosen)
    quantize_model(tmp_path / "model", tmp_path / "alone", skipped)
    quantize_model(tmp_path / "model", tmp_path / "sequential", options(tmp_path, **chosen))
    quantize_model(tmp_path / "model", tmp_path / "parallel", options(tmp_path, order="parallel", **chosen))
    alone, after, beside = (load_records(tmp_path / way) for way in ("alone", "sequential", "parallel"))
    assert alone
    assert alone.keys() < beside.keys() == after.keys()
    for layer, record in beside.items():
        wanted = alone[layer] if layer in alone else after[layer]  # the first block is the same in both orders
        assert torch.equal(record.codes, wanted.codes), layer
        assert torch.equal(record.weight(with_low_rank=True), wanted.weight(with_low_rank=True)), layer
    assert any(not torch.equal(after[layer].codes, alone[layer].codes) for layer in alone), "no order would matter"


def test_an_interrupted_run_goes_on_with_the_blocks_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "trained-toy", toy_method.TRAINED_TOY)
    tiny_model("gemma2", tmp_path / "model", num_hidden_layers=4)
    chosen = options(tmp_path, order="parallel")
    quantize_model(tmp_path / "model", tmp_path / "whole", chosen)

    def stop(step: Progress) -> None:
        if step.stage == "training" and step.block == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(tmp_path / "model", tmp_path / "out", chosen, progress=stop)
    (tmp_path / ".out.partial" / "block-00001.safetensors").unlink()  # blocks of a cluster are finished in any order
    solved: list[str] = []
    quantize_model(
        tmp_path / "model", tmp_path / "out", chosen, resume=True, progress=lambda step: solved.append(step.stage)
    )
    assert [stage for stage in solved if stage.startswith("solved")] == ["solved block 1", "solved block 3"]
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_the_original_model_runs_no_further_than_the_last_block_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama", tmp_path / "model", num_hidden_layers=3)
    chosen = options(tmp_path, method="gptq", order="parallel")
    passed: list[str] = []
    advance = capture.advance

    def watched(*args: Any) -> None:
        passed.append(args[3])
        advance(*args)

    monkeypatch.setattr(capture, "advance", watched)
    shares: list[int] = []

    def shared(placement: Placement, streams: int) -> Placement:
        shares.append(streams)
        return placement

    monkeypatch.setattr(Placement, "shared", shared)

    def stop(step: Progress) -> None:
        if step.stage == "solved block 2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(tmp_path / "model", tmp_path / "out", chosen, progress=stop)
    assert len(passed) == 3
    assert set(shares) == {3}, "what enters the model, and what enters and leaves the present block"
    (tmp_path / ".out.partial" / "block-00001.safetensors").unlink()
    quantize_model(tmp_path / "model", tmp_path / "out", chosen, resume=True)
    assert [name.split()[1] for name in passed[3:]] == ["model.layers.0", "model.layers.1"]


def tasks(count: int) -> Iterator[BlockTask]:
    """Blocks that do nothing; what leaves one enters the next."""
    inputs, call, options = torch.zeros(1, 2, 3), BlockCall((), {}, frozenset()), QuantizeOptions(method="rtn")
    for index in range(count):
        targets = inputs + 1
        site = Site(index, f"blocks.{index}.", nn.Identity(), ())
        yield BlockTask(site, call, inputs, targets, options, torch.float32, {}, Reporter(count))
        inputs = targets


def test_a_device_without_memory_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def solved(_task: BlockTask, _placement: Placement) -> BlockResult:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(BlockTask, "solved", solved)
    with pytest.raises(DeviceError, match=r"does not suffice for blocks\.0: .* --resume to go on at this block"):
        next(InProcess((torch.device("cpu"),)).solve_blocks(tasks(1)))


def fake_ray(results: Iterator[object], sent: list[torch.Tensor] | None = None) -> SimpleNamespace:
    """Return a Ray whose tasks are done at once; what a task gives is made, or raised, when it is asked for."""

    def get(_: object) -> tuple[object, list[str]]:
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result, []

    function = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: object()))
    return SimpleNamespace(
        put=(sent if sent is not None else []).append,
        remote=lambda _: function,
        wait=lambda running, num_returns, timeout=None: (running[:num_returns], running[num_returns:]),
        get=get,
        cancel=lambda *_, **__: None,
        exceptions=SimpleNamespace(RayTaskError=OSError, RayError=OSError),
    )


def test_a_stream_is_sent_to_the_cluster_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets of a block are the inputs of the next one."""
    sent: list[torch.Tensor] = []
    monkeypatch.setitem(sys.modules, "ray", fake_ray(itertools.repeat(BlockResult({}, {})), sent))
    found = list(Cluster("local:1", 1, 1, 0.0, "cpu", 1).solve_blocks(tasks(3)))
    assert [index for index, _ in found] == [0, 1, 2]
    assert [float(values.max()) for values in sent] == [0, 1, 2, 3]


@pytest.mark.parametrize("failing", ["a block", "the original model"])
def test_blocks_that_are_done_are_kept_though_one_fails(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = BlockResult({}, {}), ValueError("the weights hold NaN")

    def given() -> Iterator[BlockTask]:
        yield from tasks(3)
        if failing == "the original model":
            raise bad

    results = [bad, good, good] if failing == "a block" else [good] * 3
    monkeypatch.setitem(sys.modules, "ray", fake_ray(iter(results)))
    blocks = Cluster("local:3", 1, 3, 0.0, "cpu", 1).solve_blocks(given())
    found: list[int] = []
    with pytest.raises(ValueError, match="hold NaN"):
        found.extend(index for index, _ in blocks)
    assert found == ([1, 2] if failing == "a block" else [0, 1, 2])
