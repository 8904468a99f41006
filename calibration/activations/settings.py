"""Settings of a checkpoint beside its weights: low-bit activations and low-bit keys and values.

They lie in ``quantization_config`` of config.json as ``activations`` and ``kv_bits`` and are applied by `install` when
transformers loads the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rankbook.calibration.activations import inputs as activations
from rankbook.calibration.activations import kv_cache
from rankbook.calibration.activations.inputs import ActivationConfig
from rankbook.calibration.model import capture
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.packed_modules import CodebookLinear
from rankbook.calibration.model.patterns import matches
from rankbook.calibration.model.placement import CPU, batch_size, within_range


def chosen_settings(
    model: Any, tokens: Tensor, layers: Iterable[str], options: Any, device: torch.device = CPU
) -> dict[str, Any]:
    """Return the entries that `QuantizeOptions` ask for; static ranges are calibrated.

    Args:
        model: With its weights quantized.
        tokens: Calibration tokens (sequences, length).
        layers: Names of the layers whose inputs are quantized.
        options: See `rankbook.calibration.driver.options.QuantizeOptions`.
        device: Where its blocks run, one at a time.

    Raises:
        ValueError: A layer saw no input.
    """
    entries: dict[str, Any] = {}
    kind, skip = options.activations, tuple(options.activation_skip)
    used = [name for name in layers if not matches(name, skip)]
    if activations.is_static(kind):

        def run() -> None:
            with within_range(model, device), capture.each_placed(adapter_of(model).blocks(), device):
                for batch in torch.split(tokens, batch_size(tokens)):
                    model(input_ids=batch, use_cache=False, logits_to_keep=1)

        found = activations.calibrate(run, model, used, kind, options.activation_range)
        entries["activations"] = replace(found, skip=skip).to_json()
    elif kind != "none":
        entries["activations"] = ActivationConfig(kind, skip=skip).to_json()
    if options.kv_bits:
        entries["kv_bits"] = options.kv_bits
    return entries


@contextmanager
def in_block(
    block: nn.Module, prefix: str, layers: Iterable[str], run: Callable[[], None], options: Any
) -> Iterator[None]:
    """Quantize the inputs of a block's layers as the checkpoint will, where the options want that in training.

    Without a choice static ranges are, dynamic ones are not: calibration/README.md has what was measured.

    Args:
        block: The block.
        prefix: Its name in the model, with a dot at the end.
        layers: Names of its quantized layers, within the block.
        run: Feeds the calibration stream through the block; static ranges are chosen from it.
        options: See `rankbook.calibration.driver.options.QuantizeOptions`.
    """
    kind = options.activations
    used = [name for name in layers if not matches(f"{prefix}{name}", options.activation_skip)]
    wanted = activations.is_static(kind) if options.activation_training is None else options.activation_training
    if kind == "none" or not wanted or not used:
        yield
        return
    config = ActivationConfig(kind) if not activations.is_static(kind) else None
    with activations.applied(
        block, config or activations.calibrate(run, block, used, kind, options.activation_range), used
    ):
        yield


def install(model: Any, entries: Mapping[str, Any]) -> None:
    """Apply the entries of a checkpoint to its model.

    Raises:
        ValueError: A damaged entry, or a layer without a range.
    """
    config = ActivationConfig.from_json(entries.get("activations"))
    if config.kind != "none":
        activations.install(model, config, packed_linears(model))
    if entries.get("kv_bits"):
        kv_cache.install(model, int(entries["kv_bits"]))


def override(model: Any, *, kind: str | None, kv_bits: int | None) -> None:
    """Replace settings of a loaded model for an evaluation; None keeps what the model has.

    Args:
        model: A checkpoint, or any causal language model: the linear layers of its blocks are quantized then.
        kind: ``none`` or a dynamic kind of `rankbook.calibration.settings.ACTIVATION_FORMATS`.
        kv_bits: One of `rankbook.calibration.settings.KV_BITS`.

    Raises:
        ValueError: A static kind, whose ranges would have to be calibrated, or an unknown setting.
    """
    if kind is not None:
        activations.check_kind(kind)
        if activations.is_static(kind):
            raise ValueError(
                f"activations {kind!r} need calibrated ranges, which `rankbook quantize --activations {kind}` stores in"
                " the checkpoint; evaluate that checkpoint without --activations, or choose a dynamic kind"
            )
        activations.install(model, ActivationConfig(kind), packed_linears(model) or _plain_linears(model))
    if kv_bits is not None:
        kv_cache.install(model, kv_bits)


def packed_linears(model: Any) -> list[str]:
    """Return the names of the packed linear layers, the output layer left out."""
    head = adapter_of(model).embeddings().head
    others = {} if head is None else {head[0]}
    return [name for name, item in model.named_modules() if isinstance(item, CodebookLinear) and name not in others]


def _plain_linears(model: Any) -> list[str]:
    blocks = adapter_of(model).blocks()
    found = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return [name for name in found if name.startswith(f"{blocks.name}.")]
