"""Options that change nothing are said, and those that change something are not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.unused import note_unused

UNUSED: dict[str, tuple[dict[str, Any], str]] = {
    "branch": ({"error_rank": 8, "factor_bits": 16}, "error_rank 8 and factor_bits 16 have no effect: no layer has"),
    "scaling": ({"scale_strength": 0.7, "scale_inputs": "awq"}, "scale_strength 0.7 has no effect: inputs are not"),
    "rounding": ({"activation_skip": ("*.down_proj",)}, "has no effect: activations are not rounded"),
    "range": ({"activations": "token8", "activation_range": "minmax"}, "token8 finds its ranges anew"),
    "training": ({"activations": "static8", "activation_training": True}, "nothing is trained"),
    "memory": (
        {"device_memory": 0.0, "device": "cpu"},
        "device_memory 0.0 has no effect: this run computes on the CPU",
    ),
    "distribution": (
        {"order": "parallel", "calib_shards": 2},
        "order parallel and calib_shards 2 have no effect: nothing that was chosen depends on what enters",
    ),
    "weights": ({"cluster_weights": "path"}, "cluster_weights path has no effect: no cluster is given"),
    "weights of layers": (
        {"cluster_weights": "path", "cluster": "auto"},
        "cluster_weights path has no effect: no whole block is sent",
    ),
    "chat": ({"calib_chat": True}, "no calibration text is given"),
}
USED: list[dict[str, Any]] = [
    {},
    {"error_rank": 8, "error_branch": "qera", "branch_passes": 2},
    {"error_rank": 8, "rules": ("*.q_proj: branch=qera",)},
    {"error_rank": 8, "method": "lqer"},
    {"error_rank": 8, "rules": ("*.q_proj: method=lqer",)},
    {"scale_strength": 0.7, "method": "smoothquant"},
    {"activations": "static8", "activation_range": "minmax", "activation_skip": ("*.down_proj",)},
    {"activations": "token8", "activation_training": True, "method": "lcq"},
    {"calib_chat": True, "calib": "chats.jsonl"},
    {"order": "parallel", "calib_shards": 2, "method": "gptq"},
    {"order": "parallel", "cluster": "auto", "cluster_weights": "path", "method": "gptq"},
]


def _said(values: dict[str, Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        note_unused(QuantizeOptions(**{"method": "rtn", **values}))
    return [str(one.message) for one in caught]


@pytest.mark.parametrize(("values", "text"), UNUSED.values(), ids=UNUSED)
def test_what_changes_nothing_is_said(values: dict[str, Any], text: str) -> None:
    (said,) = _said(values)
    assert text in said


@pytest.mark.parametrize("values", USED, ids=str)
def test_what_changes_something_is_not(values: dict[str, Any]) -> None:
    assert _said(values) == []
