"""How tensors, weights and statistics travel to the workers of a cluster and back."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from rankbook.calibration.device import DeviceError
from rankbook.calibration.driver import worker
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.loading import load_model
from rankbook.calibration.model.placement import in_float32
from rankbook.calibration.notes import note
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).view(2, 3, 4),
        torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
        torch.randn(6, 8).to(torch.bfloat16)[:, 2:5].T,
        torch.zeros(()).expand(5, 5),
        torch.tensor([[True, False]]),
        torch.tensor(3),
        torch.empty(0, 4),
        torch.ones(1, 7)[:, ::3],
    ],
)
def test_tensors_arrive_as_they_lie_in_memory(tensor: torch.Tensor) -> None:
    sent = worker._to_array(tensor)
    assert sent[0].nbytes <= max(tensor.nbytes, tensor.element_size())
    arrived = worker._from_array(sent)
    assert arrived.dtype == tensor.dtype
    assert torch.equal(arrived, tensor)
    orders = [sorted(range(t.ndim), key=lambda axis, t=t: -t.stride(axis)) for t in (arrived, tensor)]  # type: ignore[misc]
    assert orders[0] == orders[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [True, False])
def test_weights_arrive_whole_and_may_be_written_to(dtype: torch.dtype, exact: bool) -> None:
    """Half as much travels where 16 bits hold them; what was sent is read-only memory, so what arrives is a copy."""
    values = torch.randn(64, 48).to(torch.bfloat16) if exact else torch.randn(64, 48)
    parameter = nn.Parameter(values.to(dtype).T, requires_grad=False)
    sent = worker._from_parameter(parameter)
    assert sent[0][0].nbytes == parameter.numel() * (2 if exact or dtype == torch.bfloat16 else 4)
    sent[0][0].setflags(write=False)
    arrived = worker._to_parameter(sent)
    assert (arrived.dtype, arrived.requires_grad) == (dtype, False)
    assert torch.equal(arrived, parameter)
    assert arrived.stride() == parameter.stride()
    arrived.data += 1


def test_small_tensors_may_be_written_to() -> None:
    sent = worker._to_array(torch.arange(8.0))
    sent[0].setflags(write=False)
    worker._from_array(sent).add_(1)


def test_a_task_that_is_no_half_is_sent_as_it_is() -> None:
    for values in (torch.tensor([1, 2]), torch.tensor([0.1]), torch.tensor([0.1], dtype=torch.bfloat16)):
        assert worker.narrow(values) is values
    assert worker.narrow(torch.tensor([0.5])).dtype == torch.bfloat16
    assert worker.narrow(torch.tensor([1 + 2**-10])).dtype == torch.float16


def test_a_worker_sends_its_notes_and_says_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "send_tensors_as_arrays", lambda: None)
    setting = worker.Setting("cpu", torch.get_num_threads())
    with worker._working(setting, "a layer") as (device, notes):
        note("something")
    assert (device, notes) == (torch.device("cpu"), ["something"])
    with (
        pytest.raises(DeviceError, match=r"memory of a worker's cpu does not suffice for a layer; give more"),
        worker._working(setting, "a layer"),
    ):
        raise torch.OutOfMemoryError


def test_a_block_is_read_from_the_files_of_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_read", [])
    tiny_model("llama", tmp_path / "model")
    model, _ = load_model(tmp_path / "model")
    block = adapter_of(model).blocks().modules[1]
    files = worker.Files(str(tmp_path / "model"), QuantizeOptions(method="rtn"))
    with in_float32(block):
        sent = files.block(1, block)
    found = sent.read()
    assert all(torch.equal(one, other) for one, other in zip(found.parameters(), block.parameters(), strict=True))
    next(found.parameters()).data += 1  # a copy: the next task that wants the block gets it as it is in the file
    assert worker.digest(sent.read()) == sent.digest
    with pytest.raises(DeviceError, match=r"other weights at .* give --cluster-weights store"):
        replace(sent, index=0).read()
    with pytest.raises(DeviceError, match=r"cannot read the weights of .*nowhere .* give --cluster-weights store"):
        replace(sent, files=replace(files, source=str(tmp_path / "nowhere"))).read()


def test_buffers_of_a_file_belong_to_what_a_worker_compares() -> None:
    def block(bias: float, inverse: float) -> torch.nn.Module:
        router = torch.nn.Linear(2, 2)
        torch.nn.init.ones_(router.weight)
        torch.nn.init.zeros_(router.bias)
        router.register_buffer("e_score_correction_bias", torch.tensor([bias]))
        router.register_buffer("inv_freq", torch.tensor([inverse]), persistent=False)
        return router

    assert worker.digest(block(0.0, 1.0)) != worker.digest(block(0.5, 1.0))
    assert worker.digest(block(0.5, 1.0)) == worker.digest(block(0.5, 2.0)), "it follows from the configuration"
    assert worker.digest(block(0.5, 1.0)) == worker.digest(block(0.5, 1.0).to(torch.bfloat16))


def test_a_worker_reads_files_again_that_were_replaced_or_are_wanted_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It outlives a run where its process stays connected to the cluster."""
    monkeypatch.setattr(worker, "_read", [])
    files = worker.Files(str(tmp_path / "model"), QuantizeOptions(method="rtn"))
    for seed in range(2):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        tiny_model("llama", tmp_path / "model", seed=seed)
        model, _ = load_model(tmp_path / "model")
        sent = files.block(0, adapter_of(model).blocks().modules[0])
        assert worker.digest(sent.read()) == sent.digest
    same, other = replace(files), replace(files, options=QuantizeOptions(method="rtn", bits=3))
    assert worker._blocks(same) is worker._blocks(files)
    assert worker._blocks(other) is not worker._blocks(files)  # options decide which layers are taken apart
