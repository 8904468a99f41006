"""The stand-in of TensorRT has the methods and arguments of the bindings, so that what runs on it can run on them."""

from __future__ import annotations

import importlib.util
import inspect
import re
from types import ModuleType
from typing import Any

import pytest

from tests import tensorrt_stand_in as stand_in


@pytest.fixture(params=["tensorrt_rtx", "tensorrt"])
def libraries(request, monkeypatch) -> tuple[Any, ModuleType]:
    """The bindings, and the stand-in."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    real = importlib.import_module(request.param)
    return real, stand_in.install(monkeypatch, request.param).module


def _classes(module: ModuleType) -> dict[str, Any]:
    found = {name: item for name, item in vars(module).items() if inspect.isclass(item)}
    return found | {"IPluginRegistry": found.pop("get_plugin_registry")}


def _arguments(documentation: str) -> list[list[str]]:
    """Names of the arguments of every overload, from the signatures that pybind11 writes."""
    lines = [match[1] for match in re.finditer(r"^(?:\d+\. )?\w+\((.*)\) -> ", documentation, re.M)]
    return [re.findall(r"(?:^|, )(\w+)(?=: )", line) for line in lines]


def test_classes_and_their_members_exist(libraries):
    real, module = libraries
    for name, item in _classes(module).items():
        theirs = getattr(real, name)
        public = {member for member in dir(item) if not member.startswith("_")} - set(dir(object))
        if issubclass(item, int):
            public -= set(dir(int))
        assert public <= set(dir(theirs)), (name, public - set(dir(theirs)))
    assert real.get_plugin_registry.__doc__.startswith("get_plugin_registry(")


def test_methods_take_the_same_arguments(libraries):
    real, module = libraries
    checked = 0
    for name, item in _classes(module).items():
        for method, function in inspect.getmembers(item, inspect.isfunction):
            if method.startswith("_") or name in ("ILogger", "IStreamReaderV2") or issubclass(item, int):
                continue
            mine = list(inspect.signature(function).parameters)
            theirs = _arguments(getattr(getattr(real, name), method).__doc__)
            assert mine in theirs, (name, method, mine, theirs)
            checked += 1
    assert checked >= 15


def test_what_the_library_calls_has_its_arguments(libraries):
    """Of these the bindings have no signature but the example in their documentation."""
    real, module = libraries
    for method in ("read", "seek"):
        example = re.search(rf"def {method}\((.*)\) ->", real.IStreamReaderV2.__doc__)
        assert example is not None
        names = re.findall(r"(\w+)(?::|,|$)", re.sub(r": \w+", ":", example[1]))
        assert list(inspect.signature(getattr(module.IStreamReaderV2, method)).parameters) == names


def test_types_have_the_names_that_the_runner_knows(libraries):
    from rankbook.tools.runtimes.trt_engine import _NUMPY

    real, module = libraries
    assert set(_NUMPY) <= set(real.DataType.__members__)
    for kind in ("TensorIOMode", "SeekPosition", "DataType"):
        assert set(getattr(module, kind).__members__) <= set(getattr(real, kind).__members__)
