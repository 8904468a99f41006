"""The kernels on weights in groups give the bits of the PyTorch code that runs without them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rankbook.calibration.fitting import codebook_fit, feedback, native, rounding
from rankbook.calibration.methods import lcq
from rankbook.calibration.methods.lcq import LcqConfig
from rankbook.calibration.notes import Note
from rankbook.calibration.training.learned_rounding import LearnedRounding
from rankbook.plugins import library
from tests.calibration import problems

built = pytest.mark.skipif(native._functions() is None, reason="the native library is not built")
ISAS = ("portable", "avx2", "avx512")
"""The best one that the processor has is taken where it has not the one that is named."""


def both(monkeypatch: pytest.MonkeyPatch, compute: Callable[[], Any]) -> tuple[Any, Any]:
    """Return what is computed with the kernels and without."""
    with_kernels = compute()
    with monkeypatch.context() as patch:
        patch.setattr(native, "_functions", lambda: None)
        return with_kernels, compute()


def drawn(levels: int, rows: int, *, sort: bool) -> tuple[Tensor, Tensor]:
    """Return values (3, 32, rows) and codebooks (3, levels, rows): equal entries, and values on boundaries, too."""
    generator = torch.Generator().manual_seed(levels * rows)
    values = torch.randn(3, 32, rows, generator=generator)
    codebooks = (torch.randn(3, levels, rows, generator=generator) * 4).round() / 4
    codebooks = codebooks.sort(1).values if sort else codebooks
    values[:, :8] = (codebooks[:, :1] + codebooks[:, 1:2]) / 2
    values[0, :, 0] = 0.0
    codebooks[1, :, -1] = 0.0
    return values, codebooks


@built
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("levels", "rows", "sort"), [(4, 1, False), (8, 16, True), (8, 70, False), (16, 37, False)])
def test_bits_are_those_of_pytorch(
    monkeypatch: pytest.MonkeyPatch, isa: str, levels: int, rows: int, *, sort: bool
) -> None:
    monkeypatch.setenv("RANKBOOK_NATIVE_ISA", isa)
    values, codebooks = drawn(levels, rows, sort=sort)
    for dtype in (torch.float32, torch.bfloat16):
        found, want = both(monkeypatch, partial(rounding.rounded, values, codebooks, dtype))
        assert torch.equal(found[0], want[0])
        assert torch.equal(found[1].view(torch.uint8), want[1].view(torch.uint8))
        codes, flow = want[0], (torch.randn_like(values) * 1e-3).to(dtype)
        flow[:, 3] = 0
        move = torch.rand(3, rows)

        def moved(flow: Tensor = flow, codes: Tensor = codes, move: Tensor = move) -> tuple[Tensor, Tensor]:
            place = values.clone()
            return rounding.step(place, flow, codes, move, levels), place

        for one, other in zip(*both(monkeypatch, moved), strict=True):
            assert torch.equal(one, other)
    energy = torch.rand(3, 32)
    one, other = both(monkeypatch, lambda: codebook_fit.moments_of(values, energy, codes, levels))
    assert torch.equal(one.mass, other.mass)
    assert torch.equal(one.value, other.value)


@built
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("levels", "rows"), [(8, 37), (16, 64), (4, 5)])
def test_feedback_has_the_codes_of_pytorch(monkeypatch: pytest.MonkeyPatch, isa: str, levels: int, rows: int) -> None:
    monkeypatch.setenv("RANKBOOK_NATIVE_ISA", isa)
    problem = problems.layer(rows=rows, columns=192)
    plan = feedback.plan(feedback.damped_gram(problem.statistics.gram), 0.0)
    grouped = rounding.to_groups(problem.weight, 32)
    codebooks = torch.randn(6, levels, rows, generator=torch.Generator().manual_seed(1)) * float(grouped.std())
    found, want = both(monkeypatch, lambda: feedback.assign(grouped, codebooks, plan))
    assert torch.equal(found, want)


@built
def test_large_layers_are_shared_among_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    values, codebooks = drawn(8, 70, sort=False)
    monkeypatch.setattr(native, "SMALL", 1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found, want = both(monkeypatch, lambda: rounding.nearest(values, codebooks))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found, want)


@built
def test_training_does_not_depend_on_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.layer(40, 128)

    def trained() -> Tensor:
        layer = LearnedRounding(problem.weight, lcq.quantize(problem, LcqConfig()), 10)
        for step in range(4):
            weight = layer.weight(torch.bfloat16)
            layer.update((weight.float() - problem.weight).to(torch.bfloat16), 1 - step / 4)
        return layer.record().codes

    found, want = both(monkeypatch, trained)
    assert torch.equal(found, want)


@built
def test_what_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKBOOK_NATIVE_ISA", "abacus")
    with pytest.raises(RuntimeError, match="RANKBOOK_NATIVE_ISA"):
        rounding.nearest(torch.zeros(1, 2, 3), torch.zeros(1, 4, 3))


@built
def test_tensors_of_other_sizes_types_or_strides_are_left_to_pytorch() -> None:
    """Kernels take memory as it comes: of these they would read something else, or what lies behind them."""
    values, codebooks = drawn(8, 37, sort=True)
    one = codebooks[..., :1]  # of all rows
    codes = rounding.nearest(values, one.expand(3, 8, 37))
    assert torch.equal(rounding.nearest(values, one), codes)
    energy, move, flow = torch.rand(3, 32), torch.rand(3, 37), torch.randn_like(values)
    mass = codebook_fit.moments_of(values, energy, codes, 8).mass
    assert torch.equal(codebook_fit.moments_of(values, energy, codes.long(), 8).mass, mass)
    assert native.moments(values, energy.double(), codes, 8) is None
    places = values.clone(), values.mT.contiguous().mT
    sums = [rounding.step(place, flow, codes, move, 8) for place in places]
    assert torch.equal(*places)
    assert torch.equal(*sums)
    cells = codebooks[:, :, ::2], rounding.midpoints(codebooks[:, :, ::2]), torch.zeros(4, dtype=torch.int64)
    work = values[0, :4, ::2]
    assert not native.feedback(work, work.to(torch.uint8), torch.empty_like(work), cells, torch.eye(4))


def test_a_library_that_cannot_be_loaded_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "library.so").write_text("no library")
    native._functions.cache_clear()
    monkeypatch.setattr(library, "unavailable", lambda _: None)
    monkeypatch.setattr(library, "library", lambda _: tmp_path / "library.so")
    try:
        with pytest.warns(Note, match=r"library cannot be loaded .*library.so.* with the same result"):
            assert native.rounded(torch.zeros(1, 2, 3), torch.zeros(1, 4, 3)) is None
    finally:
        native._functions.cache_clear()


def test_without_the_library_or_with_other_levels_pytorch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.rounded(torch.zeros(1, 2, 3), torch.zeros(1, 32, 3)) is None
    native._functions.cache_clear()
    monkeypatch.setattr(library, "unavailable", lambda _: "not built")
    try:
        assert native.rounded(torch.zeros(1, 2, 3), torch.zeros(1, 4, 3)) is None
    finally:
        native._functions.cache_clear()
