"""What a comparison must know about the roundings of an exported file: how close it can be, and to which model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankbook.exporter.file import ExportedModel
    from rankbook.tools.runtimes.torch import TorchModel

TOLERANCE = {"fp32": 2e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Largest difference relative to the largest value, by activation type: some tens of roundings in a row per layer."""
ROUNDED_TOLERANCE = 5e-2
"""The same where inputs or the cache are rounded to 8 bits: a last digit that differs moves a value by a whole step."""


def default_tolerance(file: ExportedModel) -> float:
    """Return the largest relative difference that passes by what a file rounds."""
    tolerance = max(exact_tolerance(file), TOLERANCE["fp16"] if file.metadata.kv == "float16" else 0.0)
    rounds = file.metadata.kv == "int8" or file.metadata.activations != "none"
    return max(tolerance, ROUNDED_TOLERANCE) if rounds else tolerance


def exact_tolerance(file: ExportedModel) -> float:
    """Return the largest relative difference of one layer on one input, by the file's activation type."""
    return TOLERANCE.get(file.metadata.dtype, TOLERANCE["fp32"])


def rounds_inside(file: ExportedModel) -> bool:
    """Return whether the file's own operators round their input: each of them can be compared alone."""
    return file.metadata.activations == "int8"


def match_settings(file: ExportedModel, torch_model: TorchModel) -> None:
    """Take from the torch model the settings of activations and cache that the file was exported without."""
    from rankbook.calibration.activations.settings import override

    kind = file.metadata.activations
    if kind in ("none", "int8"):
        override(torch_model.model, kind="none", kv_bits=0)
    if kind == "int8":
        _round_groups(torch_model.model)


def _round_groups(model: Any) -> None:
    """Round the inputs of packed layers as the operators of a file with ``--activations int8`` do."""
    from rankbook.calibration.activations.fake_quant import per_token
    from rankbook.calibration.model.packed_modules import CodebookLinear

    def hook(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        groups = inputs[0].unflatten(-1, (-1, module.spec.group))
        return (per_token(groups, 8, symmetric=True).flatten(-2), *inputs[1:])

    for module in model.modules():
        if isinstance(module, CodebookLinear):
            module.register_forward_pre_hook(hook)
