"""Rules: what one says, which one holds for a layer, and that the checkpoint has what they ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankbook.calibration.checkpoint.format import load_records, open_checkpoint
from rankbook.calibration.driver.block import _decoded
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.rules import Rule
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.fitting.grids import Grid, round_nearest
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.calibration.training.scaled_rounding import Divisors, ScaledRounding
from tests.tiny import tiny_model, write_text

RULES = (
    "*.layers.0.mlp.down_proj: skip",
    "*.down_proj: bits=8 group=channel",
    "*.self_attn.v_proj: method=gptq bits=4 branch=lqer:4",
    "*.layers.?.self_attn.q_proj: rank=2",
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits=4", "is not 'PATTERN: bits=4"),
        ("*:", "is not 'PATTERN"),
        ("*: skip bits=4", "can only do one"),
        ("*: bit=4", "did you mean bits"),
        ("*: bits=4 bits=3", "is set twice"),
        ("*: bits", "as KEY=VALUE"),
        ("*: bits=five", "bits is 'five'; give a number"),
        ("*: bits=5", "bits 5 is not supported"),
        ("*: group=7x", "not a group size"),
        ("*: branch=lora:4", "'lora' is not supported"),
        ("*: branch=qera:x", "branch is 'x'; give a number"),
        ("*: method=nf5", "'nf5' is not supported"),
        ("*: method=lrq", "trains whole blocks"),
        ("*: rank=2", "method 'rtn' has no option rank"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        QuantizeOptions(method="rtn", rules=(text,))
    assert "rule " in str(caught.value)


def test_the_first_rule_that_matches_holds() -> None:
    options = QuantizeOptions(method="lcq", bits=3, rank=1, error_rank=8, rules=RULES)
    assert options.layer_rules.skips("model.layers.0.mlp.down_proj")
    assert options.of_layer("model.layers.1.mlp.down_proj").bits == 8
    value = options.of_layer("model.layers.1.self_attn.v_proj")
    assert (value.method, value.bits, value.rank, value.error_branch, value.error_rank) == ("gptq", 4, None, "lqer", 4)
    query = options.of_layer("model.layers.1.self_attn.q_proj")
    assert (query.method, query.bits, query.rank, query.error_rank) == ("lcq", 3, 2, 8)
    assert options.of_layer("model.layers.1.self_attn.k_proj") is options


def test_text_is_read_where_one_rule_needs_it() -> None:
    assert not QuantizeOptions(method="rtn").needs_text()
    assert QuantizeOptions(method="rtn", rules=("*.q_proj: method=gptq",)).needs_text()
    assert not QuantizeOptions(method="rtn", rules=("*.q_proj: branch=lqer:4",)).needs_text()


def test_rules_and_a_budget_choose_the_same_thing() -> None:
    with pytest.raises(ValueError, match="target_bits chooses what each layer gets"):
        QuantizeOptions(method="rtn", target_bits=4.0, rules=("*.q_proj: bits=8",))
    QuantizeOptions(method="rtn", target_bits=4.0, rules=("*.q_proj: skip",))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rules")
    tiny_model("llama", folder / "model")
    write_text(folder / "text.txt")
    return folder


def test_the_checkpoint_has_what_the_rules_ask_for(source: Path) -> None:
    """Trained blocks: what a rule gives another method is fixed while the others are trained around it."""
    options = QuantizeOptions(
        method="lcq", bits=3, rank=1, group_size=16, rules=RULES, calib=str(source / "text.txt"), calib_sequences=4,
        calib_length=16, method_options={"steps": 2},
    )  # fmt: skip
    report = quantize_model(source / "model", source / "q", options)
    layers = open_checkpoint(source / "q").layers
    found = {name.removeprefix("model.layers."): spec for name, spec in layers.items()}
    assert "0.mlp.down_proj" not in found
    assert (found["1.mlp.down_proj"].bits, found["1.mlp.down_proj"].group) == (8, 80)
    for block in "01":
        value, query, key = (found[f"{block}.self_attn.{name}_proj"] for name in "vqk")
        assert (value.method, value.bits, value.branch_rank) == ("gptq", 4, 4)
        assert (query.method, query.bits, query.planes) == ("lcq", 3, 2)
        assert (key.method, key.bits, key.planes, key.group) == ("lcq", 3, 1, 16)
    manifest = json.loads((source / "q/rankbook.json").read_text("utf-8"))
    assert manifest["options"]["rules"] == list(RULES)
    assert manifest["rules"] == {RULES[0]: 1, RULES[1]: 1, RULES[2]: 2, RULES[3]: 2}
    assert report.left_alone["model.layers.0.mlp.down_proj"] == "skipped by option"
    assert all(record.weight().isfinite().all() for record in load_records(source / "q").values())


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (("*.qproj: bits=8",), r"rule '\*.qproj' matches none of the 14 layers.*q_proj"),
        (("*.q_proj: bits=8", "*.layers.0.self_attn.q_proj: bits=2"), "holds for no layer.*have a rule before it"),
        (("*.q_proj: group=32",), "group size 32 cannot cut rows of 48"),
    ],
)
def test_a_rule_that_holds_for_nothing_is_an_error(rules: tuple[str, ...], message: str, source: Path) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_model(source / "model", source / "never", QuantizeOptions(method="rtn", rules=rules))
    assert not (source / "never").exists()


def test_layers_that_are_done_compute_with_their_record_while_others_are_trained() -> None:
    block: Any = nn.Sequential(nn.Linear(32, 32, bias=False))
    before = block[0].weight
    problem = LayerProblem("0", before.detach(), None, LayerStatistics.unseen(32))
    record = round_nearest(problem, Grid(2, 32), "rtn")
    with _decoded(block, {"0": record}):
        assert torch.equal(block[0].weight, record.weight())
    assert block[0].weight is before
    assert Rule.parse("0: skip").settings == {}


def test_a_rank_of_lrq_holds_in_the_training_of_its_layers(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stored nowhere: what is trained is all that it shapes."""
    ranks: list[int] = []

    def noted(weight: Tensor, record: QuantizedLinear, divisors: Divisors, seed: int) -> ScaledRounding:
        ranks.append(divisors.scaling_rank)
        return ScaledRounding(weight, record, divisors, seed)

    monkeypatch.setattr("rankbook.calibration.methods.lrq.ScaledRounding", noted)
    options = QuantizeOptions(
        method="lrq", bits=3, rank=2, group_size=16, rules=("*.down_proj: rank=5", "*.up_proj: rank=0"),
        calib=str(source / "text.txt"), calib_sequences=2, calib_length=16, method_options={"steps": 1},
    )  # fmt: skip
    quantize_model(source / "model", source / "lrq", options)
    assert ranks == [2, 2, 2, 2, 2, 12, 5] * 2  # q k v o gate up down; a quarter of 48 where it is 0
