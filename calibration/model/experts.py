"""Experts of a mixture whose matrices are fused into one tensor, taken apart into linear layers.

transformers keeps the matrices of all experts of a block as parameters of three dimensions, ``gate_up_proj`` (or
``up_proj``) and ``down_proj``, transposed in some families; where a family keeps them in another way its adapter says
how (`layout`). `split` puts a list of linear layers in the place of each, so that everything that is done to a linear
layer is done to the matrix of an expert: its name is ``<experts>.gate_up_proj.3``. What a family does between the
matrices (gates, norms) stays its own code.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rankbook.calibration.model import packed_ops
from rankbook.calibration.model.packed_modules import CodebookLinear
from rankbook.calibration.notes import note

MATRICES = ("gate_up_proj", "up_proj", "down_proj")
"""Names of the fused parameters as transformers marks them; experts have one of the first two, and the last."""
_OTHERS = ("w1", "v1", "w2", "weight")
"""Names in families that say so."""
_MATRIX = re.compile(rf"(.+\.(?:{'|'.join((*MATRICES, *_OTHERS))}))\.(\d+)")


class ExpertMatrices(nn.ModuleList):
    """The same matrix of every expert, as linear layers; where kernels compute packed ones, one call for all."""

    def __init__(self, layers: Iterable[nn.Module] = ()) -> None:
        """Hold the layers, in the order of the experts."""
        super().__init__(layers)
        self._stack: dict[str, Tensor] = {}
        self._parts: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """Return each row of x (S, K) times the matrix of its expert, (S, N); experts (S,) are their numbers."""
        if self._stacked(x):
            spec: Any = self[0].spec
            return packed_ops.product(x, self._stack, spec, numbers=experts)
        order = experts.argsort(stable=True)
        counts = torch.bincount(experts, minlength=len(self)).tolist()
        rows = zip(self, torch.split(x[order], counts), strict=True)
        parts = [layer(chunk) for layer, chunk in rows if len(chunk)]
        return torch.cat(parts or [self[0](x)])[order.argsort()]

    def _stacked(self, x: Tensor) -> bool:
        """Return whether kernels compute all layers at once, applied to x; stack their constants for them.

        Not where something watches or changes what enters or leaves one of them, nor where they are stored in several
        forms.
        """
        layers = [layer for layer in self if isinstance(layer, CodebookLinear)]
        if len(layers) != len(self) or not layers or not layers[0].served(x):
            return False
        if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
            return False
        if len(self._parts) != len(layers) or any(
            part is not layer._constants for part, layer in zip(self._parts, layers, strict=True)
        ):
            if any(layer.spec != layers[0].spec or not layer.served(x) for layer in layers):
                _say_one_by_one()
                return False
            names = layers[0]._constants
            self._stack = {name: torch.stack([layer._constants[name] for layer in layers]) for name in names}
            self._parts = [layer.share(self._stack, number) for number, layer in enumerate(layers)]
        return True

    def forget_constants(self) -> None:
        """Let go of the stack, so that memory holds it only as long as the layers hold their part."""
        for layer in self:
            if isinstance(layer, CodebookLinear):
                layer.forget_constants()
        self._stack, self._parts = {}, []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertMatrices:
        """Move the layers; their stack is made again where it is asked for."""
        self.forget_constants()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def columns(self) -> int:
        """Return the inputs of each."""
        width: Any = self[0].in_features
        return int(width)


@functools.cache
def _say_one_by_one() -> None:
    note("experts of a block are stored in several forms, so that one after the other is computed, and not all at once")


def matrix_of(name: str) -> tuple[str, int] | None:
    """Return the name of the matrix of all experts and the expert's number, for the name of a layer of one expert."""
    found = _MATRIX.fullmatch(name)
    return (found[1], int(found[2])) if found else None


def stacks(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of the layers of experts by the name of their matrix, in the order of the experts."""
    found: dict[str, dict[int, str]] = {}
    for name in names:
        if matrix := matrix_of(name):
            found.setdefault(matrix[0], {})[matrix[1]] = name
    return {matrix: [layers[index] for index in sorted(layers)] for matrix, layers in found.items()}


def layout(module: Any) -> dict[str, bool]:
    """Return which parameters of a module may be fused matrices of experts, and whether they are transposed.

    That is what transformers marks, or the attribute ``expert_matrices`` that the adapter of a family sets. Where the
    matrices lie one below the other in two dimensions, it also sets ``experts_below``, the number of experts.
    """
    marked = hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")
    found: dict[str, bool] = dict.fromkeys(MATRICES, module.is_transposed) if marked else {}
    own: dict[str, bool] = getattr(module, "expert_matrices", found)
    return own


def fused(module: nn.Module) -> list[str]:
    """Return the names of the fused parameters of experts; empty for other modules."""
    dimensions = 2 if hasattr(module, "experts_below") else 3
    return [name for name in layout(module) if getattr(module._parameters.get(name), "ndim", 0) == dimensions]


def split(module: Any) -> None:
    """Put linear layers in the place of the fused parameters of experts; weights are views of what they were."""
    for name in fused(module):
        weights, biases = module._parameters.pop(name), module._parameters.pop(f"{name}_bias", None)
        if hasattr(module, "experts_below"):
            weights = weights.unflatten(0, (module.experts_below, -1))
        if layout(module)[name]:
            weights = weights.transpose(1, 2)
        pairs = zip(weights, [None] * len(weights) if biases is None else biases, strict=True)
        setattr(module, name, ExpertMatrices(_linear(weight, bias) for weight, bias in pairs))
    if not hasattr(module, "expert_matrices"):  # or who calls it knows what to do
        module.forward = types.MethodType(routed, module)
    module._is_hf_initialized = True  # or transformers would draw the parameters that are gone


def join(module: Any) -> None:
    """Undo `split`."""
    for name, transposed in layout(module).items():
        if isinstance(layers := getattr(module, name, None), ExpertMatrices):
            delattr(module, name)
            weights, biases = ([getattr(layer, part) for layer in layers] for part in ("weight", "bias"))
            whole = torch.stack(weights)
            whole = whole.transpose(1, 2).contiguous() if transposed else whole
            setattr(module, name, _fixed(whole.flatten(0, 1) if hasattr(module, "experts_below") else whole))
            if biases[0] is not None:
                setattr(module, f"{name}_bias", _fixed(torch.stack(biases)))
    for name in ("forward", "_is_hf_initialized"):
        module.__dict__.pop(name, None)


def routed(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the weighted sum of the chosen experts, (T, H): the forward of experts that were split.

    Args:
        module: The experts.
        hidden_states: (T, H).
        top_k_index: Numbers of the chosen experts, (T, k).
        top_k_weights: Their weights, (T, k).
    """
    # Some routers leave the order of the chosen experts open, and runtimes differ in it.
    top_k_index, order = top_k_index.sort(-1)
    top_k_weights, experts = top_k_weights.gather(-1, order), top_k_index.reshape(-1)
    y = hidden_states[:, None].expand(-1, top_k_index.shape[1], -1).reshape(-1, hidden_states.shape[1])
    y = module.down_proj(gated(module, linears(module)(y, experts)), experts)
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    weighted: Tensor = y.reshape(*top_k_index.shape, -1) * top_k_weights[..., None]
    return weighted.sum(1).to(hidden_states.dtype)


def linears(module: Any, matrix: str = "") -> ExpertMatrices:
    """Return the linear layers of a matrix of experts that were split, of the first one without a name."""
    name = matrix or (MATRICES[0] if module.has_gate else MATRICES[1])
    layers: ExpertMatrices = getattr(module, name)
    return layers


def gated(module: Any, y: Tensor) -> Tensor:
    """Return what enters the last matrix, given the output y (S, N) of the first."""
    found: Tensor = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    return found


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = _fixed(weight)
    if bias is not None:
        layer.bias = _fixed(bias)
    return layer


def _fixed(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach(), requires_grad=False)
