"""Integers, scales and zero points of other tools as records that decode to exactly the same weights."""

from __future__ import annotations

import pytest
import torch

from rankbook.calibration.imports.base import ImportRefusedError, Numbers, check_order, exact_params, unpacked


def random_layer(bits: int, rows: int, columns: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, float16 scales and zero points."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    scales = (torch.rand(rows, columns // group, generator=generator) * 0.01 + 1e-3).half()
    return codes, scales, torch.randint(0, 1 << bits, scales.shape, generator=generator)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("zero", ["one", "many"])
def test_a_record_decodes_to_the_weights_of_the_definition(bits: int, zero: str) -> None:
    codes, scales, zeros = random_layer(bits, 40, 64, 16)
    point = torch.full_like(zeros, (1 << bits) - 1) if zero == "one" else zeros
    record = Numbers(codes, bits, [scales], "test", zeros=point).record()
    exact = scales.double().repeat_interleave(16, 1) * (codes.double() - point.double().repeat_interleave(16, 1))
    assert torch.equal(record.weight().double(), exact)
    if bits < 8:  # the levels of 8 bits reach to -128
        assert record.has_offset == (zero == "many")
        assert record.params.form.name == ("FLOAT16" if zero == "one" else "FLOAT32")


def test_scales_of_bfloat16_stay_exact() -> None:
    codes, scales, _ = random_layer(4, 32, 32, 32)
    small = Numbers(codes, 4, [scales.bfloat16()], "test", zeros=8).record()
    assert small.params.form.name == "FLOAT16"
    tiny = (scales.float() * 1e-6).bfloat16()  # below what float16 holds
    record = Numbers(codes, 4, [tiny], "test", zeros=8).record()
    assert record.params.form.name == "FLOAT32"
    assert torch.equal(record.weight().double(), tiny.double() * (codes.double() - 8))


def test_groups_beyond_those_of_a_record_are_cut() -> None:
    codes, scales, _ = random_layer(4, 32, 1024, 512)
    record = Numbers(codes, 4, [scales], "test", zeros=8).record()
    assert record.group == 256
    assert torch.equal(record.weight(), (codes.float() - 8) * scales.float().repeat_interleave(512, 1))


@pytest.mark.parametrize(("columns", "groups", "message"), [(48, 5, "evenly"), (40, 5, "multiples of 16")])
def test_groups_that_no_record_has_are_refused(columns: int, groups: int, message: str) -> None:
    codes, levels = torch.zeros(32, columns, dtype=torch.uint8), torch.arange(16).to(torch.int8)[None]
    with pytest.raises(ImportRefusedError, match=message):
        Numbers(codes, 4, [torch.ones(32, groups)], "test", levels=levels).record()


def test_what_float32_does_not_hold_is_refused() -> None:
    with pytest.raises(ImportRefusedError, match="float32 does not hold"):
        exact_params(torch.full((1, 1, 1, 1), 1 + 2.0**-40, dtype=torch.float64))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_packed_integers_lie_in_a_row_of_bits(bits: int) -> None:
    values = [(5 * index + 3) % (1 << bits) for index in range(32)]
    word = sum(value << (bits * index) for index, value in enumerate(values))
    packed = torch.frombuffer(bytearray(word.to_bytes(4 * bits, "little")), dtype=torch.int32)[None]
    assert unpacked(packed, bits, 30).tolist() == [values[:30]]


def test_the_order_of_columns_is_checked() -> None:
    check_order({}, "g_idx", 64, 2)
    check_order({"g_idx": torch.arange(64) // 32}, "g_idx", 64, 2)
    check_order({"g_idx": torch.full((64,), -1)}, "g_idx", 64, 2)
    with pytest.raises(ImportRefusedError, match="activation order"):
        check_order({"g_idx": (torch.arange(64) // 32).flip(0)}, "g_idx", 64, 2)
