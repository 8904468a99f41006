"""Compact parameters: what they decode to, that they are what is stored, and that operators get them decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rankbook.calibration.checkpoint.format import CheckpointError, CheckpointParts, open_checkpoint, write_checkpoint
from rankbook.calibration.hf import _check_values
from rankbook.calibration.imports.run import import_model
from rankbook.calibration.model import packed_ops
from rankbook.calibration.model.packed_modules import CodebookEmbedding, CodebookLinear
from rankbook.calibration.record.compact import widened
from rankbook.calibration.record.group_params import GroupParams
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.plugins.forms import Form
from rankbook.plugins.layer_spec import LayerSpec
from tests.calibration.imports import writers


def record(compact: str, rows: int = 40) -> QuantizedLinear:
    """Return a random record of 64 inputs with compact parameters."""
    draw = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (rows, 64), generator=draw).to(torch.uint8)
    levels = torch.arange(16).to(torch.int8)[None]
    if compact == "zeros":
        points = torch.randint(0, 16, (rows, 4, 1), generator=draw).to(torch.int8)
        scales = (torch.rand(rows, 4, 1, generator=draw) + 0.1).half()
        params = GroupParams(points, values=scales, compact=compact)
        return QuantizedLinear(codes, 4, levels, params, has_offset=True)
    scales = (torch.rand(rows, 4, 1, generator=draw) * 400 + 1).to(torch.float8_e4m3fn)
    step = torch.tensor([[0.3], [0.7]])
    params = GroupParams(scales.view(torch.int8), step, torch.zeros(2, 1), compact=compact)
    return QuantizedLinear(codes, 4, levels, params, has_offset=False)


@pytest.mark.parametrize("compact", ["zeros", "e4m3"])
def test_what_is_stored_decodes_to_what_operators_take(compact: str) -> None:
    made = record(compact)
    spec, packed = made.spec(), made.pack()
    spec.check(packed)
    assert LayerSpec.from_json("x", spec.to_json()) == spec
    again = QuantizedLinear.unpack(packed, spec)
    assert torch.equal(again.weight(), made.weight())
    assert {name: tensor.tolist() for name, tensor in again.pack().items()} == {
        k: t.tolist() for k, t in packed.items()
    }
    wide = widened(packed, spec)
    spec.wide().check(wide)
    assert spec.params is spec.wide().params is Form.FLOAT32
    assert torch.equal(QuantizedLinear.unpack(wide, spec.wide()).weight(), made.weight())
    stacked = widened({name: torch.stack([tensor, tensor]) for name, tensor in packed.items()}, spec)
    assert all(torch.equal(stacked[name][1], wide[name]) for name in ("params", "step", "base"))
    constants = packed_ops.constants(spec, packed)
    assert {name: tuple(tensor.shape) for name, tensor in constants.items() if name != "bias"} == {
        name: tensor.shape for name, tensor in spec.constants().items() if name != "bias"
    }
    assert torch.equal(made.params.planes(0, 1).dense(), made.params.dense()[..., :1])
    assert torch.equal(GroupParams.joined([made.params, made.params]).dense()[..., -1:], made.params.dense()[..., -1:])


def test_the_weight_is_scale_times_code_less_zero() -> None:
    made = record("zeros")
    assert made.params.values is not None
    assert made.params.codes is not None
    scales, points = (
        each[..., 0].double().repeat_interleave(16, 1) for each in (made.params.values, made.params.codes)
    )
    assert np.array_equal(made.weight().double(), (scales * (made.codes.double() - points)).float().double())


@pytest.mark.parametrize("compact", ["zeros", "e4m3"])
def test_rows_of_an_embedding_are_those_of_the_weight(compact: str) -> None:
    made = record(compact)
    ids = torch.tensor([39, 0, 33])
    assert torch.equal(CodebookEmbedding.from_record(made)(ids), made.weight()[ids])


def test_bits_are_those_of_what_is_stored() -> None:
    zeros, scales = record("zeros", 64).spec().stored_bits(), record("e4m3", 64).spec().stored_bits()
    assert (zeros["params"], zeros["step"]) == (64 * 4 * 8, 64 * 4 * 16)
    assert (scales["params"], scales["step"]) == (64 * 4 * 8, 2 * 32)


def test_entries_that_contradict_themselves_are_refused() -> None:
    entry = record("zeros").spec().to_json()
    for change in ({"compact": "e4m3"}, {"compact": "more"}, {"param_bits": 16}):
        with pytest.raises(ValueError, match="compact is"):
            LayerSpec.from_json("x", {**entry, **change})
    with pytest.raises(ValueError, match=r"zero points have shape \(4, 1, 1\) and scales \(4, 2, 1\)"):
        GroupParams(torch.ones(4, 1, 1).to(torch.int8), values=torch.ones(4, 2, 1).half(), compact="zeros")
    with pytest.raises(ValueError, match="NaN or infinity"):
        GroupParams(torch.full((1, 1, 1), 127, dtype=torch.int8), torch.ones(1, 1), torch.zeros(1, 1), compact="e4m3")


def test_an_exporter_reads_wide_parameters(tmp_path: Path) -> None:
    import_model(writers.FIXTURES / "awq", tmp_path / "q")
    stored = open_checkpoint(tmp_path / "q")
    seen = stored.for_operators()
    name = next(name for name, spec in stored.layers.items() if spec.compact)
    tensors = {part: seen.part(name, part) for part in seen.layers[name].tensors()}
    seen.layers[name].check(tensors)
    assert torch.equal(QuantizedLinear.unpack(tensors, seen.layers[name]).weight(), stored.record(name).weight())
    assert seen.layers[name].bits_per_weight() > stored.layers[name].bits_per_weight()


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [("params", 127, "NaN or infinity"), ("step", 1e38, "NaN or infinity"), ("base", 1.0, "must hold 0")],
)
def test_scales_that_are_no_numbers_are_refused_by_every_reader(
    part: str, value: float, message: str, tmp_path: Path
) -> None:
    """Codes of E4M3 are int8 and each of two factors is finite: only what is made of them tells."""
    made = record("e4m3")
    tensors = made.pack()
    tensors[part].view(-1)[0] = value
    write_checkpoint(
        tmp_path / "q",
        CheckpointParts({}, {"a": made.spec()}, {f"a.{name}": tensor for name, tensor in tensors.items()}, {}),
    )
    seen = open_checkpoint(tmp_path / "q").for_operators()
    with pytest.raises(CheckpointError, match=message):
        seen.part("a", "step")
    module = CodebookLinear(made.spec(), made.pack())
    module.get_buffer(part).view(-1)[0] = value
    with pytest.raises(CheckpointError, match=message):
        _check_values("a", module)
