"""The stand-in of TensorRT has the methods and arguments of the bindings, so that what runs on it can run on them."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

from tests import tensorrt_stand_in as stand_in
from tests.plugins.toolchain import lean_environment_in, lean_unavailable

Documents = dict[str, dict[str, str]]


def documents(real: Any) -> Documents:
    """Return what a module says of its classes (under an empty name) and of their members."""
    classes = {name: item for name, item in vars(real).items() if isinstance(item, type)}
    return {
        name: {member: getattr(item, member).__doc__ or "" for member in dir(item)} | {"": item.__doc__ or ""}
        for name, item in classes.items()
    }


@pytest.fixture(params=["tensorrt_rtx", "tensorrt"])
def libraries(request, monkeypatch, tmp_path) -> tuple[Documents, ModuleType]:
    """What the bindings say, and the stand-in; TensorRT's need libraries that only a child process can be given."""
    if request.param == "tensorrt_rtx":
        if importlib.util.find_spec("tensorrt_rtx") is None:
            pytest.skip("tensorrt-rtx is not installed")
        said = documents(importlib.import_module("tensorrt_rtx"))
    else:
        if reason := lean_unavailable():
            pytest.skip(reason)
        script = f"import json\nfrom typing import Any\nDocuments = dict\n{inspect.getsource(documents)}"
        script += "import tensorrt_bindings\nprint(json.dumps(documents(tensorrt_bindings)))"
        command = [sys.executable, "-c", f"from __future__ import annotations\n{script}"]
        environment = lean_environment_in(tmp_path)
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        said = json.loads(done.stdout.splitlines()[-1])
    return said, stand_in.install(monkeypatch, request.param).module


def _classes(module: ModuleType) -> dict[str, Any]:
    found = {name: item for name, item in vars(module).items() if inspect.isclass(item)}
    return found | {"IPluginRegistry": found.pop("get_plugin_registry")}


def _arguments(documentation: str) -> list[list[str]]:
    """Names of the arguments of every overload, from the signatures that pybind11 writes."""
    lines = [match[1] for match in re.finditer(r"^(?:\d+\. )?\w+\((.*)\) -> ", documentation, re.M)]
    return [re.findall(r"(?:^|, )(\w+)(?=: )", line) for line in lines]


def test_classes_and_their_members_exist(libraries):
    said, module = libraries
    for name, item in _classes(module).items():
        public = {member for member in dir(item) if not member.startswith("_")}
        if issubclass(item, int):
            public -= set(dir(int))
        assert public <= set(said[name]), (name, public - set(said[name]))


def test_methods_take_the_same_arguments(libraries):
    said, module = libraries
    checked = 0
    for name, item in _classes(module).items():
        for method, function in inspect.getmembers(item, inspect.isfunction):
            if method.startswith("_") or name in ("ILogger", "IStreamReaderV2") or issubclass(item, int):
                continue
            mine, theirs = list(inspect.signature(function).parameters), _arguments(said[name][method])
            assert mine in theirs, (name, method, mine, theirs)
            checked += 1
    assert checked >= 15


def test_what_the_library_calls_has_its_arguments(libraries):
    """Of these the bindings have no signature but the example in their documentation."""
    said, module = libraries
    for method in ("read", "seek"):
        example = re.search(rf"def {method}\((.*)\) ->", said["IStreamReaderV2"][""])
        assert example is not None
        names = re.findall(r"(\w+)(?::|,|$)", re.sub(r": \w+", ":", example[1]))
        assert list(inspect.signature(getattr(module.IStreamReaderV2, method)).parameters) == names


def test_types_have_the_names_that_the_runner_knows(libraries):
    from rankbook.tools.runtimes.trt_engine import _NUMPY

    said, module = libraries
    assert set(_NUMPY) <= set(said["DataType"])
    for kind in ("TensorIOMode", "SeekPosition", "DataType"):
        assert set(getattr(module, kind).__members__) <= set(said[kind])


def test_what_rtx_has_beyond_tensorrt(libraries):
    """By these the runner tells the two apart."""
    said, module = libraries
    for name in ("CudaGraphStrategy", "IRuntimeCache"):
        assert (name in said) == hasattr(module, name) == (module.__name__ == "tensorrt_rtx")
