"""Linear layers in other forms, as ``nn.Linear``: Conv1D of GPT-2, and the fused experts of mixtures."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from rankbook.calibration.model import experts
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.packed_modules import replace_module


def make_plain(model: nn.Module) -> dict[str, nn.Module]:
    """Put linear layers in the place of other forms of them; return what was there, by name."""
    from transformers.pytorch_utils import Conv1D

    found: dict[str, nn.Module] = {}
    adapter_of(model).unify_experts()
    for name, module in list(model.named_modules()):
        if experts.fused(module):
            experts.split(module)
            found[name] = module
        elif type(module) is Conv1D:
            replace_module(model, name, _linear(module))
            found[name] = module
    return found


def restore(model: nn.Module, found: dict[str, nn.Module], chosen: Collection[str]) -> None:
    """Undo `make_plain` where no layer was chosen: it is stored under the name and in the shape it had."""
    for name, module in found.items():
        if any(layer == name or layer.startswith(f"{name}.") for layer in chosen):
            continue
        if isinstance(module, nn.Module) and model.get_submodule(name) is module:
            experts.join(module)
        else:
            replace_module(model, name, module)


def _linear(module: Any) -> nn.Linear:
    """Return a Conv1D, whose weight is (K, N), as a linear layer on a view of it."""
    weight, bias = module.weight.detach().T, module.bias.detach()
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = (nn.Parameter(values, requires_grad=False) for values in (weight, bias))
    return layer.eval()


def is_product(module: nn.Module) -> bool:
    """Return whether a module computes ``x @ W.T + bias``; of a subclass of ``nn.Linear``, whether it still does."""
    if type(module) is nn.Linear:
        return True
    if not isinstance(module, nn.Linear) or module.weight.is_meta:
        return False
    x = torch.linspace(-1, 1, 2 * module.in_features, dtype=module.weight.dtype).reshape(2, -1)
    with torch.no_grad():
        want = nn.functional.linear(x, module.weight, module.bias)
        try:
            found = module(x)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return False  # it takes other arguments (DeepSeek V4)
        if not isinstance(found, torch.Tensor) or found.shape != want.shape:
            return False
        return torch.allclose(found, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
