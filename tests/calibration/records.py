"""Random records of every stored form, for the tests."""

from __future__ import annotations

from typing import Any

import torch

from rankbook.calibration.record.quantized_linear import LEVEL_LIMIT, Factor, GroupParams, LowRank, QuantizedLinear


def random_record(
    out_features: int = 40,
    in_features: int = 48,
    *,
    bits: int = 3,
    group: int = 16,
    planes: int = 2,
    has_offset: bool = True,
    param_bits: int = 8,
    float_levels: bool = False,
    linear_levels: bool = False,
    bias: bool = False,
    rank: int = 0,
    factor_bits: int = 8,
    seed: int = 0,
) -> QuantizedLinear:
    """Return a record of random numbers in the given form."""
    generator = torch.Generator().manual_seed(seed)
    limit = LEVEL_LIMIT[bits]
    levels = torch.randint(-limit, limit, (planes, 1 << bits), generator=generator)
    if linear_levels:
        levels[:] = torch.arange(1 << bits) - (1 << bits) // 2
    params = torch.randn(out_features, in_features // group, planes + has_offset, generator=generator) * 0.01
    low_rank = None
    if rank:
        down = torch.randn(rank, in_features, generator=generator)
        up = torch.randn(out_features, rank, generator=generator) * 0.01
        low_rank = LowRank(Factor.quantize(down, factor_bits, 0), Factor.quantize(up, factor_bits, 1))
    return QuantizedLinear(
        codes=torch.randint(0, 1 << bits, (out_features, in_features), generator=generator).to(torch.uint8),
        bits=bits,
        levels=levels.to(torch.float16) / 10 if float_levels else levels.to(torch.int8),
        params=GroupParams.quantize(params, param_bits),
        has_offset=has_offset,
        bias=torch.randn(out_features, generator=generator) if bias else None,
        low_rank=low_rank,
        method="random",
    )


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "2 bits": {"bits": 2, "planes": 1},
    "4 bits": {"bits": 4, "group": 48},
    "8 bits": {"bits": 8, "planes": 1, "has_offset": False},
    "one row panel": {"out_features": 32},
    "odd sizes": {"out_features": 33, "in_features": 50, "group": 50},
    "fp16 params": {"param_bits": 16},
    "fp32 params": {"param_bits": 32, "float_levels": True},
    "bias": {"bias": True},
    "branch": {"rank": 5},
    "fp16 branch": {"rank": 4, "factor_bits": 16, "bias": True},
}
"""Arguments of `random_record` that together cover every stored form."""
