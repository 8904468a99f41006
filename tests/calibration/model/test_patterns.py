"""Patterns that match nothing are errors, with what was probably meant."""

from __future__ import annotations

import re

import pytest

from rankbook.calibration.model.patterns import check_patterns

NAMES = [
    f"model.layers.{index}.{leaf}"
    for index in range(2)
    for leaf in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
]


@pytest.mark.parametrize("pattern", ["*.down_proj", "model.layers.0.*", "model.layers.[01].mlp.?ate_proj", NAMES[0]])
def test_a_pattern_that_matches_passes(pattern: str) -> None:
    check_patterns("skip", [pattern], NAMES)


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("down_proj", "write '*.down_proj'"),
        ("model.layers.0", "write 'model.layers.0.*'"),
        ("mlp", "write '*.mlp.*'"),
        ("gate", "write '*gate*'"),
        ("*.dwn_proj", "near ones are '*.down_proj'"),
        ("*.fc1", "near ones are '*.down_proj', '*.gate_proj', '*.k_proj', '*.q_proj'"),
        ("re:.*down_proj", "is a regular expression: write '*down_proj'"),
        (r".*\.down_proj$", "is a regular expression: write '*.down_proj'"),
        (r"model\.layers\.0\..*", "is a regular expression: write 'model.layers.0.*'"),
        (r"layers\.(0|1)", "is a regular expression"),
    ],
)
def test_one_that_matches_nothing_says_what_was_meant(pattern: str, meant: str) -> None:
    with pytest.raises(
        ValueError, match=re.escape(repr(pattern)) + r" matches none of the 8 layers.*" + re.escape(meant)
    ):
        check_patterns("skip", ["*.k_proj", pattern], NAMES)
