"""Which objects make the library for a GPU; that it is linked and has both interfaces."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import pytest

from rankbook.plugins import cuda_abi
from rankbook.tools.dev import kernel_library
from rankbook.tools.errors import MissingError


@pytest.fixture
def native(tmp_path: Path) -> Path:
    """A build of CMake's with an object for every source."""
    folder = tmp_path / "plugins/csrc/CMakeFiles/rankbook_cuda_kernels.dir"
    (folder / "kernels/cuda").mkdir(parents=True)
    for unit in kernel_library.UNITS:
        (folder / f"{unit}.o").write_bytes(unit.encode())
    (tmp_path / "CMakeCache.txt").write_text("A:BOOL=ON\nRANKBOOK_CUDA_ARCHITECTURES:STRING=80;90-real;120-real\n")
    return tmp_path


def test_objects_that_ship_are_taken_while_they_are_as_new_as_their_sources(native: Path) -> None:
    found = kernel_library.compiled_kernels(90, native)
    assert len(found) == len(kernel_library.UNITS)
    os.utime(found[0], (0, 0))
    assert kernel_library.compiled_kernels(90, native) == []
    found[0].unlink()
    assert kernel_library.compiled_kernels(90, native) == []


def test_objects_for_other_gpus_are_left(native: Path) -> None:
    assert kernel_library.compiled_kernels(75, native) == []
    (native / "CMakeCache.txt").unlink()
    assert kernel_library.compiled_kernels(90, native) == []


@pytest.mark.parametrize(
    ("architectures", "wanted", "served"),
    [
        ("80;90-real;120-real", 90, True),
        ("80;90-real;120-real", 89, True),  # machine code of 8.0
        ("80;90-real;120-real", 100, True),  # PTX of 8.0
        ("80;90-real;120-real", 75, False),
        ("90-real;120-real", 100, False),  # no PTX, another major version
        ("90-real", 89, False),
        ("89-real", 86, False),  # newer within the major version
        ("80-virtual", 120, True),
        ("90a-real", 90, False),  # not asked for here, and bound to one GPU
        ("native", 90, True),
        ("", 90, False),
    ],
)
def test_code_runs_on_later_gpus_of_a_major_version_and_ptx_on_all_later_ones(
    architectures: str, wanted: int, served: bool
) -> None:
    assert kernel_library.serves(architectures, wanted) is served


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An nvcc that writes down what it was asked, and an empty folder for what it makes."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "nvcc"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nwhile [ "$1" != -o ]; do shift; done; echo made > "$2"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(kernel_library, "FOLDER", tmp_path / "made")
    return tmp_path / "asked"


def test_without_objects_every_source_is_compiled_once_for_one_architecture(compiler: Path, tmp_path: Path) -> None:
    library = kernel_library.build(90, tmp_path / "nothing")
    asked = compiler.read_text().splitlines()
    compiled = [line for line in asked if " -c " in line]
    assert len(compiled) == len(kernel_library.UNITS)
    assert all("-arch=sm_90 " in line for line in asked)
    (linked,) = (line for line in asked if "-shared" in line)
    assert all(name in linked for name in kernel_library.INTERFACES)
    assert kernel_library.build(90, tmp_path / "nothing") == library
    library.unlink()
    assert kernel_library.build(90, tmp_path / "nothing") == library
    asked = compiler.read_text().splitlines()
    assert sum(" -c " in line for line in asked) == len(kernel_library.UNITS), "objects are used again"
    assert kernel_library.build(90, None) == library, "found on a machine to which it was copied"
    assert kernel_library.build(89, None) != library


def test_objects_that_ship_are_only_linked(compiler: Path, native: Path) -> None:
    kernel_library.build(90, native)
    (linked,) = compiler.read_text().splitlines()
    assert "rankbook_cuda_kernels.dir/kernels/cuda/launch.cu.o" in linked


def test_a_missing_compiler_and_its_complaints_are_said(
    compiler: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "bin" / "nvcc"
    script.write_text("#!/bin/sh\necho 'no such architecture' >&2; exit 1\n")
    with pytest.raises(RuntimeError, match="no such architecture"):
        kernel_library.build(90, tmp_path / "nothing")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(MissingError, match="nvcc is not installed"):
        kernel_library.build(90, tmp_path / "nothing")
    assert not compiler.exists()


@pytest.mark.parametrize(("said", "architecture"), [("9.0\n8.6", 90), ("12.1", 121), ("No devices were found", None)])
def test_the_driver_names_the_architecture(
    said: str, architecture: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\necho '{said}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if architecture is not None:
        assert kernel_library.present_architecture() == architecture
        return
    with pytest.raises(MissingError, match="No devices were found"):
        kernel_library.present_architecture()
    script.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match="not installed"):
        kernel_library.present_architecture()


def _missing() -> str | None:
    if not kernel_library.compiled_kernels(90):
        return "the kernels are not compiled, or older than their sources: run `make native-cuda`"
    try:
        kernel_library.find_nvcc()
    except MissingError as error:
        return str(error)
    return None


@pytest.mark.skipif(_missing() is not None, reason=str(_missing()))
def test_the_library_has_both_interfaces_and_the_structures_of_this_package() -> None:
    path = kernel_library.build(90)
    cuda_abi.Kernels(path)  # refuses other structures
    library = ctypes.CDLL(str(path))
    assert all(hasattr(library, f"rb_{name}") for name in ("matmul", "gather", "dense", "upload", "workspace"))
