"""Bits under a budget: the sensitivities, the sizes, and the choice."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankbook.calibration.checkpoint.format import MANIFEST, load_records
from rankbook.calibration.driver import allocation
from rankbook.calibration.driver.allocation import Candidates, Choice, Sensitivity
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.driver.selection import select
from rankbook.calibration.driver.solve import solve_layer
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.experts import stacks
from rankbook.calibration.model.plain import make_plain
from rankbook.tools.dev import family_models
from tests.calibration import problems
from tests.calibration.runs import files, interrupted, options
from tests.tiny import tiny_model

pytest.importorskip("scipy")

TOKENS = torch.arange(64).view(2, 32) * 3 % 256


def layers_of(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of the blocks."""
    return {name: part for name, part in model.named_modules() if type(part) is nn.Linear and "layers" in name}


def test_predicted_divergence_is_the_measured_one() -> None:
    model = tiny_model("llama").double()  # the divergence of a tiny model is lost in float32
    layers = layers_of(model)
    samples = torch.randint(0, 256, (64, 32), generator=torch.Generator().manual_seed(0))
    fisher = allocation.sensitivities(model, layers, samples)
    with torch.no_grad():
        before = model(input_ids=samples).logits.log_softmax(-1)
    ratios = []
    for name, layer in layers.items():
        kept = layer.weight.data
        noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1)).double() * 0.1 * kept.std()
        layer.weight.data = kept + noise
        with torch.no_grad():
            after = model(input_ids=samples).logits.log_softmax(-1)
        layer.weight.data = kept
        measured = float((before.exp() * (before - after)).sum(-1).mean())
        predicted = 0.5 * float((fisher[name].fisher * noise.square()).sum())
        ratios.append(predicted / measured)
    # One draw of errors and labels for each: a factor of two. Errors of keys that all tokens share have no effect, and
    # those of values that they share add up over tokens: both fall out of the independence that is assumed.
    assert sum(0.5 < ratio < 2 for ratio in ratios) >= len(ratios) - 2, ratios
    assert 0.8 < sorted(ratios)[len(ratios) // 2] < 1.25


def test_the_model_is_left_as_it_was_found() -> None:
    model = tiny_model("opt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = layers_of(model)
    first = allocation.sensitivities(model, layers, TOKENS)
    again = allocation.sensitivities(model, layers, TOKENS)
    assert all(torch.equal(first[name].fisher, again[name].fisher) for name in layers)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "lcq", "rank": 3, "effort": "fast"},
        {"method": "rtn", "bits": 4, "weight_format": "nf4"},
        {"method": "lqer", "error_rank": 8},
        {"method": "lrq", "group_size": "channel", "error_branch": "qera", "error_rank": 8, "factor_bits": 16},
        {"method": "gptq", "param_bits": 16, "group_size": 32},
    ],
    ids=str,
)
def test_sizes_are_those_of_the_records(changes: dict[str, Any]) -> None:
    chosen = QuantizeOptions(**{"bits": 3, "group_size": 64, **changes})
    problem = problems.layer(40, 128)
    record = solve_layer(problem, chosen)
    wanted = sum(8 * tensor.nbytes for name, tensor in record.pack().items() if name != "bias")
    assert allocation.stored_bits(40, 128, allocation.corner(chosen), chosen) == wanted


def test_harm_falls_with_bits_and_follows_the_sensitivity() -> None:
    weight, fisher = torch.randn(100, 128), torch.rand(100, 128)
    for planes in (None, 1):
        widths = dict.fromkeys((Choice(bits, planes) for bits in (2, 3, 4, 8)), QuantizeOptions(method="lcq"))
        found = allocation.harms(weight, Sensitivity(fisher, torch.empty(0)), 64, widths)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        more = allocation.harms(weight, Sensitivity(6 * fisher, torch.empty(0)), 64, widths)
        assert more[Choice(3, planes)] == pytest.approx(6 * found[Choice(3, planes)], rel=1e-3)


def test_rows_that_are_left_out_are_counted() -> None:
    model = tiny_model("llama", intermediate_size=400)
    layers = {name: part for name, part in layers_of(model).items() if "gate" in name}
    some = allocation.sensitivities(model, layers, TOKENS)
    assert {tuple(found.fisher.shape) for found in some.values()} == {(100, 48)}  # every fourth row
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "_ROWS", 400)
        whole = allocation.sensitivities(model, layers, TOKENS)
    for name in layers:
        few, every = some[name].fisher, whole[name].fisher
        assert float(few.sum()) == pytest.approx(float(every.sum()), rel=0.5)
        torch.testing.assert_close(few, 4 * every[::4])


def test_the_choice_is_the_best_one() -> None:
    harm = {"a": {2: 9.0, 3: 4.0, 4: 1.0}, "b": {2: 3.0, 3: 1.0, 4: 0.5}, "c": {2: 5.0, 3: 3.0, 4: 2.5}}
    sizes = {"a": 100, "b": 100, "c": 300}
    layers = {
        name: Candidates(
            {Choice(b): value for b, value in harm[name].items()}, {Choice(b): b * sizes[name] for b in (2, 3, 4)}
        )
        for name in harm
    }

    def brute(budget: float) -> float:
        every = [dict(zip("abc", bits, strict=True)) for bits in itertools.product((2, 3, 4), repeat=3)]
        fitting = [bits for bits in every if sum(bits[name] * sizes[name] for name in bits) <= budget]
        return min(sum(harm[name][bits[name]] for name in bits) for bits in fitting)

    for budget in (1000, 1100, 1250, 1500, 1750, 2000):
        bits = {name: item.bits for name, item in allocation.choose(layers, budget, 500).items()}
        assert sum(bits[name] * sizes[name] for name in bits) <= budget
        assert sum(harm[name][bits[name]] for name in bits) == brute(budget)
    with pytest.raises(ValueError, match=r"takes 2\.000"):
        allocation.choose(layers, 900, 500)


def test_only_widths_that_the_method_takes() -> None:
    for chosen, bits in (
        (QuantizeOptions(method="lcq", rank=5, bits=3), [3, 4, 8]),
        (QuantizeOptions(method="rtn", bits=4, weight_format="nf4"), [4]),
    ):
        assert allocation.choices(chosen) == [Choice(width) for width in bits]


def test_ranks_up_to_those_of_the_options() -> None:
    chosen = QuantizeOptions(rank=2, bits=2, target_bits=3, allocate=("rank",))
    assert allocation.choices(chosen) == [Choice(2, 1), Choice(2, 2)]
    chosen = QuantizeOptions(target_bits=3, allocate=("bits", "rank"))
    # Three planes need more than three levels; at 8 bits more planes than one gain nothing.
    assert {(item.bits, item.planes) for item in allocation.choices(chosen)} == {
        *itertools.product((2, 3, 4), (1, 2, 3)),
        (8, 1),
    }
    chosen = QuantizeOptions(target_bits=3, allocate=("branch",), error_branch="qera", error_rank=8)
    assert [item.branch for item in allocation.choices(chosen)] == [0, 2, 4, 8]
    assert Choice(3, branch=0).applied(chosen).driver_branch() == "none"
    assert Choice(4, 3, 2).applied(chosen).error_rank == 2


def test_more_planes_and_larger_branches_do_less_harm() -> None:
    weight, fisher = torch.randn(64, 128), torch.rand(64, 128)
    spectrum = torch.tensor([0.3, 0.1, 0.05, 0.02])
    chosen = [Choice(3, planes, branch) for branch in (0, 2, 8) for planes in (1, 2, 3)]
    possible = dict.fromkeys(chosen, QuantizeOptions(method="lcq"))
    found = list(allocation.harms(weight, Sensitivity(fisher, spectrum), 64, possible).values())
    assert found[:3] == sorted(found[:3], reverse=True)
    assert found[::3] == sorted(found[::3], reverse=True)
    assert found[3] == pytest.approx(found[0] * (1 - allocation.branch_share(spectrum, 64, 128, 2)))


@pytest.mark.parametrize(("rows", "columns"), [(192, 96), (96, 192)])
def test_the_share_of_a_branch_is_that_of_drawn_errors(rows: int, columns: int) -> None:
    energy = torch.cat([torch.tensor([60.0, 30.0, 15.0, 8.0]), torch.ones(columns - 4)])
    energy = energy / energy.sum()
    errors = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * energy.sqrt()
    drawn = torch.linalg.svdvals(errors).square()
    for rank in (1, 2, 4, 8):
        wanted = float(drawn[:rank].sum() / drawn.sum())
        # One draw: its largest variances scatter by about sqrt(2 / rows); the bulk is taken as all of it at its edge.
        assert allocation.branch_share(energy[:4], rows, columns, rank) == pytest.approx(wanted, rel=0.15)
    assert allocation.branch_share(energy[:4], rows, columns, min(rows, columns)) == 1


def test_the_spectrum_is_that_of_the_inputs_weighted_by_what_flows_back() -> None:
    model = tiny_model("llama")
    layers = {name: part for name, part in layers_of(model).items() if "layers.1.mlp.down" in name}
    (name,) = layers
    inputs, flows = [], []

    def keep(_: Any, args: Any, output: Any) -> None:
        inputs.append(args[0][0].detach())
        output.register_hook(lambda grad: flows.append(grad[0]))

    hook = layers[name].register_forward_hook(keep)
    found = allocation.sensitivities(model, layers, TOKENS, spectra=True)[name]
    hook.remove()
    x, flow = torch.cat(inputs), torch.cat(flows).square().sum(1, keepdim=True)
    eigenvalues = torch.linalg.eigvalsh((x * flow).T @ x).flip(0)
    # 80 inputs, fewer than the random directions: exact up to the ridge of the Nystroem approximation.
    torch.testing.assert_close(found.spectrum, eigenvalues / eigenvalues.sum(), rtol=1e-3, atol=1e-5)


def test_a_model_keeps_to_its_budget_and_a_resumed_run_to_its_bits(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "model")
    chosen = options(tmp_path, method="gptq", group_size=16, target_bits=5.0)
    report = quantize_model(tmp_path / "model", tmp_path / "whole", chosen)
    assert 4.5 < report.bits_per_weight <= 5.0
    widths = {record.bits for record in load_records(tmp_path / "whole").values()}
    assert len(widths) > 1
    interrupted(tmp_path, chosen)
    quantize_model(tmp_path / "model", tmp_path / "out", chosen, resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    manifest = json.loads((tmp_path / "whole" / MANIFEST).read_text())
    assert manifest["options"]["target_bits"] == 5.0


def test_experts_of_one_matrix_get_one_choice() -> None:
    model = family_models.random_model("mixtral")
    make_plain(model)
    blocks = adapter_of(model).blocks()
    given = QuantizeOptions(
        method="rtn", bits=4, target_bits=5.0, allocate=("bits", "branch"), error_branch="lqer", error_rank=4
    )
    names = select(model, blocks, given).names(blocks)
    tokens = torch.arange(12)[None]  # too few to reach every expert
    chosen = allocation.allocate(model, names, tokens, given)
    assert set(chosen) == set(names)
    assert len(stacks(names)) == 4
    for layers in stacks(names).values():
        assert len(layers) == 4
        assert len({chosen[name] for name in layers}) == 1


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"give stored bits per weight, such as 3\.2"):
        QuantizeOptions(target_bits=0)
    with pytest.raises(ValueError, match="needs target_bits"):
        allocation.allocate(None, [], TOKENS, QuantizeOptions())
    assert replace(QuantizeOptions(), target_bits=3.2).target_bits == 3.2
    with pytest.raises(ValueError, match="needs a budget"):
        QuantizeOptions(allocate=("bits", "rank"))
    with pytest.raises(ValueError, match="choose one of bits, rank, branch"):
        QuantizeOptions(target_bits=3.2, allocate=("planes",))
    with pytest.raises(ValueError, match="stores no rank that could be chosen; lcq does"):
        QuantizeOptions(method="lrq", target_bits=3.2, allocate=("rank",))
    with pytest.raises(ValueError, match="give error_branch"):
        QuantizeOptions(target_bits=3.2, allocate=("branch",))
    with pytest.raises(ValueError, match="names nothing"):
        QuantizeOptions(target_bits=3.2, allocate=())
