"""``rankbook inspect``: the layers of a checkpoint, an exported file, an engine or an unquantized model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rankbook.calibration.option import argument, option
from rankbook.tools.command import Command, Common, Outcome
from rankbook.tools.errors import UsageError
from rankbook.tools.report import Table, plain

if TYPE_CHECKING:
    from rankbook.tools.inspect.inspection import Inspection, Layer

_SHORT = ("file_bytes", "stored_bytes", "engine_bytes", "weights_bytes", "model_type", "opset", "version")


@dataclass(frozen=True, kw_only=True)
class Inspect(Common):
    """Options of the verb."""

    path: Path = argument(
        "checkpoint, exported folder, .onnx file, engine folder, Hugging Face folder or GGUF", metavar="ANY"
    )
    sensitivity: bool = option(
        False,
        "for an unquantized model: estimate from one backward pass how rounding each layer alone to 2, 3, 4 or 8 bits"
        " changes the output; the most sensitive layers come first",
    )
    calib: str | None = option(
        None, "text for --sensitivity, as in `quantize`; default: text sampled from the model", metavar="FILE"
    )
    verify: bool = option(True, "read the weights and compare their SHA-256 with what was written")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calib is not None and not self.sensitivity:
            raise UsageError("--calib is the text of --sensitivity; give that too")


def run(options: Inspect) -> Outcome:
    """Describe it."""
    if options.sensitivity:
        return _sensitivity(options)
    from rankbook.tools.inspect.inspection import inspect

    found = inspect(options.path, verify=options.verify)
    report = {**plain(found), "bits_per_weight": found.bits_per_weight}
    return Outcome(report=report, tables=[_table(found)], text=_summary(found))


def _sensitivity(options: Inspect) -> Outcome:
    """Say which layers deserve bits."""
    import torch

    from rankbook.calibration.driver.sensitivity import layer_sensitivities

    if options.threads:
        torch.set_num_threads(options.threads)
    found = layer_sensitivities(options.path, calib=options.calib, seed=options.seed)
    found.sort(key=lambda layer: -layer.gain(3, 4))
    widths = list(found[0].harm)
    columns = ("layer", "weights", *(f"{bits} bits" for bits in widths), "3 to 4 bits gains")
    rows = [[layer.name, layer.weights, *layer.harm.values(), layer.gain(3, 4)] for layer in found]
    title = "divergence of the output, nats per token, where one layer is rounded; gains for a million stored bits"
    layers = [{**plain(layer), "gain_3_to_4": layer.gain(3, 4)} for layer in found]
    text = "the sum over layers is what rounding all of them does; `quantize --target-bits` spends a budget so"
    return Outcome(
        {"kind": "sensitivity", "path": str(options.path), "layers": layers}, [Table(title, columns, rows)], text
    )


def _table(found: Inspection) -> Table:
    columns: dict[str, Callable[[Layer], object]] = {
        "layer": lambda layer: layer.name,
        "method": lambda layer: layer.method,
        "bits": lambda layer: layer.bits,
        "N x K": lambda layer: f"{layer.out_features} x {layer.in_features}",
        "group": lambda layer: layer.group,
        "rank": lambda layer: layer.planes,
        "error rank": lambda layer: layer.error_rank or None,
        "stored bits/weight": lambda layer: layer.stored_bits,
        "error": lambda layer: layer.error,
        "operator": lambda layer: layer.operator,
    }
    rows = [[value(layer) for value in columns.values()] for layer in found.layers]
    return Table(f"{found.kind} {found.path}", tuple(columns), rows)


def _summary(found: Inspection) -> str:
    lines = [f"{len(found.layers)} layers with a weight matrix"]
    if found.bits_per_weight is not None:
        lines.append(f"{found.bits_per_weight:.3f} stored bits per weight over the quantized ones")
    if left := found.facts.get("left_in_float"):
        largest = ", ".join(left["largest"])
        lines.append(
            f"{left['share']:.1%} of the weights are in float" + (f", the largest are {largest}" if largest else "")
        )
    lines += [f"{key}: {found.facts[key]}" for key in _SHORT if key in found.facts]
    lines += [f"NOTE: {found.facts['note']}"] if "note" in found.facts else []
    lines += [f"{tool}: {command}" for tool, command in found.facts.get("commands", {}).items()]
    if metadata := found.facts.get("metadata"):
        lines += [f"{key}: {value}" for key, value in sorted(metadata.items()) if len(value) <= 100]
    for check in found.facts.get("checks", ()):
        lines.append(f"check {check['name']}: {'ok' if check['passed'] else 'FAILED'} ({check['detail']})")
    if options := found.facts.get("options"):
        lines.append(f"options: {json.dumps(options)}")
    return "\n".join(lines)


COMMAND = Command(
    name="inspect",
    summary="show the layers of a checkpoint, an exported file, an engine or an unquantized model",
    example="rankbook inspect onnx --json",
    options=Inspect,
    run=run,
)
