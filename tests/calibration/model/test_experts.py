"""Fused experts become linear layers and back, compute what transformers computes, and none is without statistics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.model import experts
from rankbook.calibration.model.plain import is_product, make_plain, restore
from rankbook.tools.dev.family_models import random_model, tiny
from tests.calibration.runs import options

FAMILIES = {"mixtral": 16, "gpt_oss": 16, "nemotron_h": 8, "llama4_text": 16, "dbrx": 24, "jetmoe": 32}
"""Gated; transposed, with biases, interleaved and clamped; without a gate; with weighted inputs; one below the other in
two dimensions; in the attention too. With the number of matrices of single experts."""


@pytest.mark.parametrize("family", FAMILIES)
def test_split_experts_compute_the_same_and_can_be_joined(family: str) -> None:
    model = random_model(family)
    tokens = torch.arange(40).reshape(2, 20)
    want, before = model(input_ids=tokens).logits, {k: v.clone() for k, v in model.state_dict().items()}
    found = make_plain(model)
    layers = [name for name, _ in model.named_modules() if experts.matrix_of(name)]
    assert len(layers) == FAMILIES[family]
    torch.testing.assert_close(model(input_ids=tokens).logits, want, rtol=1e-4, atol=1e-5)
    restore(model, found, [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(model.state_dict()) == set(before)
    torch.testing.assert_close(model(input_ids=tokens).logits, want)


def test_conv1d_becomes_a_linear_layer_and_is_put_back() -> None:
    model = random_model("gpt2")
    tokens = torch.arange(40).reshape(2, 20)
    want = model(input_ids=tokens).logits
    found = make_plain(model)
    assert type(model.transformer.h[0].attn.c_attn) is torch.nn.Linear
    torch.testing.assert_close(model(input_ids=tokens).logits, want)
    restore(model, found, ["transformer.h.0.attn.c_attn"])
    assert type(model.transformer.h[0].attn.c_attn) is torch.nn.Linear
    assert type(model.transformer.h[1].attn.c_attn).__name__ == "Conv1D"


class Renamed(torch.nn.Linear):
    """A subclass that computes what its parent does, as FalconLinear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class Doubled(torch.nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Grouped(torch.nn.Linear):
    """A subclass that takes the inputs of each group of heads apart, as that of DeepSeek V4."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.reshape(-1, 4, self.in_features))


class Paired(torch.nn.Linear):
    """A subclass that returns its bias apart."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(x), self.bias


class Asserting(torch.nn.Linear):
    """A subclass that takes inputs with three axes alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.ndim == 3
        return super().forward(x)


def test_subclasses_are_linear_layers_if_they_compute_what_one_does() -> None:
    assert is_product(Renamed(16, 8))
    assert not is_product(Doubled(16, 8))
    assert not is_product(Grouped(16, 8))
    assert not is_product(Paired(16, 8))
    assert not is_product(Asserting(16, 8))
    assert not is_product(torch.nn.Embedding(16, 8))


def test_names_tell_the_matrix_and_the_expert() -> None:
    assert experts.matrix_of("model.layers.0.mlp.experts.gate_up_proj.12") == (
        "model.layers.0.mlp.experts.gate_up_proj",
        12,
    )
    assert experts.matrix_of("model.layers.0.mlp.up_proj") is None
    names = [f"a.down_proj.{index}" for index in (10, 2, 0)]
    assert experts.stacks(names) == {"a.down_proj": ["a.down_proj.0", "a.down_proj.2", "a.down_proj.10"]}


def test_what_enters_experts_is_neither_scaled_nor_given_a_static_range(tmp_path: Path) -> None:
    tiny("mixtral", tmp_path / "model")
    scaled = options(tmp_path, method="rtn", scale_inputs="awq", calib_sequences=1, calib_length=4)
    report = quantize_model(tmp_path / "model", tmp_path / "out", scaled)
    assert report.scaled
    assert not any(experts.matrix_of(name) for name in report.scaled)
    assert report.few_tokens  # four tokens cannot reach eight columns
    with pytest.raises(ValueError, match=r"may see no calibration token; give --activation-skip '\*\.experts\.\*'"):
        quantize_model(tmp_path / "model", tmp_path / "other", options(tmp_path, method="rtn", activations="static8"))
