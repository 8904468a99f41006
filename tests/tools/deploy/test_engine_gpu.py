"""Engines on a GPU agree with ONNX Runtime. Collected everywhere, run where there is a GPU (plugins/csrc/GPU.md)."""

from __future__ import annotations

import numpy as np
import pytest

from rankbook.calibration.source import ENGINE_NAME
from rankbook.plugins import library
from rankbook.tools.deploy import engine
from rankbook.tools.deploy.options import BuildOptions
from rankbook.tools.runtimes import ort, trt
from tests.tools.files import FEATURES, chain_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(trt.unavailable() is not None, reason=str(trt.unavailable()))]


@pytest.mark.parametrize("plugins", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_an_engine_computes_what_onnx_runtime_computes(bits, plugins, tmp_path):
    """fp32 all the way; both sides add up some 200 products per output in orders of their own."""
    import tensorrt
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    if plugins and library.unavailable("trt"):
        pytest.skip(str(library.unavailable("trt")))
    path = chain_model(tmp_path / "onnx", bits=bits)
    options = BuildOptions(target="trt", max_batch=2, max_sequence=8, max_context=16, no_plugins=not plugins)
    report = engine.build(path, tmp_path / "engine", options, lambda *_: None)
    assert report.passed, report.checks
    assert (tmp_path / "engine" / engine.TIMING_CACHE_NAME).is_file()
    if plugins:
        tensorrt.get_plugin_registry().load_library(str(library.library("trt")))  # None if it is loaded already
    built = EngineFromBytes((tmp_path / "engine" / ENGINE_NAME).read_bytes())
    session = ort.session(path)
    for index, lengths in enumerate(((1, 5, 8), (1,))):  # the profiles: prefill, decode
        with TrtRunner(built, optimization_profile=index) as runner:
            for batch in (1, 2):
                for length in lengths:
                    x = np.random.default_rng(length).standard_normal((batch, length, FEATURES)).astype(np.float32)
                    (want,) = session.run(None, {"x0": x})
                    (got,) = runner.infer({"x0": x}).values()
                    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
