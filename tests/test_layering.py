"""The parts import only what lies to their left, and importing a part never loads a runtime.

plugins  <  calibration  <  exporter  <  tools

Within calibration in the order of `ROOMS`, and nothing but a method imports a method.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import run_python

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("plugins", "calibration", "exporter", "tools")
BASE = (
    "device",
    "memory",
    "notes",
    "option",
    "schema",
    "settings",
    "source",
    "text",
    "threads",
    "versions",
    "evaluate",
)
"""Modules of calibration that import none but each other."""
ROOMS = (
    *("record", "checkpoint", "fitting", "training", "methods"),
    *("model", "activations", "hf", "data", "driver", "imports"),
)
"""Folders and other modules of calibration: each imports those before it alone."""
METHODS = frozenset(path.stem for path in (ROOT / "calibration/methods").glob("*.py")) - {"__init__", "base"}
LAZY = frozenset(
    {
        *("accelerate", "datasets", "gguf", "onnxruntime", "polygraphy", "ray", "scipy"),
        *("tensorrt", "tensorrt_rtx", "transformers"),
    }
)
"""Imported inside functions only: a missing runtime must be a sentence, not an ImportError at start."""
OWN_LIBRARIES = {
    "plugins": frozenset({"numpy"}),
    "calibration": frozenset({"numpy", "torch", "safetensors"}),
    "exporter": frozenset({"numpy", "torch", "safetensors", "onnx", "onnx_ir", "ml_dtypes"}),
    "tools": frozenset({"numpy", "torch", "safetensors", "onnx", "onnx_ir", "ml_dtypes", "rich", "yaml"}),
}
"""Third-party packages that a part may import at the top of a module."""
SERVER = frozenset({"fastapi", "prometheus_client", "pydantic"})
"""What tools/serve may import there, too: `rankbook serve` alone imports that room, inside its functions."""


def statements(node: ast.AST, *, deep: bool) -> Iterator[ast.stmt]:
    """Yield the import statements under ``node``: all of them, or only those that run at import time."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test) and not deep:
            continue
        elif deep or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from statements(child, deep=deep)


def imported(source: str, *, deep: bool) -> list[tuple[int, str]]:
    """Return (line, dotted name) of every import in ``source``; ``from a import b`` counts as ``a.b``."""
    names = []
    for statement in statements(ast.parse(source), deep=deep):
        if isinstance(statement, ast.Import):
            names += [(statement.lineno, alias.name) for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            module = "." * statement.level + (statement.module or "")
            names += [(statement.lineno, f"{module}.{alias.name}") for alias in statement.names]
    return names


def violations(part: str, source: str, also: frozenset[str] = frozenset()) -> list[str]:
    """Return what a module of ``part`` with this source does against the two rules, one sentence each.

    Packages of ``also`` may be imported at the top.
    """
    allowed = PARTS[: PARTS.index(part) + 1]
    found = []
    for line, name in imported(source, deep=True):
        pieces = name.split(".")
        if name.startswith("."):
            found.append(f"line {line}: relative import {name}")
        elif pieces[0] in PARTS:
            found.append(f"line {line}: import rankbook.{name}, not {name}")
        elif pieces[0] == "rankbook" and len(pieces) > 1 and pieces[1] in PARTS and pieces[1] not in allowed:
            found.append(f"line {line}: {part} imports {name}, which lies to its right")
    for line, name in imported(source, deep=False):
        library = name.split(".")[0]
        if not library or library in PARTS:
            continue  # named above
        if library in LAZY:
            found.append(f"line {line}: import {library} inside the function that uses it")
        elif library not in sys.stdlib_module_names | (OWN_LIBRARIES[part] | also) | {"rankbook", "__future__"}:
            found.append(f"line {line}: {part} must not import {library} at the top of a module")
    return found


def room_violations(path: Path, source: str) -> list[str]:
    """Return what a module at ``path``, relative to the repository, does against the order of calibration's rooms."""
    inside = path.parts[0] == "calibration"
    own = path.parts[1].removesuffix(".py") if inside else ""
    allowed = {*BASE, *ROOMS[: ROOMS.index(own) + 1]} if own in ROOMS else {*BASE}
    found = []
    for line, name in imported(source, deep=True):
        pieces = name.split(".")
        if pieces[:2] != ["rankbook", "calibration"] or len(pieces) < 3:
            continue
        if inside and pieces[2] not in allowed:
            found.append(f"line {line}: {own} imports {name}, which lies to its right")
        elif pieces[2] == "methods" and own != "methods" and METHODS.intersection(pieces[3:4]):
            found.append(f"line {line}: {name} is a concrete method; ask METHODS, or move what is shared to fitting")
    return found


def test_rooms_of_calibration_keep_their_order() -> None:
    """Every room and module is in a list, and none imports one to its right or a concrete method."""
    rooms = {path.parent.name for path in (ROOT / "calibration").glob("*/__init__.py")}
    rooms |= {path.stem for path in (ROOT / "calibration").glob("[a-z]*.py")}
    assert rooms == {*BASE, *ROOMS}
    assert {"lcq", "rtn"} <= METHODS
    modules = [path for part in PARTS for path in sorted((ROOT / part).rglob("*.py"))]
    found = [
        f"{path.relative_to(ROOT)} {text}"
        for path in modules
        for text in room_violations(path.relative_to(ROOT), path.read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("calibration/fitting/x.py", "from rankbook.calibration.methods import METHODS", "lies to its right"),
        ("calibration/record/x.py", "def f():\n    import rankbook.calibration.fitting.rounding", "lies to its right"),
        ("calibration/training/x.py", "from rankbook.calibration.model import capture", "lies to its right"),
        ("calibration/model/x.py", "from rankbook.calibration.activations import settings", "lies to its right"),
        ("calibration/checkpoint/x.py", "from rankbook.calibration.model import adapter", "lies to its right"),
        ("calibration/activations/x.py", "from rankbook.calibration.driver import options", "lies to its right"),
        ("calibration/text.py", "from rankbook.calibration.data import Windows", "lies to its right"),
        ("calibration/driver/x.py", "from rankbook.calibration.methods import METHODS, rtn", "concrete method"),
        ("tools/commands/x.py", "from rankbook.calibration.methods.lcq import RECIPES", "concrete method"),
    ],
)
def test_a_wrong_edge_between_rooms_is_found(path: str, source: str, complaint: str) -> None:
    """Each forbidden form is named once."""
    found = room_violations(Path(path), source)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize("part", PARTS)
def test_part_keeps_both_rules(part: str) -> None:
    """No module imports a part to its right, nor a runtime at the top."""
    modules = sorted((ROOT / part).rglob("*.py"))
    assert modules, f"{part} has no modules: the layering test looks in the wrong place"
    found = [
        f"{path.relative_to(ROOT)} {text}"
        for path in modules
        for text in violations(part, path.read_text("utf-8"), SERVER if path.parent.name == "serve" else frozenset())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("part", "source", "complaint"),
    [
        ("plugins", "from rankbook.calibration import record", "lies to its right"),
        ("plugins", "from rankbook import tools", "lies to its right"),
        ("calibration", "def f():\n    import rankbook.exporter.export", "lies to its right"),
        ("plugins", "import torch", "must not import torch"),
        ("exporter", "import tensorrt", "inside the function"),
        ("tools", "try:\n    import onnxruntime as ort\nexcept ImportError:\n    ort = None", "inside the function"),
        ("calibration", "class A:\n    from transformers import AutoModel", "inside the function"),
        ("tools", "from exporter import export", "not exporter.export"),
        ("exporter", "from . import bodies", "relative import"),
    ],
)
def test_a_wrong_edge_is_found(part: str, source: str, complaint: str) -> None:
    """The checker is not blind: each forbidden form is named."""
    found = violations(part, source)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("tools", "from rankbook.exporter import export\nimport rankbook.plugins.layout"),
        ("exporter", "def f():\n    import onnxruntime"),
        (
            "calibration",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from transformers import PreTrainedModel",
        ),
    ],
)
def test_allowed_forms_pass(part: str, source: str) -> None:
    """Imports to the left, lazy imports and imports for types only are fine."""
    assert violations(part, source) == []


def test_no_test_module_imports_another() -> None:
    """What tests share lies in modules of its own: a test module can be moved, run and deleted alone."""
    found = [
        f"{path.relative_to(ROOT)} line {line}: {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for line, name in imported(path.read_text("utf-8"), deep=True)
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split(".")[:-1])
    ]
    assert not found, "\n".join(found)


def test_plugins_need_only_numpy() -> None:
    """A deployment image with numpy alone can import every module of plugins: no other library or part is loaded."""
    names = [
        f"rankbook.plugins.{path.stem}" for path in sorted((ROOT / "plugins").glob("*.py")) if path.stem != "__init__"
    ]
    code = f"import importlib, sys\nfor n in {names}: importlib.import_module(n)\n"
    code += "print(sorted({n.split('.')[0] for n in sys.modules} & {'torch', 'onnx', 'transformers', 'onnxruntime'}))\n"
    code += f"print(sorted({{n.split('.')[1] for n in sys.modules if n.startswith('rankbook.')}} & set({PARTS})))"
    assert run_python(code).splitlines() == ["[]", "['plugins']"]


def test_the_verbs_are_found_without_any_library() -> None:
    """A shell waits for ``rankbook --help``; what a verb computes with is loaded when it runs."""
    heavy = sorted({library for libraries in OWN_LIBRARIES.values() for library in libraries} | LAZY)
    code = "import sys\nfrom rankbook.tools.commands import discover\nfrom rankbook.tools.flags import flags_of\n"
    code += f"for c in discover().values(): flags_of(c.options)\nprint(sorted(set({heavy}) & set(sys.modules)))"
    assert run_python(code) == "[]"
