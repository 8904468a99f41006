"""Weights in groups by the kernels of the native library (plugins/csrc/kernels/cpu/groups), where it is built.

Each function returns None where the kernels do not serve: the library is not there, other numbers of levels, tensors
on a GPU, of another type or of other sizes than the kernels would read. The PyTorch code of
`rankbook.calibration.fitting` that runs then gives the same bits, so results do not depend on the library.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from rankbook.calibration.notes import note
from rankbook.calibration.threads import SMALL
from rankbook.plugins import library

LEVELS = (4, 8, 16)
"""Numbers of levels that are served."""
COLUMNS = 16
"""Columns that `feedback` takes at most."""
_NAMES = ("round", "step", "moments", "feedback")
_FLOATS = {torch.float32: 0, torch.bfloat16: 1}
_FLOAT, _BYTE = torch.float32, torch.uint8


def _structure(name: str, *fields: str) -> type[ctypes.Structure]:
    """Return a structure of groups.h whose fields are eight bytes each: numbers, and pointers as numbers."""
    return type(name, (ctypes.Structure,), {"_fields_": [(field, ctypes.c_int64) for field in fields]})


_SHAPE = ("groups", "group", "rows", "levels")
_Round = _structure("RoundGroups", *_SHAPE, "values", "codebooks", "codes", "decoded", "bfloat16")
_Step = _structure("StepGroups", *_SHAPE, "flow", "codes", "move", "place", "sums", "bfloat16")
_Moments = _structure("MomentGroups", *_SHAPE, "values", "energy", "codes", "mass", "value")
_Feedback = _structure(
    "FeedbackColumns",
    *("columns", "rows", "levels", "work", "codebooks", "bounds", "groups", "factor", "stride", "ranks", "errors"),
)


def rounded(
    values: Tensor, codebooks: Tensor, decoded: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None] | None:
    """Return the codes of the nearest entries as `rounding.nearest`, and with a dtype the entries in it.

    Args:
        values: (G, group, N) float32.
        codebooks: (G, L, N) float32, in any order.
        decoded: float32 or bfloat16; None where the entries are not needed.

    Returns:
        Codes (G, group, N) uint8, and the entries of the same shape or None.
    """
    groups, levels, rows = len(values), codebooks.shape[1], values.shape[2]
    given = (values, _FLOAT, values.shape), (codebooks, _FLOAT, (groups, levels, rows))
    if decoded not in (None, *_FLOATS) or (run := _served("round", levels, *given)) is None:
        return None
    values, codebooks = values.contiguous(), codebooks.contiguous()
    codes = torch.empty_like(values, dtype=torch.uint8)
    entries = None if decoded is None else torch.empty_like(values, dtype=decoded)
    kind = 0 if decoded is None else _FLOATS[decoded]
    _run(run, _Round(*values.shape, levels, *_places(values, codebooks, codes, entries), kind), values)
    return codes, entries


def stepped(place: Tensor, flow: Tensor, codes: Tensor, move: Tensor, levels: int) -> Tensor | None:
    """Take ``sign(flow) * move`` from ``place`` and return the sums of ``flow`` by code, as `rounding.step`.

    Args:
        place: (G, group, N) float32, contiguous, changed.
        flow: (G, group, N) float32 or bfloat16.
        codes: (G, group, N) uint8.
        move: (G, N) float32, not negative.
        levels: L.

    Returns:
        (G, L, N) float32.
    """
    groups, _, rows = shape = place.shape
    given = (place, _FLOAT, shape), (flow, flow.dtype, shape), (codes, _BYTE, shape), (move, _FLOAT, (groups, rows))
    run = _served("step", levels, *given) if flow.dtype in _FLOATS and place.is_contiguous() else None
    if run is None:
        return None
    flow, codes, move = flow.contiguous(), codes.contiguous(), move.contiguous()
    sums = place.new_empty(groups, levels, rows)
    _run(run, _Step(*place.shape, levels, *_places(flow, codes, move, place, sums), _FLOATS[flow.dtype]), place)
    return sums


def moments(values: Tensor, energy: Tensor, codes: Tensor, levels: int) -> tuple[Tensor, Tensor] | None:
    """Return sums of energies (G, group), and of energies times values (G, group, N), by code: (G, L, N) each."""
    groups, _, rows = shape = values.shape
    given = (values, _FLOAT, shape), (energy, _FLOAT, shape[:2]), (codes, _BYTE, shape)
    if (run := _served("moments", levels, *given)) is None:
        return None
    values, energy, codes = values.contiguous(), energy.contiguous(), codes.contiguous()
    mass, value = values.new_empty(2, groups, levels, rows)
    _run(run, _Moments(*values.shape, levels, *_places(values, energy, codes, mass, value)), values)
    return mass, value


def feedback(work: Tensor, ranks: Tensor, errors: Tensor, cells: tuple[Tensor, Tensor, Tensor], factor: Tensor) -> bool:
    """Round a few columns in turn as `feedback._assign_part`; return whether it was done.

    Args:
        work: (columns, N) float32, changed.
        ranks: (columns, N) uint8, written.
        errors: (columns, N) float32, written.
        cells: Sorted codebooks (G, L, N), the boundaries between their cells (G, L - 1, N) and the group of each column
            (columns,) int64.
        factor: (columns, columns).
    """
    codebooks, bounds, of_columns = cells
    groups, levels, _ = codebooks.shape
    columns, rows = shape = work.shape
    given = (work, _FLOAT, shape), (ranks, _BYTE, shape), (errors, _FLOAT, shape), (factor, _FLOAT, (columns, columns))
    sizes = (codebooks, _FLOAT, (groups, levels, rows)), (bounds, _FLOAT, (groups, levels - 1, rows))
    run = _served("feedback", levels, *given, *sizes, (of_columns, torch.int64, (columns,)))
    if run is None or columns > COLUMNS or not all(t.is_contiguous() for t in (work, ranks, errors, *cells)):
        return False
    factor = factor.contiguous()
    places = (*_places(work, *cells, factor), len(factor), *_places(ranks, errors))
    _check(run(ctypes.byref(_Feedback(columns, rows, levels, *places)), 0, rows))
    return True


@functools.cache
def _functions() -> dict[str, Any] | None:
    """Return the functions of the library by name, None where there is none, or an older one without them."""
    if library.unavailable("ort"):
        return None
    try:
        loaded = ctypes.CDLL(str(library.library("ort")))
    except OSError as error:
        note(f"the native library cannot be loaded ({error}): quantizing takes longer, with the same result")
        return None
    if not all(hasattr(loaded, f"rankbook_groups_{name}") for name in _NAMES):
        return None
    found = {name: getattr(loaded, f"rankbook_groups_{name}") for name in _NAMES}
    for function in found.values():
        function.restype = ctypes.c_char_p
        function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    return found


def _served(name: str, levels: int, *given: tuple[Tensor, torch.dtype, Sequence[int]]) -> Any:
    """Return a function where it serves tensors, each given with the type and the sizes that the kernel takes for sure.

    Of a tensor of other sizes, which PyTorch expands or refuses, the kernel would read what lies behind it.
    """
    served = levels in LEVELS and given[0][0].numel() > 0
    served = served and all(
        tensor.device.type == "cpu" and tensor.dtype == dtype and tuple(tensor.shape) == tuple(sizes)
        for tensor, dtype, sizes in given
    )
    functions = _functions() if served else None
    return None if functions is None else functions[name]


def _places(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _run(function: Any, arguments: ctypes.Structure, values: Tensor) -> None:
    """Work on all groups; those of a large layer by as many threads as PyTorch uses."""
    groups, threads = len(values), torch.get_num_threads() if values.numel() > SMALL else 1
    begins = [groups * part // threads for part in range(threads + 1)]

    def part(first: int, last: int) -> None:
        _check(function(ctypes.byref(arguments), first, last))

    if threads == 1:
        part(0, groups)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, begins, begins[1:]))


def _check(message: bytes | None) -> None:
    if message is not None:
        raise RuntimeError(f"the native library refuses weights in groups: {message.decode()}")
