"""Writes into the file what made it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from rankbook.calibration.checkpoint.format import Checkpoint, versions
from rankbook.plugins import contract

FORMAT = "rankbook.format"
"""Metadata key that marks an exported file; its value is the version of the operators."""
LAYERS = "rankbook.layers"
"""Metadata key of the description of each packed layer, as JSON."""

DATA_SHA256 = "rankbook.data_sha256"
"""Metadata key of the SHA-256 of the data file, see `rankbook.exporter.file.ExportedModel.verify`."""
DIALECT = "rankbook.dialect"
"""Metadata key of the dialect; files without it are in that of rankbook."""
CONTEXT = "rankbook.context"
"""Metadata key of the positions, past ones included, up to which a file computes what the model does; a number."""


class AddMetadata(ir.passes.InPlacePass):
    """Sets producer and metadata properties: methods, bits, hashes of the checkpoint, tool versions, one entry a layer.

    Keys begin with ``rankbook.``; values that are not plain text are JSON. What torch noted about each node (stack
    traces of this machine) is left out.
    """

    def __init__(self, checkpoint: Checkpoint, extra: Mapping[str, str]) -> None:
        super().__init__()
        self._checkpoint = checkpoint
        self._extra = extra

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place."""
        layers = self._checkpoint.layers
        manifest = self._checkpoint.manifest
        model.producer_name = "rankbook"
        model.producer_version = _version("rankbook")
        model.graph.name = str(self._checkpoint.config.get("model_type", "model"))
        model.metadata_props.clear()
        properties = {
            FORMAT: str(contract.VERSION),
            "rankbook.method": ", ".join(sorted({spec.method for spec in layers.values()})),
            "rankbook.bits": ", ".join(str(bits) for bits in sorted({spec.bits for spec in layers.values()})),
            "rankbook.checkpoint_sha256": _json(_hashes(manifest)),
            "rankbook.versions": _json({**versions(), "onnx": _version("onnx"), "onnx_ir": _version("onnx-ir")}),
            LAYERS: _json({name: _entry(name, spec.to_json(), manifest) for name, spec in layers.items()}),
            **self._extra,
        }
        model.metadata_props.update(properties)
        return ir.passes.PassResult(model, modified=True)


def _hashes(manifest: Mapping[str, Any]) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in manifest.get("files", {}).items() if name.endswith(".safetensors")}


def _entry(name: str, spec: dict[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    known = manifest.get("layers", {}).get(name)
    return {**spec, "error": known["error"]} if isinstance(known, dict) and "error" in known else spec


def _json(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"
