"""Architectures in a library are found, and GPUs that none of them serves are refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from rankbook.plugins import library
from rankbook.tools.deploy import gpu_code
from rankbook.tools.errors import MissingError, UsageError


def fat_binary(*entries: tuple[int, int]) -> bytes:
    """Return a fat binary of (kind, architecture), by the layout of its headers."""
    body = b"".join(
        struct.pack("<HHIQIIHHI", kind, 0x101, 64, 8, 0, 0, 0, 0, architecture) + bytes(32 + 8)
        for kind, architecture in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def write(path: Path, *binaries: bytes) -> Path:
    path.write_bytes(b"\x7fELF padding" + b"between".join(binaries) + b"end")
    return path


def test_every_fat_binary_of_a_file_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "lib.so", fat_binary((2, 80), (1, 80)), fat_binary((2, 90)))
    assert gpu_code.architectures(path) == {("code", 80), ("ptx", 80), ("code", 90)}


@pytest.mark.parametrize(
    ("entries", "served", "refused"),
    [
        (((2, 80), (1, 80), (2, 120)), ("SM80", "SM86", "SM89", "SM120", "SM121"), ("SM75",)),
        (((2, 86),), ("SM86", "SM89"), ("SM80", "SM120")),
        (((1, 75),), ("SM75", "SM120"), ()),
    ],
)
def test_gpus_that_no_code_runs_on_are_refused(
    tmp_path: Path, entries: tuple[tuple[int, int], ...], served: tuple[str, ...], refused: tuple[str, ...]
) -> None:
    path = write(tmp_path / "lib.so", fat_binary(*entries))
    gpu_code.check(path, served)
    for name in refused:
        with pytest.raises(UsageError, match=rf"--compute-capability {name}: lib\.so holds .*--no-plugins"):
            gpu_code.check(path, (*served, name))


def test_a_library_without_kernels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="holds no code for a GPU"):
        gpu_code.architectures(write(tmp_path / "lib.so"))


@pytest.mark.skipif(library.unavailable("trt") is not None, reason=str(library.unavailable("trt")))
def test_the_built_library_serves_what_it_was_built_for() -> None:
    assert gpu_code.architectures(library.library("trt"))
