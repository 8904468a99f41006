"""The NEON kernels, built by a cross compiler and run on an emulated aarch64 processor."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.plugins.toolchain import build_check, tool

COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")


@pytest.mark.slow
def test_neon_kernels_agree_with_the_portable_ones(tmp_path: Path) -> None:
    """The int8 mode to the bit, fp32 within the bound of the other kernels; with and without dot-product instructions.

    The second processor would stop at an instruction that it does not have.
    """
    emulator = next((found for name in EMULATORS if (found := tool(name))), None)
    if not (tool(COMPILER) and emulator):
        pytest.skip(f"{COMPILER} and qemu-aarch64 are needed: apt-get install g++-aarch64-linux-gnu qemu-user-static")
    check = build_check(
        tmp_path,
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={COMPILER}",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",  # no aarch64 libraries are installed where the emulator looks
        "-DCMAKE_CXX_FLAGS=-O0 -DRANKBOOK_PLANES=2",  # -O1 and all copies of the loops: ten times as long
    )
    for processor, integers in (("max", "neon-dotprod"), ("cortex-a57", "neon")):
        done = subprocess.run([emulator, "-cpu", processor, str(check)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.split("\n")[-2] == f"neon {integers}"
