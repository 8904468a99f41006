"""Which layers of a model are quantized, and which are left alone and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from rankbook.calibration.activations.inputs import is_static
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.report import GATE, OUTSIDE, SKIPPED
from rankbook.calibration.model.adapter import Blocks, adapter_of
from rankbook.calibration.model.experts import matrix_of
from rankbook.calibration.model.patterns import check_patterns, matches
from rankbook.calibration.model.plain import is_product
from rankbook.plugins.layer_spec import MIN_GROUP

LEAST_SHARE = 0.5
"""Share of the blocks' weights that must be quantized, or left alone by option, unless ``allow_partial`` is given."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Fields of configurations that say how many experts a block has."""


@dataclass
class Selection:
    """The choice for one model.

    Attributes:
        layers: For each block, the names of its linear layers within the block, in order of their definition.
        left_alone: Full names of weights that stay as they are, with the reason. One-dimensional ones are not listed.
        rules: For how many layers each rule holds.
    """

    layers: list[list[str]] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    rules: dict[str, int] = field(default_factory=dict)

    def share(self, blocks: Blocks) -> float:
        """Return the share of the weights in the blocks that the layers hold."""
        every = {id(p): p.numel() for block in blocks.modules for p in block.parameters() if p.ndim >= 2}
        pairs = zip(blocks.modules, self.layers, strict=True)
        chosen = [block.get_submodule(name).weight for block, layers in pairs for name in layers]
        return sum(weight.numel() for weight in chosen) / sum(every.values())  # type: ignore[operator,misc]

    def names(self, blocks: Blocks) -> list[str]:
        """Return the full names of the layers."""
        return [f"{blocks.name}.{index}.{local}" for index, layers in enumerate(self.layers) for local in layers]


def select(model: nn.Module, blocks: Blocks, options: QuantizeOptions) -> Selection:
    """Choose the linear layers of the blocks (`rankbook.calibration.model.plain`).

    Routers and gates of experts stay in float: they are small, and what they choose changes at once. So do layers whose
    rows are shorter than the smallest group.

    Raises:
        ValueError: The group size fits none of the rows of a layer, a pattern matches nothing, or nothing or too little
            is left to quantize.
    """
    selection, others = Selection(), Counter[str]()
    owners = Counter(id(module) for block in blocks.modules for module in block.modules())
    counted: set[int] = set()
    gates = _gates(model)
    for index, block in enumerate(blocks.modules):
        selection.layers.append([])
        for local, module in block.named_modules():
            name = f"{blocks.name}.{index}.{local}"
            if not has_weights(module):
                continue
            reason = _reason(name, module, options, gates)
            if not reason and owners[id(module)] > 1:
                reason = "used by more than one block"
            if id(module) not in counted:
                others["" if reason in ("", SKIPPED) else type(module).__name__] += _weights(module)
            counted.add(id(module))
            if reason:
                selection.left_alone[name] = reason
            elif isinstance(module, nn.Linear):
                _check_group(name, module.in_features, options.of_layer(name))
                selection.layers[-1].append(local)
    _note_outside(model, blocks, selection)
    chosen = selection.names(blocks)
    check_patterns("skip", options.skip, [name for name, module in model.named_modules() if has_weights(module)])
    skipped = [name for name, why in selection.left_alone.items() if why == SKIPPED]
    selection.rules = options.layer_rules.counted([*chosen, *skipped])
    if not chosen:
        raise ValueError(
            f"no layer of {type(model).__name__} is left to quantize; check --skip, --rule and the kind of model"
        )
    check_patterns("activation_skip", options.activation_skip, chosen)
    _check_ranges(chosen, options)
    if options.activations != "none" and all(matches(name, options.activation_skip) for name in chosen):
        raise ValueError(
            f"activation_skip {options.activation_skip} leaves no layer whose input could be quantized; name fewer"
        )
    if not options.allow_partial:
        _check_share(model, others)
    return selection


def _check_ranges(chosen: list[str], options: QuantizeOptions) -> None:
    """Refuse static ranges for what enters experts: those that no token is sent to would have none."""
    experts = [name for name in chosen if matrix_of(name) and not matches(name, options.activation_skip)]
    if is_static(options.activations) and experts:
        raise ValueError(
            f"activations {options.activations!r} need a range for the inputs of every layer, and experts such as"
            f" {experts[0]} may see no calibration token; give --activation-skip '*.experts.*'"
        )


def has_weights(module: nn.Module) -> bool:
    """Return whether a module has weights of its own: parameters of two dimensions or more."""
    return any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False) if parameter.ndim >= 2)


def _gates(model: nn.Module) -> set[int]:
    """Return how many outputs a router or gate of experts has; empty for a model without experts."""
    config = adapter_of(model).config
    parts = (config, getattr(config, "ffn_config", None))
    counts = {int(getattr(part, name, None) or 0) for part in parts for name in _EXPERTS} - {0, 1}
    return {1, *counts} if counts else set()


def _reason(name: str, module: nn.Module, options: QuantizeOptions, gates: set[int]) -> str:
    """Return why a module with weights is left alone; empty if it is not."""
    if matches(name, options.skip) or options.layer_rules.skips(name):
        return SKIPPED
    weight = module._parameters.get("weight")
    if weight is not None and weight.ndim == 2 and weight.shape[0] in gates:
        return f"{GATE} of {weight.shape[0]} outputs"
    if name.endswith("_router"):  # of Gemma 3n, which mixes several hidden states
        return GATE
    if not isinstance(module, nn.Linear) or not is_product(module):
        return f"{type(module).__name__} is not a linear layer that rankbook knows"
    return "" if module.in_features >= MIN_GROUP else f"rows of {module.in_features} weights are too short for a group"


def _check_share(model: nn.Module, weights: Counter[str]) -> None:
    """Refuse to quantize the smaller part of a model: ``weights`` by the type that is left out, empty for the rest."""
    total = weights.total()
    if weights[""] >= LEAST_SHARE * total:
        return
    del weights[""]
    left = ", ".join(f"{count / total:.1%} in {kind}" for kind, count in weights.most_common())
    raise ValueError(
        f"only {1 - weights.total() / total:.1%} of the weights in the blocks of {type(model).__name__} are in linear"
        f" layers that rankbook can quantize; the rest would stay in float ({left}). Give --allow-partial to quantize"
        " the smaller part alone"
    )


def _check_group(name: str, in_features: int, options: QuantizeOptions) -> None:
    try:
        options.group(in_features)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _note_outside(model: nn.Module, blocks: Blocks, selection: Selection) -> None:
    found = adapter_of(model).embeddings()
    reported = {name for name, _ in filter(None, (found.embedding, found.head))}
    for name, module in model.named_modules():
        outside = not name.startswith(f"{blocks.name}.") and name not in reported
        if outside and has_weights(module):
            selection.left_alone[name] = f"{type(module).__name__} {OUTSIDE}"
