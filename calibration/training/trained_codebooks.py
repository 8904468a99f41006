"""LCQ trained as the paper describes it: codebook parameters by gradient, codes always the nearest levels.

The paper names an approximate gradient and a re-parameterization without formulas; both readings of the gradient are
here, and a scale-free parameterization that contains OmniQuant's learned clipping.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rankbook.calibration.fitting import codebook_store, rounding
from rankbook.calibration.fitting.codebook_fit import Codebooks
from rankbook.calibration.record.quantized_linear import GroupParams, QuantizedLinear
from rankbook.calibration.training.learned_rounding import around_branch, codebooks_of

GRADIENTS = ("straight-through", "assignment")

_CLIP_RATE, _SHARE_RATE, _LEVEL_RATE = 1e-2, 5e-3, 1e-3
_TINY = torch.finfo(torch.float32).tiny
_EPSILON = 1e-15
"""Of Adam: gradients of a block's relative error are about 1e-8, where the usual 1e-8 would brake."""
_MIN_STEP = 1e-3
"""Smallest step of a group relative to the mean of all at the start."""
_REACH = 1.5


def decode(grouped: Tensor, codebooks: Tensor, gradient: str) -> Tensor:
    """Round weights to the nearest level, with a gradient to the codebooks.

    ``assignment`` treats the codes as constants: the gradient of a gather. ``straight-through`` also counts that a
    weight between two levels follows both of them (LSQ, Esser et al. 2020, generalized to any sorted codebook)::

        dW_hat / dC[k] = [k = code] - (1 - phi) [k = below] - phi [k = above]     inside the range, else [k = code]

    Args:
        grouped: Weights (G, group, N), without gradient.
        codebooks: (G, L, N).
        gradient: One of `GRADIENTS`.

    Returns:
        (G, group, N); the value is exactly the nearest level.

    Raises:
        ValueError: Unknown gradient.
    """
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient {gradient!r} is unknown; choose one of {', '.join(GRADIENTS)}")
    with torch.no_grad():
        order = codebooks.argsort(dim=1, stable=True)
    ordered = codebooks.gather(1, order)
    fixed = ordered.detach()
    hit = ordered.gather(1, rounding.search(grouped, rounding.midpoints(fixed)).long())
    if gradient == "assignment":
        return hit
    with torch.no_grad():
        below = sum(
            ((grouped > fixed[:, k : k + 1]).long() for k in range(fixed.shape[1])), torch.zeros_like(order[:, :1])
        )
        inside = (below > 0) & (below < fixed.shape[1])
        lower = (below - 1).clamp(0, fixed.shape[1] - 2)
        start = fixed.gather(1, lower)
        phi = (grouped - start) / (fixed.gather(1, lower + 1) - start).clamp_min(_TINY)
    between = (1 - phi) * ordered.gather(1, lower) + phi * ordered.gather(1, lower + 1)
    return hit + torch.where(inside, between.detach() - between, between.new_zeros(()))


class ClippedCodebooks:
    """Codebooks in the scale-free parameterization; ``parameters`` are leaves with gradients.

    ``high = 1.5 sigmoid(gamma) max(w, 0)``, ``low = 1.5 sigmoid(beta) min(w, 0)`` (plane 0 alone may reach beyond the
    weights), ``step = (high - low) / (L - 1)``; the codebook is
    ``low + step (V_0 + sum_i a_i V_i)`` with V_0 increasing from 0 to L - 1 and the other V_i orthonormal to it, to
    ones and to each other.

    Attributes:
        gamma: (G, N).
        beta: (G, N).
        shares: ``a``, (P - 1, G, N).
        growth: Increments of V_0 before softplus, (L - 1,).
        extra: V_1 .. before orthonormalization, (P - 1, L).
    """

    def __init__(self, grouped: Tensor, start: Codebooks) -> None:
        """Start near given codebooks of grouped weights (G, group, N), plane 0 being the scale plane."""
        count = start.levels.shape[1]
        self._low, self._high = grouped.amin(1).clamp_max(0), grouped.amax(1).clamp_min(0)
        head = start.levels[0].sort().values
        span = (head[-1] - head[0]).clamp_min(_TINY)
        step = (start.coeffs[0] * span / (count - 1)).abs()
        self._least = float(step.mean()) * _MIN_STEP + _TINY
        step = step.clamp_min(self._least)
        low = start.offset + start.coeffs[0] * head[0]
        self.gamma = _logit((low + step * (count - 1)) / (_REACH * self._high).clamp_min(_TINY))
        self.beta = _logit(low / (_REACH * self._low).clamp_max(-_TINY))
        self.shares = start.coeffs[1:] / step
        rises = (head.diff() / span).clamp_min(1e-3)
        self.growth = torch.log(torch.expm1(rises * (count - 1)))
        self.extra = start.levels[1:].clone()
        for leaf in self.parameters():
            leaf.requires_grad_(True)

    def parameters(self) -> list[Tensor]:
        """Return the leaves."""
        return [self.gamma, self.beta, self.shares, self.growth, self.extra]

    def books(self) -> Codebooks:
        """Return the codebooks, differentiable in the parameters."""
        count = len(self.growth) + 1
        rises = F.softplus(self.growth)
        head = F.pad((rises / rises.sum()).cumsum(0), (1, 0)) * (count - 1)
        frame = torch.cat([torch.ones_like(head)[None], head[None], self.extra])
        extra = torch.linalg.qr(frame.T)[0].T[2:]
        extra = extra * (extra * self.extra).sum(1, keepdim=True).detach().sign()
        high = _REACH * torch.sigmoid(self.gamma) * self._high
        low = _REACH * torch.sigmoid(self.beta) * self._low
        step = ((high - low) / (count - 1)).clamp_min(self._least)
        norms = self.extra.detach().norm(dim=1, keepdim=True)
        levels = torch.cat([head[None], extra * norms])
        return Codebooks(levels, torch.cat([step[None], step * self.shares]), low)


def _logit(ratio: Tensor) -> Tensor:
    return torch.logit(ratio.clamp(1e-3, 0.999))


class TrainedCodebooks:
    """A layer trained by its codebook parameters alone (Adam), codes recomputed at every step.

    An error branch stays as it is, and the codes are those of what it leaves of the weight.

    With ``clip_rate``, for a record with one row of evenly spaced levels and an offset, only the range of each group is
    learned, at that step size: OmniQuant's learned weight clipping (Shao et al. 2024, equation 2).
    """

    def __init__(self, weight: Tensor, record: QuantizedLinear, gradient: str, clip_rate: float | None = None) -> None:
        """Start from ``record`` of ``weight`` (N, K)."""
        self._start, self._gradient, self._learn_levels = record, gradient, clip_rate is None
        self._grouped, self._branch = around_branch(weight, record)
        self._model = ClippedCodebooks(self._grouped, codebooks_of(record))
        model = self._model
        if not self._learn_levels:
            for fixed in (model.shares, model.growth, model.extra):
                fixed.requires_grad_(False)
        groups = [
            {"params": [model.gamma, model.beta], "rate": _CLIP_RATE if clip_rate is None else clip_rate},
            {"params": [model.shares], "rate": _SHARE_RATE},
            {"params": [model.growth, model.extra], "rate": _LEVEL_RATE},
        ]
        self._optimizer = torch.optim.Adam(groups[: 3 if self._learn_levels else 1], eps=_EPSILON)
        self._decoded: Tensor | None = None

    def _stored(self, books: Codebooks) -> tuple[GroupParams, Codebooks]:
        integer = "int8" if self._start.levels.dtype == torch.int8 else "float16"
        if self._learn_levels:
            rounded = codebook_store.round_levels(books, self._start.bits, integer)
        else:  # the same codebooks on the levels there are
            levels = self._start.levels.float()
            rounded = Codebooks(levels, books.coeffs, books.offset - books.coeffs[0] * levels[0, 0])
        params = codebook_store.to_params(rounded, 8 if self._start.params.codes is not None else 16)
        return params, codebook_store.from_params(params, rounded.levels)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the decoded weight (N, K): values of the stored codebooks, gradients of the exact ones."""
        with torch.enable_grad():
            codebooks = self._model.books().dense()
            with torch.no_grad():
                stored = self._stored(self._model.books())[1].dense()
            self._decoded = decode(self._grouped, codebooks + (stored - codebooks).detach(), self._gradient)
        weight = rounding.from_groups(self._decoded.detach())
        return (weight if self._branch is None else weight + self._branch).to(dtype)

    def update(self, grad: Tensor, fraction: float) -> None:
        """Take one step of Adam; ``grad`` (N, K), ``fraction`` of the step size left."""
        if self._decoded is None:
            return
        self._optimizer.zero_grad()
        self._decoded.backward(grad.T.float().reshape(self._decoded.shape))  # type: ignore[no-untyped-call]
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * fraction
        self._optimizer.step()

    @torch.no_grad()
    def record(self) -> QuantizedLinear:
        """Return the state as it is stored."""
        params, books = self._stored(self._model.books())
        codes = rounding.nearest(self._grouped, books.dense())
        levels = books.levels.to(self._start.levels.dtype)
        return replace(self._start, codes=rounding.from_groups(codes), levels=levels, params=params, has_offset=True)
