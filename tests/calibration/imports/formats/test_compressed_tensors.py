"""Layouts of compressed-tensors: packed and plain integers, FP8 with one scale, those of rows and those of blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankbook.calibration.imports.base import ImportRefusedError
from rankbook.calibration.imports.formats.compressed_tensors import check, numbers
from rankbook.calibration.notes import Note
from tests.calibration.imports import writers

INT4 = {"config_groups": {"g": {"weights": {"num_bits": 4}}}}
SIZES = st.tuples(st.integers(1, 3).map(lambda n: 8 * n), st.integers(1, 3).map(lambda n: 32 * n))


@given(shape=SIZES, bits=st.integers(2, 8), group=st.sampled_from([16, 32]), seed=st.integers(0, 99))
def test_packed_integers_keep_their_weight(shape: tuple[int, int], bits: int, group: int, seed: int) -> None:
    layer = writers.random_layer(shape, bits, group, seed)
    assert torch.equal(numbers(writers.compressed(layer), {}).record().weight().double(), layer.weight())


@given(shape=SIZES, seed=st.integers(0, 99), symmetric=st.booleans())
def test_plain_integers_keep_their_weight(shape: tuple[int, int], seed: int, symmetric: bool) -> None:
    layer = writers.random_layer(shape, 8, shape[1], seed, symmetric=symmetric)
    parts = {"weight": (layer.codes.short() - 128).to(torch.int8), "weight_scale": layer.scales}
    if not symmetric:
        parts["weight_zero_point"] = (layer.zeros - 128).to(torch.int8)
    record = numbers(parts, {}).record()
    assert torch.equal(record.weight().double(), layer.weight())
    assert record.has_offset != symmetric


def test_fp8_has_scales_of_rows_or_blocks() -> None:
    parts, weight = writers.random_fp8((24, 96), 1, block=32)
    entry = {"config_groups": {"g": {"weights": {"block_structure": [32, 32]}}}}
    blocks = {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"]}
    assert torch.equal(numbers(blocks, entry).record().weight(), weight.float())
    rows = torch.rand(24, 1).bfloat16()
    found = numbers({"weight": parts["weight"], "weight_scale": rows}, {}).record()
    assert torch.equal(found.weight(), (parts["weight"].double() * rows).float())
    with pytest.raises(ImportRefusedError, match=r"scales \(1, 3\) are not those of a weight \(24, 96\)"):
        numbers(blocks, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_packed": None}, "neither weight_packed nor weight"),
        ({"weight_packed": torch.ones(8, 3, dtype=torch.int32)}, r"\(8, 3\) is no dense packing of 8 x 32"),
        ({"weight_packed": torch.ones(4, 4, dtype=torch.int32)}, r"\(4, 4\) is no dense packing of 8 x 32"),
        ({"weight_scale": torch.ones(6, 2)}, r"scales \(6, 2\) are not those of a weight \(8, 32\)"),
        ({"weight_packed": torch.ones(8, 4)}, "torch.float32.*not packed integers"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, torch.Tensor | None], message: str) -> None:
    parts = {**writers.compressed(writers.random_layer((8, 32), 4, 16, 0)), **change}
    with pytest.raises(ImportRefusedError, match=message):
        numbers({name: tensor for name, tensor in parts.items() if tensor is not None}, INT4)


def test_what_is_not_taken_over_is_said() -> None:
    with pytest.warns(Note, match="rounds its cache as well"):
        check({"format": "int-quantized", "config_groups": {"g": {}}, "kv_cache_scheme": {"num_bits": 8}})
