"""Options are checked at once, and group sizes and method configs follow from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest

from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.methods import METHODS, Method
from tests.calibration import toy_method


@dataclass(frozen=True)
class WideConfig:
    """A config with every common field."""

    bits: int = 3
    group_size: int = 64
    rank: int = 2
    format: str = "affine"
    clip_search: bool = False
    effort: str = "default"
    error_branch: str = "l2qer"
    error_rank: int = 8
    factor_bits: int = 8
    seed: int = 0
    rounds: int = field(default=1)

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ValueError("rounds must be at least 0")


@pytest.fixture(autouse=True)
def _methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "toy", toy_method.TOY)
    monkeypatch.setitem(METHODS, "wide", Method("wide", WideConfig, toy_method.quantize))


def test_every_option_has_a_default_and_help() -> None:
    for item in dataclasses.fields(QuantizeOptions):
        assert item.metadata["about"].text


@pytest.mark.parametrize(
    ("in_features", "group"),
    [
        (576, 64),
        (1536, 64),
        (4096, 64),
        (48, 48),
        (80, 80),
        (96, 48),
        (100, 100),
        (7, 7),
        (16, 16),
        (1000, 1000),
        (144, 48),
    ],
)
def test_auto_takes_the_group_nearest_to_64(in_features: int, group: int) -> None:
    assert QuantizeOptions(method="toy").group(in_features) == group


def test_auto_takes_the_block_of_mx_formats() -> None:
    assert QuantizeOptions(method="wide", weight_format="mxint").group(4096) == 32
    assert QuantizeOptions(method="wide", method_options={"format": "mxint"}).group(4096) == 32


def test_channel_and_number() -> None:
    assert QuantizeOptions(method="toy", group_size="channel").group(576) == 576
    assert QuantizeOptions(method="toy", group_size=96).group(576) == 96
    with pytest.raises(
        ValueError, match=r"group size 128 cannot cut rows of 576 weights; choose one of 16, 32, 48, 64"
    ):
        QuantizeOptions(method="toy", group_size=128).group(576)


def test_config_gets_what_was_given_and_keeps_its_own_defaults() -> None:
    config = QuantizeOptions(method="wide", bits=4, effort="fast", seed=3, method_options={"rounds": 5}).method_config(
        96
    )
    assert config == WideConfig(bits=4, group_size=48, effort="fast", seed=3, rounds=5, error_rank=32)
    assert QuantizeOptions(method="toy", effort="high").method_config(32) == toy_method.ToyConfig(3, 32)


def test_the_bits_are_the_methods_own_where_none_are_given() -> None:
    """SmoothQuant is for 8-bit weights; it took the 3 bits of all others."""
    run = QuantizeOptions(method="smoothquant", rules=("a: method=rtn", "b: bits=4"))
    assert [run.of_layer(name).code_bits() for name in "abc"] == [3, 4, 8]
    assert run.grid(64).bits == 8
    given = QuantizeOptions(method="smoothquant", bits=4, rules=("a: method=rtn",))
    assert [given.of_layer(name).code_bits() for name in "ac"] == [4, 4]


def test_the_branch_is_the_methods_own_where_it_has_one() -> None:
    assert QuantizeOptions(method="toy").driver_branch() == "none"
    assert QuantizeOptions(method="toy", error_branch="qera").driver_branch() == "qera"
    own = QuantizeOptions(method="wide", error_branch="qera")
    assert own.driver_branch() == "none"
    assert own.method_config().error_branch == "qera"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "magic"}, "method 'magic' is not supported; choose one of"),
        ({"bits": 5}, "bits 5 is not supported; choose one of 2, 3, 4, 8"),
        ({"group_size": "row"}, "choose one of auto, channel"),
        ({"quantize_lm_head": 3}, "quantize_lm_head 3 is not supported; choose one of 0, 4, 8"),
        ({"factor_bits": 4}, "factor_bits 4"),
        ({"error_branch": "svd"}, "error_branch 'svd'"),
        ({"error_rank": 0}, "error_rank is 0; give at least 1"),
        ({"calib_length": 1}, "give at least 2"),
        ({"method": "toy", "weight_format": "nf4"}, "has no option weight_format"),
        ({"method": "toy", "rank": 2}, "method 'toy' has no option rank; leave it out or choose another method"),
        ({"method": "lrq", "level_dtype": "float16"}, "method 'lrq' has no option level_dtype"),
        ({"method": "toy", "method_options": {"rank": 2}}, r"has no options \['rank'\]; it has bits, group_size"),
        ({"method": "wide", "method_options": {"rounds": -1}}, "rounds must be"),
    ],
)
def test_what_is_not_allowed_is_said_with_what_is(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizeOptions(**values)
