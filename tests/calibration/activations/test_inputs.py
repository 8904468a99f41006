"""Low-bit activations and caches: calibration of ranges, what is stored, and what loading and evaluation apply."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rankbook.calibration.activations import fake_quant, kv_cache, settings
from rankbook.calibration.activations import inputs as activations
from rankbook.calibration.activations.inputs import (
    ActivationConfig,
    Histogram,
    StaticRange,
)
from rankbook.calibration.checkpoint.format import load_records, open_checkpoint
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.methods import lrq
from rankbook.calibration.methods.lrq import LrqConfig
from rankbook.calibration.model.loading import load_model
from rankbook.calibration.model.packed_modules import CodebookLinear, packed_modules
from rankbook.calibration.settings import ACTIVATION_FORMATS, RANGES
from tests.calibration import problems
from tests.calibration.problems import block_loss
from tests.calibration.records import random_record
from tests.tiny import tiny_model, write_text


def quantized(folder: Path, family: str = "llama", **options: Any) -> Path:
    tiny_model(family, folder / "model")
    text = str(write_text(folder / "text.txt"))
    chosen = {"method": "rtn", "bits": 8, "calib": text, "calib_sequences": 2, "calib_length": 16, **options}
    quantize_model(folder / "model", folder / "q", QuantizeOptions(**chosen))
    return folder / "q"


def entering(model: Any, ids: torch.Tensor, *, after: bool) -> dict[str, torch.Tensor]:
    """Return what enters each packed layer, before or after its input is quantized."""
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_: Any, args: Any, *rest: Any) -> None:
            seen[name] = args[0].clone()

        return keep

    for name, module in packed_modules(model).items():
        if after:
            module.register_forward_hook(hook(name))
        else:
            module.register_forward_pre_hook(hook(name), prepend=True)
    with torch.no_grad():
        model(ids)
    return seen


@pytest.mark.parametrize("kind", ACTIVATION_FORMATS[1:])
def test_a_checkpoint_is_loaded_with_its_activations(kind, tmp_path):
    folder = quantized(tmp_path, activations=kind, activation_range="minmax")
    model, _ = load_model(folder)
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    before, after = entering(copy.deepcopy(model), ids, after=False), entering(model, ids, after=True)
    assert len(after) == 14
    config = ActivationConfig.from_json(open_checkpoint(folder).settings["activations"])
    for name, x in before.items():
        if kind == "token8":
            want = fake_quant.per_token(x, 8)
        elif kind == "token8-symmetric":
            want = fake_quant.per_token(x, 8, symmetric=True)
        elif kind.startswith("mxint"):
            want = fake_quant.mxint(x, int(kind[-1]))
        else:
            found = config.ranges[name]
            want = fake_quant.per_tensor(x, found.step, found.zero, symmetric=kind == "static8")
        assert torch.equal(after[name], want)
        assert not torch.equal(after[name], x)


def test_shared_inputs_have_one_range_and_the_output_layer_none(tmp_path):
    folder = quantized(tmp_path, activations="static8", quantize_lm_head=8)
    ranges = open_checkpoint(folder).settings["activations"]["ranges"]
    assert "lm_head" not in ranges
    attention = "model.layers.0.self_attn"
    assert ranges[f"{attention}.q_proj"] == ranges[f"{attention}.k_proj"] == ranges[f"{attention}.v_proj"]
    assert ranges[f"{attention}.q_proj"] != ranges[f"{attention}.o_proj"]


def test_mxint_rounds_the_results_of_both_factors_of_the_error_branch():
    record = random_record(40, 48, bits=4, rank=5, bias=True)
    layer = CodebookLinear.from_record(record)
    holder = torch.nn.ModuleDict({"layer": layer})
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0))
    activations.install(holder, ActivationConfig("mxint6"), ["layer"])

    def rounded(values: torch.Tensor) -> torch.Tensor:
        return fake_quant.mxint(values, 6)

    assert record.low_rank is not None
    assert record.bias is not None
    inner = rounded(rounded(x) @ record.low_rank.down.dense().T)
    branch = rounded(inner @ record.low_rank.up.dense().T)
    want = rounded(x) @ record.weight().T + branch + record.bias
    got = layer(x)
    # float32: the exact branch is added with the weight and taken away again.
    assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()))
    activations.install(holder, ActivationConfig("none"), ["layer"])
    exact = x @ record.weight(with_low_rank=True).T + record.bias
    assert torch.allclose(layer(x), exact, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("kind", ["static8", "token8"])
def test_inputs_of_skipped_layers_are_left_alone(kind, tmp_path):
    folder = quantized(tmp_path, activations=kind, activation_skip=("*.down_proj",))
    ranges = open_checkpoint(folder).settings["activations"].get("ranges", {})
    assert not any(name.endswith("down_proj") for name in ranges)
    model, _ = load_model(folder)
    ids = torch.randint(0, 256, (1, 6), generator=torch.Generator().manual_seed(0))
    before, after = entering(copy.deepcopy(model), ids, after=False), entering(model, ids, after=True)
    left = {name for name, x in before.items() if torch.equal(after[name], x)}
    assert left == {f"model.layers.{index}.mlp.down_proj" for index in range(2)}
    with pytest.raises(ValueError, match="leaves no layer"):
        quantized(tmp_path / "none", activations=kind, activation_skip=("*",))


def test_minmax_covers_exactly_what_was_seen():
    histogram = Histogram()
    for values in ([0.5, -0.25], [3.0, -1.0], [0.0]):
        histogram.add(torch.tensor(values))
    assert histogram.count == 5
    assert histogram.range("minmax", symmetric=True) == StaticRange(float(torch.tensor(3 / 127)), 0)
    assert histogram.range("minmax", symmetric=False) == StaticRange(float(torch.tensor(4 / 255)), 64)


@pytest.mark.parametrize("symmetric", [True, False])
def test_outliers_move_minmax_but_hardly_the_other_ranges(symmetric):
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    outlier = torch.tensor([50.0])
    steps = {}
    for how in RANGES:
        histogram = Histogram()
        histogram.add(values)
        histogram.add(outlier)
        steps[how] = histogram.range(how, symmetric=symmetric).step
    assert steps["minmax"] == pytest.approx(50 / 127 if symmetric else (50 - float(values.min())) / 255)
    # 99.99 % of a normal distribution lies within 3.89 deviations; a bin is 0.02 to 0.03 wide.
    assert steps["percentile"] == pytest.approx(3.89 / 127 if symmetric else 2 * 3.89 / 255, rel=0.15)
    # The outlier's error counts once, the step's error for every value.
    assert steps["percentile"] * 0.9 < steps["mse"] < steps["minmax"] * 0.9


def test_the_mse_range_has_the_least_error_of_all_shrinks():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1)) ** 3
    histogram = Histogram()
    histogram.add(values)

    def error(step: float) -> float:
        return float((fake_quant.per_tensor(values, step, 0, symmetric=True) - values).square().sum())

    best = histogram.range("mse", symmetric=True)
    peak = float(values.abs().max())
    trials = [error(peak * (1 - index / 100) / 127) for index in range(100)]
    # The search sees bins 1/4096 of the range wide instead of values.
    assert error(best.step) <= min(trials) * 1.02


def test_the_range_does_not_depend_on_the_order_of_batches():
    values = torch.randn(40, 100, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 5, 40)[:, None]
    steps = []
    for order in (range(40), range(39, -1, -1)):
        histogram = Histogram()
        for index in order:
            histogram.add(values[index])
        steps.append(histogram.range("mse", symmetric=True).step)
    # The bounds differ by the powers of two that the first batch is doubled by, so the bins do.
    assert steps[0] == pytest.approx(steps[1], rel=0.03)


def test_8_bit_activations_change_little_and_4_bit_keys_more(tmp_path):
    folder = quantized(tmp_path)
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    model, _ = load_model(folder)
    with torch.no_grad():
        plain = model(ids).logits
        differences = {}
        for name, kind, kv_bits in (("token8", "token8", 0), ("kv8", "none", 8), ("kv4", "none", 4)):
            settings.override(model, kind=kind, kv_bits=kv_bits)
            differences[name] = float((model(ids).logits - plain).abs().max() / plain.abs().max())
        settings.override(model, kind="none", kv_bits=0)
        assert torch.equal(model(ids).logits, plain)
    assert 0 < differences["token8"] < 0.05
    assert 0 < differences["kv8"] < differences["kv4"] < 0.5
    # 4 bits have 17 times the step of 8.
    assert differences["kv4"] > 4 * differences["kv8"]


@pytest.mark.parametrize(("family", "leaf"), [("llama", "k_proj"), ("opt", "v_proj"), ("phi3", "qkv_proj")])
def test_keys_and_values_are_rounded_per_token_and_head(family, leaf):
    model = tiny_model(family)
    name = next(name for name, _ in model.named_modules() if name.endswith(leaf))
    module = model.get_submodule(name)
    x = torch.randn(2, 3, 48)
    before = module(x)
    kv_cache.install(model, 4)
    after = module(x)
    heads = 4
    start = 4 * 12 if leaf == "qkv_proj" else 0
    assert torch.equal(after[..., :start], before[..., :start])
    size = 48 // heads
    want = fake_quant.per_token(before[..., start:].reshape(2, 3, -1, size), 4).flatten(-2)
    assert torch.equal(after[..., start:], want)


def test_kv_bits_are_stored_and_loaded(tmp_path):
    folder = quantized(tmp_path, kv_bits=4)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["kv_bits"] == 4
    model, _ = load_model(folder)
    output = model.model.layers[0].self_attn.k_proj(torch.randn(1, 1, 48))
    assert len(set(output.view(2, 12)[0].tolist())) <= 12
    codes = output.view(2, 12)[0]
    step = float((codes.max() - codes.min()) / 15) if float(codes.min()) < 0 < float(codes.max()) else math.nan
    assert torch.allclose((codes / step).round() * step, codes, atol=1e-5)


def test_scaled_inputs_hold_the_outliers_that_one_step_does_not(tmp_path):
    model = tiny_model("llama", tmp_path / "model")
    with torch.no_grad():
        for layer in model.model.layers:  # the same function, one channel into down_proj a hundred times as large
            layer.mlp.up_proj.weight[3] *= 100
            layer.mlp.down_proj.weight[:, 3] /= 100
    model.save_pretrained(tmp_path / "model")
    text = str(write_text(tmp_path / "text.txt"))
    common: dict[str, Any] = {
        "method": "rtn",
        "bits": 8,
        "param_bits": 16,
        "calib": text,
        "calib_sequences": 2,
        "calib_length": 16,
    }
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    errors = {}
    for scaling in ("none", "smoothquant"):
        options = QuantizeOptions(
            **common,
            activations="static8",
            activation_range="minmax",
            scale_inputs=scaling,
            activation_skip=("*attn*", "*gate*", "*up_*"),
        )
        quantize_model(tmp_path / "model", tmp_path / scaling, options)
        found, _ = load_model(tmp_path / scaling)
        with torch.no_grad():
            errors[scaling] = float((found(ids).logits - model(ids).logits).square().mean())
    # The step is about ten times as fine beside the other channels: a hundred to the power of the strength 0.5.
    assert errors["smoothquant"] < 0.5 * errors["none"]


def test_gradients_pass_rounding_but_not_the_ends_of_a_range():
    layer = torch.nn.Linear(6, 3, bias=False)
    x = torch.tensor([[0.31, -0.52, 0.0, 40.0, 0.77, -90.0]], requires_grad=True)
    flow = torch.randn(1, 3)
    plain = flow @ layer.weight
    for kind, ranges in (("static8", {"": StaticRange(0.1)}), ("token8", {})):
        config = ActivationConfig(kind, ranges)
        with activations.applied(layer, config, [""]):
            output = layer(x)
        torch.testing.assert_close(output, layer(config.function("")(x)))
        (found,) = torch.autograd.grad((output * flow).sum(), x)
        # 0.1 times 127 is the end of the static range; the range of a token has none.
        inside = x.abs() < 12.8 if kind == "static8" else torch.ones_like(x, dtype=torch.bool)
        torch.testing.assert_close(found, torch.where(inside, plain, 0))
    assert not layer._forward_pre_hooks


def test_training_makes_up_for_rounded_inputs():
    problem = problems.block()
    config = LrqConfig(steps=60, compute="float32", bits=8)
    start = {name: lrq.quantize(part, config) for name, part in problem.layers.items()}
    # Steps a good part of the inputs' spread: coarse enough to matter beside 8-bit weights.
    ranges = ActivationConfig("static8", {"first": StaticRange(0.8), "second": StaticRange(0.4)})
    blind = lrq.refine(problem, start, config)
    with activations.applied(problem.block, ranges, list(start)):
        seeing = lrq.refine(problem, start, config)
        found = {name: block_loss(problem, now) for name, now in (("blind", blind), ("seeing", seeing))}
    assert found["seeing"] < 0.98 * found["blind"]


def test_blocks_are_trained_with_the_inputs_they_will_have(tmp_path):
    chosen: dict[str, Any] = {"method": "lrq", "method_options": {"steps": 20, "compute": "float32"}, "bits": 3}
    found = {}
    for kind, training in (("none", None), ("static8", None), ("static8", False)):
        folder = quantized(tmp_path, activations=kind, activation_training=training, **chosen)
        found[kind, training] = {name: record.codes for name, record in load_records(folder).items()}
    plain, seeing, blind = found.values()
    assert all(torch.equal(blind[name], codes) for name, codes in plain.items())
    assert any(not torch.equal(seeing[name], codes) for name, codes in plain.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activations": "int8"}, r"'int8' is not supported; choose one of none, static8"),
        ({"activation_range": "max"}, r"choose one of minmax, percentile, mse"),
        ({"kv_bits": 2}, r"choose one of 0, 8, 4"),
    ],
)
def test_unknown_settings_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        QuantizeOptions(**options)


def test_settings_that_cannot_be_applied_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"need calibrated ranges.*rankbook quantize --activations static8"):
        settings.override(model, kind="static8", kv_bits=None)
    with pytest.raises(ValueError, match="no input range for"):
        activations.install(model, ActivationConfig("static8", {"x": StaticRange(0.1)}), ["model.layers.0.mlp.up_proj"])
    damaged = [
        {"ranges": {}},
        3,
        {"kind": "static8", "ranges": []},
        {"kind": "static8", "ranges": {"x": [0.1, float("nan")]}},
    ]
    damaged += [{"kind": "static8", "ranges": {"x": [step, 0]}} for step in (0.0, -1.0, float("nan"), float("inf"))]
    for entry in damaged:
        with pytest.raises(ValueError, match="is damaged"):
            ActivationConfig.from_json(entry)  # type: ignore[arg-type]
    del model.model.layers[1].self_attn.k_proj
    with pytest.raises(ValueError, match=r"leave out --kv-bits"):
        kv_cache.install(model, 8)
