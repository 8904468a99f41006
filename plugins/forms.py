"""Forms in which the parts of a layer are stored: the table that Python, the ONNX contract and the C++ header share.

A layer has the same parts in every form, because operators have no optional inputs: ``params * step + base`` are the
group parameters and ``down * down_scale`` is a factor, always. Where the numbers themselves are stored, they are in
``step`` or ``down_scale``, and the other parts are placeholders of one element that change nothing. `Form` says which
of the two it is, in every program and in config.json; only a constant of an ONNX node has nothing but its shape to say
so, and `match` is the one place that reads it.

Letters of shapes: N out features (rows of an embedding), K in features, NP = ceil(N / 32) panels, KB = ceil(K / 32)
blocks, b bits, L = 2**b levels, G groups (G divides K), P planes, Q parameter planes (P, or P + 1 where the last one is
the offset), R rank of the error branch.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankbook.plugins import layout

Shape = tuple["int | str", ...]
"""Sizes are numbers or letters."""


class Form(enum.IntEnum):
    """How the elements of a part are stored; the value is their bits.

    ``INT8`` is integers with a second-level scale (and base), the others are the numbers themselves.
    """

    INT8 = 8
    FLOAT16 = 16
    FLOAT32 = 32

    @property
    def dtype(self) -> str:
        """Name of the element type."""
        return self.name.lower()


@dataclass(frozen=True)
class PartForm:
    """One part in one form.

    Attributes:
        shape: With letters.
        dtype: Name of the element type.
        value: What a placeholder holds; None for a part that holds data.
    """

    shape: Shape
    dtype: str
    value: int | None = None

    def sized(self, sizes: Mapping[str, int]) -> TensorSpec:
        """Return the tensor that it is with these sizes."""
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)
        return TensorSpec(shape, self.dtype, self.value)


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor.

    Attributes:
        shape: Its sizes.
        dtype: Name of its element type.
        value: What a placeholder holds; None for a tensor that holds data.
    """

    shape: tuple[int, ...]
    dtype: str
    value: int | None = None

    @property
    def bits(self) -> int:
        """Stored bits."""
        return math.prod(self.shape) * int(self.dtype.lstrip("abcdefghijklmnopqrstuvwxyz"))

    def check(self, name: str, tensor: Any) -> None:
        """Check shape, type and values of an array of numpy or torch.

        Raises:
            ValueError: They are others, a number is not finite, or a placeholder holds something else.
        """
        shape, dtype = tuple(tensor.shape), _dtype_name(tensor)
        if (shape, dtype) != (self.shape, self.dtype):
            raise ValueError(
                f"{name} is {dtype} {shape}; the description of the layer asks for {self.dtype} {self.shape}"
            )
        if self.value is not None:
            if bool((tensor != self.value).any()):
                raise ValueError(
                    f"{name} is a placeholder and must hold {self.value}; it holds {tensor.reshape(-1)[0]}"
                )
        elif "float" in dtype and not bool((abs(tensor) < math.inf).all()):
            raise ValueError(f"{name} holds NaN or infinity; the file is damaged: write or copy it again")


PARAMS: Mapping[Form, Mapping[str, PartForm]] = {
    Form.INT8: {
        "params": PartForm(("NP", "G", "Q", layout.PANEL), "int8"),
        "step": PartForm(("NP", 1, "Q", 1), "float32"),
        "base": PartForm(("NP", 1, "Q", 1), "float32"),
    },
    **{
        form: {
            "params": PartForm((1, 1, 1, 1), "int8", 1),
            "step": PartForm(("NP", "G", "Q", layout.PANEL), form.dtype),
            "base": PartForm((1, 1, 1, 1), "float32", 0),
        }
        for form in (Form.FLOAT16, Form.FLOAT32)
    },
}
"""Parts of the group parameters in each form."""
COMPACT: Mapping[str, Mapping[str, PartForm]] = {
    "zeros": {
        "params": PartForm(("NP", "G", 1, layout.PANEL), "int8"),
        "step": PartForm(("NP", "G", 1, layout.PANEL), "float16"),
        "base": PartForm((1, 1, 1, 1), "float32", 0),
    },
    "e4m3": {**PARAMS[Form.INT8], "base": PartForm(("NP", 1, "Q", 1), "float32", 0)},
}
"""Parts of the group parameters as checkpoints alone hold them (`LayerSpec.compact`)."""
FACTORS: Mapping[Form, Mapping[str, PartForm]] = {
    Form.INT8: {
        "down": PartForm(("R", "K"), "int8"),
        "down_scale": PartForm(("R", 1), "float32"),
        "up": PartForm(("N", "R"), "int8"),
        "up_scale": PartForm((1, "R"), "float32"),
    },
    **{
        form: {
            "down": PartForm((1, 1), "int8", 1),
            "down_scale": PartForm(("R", "K"), form.dtype),
            "up": PartForm((1, 1), "int8", 1),
            "up_scale": PartForm(("N", "R"), form.dtype),
        }
        for form in (Form.FLOAT16, Form.FLOAT32)
    },
}
"""Parts of the error branch in each form; both factors have the same one."""
CONSTANTS: Mapping[str, tuple[PartForm, ...]] = {
    "codes": (PartForm(("NP", "KB", "b", layout.PANEL, 4), "int8"),),
    "levels": (PartForm(("Q", "L"), "float16"),),
    **{name: tuple(dict.fromkeys(parts[name] for parts in PARAMS.values())) for name in PARAMS[Form.INT8]},
    "bias": (PartForm(("N",), "float32"), PartForm((1,), "float32", 0)),
    **{name: tuple(dict.fromkeys(parts[name] for parts in FACTORS.values())) for name in FACTORS[Form.INT8]},
}
"""Every form of the constants that an operator takes, by formal name; see `LayerSpec.constants`."""


def match_shape(shape: Shape, actual: Sequence[int | None], sizes: Mapping[str, int]) -> dict[str, int] | None:
    """Match a shape, of which None is a size that is not known, against one with letters.

    Returns:
        ``sizes`` completed by the letters met, or None if the shapes differ. ``...`` stands for any leading sizes;
        sizes made of others (``N * H``) fit any.
    """
    if shape and shape[0] == "...":
        shape = shape[1:]
        actual = actual[max(0, len(actual) - len(shape)) :]
    if len(shape) != len(actual):
        return None
    found = dict(sizes)
    for want, have in zip(shape, actual, strict=True):
        if have is None or (isinstance(want, str) and not want.isalpha()):
            continue
        if (found.setdefault(want, have) if isinstance(want, str) else want) != have:
            return None
    return found


def spell(form: PartForm | TensorSpec) -> str:
    """Return type and shape as text."""
    return f"{form.dtype} ({', '.join(map(str, form.shape))})"


def match(
    allowed: Sequence[Mapping[str, PartForm]], given: Mapping[str, TensorSpec], sizes: Mapping[str, int]
) -> tuple[int, dict[str, int]]:
    """Return which of the allowed forms the given parts have, all of them the same one, and the sizes that follow.

    Raises:
        ValueError: A part is missing, or they have none of the forms; the message says what is given and allowed.
    """
    if missing := [name for name in allowed[0] if name not in given]:
        raise ValueError(f"the constants {', '.join(missing)} are missing")
    for index, parts in enumerate(allowed):
        found: dict[str, int] | None = dict(sizes)
        for name, part in parts.items():
            same = found is not None and given[name].dtype == part.dtype
            found = match_shape(part.shape, given[name].shape, found) if same and found is not None else None
        if found is not None and all(size > 0 for size in found.values()):
            return index, found
    told = ", ".join(f"{name} {spell(given[name])}" for name in allowed[0])
    texts = [", ".join(f"{name} {spell(part)}" for name, part in parts.items()) for parts in allowed]
    raise ValueError(f"the constants are {told}; allowed are {'; or '.join(texts)}, with {dict(sizes)}")


def _dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")
