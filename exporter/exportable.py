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
from rankbook.exporter import skeleton, verdicts
from rankbook.exporter.export import build_model
from rankbook.exporter.options import ExportOptions
from rankbook.exporter.refusal import NotExportableError

_BLOCKS, _KINDS = 2, 4
"""Fewest blocks, and most kinds of blocks, of the copy of a model that is tried."""


def check_exportable(config: Any) -> str:
    """Return why a model cannot be exported, or an empty string.

    A copy of two blocks without weights goes through the whole export but for the writing of files: seconds, unless
    the same code has done so before (`rankbook.exporter.verdicts`).

    Args:
        config: Its transformers configuration; of a model with a vision tower that of the whole model.
    """
    short = _shortened(config)
    text = json.dumps(short.to_dict(), sort_keys=True, default=str)
    if verdicts.known(short, text):
        return ""
    reason = _check(_Asked(short, text))
    if not reason:
        verdicts.keep(short, text)
    return reason


@dataclass(frozen=True)
class _Asked:
    config: Any = field(compare=False)
    text: str


@functools.lru_cache
def _check(asked: _Asked) -> str:
    try:
        build_model(_blank(asked.config), ExportOptions(), asked.config)
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


def _blank(config: Any) -> Checkpoint:
    shapes = {name: tensor.shape for name, tensor in skeleton.empty_model(config).named_parameters()}
    return _Blank(Path(), {}, {}, {}, dict.fromkeys(shapes, ""), shapes=shapes)


def _shortened(config: Any) -> Any:
    """Return a copy of a configuration with one block of every kind, and two at least.

    Kinds are what differs in the lists that have an entry for each block. Where the configuration computes them (Jamba,
    Bamba), there are as many blocks as it takes to meet each.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    for part in (config, text):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    if not isinstance(layers, int) or layers <= _BLOCKS:
        return config
    kinds = set(getattr(text, "layer_types", None) or ())
    lists = {name: value for name, value in vars(text).items() if isinstance(value, list) and len(value) == layers}
    kept = sorted({0, *(place for values in lists.values() for place in _places(values))})
    shared = layers - (getattr(text, "num_kv_shared_layers", None) or 0)  # blocks behind read the keys of earlier ones
    if shared < layers:
        types = text.layer_types
        kept = sorted({*kept, *(types.index(kind, shared) for kind in {*types[shared:]})})
        text.num_kv_shared_layers = sum(place >= shared for place in kept)
    kept += [place for place in range(1, layers) if place not in kept][: max(0, _BLOCKS - len(kept))]
    for name, values in lists.items():
        setattr(text, name, [values[place] for place in sorted(kept)])
    text.num_hidden_layers = len(kept)
    if ids := getattr(text, "hybrid_layer_ids", None):  # of Zamba 2, beside the list of kinds
        text.hybrid_layer_ids = [number for number, place in enumerate(sorted(kept)) if place in ids]
    while not lists and text.num_hidden_layers < layers and set(getattr(text, "layer_types", None) or ()) != kinds:
        text.num_hidden_layers += 1
    return config


def _places(values: list[Any]) -> list[int]:
    """Return where each kind comes first; of lists that give most blocks a value of their own, of two kinds."""
    kinds = [value for place, value in enumerate(values) if value not in values[:place]]
    return [values.index(kind) for kind in (kinds if len(kinds) <= _KINDS else kinds[:_BLOCKS])]
