"""Writes into the file what made it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from rankbook.calibration.checkpoint.format import Checkpoint
from rankbook.calibration.versions import versions
from rankbook.exporter.properties import Metadata
from rankbook.plugins import contract


class AddMetadata(ir.passes.InPlacePass):
    """Sets producer and metadata properties: methods, bits, hashes of the checkpoint, tool versions, one entry a layer.

    What torch noted about each node (stack traces of this machine) is left out.
    """

    def __init__(self, checkpoint: Checkpoint, **more: Any) -> None:
        """Give the fields of `Metadata` that the checkpoint does not say as ``more``."""
        super().__init__()
        self._name = str(checkpoint.config.get("model_type", "model"))
        layers, manifest = checkpoint.layers, checkpoint.manifest
        self._metadata = Metadata(
            format=str(contract.VERSION),
            method=", ".join(sorted({spec.method for spec in layers.values()})),
            bits=", ".join(str(bits) for bits in sorted({spec.bits for spec in layers.values()})),
            checkpoint_sha256=_hashes(manifest),
            versions=versions("onnx", "onnx_ir"),
            layers={name: _entry(name, spec.to_json(), manifest) for name, spec in layers.items()},
            **more,
        )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place."""
        model.producer_name, model.producer_version = "rankbook", versions()["rankbook"]
        model.graph.name = self._name
        model.metadata_props.clear()
        model.metadata_props.update(self._metadata.texts())
        return ir.passes.PassResult(model, modified=True)


def _hashes(manifest: Mapping[str, Any]) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in manifest.get("files", {}).items() if name.endswith(".safetensors")}


def _entry(name: str, spec: dict[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    known = manifest.get("layers", {}).get(name)
    return {**spec, "error": known["error"]} if isinstance(known, dict) and "error" in known else spec
