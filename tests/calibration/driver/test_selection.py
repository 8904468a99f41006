"""Which layers are quantized: the plain linear ones of the blocks, unless a pattern says otherwise."""

from __future__ import annotations

import pytest
from torch import nn

from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.report import OUTSIDE, SKIPPED
from rankbook.calibration.driver.selection import has_weights, select
from rankbook.calibration.model.adapter import adapter_of
from tests.tiny import tiny_model


def chosen(**changes: object) -> tuple[list[list[str]], dict[str, str]]:
    model = tiny_model("llama")
    model.extra = nn.Linear(4, 4)
    found = select(model, adapter_of(model).blocks(), QuantizeOptions(method="rtn", **changes))  # type: ignore[arg-type]
    return found.layers, found.left_alone


def test_all_plain_linear_layers_of_the_blocks_in_order() -> None:
    layers, left = chosen()
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    assert layers == [[*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]] * 2
    assert left == {"extra": f"Linear {OUTSIDE}"}  # embedding and output layer are reported by themselves


def test_a_pattern_leaves_layers_alone() -> None:
    layers, left = chosen(skip=("*.down_proj",))
    assert all("mlp.down_proj" not in names for names in layers)
    assert [name for name, reason in left.items() if reason == SKIPPED] == [
        f"model.layers.{index}.mlp.down_proj" for index in range(2)
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"skip": ("*.dwon_proj",)}, "matches none of the"),
        ({"skip": ("*_proj",)}, "no layer of LlamaForCausalLM is left to quantize"),
        ({"group_size": 64}, r"q_proj: group size 64 cannot cut rows of 48"),
        ({"activations": "token8", "activation_skip": ("*",)}, "leaves no layer whose input could be quantized"),
    ],
)
def test_what_cannot_be_is_said(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        chosen(**changes)


def test_weights_are_matrices() -> None:
    assert has_weights(nn.Linear(2, 2))
    assert not has_weights(nn.LayerNorm(2))
    assert not has_weights(nn.Sequential(nn.Linear(2, 2)))
