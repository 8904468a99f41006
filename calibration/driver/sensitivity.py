"""Which layers deserve bits: what rounding each of them alone would do to the model's output, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rankbook.calibration.data import calibration_batches
from rankbook.calibration.driver.allocation import SEQUENCES, by_choice, candidates
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.selection import select
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.loading import load_model
from rankbook.calibration.model.packed_modules import packed_modules
from rankbook.calibration.model.placement import within_range
from rankbook.calibration.model.plain import make_plain, restore


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer, or the layers of all experts of one matrix.

    Attributes:
        name: Dotted name of the torch module.
        weights: Number of weights.
        harm: Predicted divergence of the model's output in nats per token where this layer alone is rounded to nearest
            on a searched grid, by bits of a code.
        stored: Stored bits per weight, by bits of a code.
    """

    name: str
    weights: int
    harm: Mapping[int, float]
    stored: Mapping[int, float]

    def gain(self, low: int, high: int) -> float:
        """Return what ``high`` bits in place of ``low`` gain: nats per token for a million stored bits."""
        return (self.harm[low] - self.harm[high]) / ((self.stored[high] - self.stored[low]) * self.weights / 1e6)


def layer_sensitivities(source: str | Path, *, calib: str | None = None, seed: int = 0) -> list[LayerSensitivity]:
    """Return the sensitivities of the layers that `quantize` would pack, in their order.

    One backward pass over four windows of 512 tokens, see `rankbook.calibration.driver.allocation`.

    Args:
        source: Model that is not quantized.
        calib: Text, as `QuantizeOptions.calib`; sampled from the model without.
        seed: Of sampled text and labels.

    Raises:
        ValueError: The model is quantized already, or has no layer to quantize.
    """
    model, tokenizer = load_model(source)
    if packed_modules(model):
        raise ValueError(f"{source} is quantized already: the errors of its layers are known; give the original model")
    options = QuantizeOptions(method="rtn", clip_search=True, allow_partial=True, seed=seed)
    adapter = adapter_of(model)
    blocks, forms = adapter.blocks(), make_plain(model)
    names = select(model, blocks, options).names(blocks)
    restore(model, forms, names)
    length = min(options.calib_length, adapter.longest_text() or options.calib_length)
    with within_range(model):
        data = calibration_batches(tokenizer, calib, sequences=SEQUENCES, length=length, seed=seed, model=model)
        found = by_choice(candidates(model, names, data.tokens, options))
    sizes = {
        name: len(members) * model.get_submodule(members[0]).weight.numel() for name, (members, _) in found.items()
    }
    return [
        LayerSensitivity(
            name,
            sizes[name],
            {choice.bits: harm for choice, harm in cost.harm.items()},
            {choice.bits: stored / sizes[name] for choice, stored in cost.stored.items()},
        )
        for name, (_, cost) in found.items()
    ]
