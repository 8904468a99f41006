"""A small run with everything: two checkpoints of a tiny model, one exported, evaluated and compared."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tiny import tiny_model, write_text
from tests.tools.files import run_cli


@dataclass(frozen=True)
class Made:
    """The folder ``folder`` holds ``model``, ``three`` and ``four`` (bits), ``onnx`` of ``three``, and ``reports``."""

    folder: Path

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("runs")
    tiny_model("llama", folder / "model")
    text = write_text(folder / "text.txt")
    calib = ("--calib", text, "--calib-sequences", 4, "--calib-length", 32, "--quiet")
    branch = ("--error-branch", "qera", "--error-rank", 4)
    for name, bits, more in (("three", 3, branch), ("four", 4, ())):
        given = ("quantize", folder / "model", "--method", "rtn", "--bits", bits, "--group-size", 16, *calib, *more)
        assert run_cli(*given, "-o", folder / name) == 0
    assert run_cli("export", folder / "three", "-o", folder / "onnx", "--logits", "all", "--quiet") == 0
    (folder / "reports").mkdir()
    measure = (
        "--text",
        text,
        "--context",
        32,
        "--max-tokens",
        128,
        "--reference",
        folder / "model",
        "--json",
        "--quiet",
    )
    for name in ("three", "four"):
        (folder / "reports" / f"eval-{name}.json").write_text(printed("eval", folder / name, *measure))
    compare = ("--tokens", 8, "--no-layers", "--greedy", 2, "--quiet", "-o", folder / "reports" / "parity.json")
    assert run_cli("parity", folder / "onnx", *compare) == 0
    return Made(folder)


def printed(*arguments: object) -> str:
    """Return what a verb prints."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        assert run_cli(*arguments) == 0
    return stream.getvalue()
