"""Settings of a checkpoint beside its weights: applied when it is loaded, replaced for an evaluation, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankbook.calibration.activations import settings
from rankbook.calibration.model.packed_modules import CodebookLinear, replace_module
from tests.calibration.records import random_record
from tests.tiny import tiny_model

IDS = torch.arange(60, 72)[None]
LAYER = "model.layers.0.mlp.up_proj"


def model() -> nn.Module:
    """A tiny llama with one packed layer."""
    found: nn.Module = tiny_model("llama")
    replace_module(found, LAYER, CodebookLinear.from_record(random_record(80, 48)))
    return found


def test_entries_of_a_checkpoint_change_what_a_model_computes() -> None:
    held = model()
    exact = held(IDS).logits
    settings.install(held, {})
    assert torch.equal(held(IDS).logits, exact)
    settings.install(held, {"activations": {"kind": "token8"}, "kv_bits": 8})
    rounded = held(IDS).logits
    assert 0 < (rounded - exact).norm() < 0.2 * exact.norm()
    settings.override(held, kind="none", kv_bits=0)
    assert torch.equal(held(IDS).logits, exact)


def test_only_packed_layers_count_and_all_of_a_plain_model() -> None:
    assert settings.packed_linears(model()) == [LAYER]
    plain = tiny_model("llama")
    exact = plain(IDS).logits
    settings.override(plain, kind="token8", kv_bits=None)
    assert not torch.equal(plain(IDS).logits, exact)


def test_ranges_that_would_have_to_be_calibrated_are_refused() -> None:
    with pytest.raises(ValueError, match="'static8' need calibrated ranges, which `rankbook quantize --activations"):
        settings.override(model(), kind="static8", kv_bits=None)
    with pytest.raises(ValueError, match="are unknown; choose one of none, static8"):
        settings.override(model(), kind="int3", kv_bits=None)
