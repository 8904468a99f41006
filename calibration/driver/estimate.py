"""What a run will store and hold in memory, before it runs.

What each layer gets follows from the method's answer to a small piece of it: the form of a record (planes, offset,
types of parameters) does not depend on the size of a layer, and its stored bits follow from form and size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from rankbook.calibration.driver.cluster_options import PARALLEL
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.solve import solve_layer
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.plugins import layout
from rankbook.plugins.layer_spec import LayerSpec

_COLUMNS = 256
"""Inputs of a piece, at least."""


def planned_specs(model: nn.Module, names: Sequence[str], options: QuantizeOptions) -> dict[str, LayerSpec]:
    """Return the specs that layers will have, by name; a budget, which chooses others, is not spent."""
    known: dict[tuple[object, ...], LayerSpec] = {}
    found = {}
    for name in names:
        weight: torch.Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
        chosen = options.of_layer(name)
        bias = getattr(model.get_submodule(name), "bias", None) is not None
        key = (id(chosen), bias, *weight.shape)
        if key not in known:
            known[key] = _spec(weight, chosen, bias=bias)
        found[name] = known[key]
    return found


def _spec(weight: torch.Tensor, options: QuantizeOptions, *, bias: bool) -> LayerSpec:
    rows, columns = weight.shape
    group = options.group(columns)
    height = min(rows, layout.ceil_div(max(options.error_rank, 1), layout.PANEL) * layout.PANEL)
    small = options
    if group > _COLUMNS:  # the whole row
        width = min(columns, max(_COLUMNS, options.error_rank))
        small = replace(options, group_size="channel", rules=())
    else:
        width = min(columns, layout.ceil_div(max(_COLUMNS, options.error_rank), group) * group)
    piece = weight[:height, :width].detach().float()
    statistics = LayerStatistics.empty(width)
    statistics.update(torch.eye(width))
    with torch.random.fork_rng(devices=[]):
        record = solve_layer(LayerProblem("", piece, torch.zeros(height) if bias else None, statistics), small)
    return replace(record.spec(), out_features=rows, in_features=columns, group=group)


def memory(model: nn.Module, blocks: Sequence[nn.Module], hidden: int, options: QuantizeOptions) -> Mapping[str, int]:
    """Return what a run holds in bytes, by part; the weights are mapped from their file where they can be."""
    largest = max(blocks, key=lambda block: sum(p.numel() for p in block.parameters()))
    first = next(largest.parameters())
    parts = {
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "one block in float32": 4 * sum(parameter.numel() for parameter in largest.parameters()),
    }
    if options.weighs_inputs():
        tokens, streams = options.calib_sequences * options.calib_length, 1 + options.trains()
        if options.order == PARALLEL:  # what enters the first block, and what enters and leaves the present one
            streams = 3
        parts["calibration activations"] = streams * tokens * hidden * first.element_size()
        widths = [module.in_features for module in largest.modules() if isinstance(module, nn.Linear)]
        parts["statistics of a block"] = 4 * sum(width * width for width in widths)
    return parts
