"""Whether a model can be exported, asked before hours are spent on it."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankbook.calibration.checkpoint.format import Checkpoint
from rankbook.exporter import skeleton
from rankbook.exporter.export import build_model
from rankbook.exporter.options import ExportOptions
from rankbook.exporter.refusal import NotExportableError

_BLOCKS = 2


def check_exportable(config: Any) -> str:
    """Return why a model cannot be exported, or an empty string.

    A copy of two blocks without weights goes through the whole export but for the writing of files: seconds.

    Args:
        config: Its transformers configuration; of a model with a vision tower that of the whole model.
    """
    short = _shortened(config)
    return _check(_Asked(short, json.dumps(short.to_dict(), sort_keys=True, default=str)))


@dataclass(frozen=True)
class _Asked:
    config: Any = field(compare=False)
    text: str


@functools.lru_cache
def _check(asked: _Asked) -> str:
    try:
        shapes = {name: tensor.shape for name, tensor in skeleton.empty_model(asked.config).named_parameters()}
        checkpoint = _Blank(Path(), {}, {}, {}, dict.fromkeys(shapes, ""), shapes=shapes)
        build_model(checkpoint, ExportOptions(), asked.config)
    except NotExportableError as error:
        return error.reason
    except ValueError as error:  # of the passes
        return str(error)
    return ""


@dataclass(frozen=True)
class _Blank(Checkpoint):
    """A checkpoint of ones that take no memory."""

    shapes: Mapping[str, torch.Size] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """Return ones."""
        return torch.ones(()).expand(self.shapes[name])


def _shortened(config: Any) -> Any:
    """Return a copy of a configuration with two blocks, and with the first two entries of every list of blocks."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    for part in (config, text):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    if isinstance(layers, int) and layers > _BLOCKS:
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == layers:
                setattr(text, name, _both_kinds(value))
        text.num_hidden_layers = _BLOCKS
    return config


def _both_kinds(values: list[Any]) -> list[Any]:
    """Return the first value and the next that differs from it."""
    return [values[0], next((value for value in values if value != values[0]), values[1])]
