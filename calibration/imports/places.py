"""Where the tensors of a folder belong in its model: names are changed as transformers changes them when it loads.

A name in a folder may be of an older layout than the model's, and several layers may lie in one tensor of the model:
the matrices of all experts of a block, with gate and up below each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rankbook.calibration.imports.base import ImportRefusedError
from rankbook.calibration.model import experts

_EXPERT = re.compile(r"(?P<owner>.+)\.(?P<expert>\d+)\.(?P<matrix>gate_proj|up_proj|down_proj|w1|w2|w3)")
"""A layer of one expert, where transformers has no rule for its name."""
_PARTS = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}
"""Which part of the matrix ``gate_up_proj`` such a layer is; the others are ``down_proj``."""


@dataclass(frozen=True)
class Place:
    """Where a quantized layer of a folder belongs.

    Attributes:
        target: Name of the layer of the model, or of the matrix of all experts.
        expert: Number of the expert; None for a layer, and where the stored tensors hold all of them.
        part: Which of the parts it is whose rows lie below each other in the target.
        parts: How many there are.
        interleaved: The rows of the parts take turns instead.
    """

    target: str
    expert: int | None = None
    part: int = 0
    parts: int = 1
    interleaved: bool = False


class Places:
    """The rules for one model, as `transformers` has them."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        rules = get_model_conversion_mapping(model)
        self._model, self._names = model, model.state_dict()
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._renamings: Any = [rule for rule in rules if not isinstance(rule, WeightConverter)]

    def of_layer(self, layer: str) -> Place:
        """Return where a quantized layer belongs.

        Raises:
            ImportRefusedError: The model keeps it in a shape that its packed numbers cannot be brought into.
        """
        if self._changed(layer) in self._names:  # a parameter, which holds the matrices of all experts
            return Place(self._changed(layer))
        name = self._changed(f"{layer}.weight")
        for rule in self._converters:
            target, pattern = self._renamed(name, rule)
            if pattern is not None:
                return self._converted(layer, name, rule, target, pattern)
        return self._expert(name.removesuffix(".weight")) or Place(name.removesuffix(".weight"))

    def others(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors that are not quantized by their names in the model, in the model's shapes."""
        found: dict[str, Tensor] = {}
        collected: dict[str, Any] = {}
        from transformers.core_model_loading import dot_natural_key

        for stored in sorted(tensors, key=dot_natural_key):
            name = self._changed(stored)
            rule = next((rule for rule in self._converters if self._renamed(name, rule)[1]), None)
            if rule is None:
                found[name] = tensors[stored]
                continue
            target, pattern = self._renamed(name, rule)
            converter = collected.setdefault(target, deepcopy(rule))
            converter.add_tensor(target, stored, pattern, lambda tensor=tensors[stored]: tensor)
        for target, converter in collected.items():
            for name, made in converter.convert(target, model=self._model, config=self._model.config).items():
                found[name] = made[0] if isinstance(made, list) else made
        return found

    def _changed(self, name: str) -> str:
        """Return a name by the rules that change names alone."""
        return self._renamed(name)[0]

    def _renamed(self, name: str, rule: Any = None) -> tuple[str, str | None]:
        """Return a name by one rule, or by those that change names alone, and the pattern of the rule that it fits."""
        from transformers.core_model_loading import rename_source_key

        renamings: Any = self._renamings if rule is None else []
        rules = [] if rule is None else [rule]
        changed: tuple[str, str | None] = rename_source_key(
            name, renamings, rules, self._model.base_model_prefix, self._names
        )
        return changed

    def _converted(self, layer: str, name: str, rule: Any, target: str, pattern: str) -> Place:
        """Return the place of a layer that a rule brings into another shape."""
        kinds = [type(operation).__name__ for operation in rule.operations]
        axes = [getattr(operation, "dim", None) for operation in rule.operations]
        part, parts = rule.source_patterns.index(pattern), len(rule.source_patterns)
        if (kinds, axes) == (["Concatenate"], [0]):
            return Place(target.removesuffix(".weight"), None, part, parts)
        found = re.search(pattern.replace("*.", r"(?P<expert>\d+)\."), name)
        known = (["MergeModulelist"], [0]), (["MergeModulelist", "Concatenate"], [0, 1])
        if found is None or "expert" not in found.groupdict() or (kinds, axes) not in known:
            raise ImportRefusedError(
                f"{type(self._model).__name__} keeps layer {layer} in another shape ({', '.join(kinds)} of"
                " transformers), into which packed numbers cannot be brought"
            )
        return Place(target, int(found["expert"]), part, parts)

    def _expert(self, name: str) -> Place | None:
        """Return the place of a layer of one expert by the names that most tools give it; None for others."""
        found = _EXPERT.fullmatch(name)
        if found is None:
            return None
        owner = dict(self._model.named_modules()).get(found["owner"])
        if owner is None or not experts.fused(owner):
            return None
        number = int(found["expert"])
        if found["matrix"] in _PARTS and getattr(owner, "has_gate", True):
            interleaved = not getattr(owner, "is_concatenated", True)
            return Place(f"{found['owner']}.gate_up_proj", number, _PARTS[found["matrix"]], 2, interleaved)
        matrix = "up_proj" if found["matrix"] in _PARTS else "down_proj"
        return Place(f"{found['owner']}.{matrix}", number)
