"""The language model alone of a checkpoint with a vision tower (LLaVA and its like)."""

from __future__ import annotations

from dataclasses import replace

from rankbook.calibration.checkpoint.format import Checkpoint, CheckpointError
from rankbook.calibration.checkpoint.integrity import member
from rankbook.calibration.model.adapter import family_of


def language_view(checkpoint: Checkpoint) -> Checkpoint:
    """Return the language model alone of a checkpoint with a vision tower, under the names it has alone.

    A checkpoint without a vision tower is returned as it is.

    Raises:
        CheckpointError: The language model lies somewhere else than in LLaVA and its like.
    """
    config = checkpoint.config
    if "vision_config" not in config or "text_config" not in config:
        return checkpoint
    text = member(config, "text_config", checkpoint.folder / "config.json")
    family = family_of(config.get("model_type"), text.get("model_type"))
    inside = {
        family.language_name(name): name for name in checkpoint.files if name.startswith((family.language, "lm_head."))
    }
    if len(inside) < 2:
        raise CheckpointError(
            f"{checkpoint.folder}: a model of type {config.get('model_type')!r} keeps its language model in an unknown"
            f" place (not {family.language}*), so it cannot be exported alone"
        )
    layers = {
        family.language_name(name): replace(spec, shared_with=family.language_name(spec.shared_with))
        for name, spec in checkpoint.layers.items()
    }
    quantization = dict(config.get("quantization_config", {}))
    if ranges := (quantization.get("activations") or {}).get("ranges"):
        renamed = {family.language_name(name): found for name, found in ranges.items()}
        quantization["activations"] = {**quantization["activations"], "ranges": renamed}
    noted = {family.language_name(name): entry for name, entry in checkpoint.manifest.get("layers", {}).items()}
    return replace(
        checkpoint,
        config={**text, "quantization_config": quantization},
        manifest={**checkpoint.manifest, "layers": noted},
        layers=layers,
        files={name: checkpoint.files[stored] for name, stored in inside.items()},
        stored_names=inside,
    )
