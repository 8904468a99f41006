"""A packed layer as plain integers with a scale and a zero point, where its codebooks are that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rankbook.calibration.record.group_params import GroupParams
from rankbook.plugins import layout
from rankbook.plugins.layer_spec import LayerSpec


class NotAffineError(ValueError):
    """A layer whose codebooks are not evenly spaced levels; the message says why and what to do."""


@dataclass(frozen=True)
class AffineLayer:
    """A layer of which ``weight = scale * (integer - zero)`` holds, group by group.

    The integers are the codes recoded: ``integer = (levels[code] - first * unit) / unit``, so that formats that number
    their levels in another way (MXINT has zero twice) fit as well.

    Attributes:
        spec: Shapes of the layer.
        read: Returns a packed tensor of the layer by name.
        first: Smallest level in units.
        unit: Distance between neighbouring levels.
        recode: (2**bits,) uint8, the integer of each code.
    """

    spec: LayerSpec
    read: Callable[[str], Tensor]
    first: float
    unit: float
    recode: Tensor

    @classmethod
    def of(cls, spec: LayerSpec, read: Callable[[str], Tensor]) -> AffineLayer:
        """Look at the levels of a layer.

        Raises:
            NotAffineError: The codebooks have a rank above one, or levels that are not evenly spaced.
        """
        if spec.planes != 1:
            raise NotAffineError(
                f"its codebooks have rank {spec.planes}; affine codes have rank 1: export to ONNX with --dialect"
                " rankbook, or quantize with --method rtn (or another affine method)"
            )
        levels = read("levels").double()[0]
        low = levels.min()
        gaps = torch.unique(levels - low).diff()
        if len(gaps) == 0:
            raise NotAffineError("all its levels are equal; quantize the layer again")
        unit = gaps.min()
        integers = (levels - low) / unit
        # Exact: levels are small integers or float16 numbers, and evenly spaced ones are multiples of one number.
        if not torch.equal(integers, integers.round()) or integers.max() >= 1 << spec.bits:
            raise NotAffineError(
                "its levels were learned or are not evenly spaced; export to ONNX with --dialect rankbook, or"
                " quantize with --method rtn --weight-format affine or symmetric (or another affine method)"
            )
        return cls(spec, read, float(low / unit), float(unit), integers.to(torch.uint8))

    def integers(self) -> Tensor:
        """Return the integers (N, K) uint8, at least 0 and below ``2**bits``."""
        packed = self.read("codes").cpu().numpy()
        codes = layout.unpack_codes(packed, self.spec.out_features, self.spec.in_features)
        return self.recode[torch.from_numpy(codes).long()]

    def scales(self) -> Tensor:
        """Return the scales (N, G) float32.

        Raises:
            NotAffineError: A scale is negative, or zero where the group has an offset.
        """
        scales = self._params[..., 0].double() * self.unit
        if self.spec.has_offset and bool(((scales == 0) & (self._params[..., 1] != 0)).any()):
            raise NotAffineError(
                "a group has a scale of zero and an offset; export this model to ONNX with --dialect rankbook"
            )
        if bool((scales < 0).any()):
            raise NotAffineError("a group has a negative scale; export this model to ONNX with --dialect rankbook")
        return scales.float()

    def zeros(self) -> Tensor:
        """Return the zero points (N, G) float32, not always whole numbers: the offset of a group may be any number."""
        scales = self.scales().double()
        zeros = torch.full_like(scales, -self.first)
        if self.spec.has_offset:
            zeros -= torch.where(scales == 0, 0.0, self._params[..., 1].double() / scales)
        return zeros.float()

    @cached_property
    def _params(self) -> Tensor:
        """Coefficient and offset of each group, (N, G, 1 or 2)."""
        names = ("params", "step", "base")
        return GroupParams.unpack({name: self.read(name) for name in names}, self.spec).dense()


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack uint8 values below ``2**bits`` (..., n) into bytes (..., n * bits / 8), the first ones in the low bits."""
    per_byte = 8 // bits
    parts = values.reshape(*values.shape[:-1], -1, per_byte)
    shifts = torch.arange(per_byte) * bits
    return (parts.to(torch.int32) << shifts).sum(-1).to(torch.uint8)
