"""The registry of TensorRT 11 itself, not only that of TensorRT-RTX, takes the plugin library and makes plugins of it.

TensorRT's builder is not on the package index and needs a GPU; its Python bindings and lean runtime are and do not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from rankbook.plugins import contract, library
from rankbook.plugins.operators import OPERATORS
from tests.plugins.toolchain import EXPECTED, lean_environment_in, lean_unavailable

_reason = lean_unavailable() or library.unavailable("trt")
pytestmark = pytest.mark.skipif(_reason is not None and not EXPECTED, reason=str(_reason))

CHILD = """
import json, sys
import numpy as np
import tensorrt_bindings as trt

registry = trt.get_plugin_registry()
loaded = registry.load_library(sys.argv[1]) is not None
found = {}
for creator in registry.all_creators:
    if creator.plugin_namespace != sys.argv[2]:
        continue
    fields = [("in_features", 64), ("out_features", 96), ("offset", 1)]
    fields = [trt.PluginField(n, np.array([v], np.int32), trt.PluginFieldType.INT32) for n, v in fields]
    whole = creator.create_plugin("layer.7", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    part = creator.create_plugin("layer.7", trt.PluginFieldCollection(fields[:1]), trt.TensorRTPhase.BUILD)
    found[creator.name] = [creator.plugin_version, whole is not None, part is not None]
print(json.dumps({"version": trt.__version__, "loaded": loaded, "creators": found}))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Load the library in a child process, since what is loaded there must not meet TensorRT-RTX."""
    environment = lean_environment_in(tmp_path_factory.mktemp("stubs"))
    command = [sys.executable, "-c", CHILD, str(library.library("trt")), contract.PLUGIN_NAMESPACE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_every_creator_is_registered(report: dict[str, Any]) -> None:
    assert report["version"].startswith("11.")
    assert report["loaded"]
    assert sorted(report["creators"]) == sorted(name for name, each in OPERATORS.items() if each.has_plugin)


def test_plugins_are_made_and_bad_attributes_refused(report: dict[str, Any]) -> None:
    assert set(map(tuple, report["creators"].values())) == {(contract.PLUGIN_VERSION, True, False)}
