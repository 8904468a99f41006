"""Layouts of GPTQ and AWQ: both versions of zero points, every width, both kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankbook.calibration.imports.base import ImportRefusedError
from rankbook.calibration.imports.formats import awq, gptq
from tests.calibration.imports import writers

SHAPES = st.tuples(st.integers(1, 2).map(lambda n: 32 * n), st.integers(1, 3).map(lambda n: 32 * n))


@given(shape=SHAPES, bits=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 99), less_one=st.booleans())
def test_gptq_keeps_its_weight(shape: tuple[int, int], bits: int, seed: int, less_one: bool) -> None:
    layer = writers.random_layer(shape, bits, 32, seed, symmetric=seed % 3 == 0)
    entry = {"checkpoint_format": "gptq" if less_one else "gptq_v2"}
    found = gptq.numbers(writers.gptq(layer, less_one=less_one), entry).record()
    assert torch.equal(found.weight().double(), layer.weight())


@given(shape=SHAPES, seed=st.integers(0, 99), version=st.sampled_from(["gemm", "gemv", "GEMM"]))
def test_awq_keeps_its_weight(shape: tuple[int, int], seed: int, version: str) -> None:
    layer = writers.random_layer(shape, 4, 32, seed)
    parts = writers.awq_gemv(layer) if version == "gemv" else writers.awq_gemm(layer)
    found = awq.numbers(parts, {"version": version, "group_size": 32}).record()
    assert torch.equal(found.weight().double(), layer.weight())


def test_bits_of_some_layers_may_be_others() -> None:
    layer = writers.random_layer((32, 64), 8, 32, 1, symmetric=False)
    parts = writers.gptq(layer, less_one=True)
    for entry in ({"dynamic": {"+:.*": {"bits": 8}, "-:lm_head": {}}}, {"extra_config": {"q_proj": {"bits": 8}}}, {}):
        found = gptq.numbers(parts, {"bits": 4, **entry} if entry else {})
        assert torch.equal(found.record().weight().double(), layer.weight())
    with pytest.raises(ImportRefusedError, match="those of 8 bits, and quantization_config says 4"):
        gptq.numbers(parts, {"bits": 4})


@pytest.mark.parametrize("group", [64, 128, 48])
def test_groups_that_gemv_does_not_have_are_refused(group: int) -> None:
    """Its scales are padded: too few of them, read as those of larger groups, would be other weights."""
    parts = writers.awq_gemv(writers.random_layer((32, 128), 4, 32, 1))
    with pytest.raises(ImportRefusedError, match=f"not those of groups of {group}, which quantization_config says"):
        awq.numbers(parts, {"version": "gemv", "group_size": group})
