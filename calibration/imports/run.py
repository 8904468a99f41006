"""Importing a whole model: what another tool has quantized becomes a checkpoint, its numbers as they were."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankbook.calibration.checkpoint.format import MANIFEST, write_checkpoint
from rankbook.calibration.checkpoint.output import check_replaceable, locked
from rankbook.calibration.driver.parts import checkpoint_parts
from rankbook.calibration.driver.report import LayerReport, in_float, outside, totals
from rankbook.calibration.driver.selection import has_weights
from rankbook.calibration.imports.folder import load_folder
from rankbook.calibration.imports.gguf import load_gguf
from rankbook.calibration.memory import peak_rss_bytes
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.gguf_file import read_once
from rankbook.calibration.model.loading import load_tokenizer, model_hash, resolve, source_folder
from rankbook.calibration.model.packed_modules import PackedModule, TiedCodebookLinear, packed_modules
from rankbook.calibration.source import Kind, Source, hub_origin
from rankbook.plugins.layer_spec import LayerSpec

KEPT = "in float in the source"
"""Why an import leaves a weight alone."""


@dataclass(frozen=True)
class ImportReport:
    """The result of an import.

    Attributes:
        output_dir: The checkpoint.
        format: Name of the source's format.
        settings: What the source says about its quantization.
        layers: Packed layers by full name.
        totals: As of `rankbook.calibration.driver.report.QuantizeReport`.
        left_alone: Names of weights that are in float, with the reason.
        seconds: Wall time.
        peak_rss_bytes: Peak resident memory of the process.
    """

    output_dir: Path
    format: str
    settings: Mapping[str, Any]
    layers: Mapping[str, LayerReport]
    totals: Mapping[str, Any]
    left_alone: Mapping[str, str]
    seconds: float
    peak_rss_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the packed layers of the blocks."""
        return float(self.totals["linear"]["bits_per_weight"])

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        layers = {name: {**layer.spec.to_json(), **layer.to_json()} for name, layer in self.layers.items()}
        return {**asdict(self), "output_dir": str(self.output_dir), "layers": layers}


def import_model(source: str | Path, output_dir: str | Path) -> ImportReport:
    """Write the checkpoint of a model that another tool has quantized: codes, scales and tables as they are.

    >>> report = rankbook.import_model("model-awq", "imported")
    >>> report.format, len(report.layers)
    ('awq', 7)

    Args:
        source: Hugging Face folder or id, GGUF file or a folder with one.
        output_dir: Folder of the result; an earlier checkpoint there is replaced when the new one is complete.

    Raises:
        ValueError: A source that is not quantized, or in a way that a checkpoint cannot hold without a change.
        FileExistsError: ``output_dir`` holds something else, or another run writes there.
        OSError: Writing failed; an earlier result is untouched.
    """
    start = time.monotonic()
    with locked(Path(output_dir)) as output:
        check_replaceable(output, MANIFEST)
        found = resolve(source)
        if found.packed:
            raise ValueError(f"{source} is a checkpoint of rankbook already")
        name, settings, model = _loaded(found)
        specs = _specs(model)
        report = _report(output, model, specs, (name, settings), start)
        known = {"hub_id": found.location} if found.kind is Kind.HUB else hub_origin(found.location)
        origin = {"name": known.get("hub_id", str(source)), "sha256": model_hash(source), **known}
        manifest = _manifest(report, origin)
        write_checkpoint(
            output, checkpoint_parts(model, load_tokenizer(source), specs, manifest, source_folder(source))
        )
        return report


def _loaded(found: Source) -> tuple[str, Mapping[str, Any], Any]:
    """Return the name of the format, what the source says about it, and the model with packed layers."""
    if found.kind is Kind.GGUF:
        with read_once():
            model, counts = load_gguf(found)
        return "gguf", {"matrices_by_type": counts}, model
    model, form, entry = load_folder(found.location)
    return form.name, entry, model


def _specs(model: Any) -> dict[str, LayerSpec]:
    """Return the specs of packed layers by name."""
    found = packed_modules(model)
    owners = {id(module): name for name, module in found.items() if isinstance(module, PackedModule)}
    return {
        name: module.record().spec(shared_with=owners[id(module.source)])
        if isinstance(module, TiedCodebookLinear)
        else module.spec
        for name, module in found.items()
    }


def _report(
    output: Path, model: Any, specs: Mapping[str, LayerSpec], source: tuple[str, Mapping[str, Any]], start: float
) -> ImportReport:
    layers = {layer: LayerReport(spec) for layer, spec in specs.items()}
    blocks = adapter_of(model).blocks()
    inside = {layer: report for layer, report in layers.items() if layer.startswith(f"{blocks.name}.")}
    entries = outside(adapter_of(model).embeddings(), layers)
    entries |= {"blocks": in_float(blocks.modules, inside.values()), "model": in_float([model], layers.values())}
    left = {layer: KEPT for layer, module in model.named_modules() if layer not in specs and has_weights(module)}
    return ImportReport(
        output_dir=output,
        format=source[0],
        settings=dict(source[1]),
        layers=layers,
        totals=totals(inside, entries),
        left_alone=left,
        seconds=time.monotonic() - start,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _manifest(report: ImportReport, source: Mapping[str, str]) -> dict[str, Any]:
    return {
        "source": dict(source),
        "imported": {"format": report.format, "settings": dict(report.settings)},
        "calibration": f"none: imported from {report.format}",
        "totals": dict(report.totals),
        "layers": {name: layer.to_json() for name, layer in report.layers.items()},
        "left_alone": dict(report.left_alone),
        "run": {"seconds": report.seconds, "peak_rss_bytes": report.peak_rss_bytes},
    }
