"""Input scaling: what can carry it is found, the model stays what it was, and quantization gains."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankbook.calibration.driver import scaling
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.fitting.grids import Grid, round_nearest
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.methods import METHODS
from rankbook.calibration.model import capture
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.loading import load_model
from tests.calibration import problems
from tests.calibration.runs import files, interrupted, options
from tests.tiny import tiny_model

TOKENS = torch.arange(32).view(2, 16)


class Parts:
    """A tiny model, its first block, and what the driver hands to `scale_inputs`."""

    def __init__(self, family: str, **overrides: Any) -> None:
        self.model = tiny_model(family, **overrides)
        found = adapter_of(self.model).blocks()
        self.block = found.modules[0]
        call = capture.record_calls(self.model, found, TOKENS)[0]
        x = capture.first_inputs(self.model, found, TOKENS, torch.float32).values
        self.names = [name for name, module in self.block.named_modules() if type(module) is nn.Linear]
        self.statistics = capture.collect(self.block, call, x, self.names)
        self.run = lambda: call(self.block, x[:1])

    def logits(self) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.model(input_ids=TOKENS).logits
        return found


def random_scale(layers: Any) -> Tensor:
    """Scales from 1/8 to 8."""
    width = layers[0].weight.shape[1]
    return torch.rand(width, generator=torch.Generator().manual_seed(1)).mul(6).sub(3).exp2()


CARRIERS = {
    "llama": {"input_layernorm": "q k v", "post_attention_layernorm": "gate up", "up_proj": "down"},
    "opt": {"self_attn_layer_norm": "q k v", "v_proj": "out", "final_layer_norm": "fc1", "fc1": "fc2"},
    "gemma2": {"input_layernorm": "q k v", "pre_feedforward_layernorm": "gate up", "up_proj": "down"},
    "phi3": {"input_layernorm": "qkv", "post_attention_layernorm": "gate_up"},
}


def short(name: str) -> str:
    """``self_attn.q_proj`` to ``q``."""
    return name.rpartition(".")[2].removesuffix("_proj")


@pytest.mark.parametrize("family", CARRIERS)
def test_carriers_are_found(family: str) -> None:
    parts = Parts(family)
    with torch.no_grad():
        found = scaling.find_carriers(parts.block, parts.run, parts.statistics)
    names = {carrier.name.rpartition(".")[2]: set(map(short, carrier.layers)) for carrier in found}
    assert names == {carrier: set(layers.split()) for carrier, layers in CARRIERS[family].items()}
    assert all(carrier.shift == (family == "gemma2" and "norm" in carrier.name) for carrier in found)


def test_with_one_value_head_per_head_the_output_projection_is_scaled() -> None:
    parts = Parts("llama", num_key_value_heads=4)
    with torch.no_grad():
        found = scaling.find_carriers(parts.block, parts.run, parts.statistics)
    assert ("self_attn.v_proj", ("self_attn.o_proj",)) in [(carrier.name, carrier.layers) for carrier in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CARRIERS)
def test_the_model_stays_what_it_was(family: str, dtype: torch.dtype) -> None:
    parts = Parts(family)
    before = parts.logits()
    weights = {name: value.data.clone() for name, value in parts.block.named_parameters()}
    done = scaling.scale_inputs(parts.block, parts.run, parts.statistics, random_scale, dtype)
    assert {short(name) for name in done.layers} == {
        short(name) for layers in CARRIERS[family].values() for name in layers.split()
    }
    change = (parts.logits() - before).norm() / before.norm()
    # The layers make up for the rounding of a norm's weight; what is left in bfloat16 is that of biases.
    assert float(change) < (1e-5 if dtype == torch.float32 or family != "opt" else 2e-2)
    for name, value in parts.block.named_parameters():
        moved = not torch.equal(value.data, weights[name])
        layer = name.rpartition(".")[0]
        assert moved == (layer in done.layers and name.endswith("weight")) or name in done.tensors or "bias" in name
    assert all(torch.equal(value, value.to(dtype).float()) for value in done.tensors.values())


def test_the_statistics_follow() -> None:
    parts = Parts("llama")
    before = {name: found.gram.clone() for name, found in parts.statistics.items()}
    scaling.scale_inputs(parts.block, parts.run, parts.statistics, random_scale, torch.float32)
    name = "self_attn.q_proj"
    scale = random_scale([LayerProblem(name, torch.zeros(1, 48), None, parts.statistics[name])])
    scale = scale / (scale.max() * scale.min()).sqrt()
    torch.testing.assert_close(parts.statistics[name].gram, before[name] / scale / scale[:, None])
    assert torch.equal(parts.statistics["self_attn.o_proj"].gram, before["self_attn.o_proj"])


def test_a_norm_that_something_else_reads_carries_nothing() -> None:
    parts = Parts("llama")
    seen = {name: part for name, part in parts.statistics.items() if name != "self_attn.k_proj"}
    done = scaling.scale_inputs(parts.block, parts.run, seen, random_scale, torch.float32)
    assert not {"self_attn.q_proj", "self_attn.v_proj"} & set(done.layers)
    assert "mlp.gate_proj" in done.layers


def test_statistics_of_scaled_inputs_are_those_of_the_inputs_scaled() -> None:
    x, scale = problems.inputs(32), torch.rand(32) + 0.5
    divided, direct = LayerStatistics.empty(32), LayerStatistics.empty(32)
    for batch in x.split(100):
        divided.update(batch)
        direct.update(batch / scale)
    divided.divide(scale)
    for name in ("gram", "mean_abs", "peak_mean_abs", "peak"):
        torch.testing.assert_close(getattr(divided, name), getattr(direct, name), rtol=1e-4, atol=1e-5)
    assert torch.equal(direct.peak, (x / scale).abs().amax(0))


def outliers() -> LayerProblem:
    """A layer with a few inputs that are much larger than the rest."""
    problem = problems.layer(64, 128)
    scale = torch.ones(128)
    scale[::16] = 0.05
    problem.statistics.divide(scale)
    return problem


def test_awq_scales_important_inputs_up_and_never_loses() -> None:
    problem = outliers()
    scale = scaling.awq_scale([problem], [Grid(3, 64)])
    assert float(scale[::16].mean()) > 1.5 * float(scale.median())
    plain = METHODS["rtn"].quantize(problem, METHODS["rtn"].config_type(bits=3))
    scaled = LayerProblem("layer", problem.weight * scale, None, problem.statistics)
    decoded = METHODS["rtn"].quantize(scaled, METHODS["rtn"].config_type(bits=3)).weight() / scale
    assert problems.output_error(problem, decoded) < 0.8 * problems.output_error(problem, plain.weight())


def test_awq_searches_for_the_grid_that_a_layer_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rules, a budget or the format: it searched for even levels in the bits of the run."""
    problem, grid = outliers(), Grid(4, 32, "mxint")

    def lost(scale: Tensor) -> float:
        scaled = LayerProblem("layer", problem.weight * scale, None, problem.statistics)
        return problems.output_error(problem, round_nearest(scaled, grid, "").weight() / scale)

    chosen, other = (scaling.awq_scale([problem], [each]) for each in (grid, Grid(3, 64)))
    assert lost(chosen) < 0.9 * lost(other)
    seen: dict[str, Grid] = {}
    search = scaling.awq_scale

    def noted(given: Sequence[LayerProblem], grids: Sequence[Grid]) -> Tensor:
        seen.update(zip([each.name for each in given], grids, strict=True))
        return search(given, grids)

    monkeypatch.setattr(scaling, "awq_scale", noted)
    tiny_model("llama", tmp_path / "model")
    rules = ("*.k_proj: bits=8 group=16", "*.v_proj: method=lqer branch=none")
    quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path, method="awq", bits=4, rules=rules))
    found = {name.rpartition(".")[2]: (grid.bits, grid.group_size, grid.format) for name, grid in seen.items()}
    assert found["q_proj"] == (4, 48, "affine")
    assert found["k_proj"] == (8, 16, "affine")
    assert found["v_proj"] == (4, 48, "mxint")


def test_smoothquant_is_its_formula() -> None:
    problem = outliers()
    scale = scaling.smoothquant_scale([problem], 0.5)
    torch.testing.assert_close(scale, (problem.statistics.peak / problem.weight.abs().amax(0)).sqrt())
    # With half the strength on each side, inputs and weights end up with equal peaks.
    torch.testing.assert_close(problem.statistics.peak / scale, problem.weight.abs().amax(0) * scale)
    everything = scaling.smoothquant_scale([problem], 1.0)
    torch.testing.assert_close(problem.statistics.peak / everything, torch.ones(128))


def test_inputs_that_never_were_active_keep_a_scale_like_the_others() -> None:
    problem = outliers()
    problem.statistics.peak[3] = 0
    scale = scaling.smoothquant_scale([problem], 0.5)
    assert float(scale[3]) == float(scale.median())
    with pytest.raises(ValueError, match="none, awq, smoothquant"):
        scaling.chooser("quip", lambda _: Grid(3, 64))


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_a_checkpoint_with_scaled_inputs_is_the_model(tmp_path: Path, method: str) -> None:
    model = tiny_model("gemma2", tmp_path / "model")
    report = quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path, method=method, bits=8))
    assert len(report.scaled) == 2 * 6  # all but the output projection, in two blocks
    loaded, _ = load_model(tmp_path / "out")
    with torch.no_grad():
        wanted, found = model(input_ids=TOKENS).logits, loaded(input_ids=TOKENS).logits
    assert float((found - wanted).norm() / wanted.norm()) < 0.02  # 8-bit weights
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(loaded.get_parameter(norm), model.get_parameter(norm))


def test_a_resumed_run_has_the_scaled_norms(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "model")
    training = {"steps": 3, "compute": "float32"}
    chosen = options(tmp_path, method="omniquant", scale_inputs="awq", method_options=training)
    quantize_model(tmp_path / "model", tmp_path / "whole", chosen)
    interrupted(tmp_path, chosen)
    report = quantize_model(tmp_path / "model", tmp_path / "out", chosen, resume=True)
    assert report.resumed_at == 1
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert len(report.scaled) == 2 * 6


@pytest.mark.parametrize(
    ("form", "larger", "param_bits", "said"),
    [
        ("affine", 100, 8, True),
        ("affine", 100, 16, False),
        ("mxint", 1000, 8, True),  # ten octaves, of which eight bits hold seven
        ("mxint", 1000, 16, False),
        ("mxint", 4, 8, False),
    ],
)
def test_rows_beside_much_larger_ones_are_said(
    tmp_path: Path, form: str, larger: int, param_bits: int, said: bool
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[7] *= larger
    model.save_pretrained(tmp_path / "model")
    chosen = options(tmp_path, method="rtn", calib=None, param_bits=param_bits, weight_format=form)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize_model(tmp_path / "model", tmp_path / "out", chosen)
    texts = [str(one.message) for one in caught]
    assert said == any("coarse for rows of 1 layers such as model.layers.1.mlp.up_proj" in text for text in texts)
