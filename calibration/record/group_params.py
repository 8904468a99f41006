"""Per-group numbers of a quantized layer, in 8 bits with second-level scales or in floating point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankbook.calibration.record import halves
from rankbook.calibration.record.compact import decoded
from rankbook.calibration.record.finite import is_finite
from rankbook.plugins import layout
from rankbook.plugins.forms import Form
from rankbook.plugins.layer_spec import LayerSpec

COARSE = 0.1
"""Error of a row's scales, relative, from which 8 bits are coarse for it."""
_TENSORS = ("codes", "step", "base", "values")
"""Fields that are tensors, in order."""


@dataclass(frozen=True)
class GroupParams:
    """Per-group numbers (N, G, Q): one coefficient per plane, then the offset if there is one.

    Either in 8 bits, ``codes * step + base`` with one step and base per panel of 32 rows and plane (double
    quantization: LCQ section on per-group parameters; QLoRA, Dettmers et al. 2023, section 3), or plain
    floating-point ``values``; or compact, see `rankbook.calibration.record.compact`.

    Attributes:
        codes: (N, G, Q) int8, or None.
        step: (ceil(N / 32), Q) float32, or None.
        base: (ceil(N / 32), Q) float32, or None.
        values: (N, G, Q) float16 or float32, or None.
        compact: Empty; ``zeros``, where ``values`` (N, G, 1) float16 are scales and ``codes`` (N, G, 1) int8 zero
            points; or ``e4m3``, where ``codes`` are 8-bit floats, multiplied by ``step``.
    """

    codes: Tensor | None = None
    step: Tensor | None = None
    base: Tensor | None = None
    values: Tensor | None = None
    compact: str = ""

    def __post_init__(self) -> None:
        if self.compact == "zeros" and self.values is not None and self.codes is not None:
            check_tensor("scales", self.values, (torch.float16,), 3)
            check_finite("scales", self.values)
            check_tensor("zero points", self.codes, (torch.int8,), 3)
            if self.codes.shape != self.values.shape:
                raise ValueError(
                    f"zero points have shape {tuple(self.codes.shape)} and scales {tuple(self.values.shape)}; each"
                    " group has one of both"
                )
            return
        if (self.values is None) == (self.codes is None):
            raise ValueError("group parameters need either codes with step and base, or values; give exactly one form")
        if self.values is not None:
            check_tensor("group values", self.values, (torch.float16, torch.float32), 3)
            check_finite("group values", self.values)
            return
        stored, step, base = self.codes, self.step, self.base
        if stored is None or step is None or base is None:
            raise ValueError("8-bit group parameters need codes, step and base")
        check_tensor("group codes", stored, (torch.int8,), 3)
        if self.compact:
            check_finite("scales", stored.view(torch.float8_e4m3fn))
        want = (layout.ceil_div(stored.shape[0], layout.PANEL), stored.shape[2])
        for name, tensor in (("step", step), ("base", base)):
            check_tensor(f"group {name}", tensor, (torch.float32,), 2)
            check_finite(f"group {name}", tensor)
            if tuple(tensor.shape) != want:
                raise ValueError(f"group {name} has shape {tuple(tensor.shape)}; codes ask for {want}")

    @classmethod
    def quantize(cls, values: Tensor, bits: int = 8) -> GroupParams:
        """Store values (N, G, Q) in ``bits``: 8 (step and base per panel and plane), 16 (float16) or 32.

        Of 16 bits, float32 is taken where float16 does not hold a plane (`rankbook.calibration.record.halves`).

        Raises:
            ValueError: Another number of bits, or values that are not finite.
        """
        if not is_finite(values):
            raise ValueError(
                "group parameters hold NaN or infinity; the weights or the statistics they came from do too"
            )
        if bits == 16:
            return cls(values=halves.stored(values, axis=2))
        if bits == 32:
            return cls(values=values.float().contiguous())
        if bits != 8:
            raise ValueError(f"group parameters in {bits} bits are not supported; choose 8, 16 or 32")
        step, base = panel_range(values.float())
        codes = ((values.float() - _per_row(base, values)) / _per_row(step, values)).round().clamp(-128, 127)
        return cls(codes.to(torch.int8), step, base)

    @classmethod
    def powers_of_two(cls, exponents: Tensor, bits: int = 8) -> GroupParams:
        """Store ``2 ** exponents`` exactly, exponents (N, G, Q) integers from -126 to 127 in any dtype.

        In 8 bits a panel of 32 rows covers the seven octaves below its largest exponent (codes 1, 2, 4 .. 128,
        shifted by 128 through ``base``); smaller exponents are raised to the lowest of them. In 32 bits every
        exponent is exact; 16 bits are float16, or float32 where that does not hold them.

        Raises:
            ValueError: Another number of bits, or exponents that are not finite.
        """
        if not is_finite(exponents):
            raise ValueError("exponents hold NaN or infinity; the weights they came from do too")
        if bits != 8:
            return cls.quantize(exponents.float().exp2(), bits)
        top = panel_max(exponents.float())
        lowest = _per_row(top - 7, exponents)
        codes = (exponents.float() - lowest).clamp_min(0).exp2() - 128
        step = (top - 7).exp2()
        return cls(codes.to(torch.int8), step, 128 * step)

    @classmethod
    def joined(cls, parts: Sequence[GroupParams], axis: int = -1) -> GroupParams:
        """Put planes of the same groups beside each other, or, along axis 0, whole panels of rows below each other.

        Raises:
            ValueError: No parts, or parts in different forms.
        """
        parts = [part.wide() for part in parts]
        names = {tuple(part.held()) for part in parts}
        if len(names) != 1:
            raise ValueError("group parameters can be joined only if all hold 8-bit codes or all hold values")
        whole = {name: torch.cat([part.held()[name] for part in parts], axis) for name in names.pop()}
        return cls.of(whole)

    def planes(self, first: int, stop: int | None) -> GroupParams:
        """Return some of the planes."""
        return GroupParams.of({name: tensor[..., first:stop] for name, tensor in self.wide().held().items()})

    @classmethod
    def of(cls, held: Mapping[str, Tensor]) -> GroupParams:
        """Return parameters from their tensors by field, those that are not compact."""
        return cls(held.get("codes"), held.get("step"), held.get("base"), held.get("values"))

    def wide(self) -> GroupParams:
        """Return the same numbers as operators take them."""
        return GroupParams(values=self.dense()) if self.compact else self

    def held(self) -> dict[str, Tensor]:
        """Return the tensors of the form that it has, by field."""
        return {name: tensor for name in _TENSORS if (tensor := getattr(self, name)) is not None}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], spec: LayerSpec) -> GroupParams:
        """Undo `pack`: the parameters of a layer from its packed ``params``, ``step`` and ``base``."""
        if spec.compact == "zeros":
            codes, values = (_unpack_rows(tensors[name], spec) for name in ("params", "step"))
            return cls(codes, values=values, compact=spec.compact)
        if spec.params is not Form.INT8 and not spec.compact:
            return cls(values=_unpack_rows(tensors["step"], spec))
        step = tensors["step"][:, 0, :, 0].contiguous()
        base = torch.zeros_like(step) if spec.compact else tensors["base"][:, 0, :, 0].contiguous()
        return cls(_unpack_rows(tensors["params"], spec), step, base, compact=spec.compact)

    @property
    def form(self) -> Form:
        """How operators take them."""
        if self.compact:
            return Form.FLOAT32
        return Form.INT8 if self.values is None else Form(8 * self.values.element_size())

    @property
    def shape(self) -> torch.Size:
        """(N, G, Q)."""
        stored: Tensor = self.codes if self.values is None else self.values  # type: ignore[assignment]
        return torch.Size((*stored.shape[:2], 2)) if self.compact == "zeros" else stored.shape

    def dense(self) -> Tensor:
        """Return the parameters as float32 (N, G, Q), exactly what every runtime computes."""
        if self.compact and self.codes is not None:
            step = self.values if self.step is None else _per_row(self.step, self.codes)
            return decoded(self.compact, self.codes, step, axis=2)  # type: ignore[arg-type]
        if self.values is not None:
            return self.values.float()
        stored, step, base = self.codes, self.step, self.base
        if stored is None or step is None or base is None:  # excluded at construction; keeps the type checker honest
            raise ValueError("8-bit group parameters need codes, step and base")
        codes = stored.float()
        return codes * _per_row(step, codes) + _per_row(base, codes)

    def coarse_rows(self) -> int:
        """Return for how many rows 8 bits are coarse, because rows beside them have much larger scales.

        The first plane counts. Rows of zeros are exact, and so are powers of two (`powers_of_two`), for which this says
        nothing.
        """
        if self.codes is None or self.step is None or self.compact:
            return 0
        scales, half = self.dense()[..., 0].abs().median(1).values, _per_row(self.step, self.codes)[:, 0, 0] / 2
        return int(((half > COARSE * scales) & (scales > 1e-4 * half)).sum())

    def pack(self) -> dict[str, Tensor]:
        """Return the parts that hold data, see `LayerSpec.tensors`."""
        if self.codes is not None and self.step is not None and self.base is not None:
            codes = torch.from_numpy(layout.pack_rows(self.codes.cpu().numpy()))
            return {"params": codes, "step": self.step[:, None, :, None], "base": self.base[:, None, :, None]}
        rows = {"step": self.values, "params": self.codes}
        return {name: torch.from_numpy(layout.pack_rows(t.cpu().numpy())) for name, t in rows.items() if t is not None}


def _unpack_rows(packed: Tensor, spec: LayerSpec) -> Tensor:
    rows = torch.from_numpy(layout.unpack_rows(packed.cpu().numpy(), spec.out_features))
    return rows.to(packed.device)


def panel_range(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return step and base (ceil(N / 32), Q) float32 that map int8 codes onto the range of each panel of (N, G, Q)."""
    low, high = -panel_max(-values), panel_max(values)
    step = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).tiny)
    return step, low + 128 * step


def panel_max(values: Tensor) -> Tensor:
    """Return the largest of values (N, G, Q) in each panel of 32 rows, (ceil(N / 32), Q)."""
    rows, groups, planes = values.shape
    panels = layout.ceil_div(rows, layout.PANEL)
    flat = values.reshape(rows, -1)  # rows first: a maximum over the few groups would not use vector instructions
    if missing := panels * layout.PANEL - rows:
        flat = torch.cat([flat, flat[-1:].expand(missing, -1)])
    return flat.view(panels, layout.PANEL, -1).amax(1).view(panels, groups, planes).amax(1)


def _per_row(per_panel: Tensor, values: Tensor) -> Tensor:
    """(panels, Q) to (N, 1, Q) for values (N, G, Q)."""
    return per_panel.repeat_interleave(layout.PANEL, 0)[: values.shape[0], None, :]


def check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], ndim: int) -> None:
    """Check dtype and number of dimensions.

    Raises:
        ValueError: They are others; the message names what was given and what is allowed.
    """
    if tensor.dtype not in dtypes or tensor.ndim != ndim:
        raise ValueError(
            f"{name} are {tensor.dtype} with {tensor.ndim} dimensions; give {' or '.join(map(str, dtypes))} with {ndim}"
        )


def check_finite(name: str, tensor: Tensor | None) -> None:
    """Check that a tensor, if there is one, holds finite numbers.

    Raises:
        ValueError: It does not.
    """
    if tensor is not None and not is_finite(tensor):
        raise ValueError(f"{name} hold NaN or infinity")
