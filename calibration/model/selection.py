"""Which layers of a model are quantized, and which are left alone and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from rankbook.calibration.model.capture import Blocks
from rankbook.calibration.model.options import QuantizeOptions


@dataclass
class Selection:
    """The choice for one model.

    Attributes:
        layers: For each block, the names of its linear layers within the block, in order of their definition.
        left_alone: Full names of weights that stay as they are, with the reason. One-dimensional ones are not listed.
    """

    layers: list[list[str]] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)


def select(model: nn.Module, blocks: Blocks, options: QuantizeOptions) -> Selection:
    """Choose the plain linear layers of the blocks.

    Raises:
        ValueError: The group size fits none of the rows of a layer, or nothing is left to quantize.
    """
    selection = Selection()
    owners: dict[int, int] = {}
    for block in blocks.modules:
        for module in block.modules():
            owners[id(module)] = owners.get(id(module), 0) + 1
    for index, block in enumerate(blocks.modules):
        selection.layers.append([])
        for local, module in block.named_modules():
            name = f"{blocks.name}.{index}.{local}"
            if reason := _reason(name, module, options, shared=owners[id(module)] > 1):
                selection.left_alone[name] = reason
            elif type(module) is nn.Linear:
                _check_group(name, module.in_features, options)
                selection.layers[-1].append(local)
    if not any(selection.layers):
        raise ValueError(f"no layer of {type(model).__name__} is left to quantize; check --skip and the kind of model")
    _note_outside(model, blocks, selection)
    return selection


def _reason(name: str, module: nn.Module, options: QuantizeOptions, *, shared: bool) -> str:
    """Return why a module with weights of its own is left alone; empty if it is not, or has none."""
    if all(parameter.ndim < 2 for parameter in module.parameters(recurse=False)):
        return ""
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is not a linear layer that rankbook knows"
    if any(fnmatchcase(name, pattern) for pattern in options.skip):
        return "skipped by option"
    return "used by more than one block" if shared else ""


def _check_group(name: str, in_features: int, options: QuantizeOptions) -> None:
    try:
        options.group(in_features)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _note_outside(model: Any, blocks: Blocks, selection: Selection) -> None:
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    for name, module in model.named_modules():
        outside = not name.startswith(f"{blocks.name}.") and all(module is not table for table in tables)
        if outside and any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False)):
            selection.left_alone[name] = f"{type(module).__name__} outside the decoder blocks"
