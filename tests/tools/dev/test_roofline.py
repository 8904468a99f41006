"""Machine code is counted along the common way through the main loop, and turned into a prediction that adds up."""

from __future__ import annotations

import pytest

from rankbook.tools.dev import roofline, sass
from rankbook.tools.errors import CommandError

LISTING = """
\tcode for sm_80
\t\tFunction : decode
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   I2F.S8 R1, R2 ;
        /*0020*/              @!P1 BRA 0x50 ;
        /*0030*/                   LDG.E.U16.CONSTANT R3, [R4.64] ;
        /*0040*/                   BRA 0x60 ;
        /*0050*/                   FFMA R5, R6, R7, R8 ;
        /*0060*/                   LDG.E.128.CONSTANT R8, [R4.64] ;
        /*0070*/                   PRMT R9, R8, 0x4440, RZ ;
        /*0080*/                   LDS.64 R10, [R9] ;
        /*0090*/                   HMMA.16816.F32 R28, R36, R20, R28 ;
        /*00a0*/               @P0 BRA 0x60 ;
        /*00b0*/               @P2 BRA 0x10 ;
        /*00c0*/                   EXIT ;
\tcode for sm_90
\t\tFunction : decode
        /*0000*/                   EXIT ;
"""


@pytest.fixture
def listing(monkeypatch, tmp_path):
    """A cuobjdump that prints LISTING."""
    (tmp_path / "cuobjdump").write_text(f"#!/bin/sh\ncat <<'END'\n{LISTING}\nEND\n")
    (tmp_path / "cuobjdump").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_loops_are_counted_without_the_slow_forms(listing):
    code = sass.functions(listing / "library.so", 80)["decode"]
    cost = sass.main_loop(code, tokens=8)
    assert [i.opcode.split(".")[0] for i in cost.step] == ["LDG", "PRMT", "LDS", "HMMA", "BRA"]
    assert [i.opcode.split(".")[0] for i in cost.group] == ["I2F", "BRA", "FFMA", "BRA"]  # not the scalar load
    assert cost.weights == 8
    per_weight = cost.per_weight(steps_per_group=2)
    assert per_weight["xu"] == pytest.approx(0.5 / 8)
    assert per_weight["shared"] == pytest.approx(1 / 8)
    assert per_weight["total"] == pytest.approx((5 + 4 / 2) / 8)
    assert roofline.wavefronts(cost.step) == 2


def instructions(*lines: str) -> list[sass.Instruction]:
    """Instructions four bytes apart, as ``[@predicate] opcode [operands]``."""
    found = []
    for i, line in enumerate(lines):
        predicate, rest = line.split(" ", 1) if line.startswith("@") else ("", line)
        opcode, _, operands = rest.partition(" ")
        found.append(sass.Instruction(4 * i, predicate.lstrip("@"), opcode, operands))
    return found


def test_the_second_step_of_a_turn_is_told_apart():
    code = instructions("LDG", "IMMA", "@P0 BRA 0x14", "PRMT", "IMMA", "FADD", "@P1 BRA 0x0", "EXIT")
    cost = sass.turn_loop(code, weights=64)
    assert [i.opcode for i in cost.step] == ["LDG", "IMMA", "BRA", "FADD", "BRA"]
    assert [i.opcode for i in cost.group] == ["PRMT", "IMMA"]
    assert cost.per_weight(1)["total"] == pytest.approx(5 / 64)
    assert cost.per_weight(2)["total"] == cost.per_weight(8)["total"] == pytest.approx(7 / 128)


def test_other_architectures_are_told_apart(listing):
    assert len(sass.functions(listing / "library.so", 90)["decode"]) == 1
    assert sass.functions(listing / "library.so", 75) == {}


def test_code_without_tensor_cores_is_refused(listing):
    with pytest.raises(ValueError, match="no loop with tensor-core"):
        sass.main_loop(sass.functions(listing / "library.so", 90)["decode"], 8)


def test_the_prediction_follows_from_the_counts(listing):
    """By hand: 4 bits and 2 parameters per 64 weights are 0.53125 bytes; 100 GB/s at 1 SM and 1 GHz are 188.2 weights a
    clock, and 188.2 * 7 / 8 instructions are 1.287 of the 128 that can start."""
    cost = sass.main_loop(sass.functions(listing / "library.so", 80)["decode"], tokens=8)
    gpu = roofline.Gpu("paper", 80, 100.0, 1, 1.0, 2.0, 2.0, 64)
    found = roofline.decode(gpu, cost, bits=4, planes=1, group=128, tokens=1)
    assert found.bytes_per_weight == pytest.approx(0.5 + 2 / 128)
    rate = 100 / found.bytes_per_weight
    assert found.loads["issue"] == pytest.approx(rate * (5 + 4 / 2) / 8 / 128)
    assert found.loads["shared"] == pytest.approx(rate * 2 / 8 / 32)
    assert found.loads["tensor"] == pytest.approx(rate / 8 / 32 * 2)
    assert found.limiter == max(found.loads, key=lambda pipe: found.loads[pipe])
    assert found.bandwidth_fraction == pytest.approx(1 / found.loads[found.limiter])
    slow = roofline.Gpu("slow memory", 80, 1.0, 1, 1.0, 2.0, 2.0, 64)
    assert roofline.decode(slow, cost, 4, 1, 128, 1).limiter == "memory"
    assert roofline.decode(slow, cost, 4, 1, 128, 1).bandwidth_fraction == 1.0


def test_the_prediction_for_many_tokens_follows_from_the_counts(listing):
    """By hand: a step is 1 mma of 2 clocks, 5 instructions (of which 4 start per clock) and 2 rows of shared memory."""
    cost = sass.main_loop(sass.functions(listing / "library.so", 80)["decode"], tokens=8)
    gpu = roofline.Gpu("paper", 80, 100.0, 1, 1.0, 2.0, 2.0, 64)
    found = roofline.prefill(gpu, cost, bits=4, planes=1, group=128)
    assert found.loads["issue"] == pytest.approx((5 + 4 / 2) / 4 / 2)
    assert found.loads["shared"] == pytest.approx(2 / 2)
    quick = roofline.Gpu("quick tensor cores", 80, 100.0, 1, 1.0, 0.5, 0.5, 64)
    assert roofline.prefill(quick, cost, 4, 1, 128).fraction == pytest.approx(0.5 / 2)
    assert roofline.prefill(quick, cost, 4, 1, 128).limiter == "shared"


def test_a_missing_tool_or_library_is_said(monkeypatch, tmp_path, capsys):
    def missing(_name):
        raise CommandError("cuobjdump is not installed")

    monkeypatch.setattr(sass, "tool", missing)
    assert roofline.main(["--library", str(tmp_path / "x.so")]) == 3
    assert "cuobjdump is not installed" in capsys.readouterr().err
