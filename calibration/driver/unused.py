"""Options that were given and change nothing, because what they are for was not chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rankbook.calibration.activations.inputs import is_static
from rankbook.calibration.device import resolve
from rankbook.calibration.driver.cluster_options import SEQUENTIAL
from rankbook.calibration.notes import note

if TYPE_CHECKING:
    from rankbook.calibration.driver.options import QuantizeOptions


def note_unused(options: QuantizeOptions) -> None:
    """Say of each option with another value than its default that it has no effect, where that is so."""
    defaults = {item.name: item.default for item in dataclasses.fields(options)}
    for names, reason in _idle(options):
        if given := [f"{name} {getattr(options, name)}" for name in names if getattr(options, name) != defaults[name]]:
            verb = "has" if len(given) == 1 else "have"
            note(f"{' and '.join(given)} {verb} no effect: {reason}")


def _idle(options: QuantizeOptions) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield names of options that would change nothing, with the reason."""
    each = [options, *options.layer_rules.options.values()]
    if not any(one.branch() != "none" for one in each):
        yield ("error_rank", "branch_passes", "factor_bits"), "no layer has an error branch"
    if options.scaling() != "smoothquant":
        yield ("scale_strength",), "inputs are not scaled by smoothquant"
    if options.activations == "none":
        yield ("activation_skip", "activation_range", "activation_training"), "activations are not rounded"
    elif not is_static(options.activations):
        yield ("activation_range",), f"{options.activations} finds its ranges anew for each token"
    if options.activations != "none" and not options.trains():
        yield ("activation_training",), "nothing is trained"
    if options.cluster is None:
        yield ("cluster_gpus", "cluster_weights"), "no cluster is given"
    elif options.order == SEQUENTIAL and options.calib_shards == 1:
        yield ("cluster_weights",), "no whole block is sent without --order parallel or --calib-shards"
    if not options.weighs_inputs():
        yield ("order", "calib_shards"), "nothing that was chosen depends on what enters the blocks"
    if resolve(options.device).type == "cpu":
        yield ("device_memory",), "this run computes on the CPU"
    if options.calib is None:
        yield ("calib_chat",), "no calibration text is given"
