"""Mixtures of experts with the native library: the logits of torch, in a prompt and token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rankbook.calibration.checkpoint.format import open_checkpoint
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.run import quantize_model
from rankbook.exporter.export import ExportOptions, export
from rankbook.exporter.file import ExportedModel
from rankbook.tools.deploy.engine import build
from rankbook.tools.deploy.options import BuildOptions
from rankbook.tools.dev.family_models import tiny
from rankbook.tools.inspect.sizes import packed_size
from rankbook.tools.runtimes.ort import OrtModel
from rankbook.tools.runtimes.torch import TorchModel
from tests.exporter.rtx import needs_rtx
from tests.ops.runners import built

TOKENS = np.random.default_rng(0).integers(0, 256, (1, 12))
BOUNDS = {"native": 1e-5, "native-int8": 5e-2}
"""Largest difference to the logits of torch, relative to the largest; that of int8 activations as in test_dtypes.py."""


@built
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_native_library_computes_mixtures(family: str, tmp_path: Path) -> None:
    """Plain experts; many; with biases, attention sinks and a clamped gate. An error branch in each."""
    tiny(family, tmp_path / "model")
    how = QuantizeOptions(method="rtn", bits=4, group_size=32, calib="none", error_branch="lqer", error_rank=4)
    quantize_model(tmp_path / "model", tmp_path / "checkpoint", how)
    report = export(tmp_path / "checkpoint", tmp_path / "onnx", ExportOptions(logits="all"))
    assert report.nodes["CodebookExpertsLowRank4"] == 4
    specs = open_checkpoint(tmp_path / "checkpoint").layers.values()
    assert packed_size(ExportedModel.open(tmp_path / "onnx"))[1] == sum(spec.weights for spec in specs)
    want = TorchModel(tmp_path / "checkpoint").logits(TOKENS)
    for kernels, bound in BOUNDS.items():
        model = OrtModel(tmp_path / "onnx", kernels=kernels)
        assert np.abs(model.logits(TOKENS) - want).max() < bound * np.abs(want).max(), kernels
        steps = [model.start(TOKENS[:, :9]), *(model.step(int(token)) for token in TOKENS[0, 9:])]
        assert np.abs(np.stack(steps) - want[0, 8:]).max() < bound * np.abs(want).max(), kernels


@needs_rtx
@pytest.mark.trt
def test_a_mixture_becomes_an_engine_without_a_plugin(tmp_path: Path) -> None:
    tiny("qwen3_moe", tmp_path / "model")
    how = QuantizeOptions(method="rtn", bits=4, group_size=32, calib="none")
    quantize_model(tmp_path / "model", tmp_path / "checkpoint", how)
    export(tmp_path / "checkpoint", tmp_path / "onnx", ExportOptions())
    report = build(tmp_path / "onnx", tmp_path / "engine", BuildOptions(compute_capability=("SM86",), no_plugins=True))
    assert [check for check in report.checks if not check.passed] == []
    assert report.plugin_layers == 0
