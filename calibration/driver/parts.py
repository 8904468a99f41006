"""What a checkpoint holds, gathered from a model whose layers have been packed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rankbook.calibration.checkpoint.extras import copy_extras
from rankbook.calibration.checkpoint.format import CheckpointParts
from rankbook.calibration.model.adapter import adapter_of
from rankbook.plugins.layer_spec import LayerSpec


def checkpoint_parts(
    model: Any, tokenizer: Any, specs: Mapping[str, LayerSpec], manifest: Mapping[str, Any], folder: Path | None
) -> CheckpointParts:
    """Gather what the checkpoint holds; tied weights are stored once, other files of the source's folder go along."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    packed = {f"{name}.{part}" for name, spec in specs.items() for part in spec.tensors()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
        elif name in packed:  # layers are read one by one: each has its own, such as levels that are the same for all
            tensors[name] = tensor.clone()
    config = json.loads(model.config.to_json_string())
    config.setdefault("architectures", [type(model).__name__])
    if (
        found := adapter_of(model).embeddings()
    ).head is not None:  # the flags of a wrapper and its inner model may differ
        for part in (config, config.get("text_config")):
            if part is not None:
                part["tie_word_embeddings"] = found.tied

    def save_extras(target: Path) -> None:
        if folder is not None:
            copy_extras(folder, target)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)

    return CheckpointParts(config, specs, tensors, manifest, save_extras)
