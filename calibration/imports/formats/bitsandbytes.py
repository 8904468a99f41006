"""bitsandbytes in 4 bits (NF4, FP4): a table of 16 values, and a largest magnitude for each block of a row."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankbook.calibration.imports.base import Format, ImportRefusedError, Numbers

_STATE = "weight.quant_state.bitsandbytes__"
_SHIFT = 2.0**10
"""Table values times this, a power of two, keep away from float16's smallest numbers."""


def check(entry: Mapping[str, object]) -> None:
    """Refuse LLM.int8."""
    if entry.get("load_in_8bit"):
        raise ImportRefusedError(
            "LLM.int8 of bitsandbytes splits inputs by their size while it runs, which no record holds; quantize the"
            " original model to 8 bits"
        )


def numbers(tensors: Mapping[str, Tensor], _: Mapping[str, object]) -> Numbers:
    """Return a layer of ``weight`` (N K / 2, 1) uint8 and the state beside it.

    The table's values have float32's digits, which two planes of float16 levels hold to the last one or two.
    Blocks may run over the ends of rows: a group is what lies in one row and one block.
    """
    state = _state(tensors)
    (rows, columns), block = state["shape"], int(state["blocksize"])
    bytes_ = tensors["weight"].view(torch.uint8).reshape(-1)
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], 1).reshape(rows, columns)
    scales = tensors["weight.absmax"].flatten()
    if "weight.nested_absmax" in tensors:
        outer = tensors["weight.nested_absmax"][torch.arange(scales.numel()) // int(state["nested_blocksize"])]
        scales = tensors["weight.nested_quant_map"][scales.long()] * outer + float(state["nested_offset"])
    values = tensors["weight.quant_map"].double() * _SHIFT
    high = values.half()
    low = ((values - high.double()) * _SHIFT).half()
    group = math.gcd(columns, block)
    scales = scales.double()[torch.arange(0, rows * columns, group) // block].view(rows, -1)
    planes = [scales / _SHIFT, scales / _SHIFT**2]
    return Numbers(codes, 4, planes, f"bnb-{state['quant_type']}", levels=torch.stack([high, low]))


def _state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    found = [tensor for name, tensor in tensors.items() if name.startswith(_STATE)]
    if len(found) != 1:
        raise ImportRefusedError("it has no state of bitsandbytes beside its weight; save it again with transformers")
    state: dict[str, Any] = json.loads(bytes(found[0].tolist()))
    return state


FORMAT = Format(
    "bitsandbytes",
    "bitsandbytes (NF4, FP4)",
    lambda entry: entry.get("quant_method") == "bitsandbytes" or bool(entry.get("load_in_4bit")),
    "weight.absmax",
    numbers,
    check,
)
