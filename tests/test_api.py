"""The public API: its names, that they cost nothing until they are used, and the examples of its docstrings."""

from __future__ import annotations

import doctest
import inspect
import re
import shutil
from pathlib import Path

import pytest

import rankbook
from rankbook.tools import api
from rankbook.tools.runtimes import trt
from tests.processes import run_python
from tests.tiny import tiny_model, write_text

VERBS = (
    "quantize",
    "export",
    "load",
    "open_model",
    "parity",
    "evaluate",
    "generate",
    "inspect",
    "import_model",
    "build",
)
"""Functions in the order in which their examples use what earlier ones wrote."""


def test_the_names_are_those_of_the_api() -> None:
    offered = {name for name, value in vars(api).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert set(rankbook.__all__) == offered - {"annotations"}
    assert len(set(rankbook.__all__)) == len(rankbook.__all__)
    assert set(rankbook.__all__) <= set(dir(rankbook))
    for name in rankbook.__all__:
        assert getattr(rankbook, name) is getattr(api, name)
    assert {name for name in rankbook.__all__ if inspect.isfunction(getattr(rankbook, name))} == set(VERBS)


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'quantise'; it offers .*quantize"):
        rankbook.quantise  # noqa: B018


def test_names_are_loaded_when_they_are_used() -> None:
    code = "import rankbook, sys; before = 'torch' in sys.modules; rankbook.quantize"
    code += "; print(before, 'torch' in sys.modules)"
    assert run_python(code) == "False True"
    assert run_python("from rankbook import plugins; import sys; print('torch' in sys.modules)") == "False"
    code = "from rankbook import *; print(QuantizeOptions().code_bits(), quantize.__name__)"
    assert run_python(code) == "3 quantize_model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama named ``model`` and a text."""
    folder = tmp_path_factory.mktemp("api")
    tiny_model("llama", folder / "model")
    write_text(folder / "text.txt")
    shutil.copytree(Path(__file__).parent / "calibration/imports/fixtures/awq", folder / "model-awq")
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples name files without a folder."""
    monkeypatch.chdir(folder)


@pytest.mark.usefixtures("here")
def test_the_examples_do_what_they_say() -> None:
    names = [name for name in VERBS if name != "build" or trt.rtx_unavailable() is None]
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    for subject in (rankbook, *(getattr(rankbook, name) for name in names)):
        (example,) = finder.find(subject, globs={"rankbook": rankbook})
        assert example.examples, f"{subject.__name__} has no example"
        said: list[str] = []
        assert runner.run(example, out=said.append).failed == 0, "".join(said)


@pytest.mark.usefixtures("here")
def test_the_block_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "python-api.md").read_text("utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    exec(block.replace('"checkpoint"', '"page-checkpoint"').replace('"onnx"', '"page-onnx"'), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("model.layers.0.self_attn.q_proj ")
    assert len(lines) >= 14 + 2
