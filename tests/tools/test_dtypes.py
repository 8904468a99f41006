"""Every dtype, graph and choice of kernels: the logits of torch, or a sentence that says which choice gives them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from rankbook.exporter.export import ExportOptions, export
from rankbook.plugins import library
from rankbook.tools.errors import UsageError
from rankbook.tools.runtimes.ort import OrtModel
from rankbook.tools.runtimes.torch import TorchModel
from tests.exporter.checkpoints import make_checkpoint

TOKENS = np.random.default_rng(0).integers(0, 256, (1, 12))
BOUNDS = {"fp32": 1e-5, "fp16": 1e-2}
"""Largest difference to the float32 logits of torch, relative to the largest; two layers in half precision."""
KERNELS = ("bodies", "native", "native-int8")
# int8 activations of 16 weights a group: about half a step of 127 in every product, which is all that is asked here.
INT8 = 5e-2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with an error branch, whose factors are constants of half precision in a file of half precision."""
    how = {"bits": 4, "error_branch": "lqer", "error_rank": 2, "factor_bits": 16, "quantize_lm_head": 8}
    return make_checkpoint(tmp_path_factory.mktemp("dtypes"), "llama", model={"head_dim": 16}, **how)


def unoptimized(model: OrtModel) -> np.ndarray:
    """Return the logits of `TOKENS` with graph optimizations off: constants that are cast to float32 are not folded."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if model.native:
        activations = "int8" if model.kernels == "native-int8" else "fp32"
        options.add_session_config_entry(library.ACTIVATIONS_ENTRY, activations)
        options.register_custom_ops_library(str(library.library("ort")))
    session = onnxruntime.InferenceSession(model.file.path, options, providers=["CPUExecutionProvider"])
    logits: np.ndarray = session.run(["logits"], model.feeds(TOKENS))[0]
    return logits


@pytest.mark.parametrize("graph", ["standard", "ort"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_choice_works_or_says_which_one_does(dtype: str, graph: str, checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "onnx", ExportOptions(dtype=dtype, graph=graph, logits="all"))
    want = TorchModel(checkpoint).logits(TOKENS)
    for kernels in KERNELS:
        if kernels != "bodies" and library.unavailable("ort"):
            continue
        if dtype == "bf16":
            with pytest.raises(UsageError, match="--dtype fp32"):
                OrtModel(tmp_path / "onnx", kernels=kernels)
            continue
        model = OrtModel(tmp_path / "onnx", kernels=kernels)
        error = np.abs(model.logits(TOKENS) - want).max() / np.abs(want).max()
        assert error < (INT8 if kernels == "native-int8" else BOUNDS[dtype]), kernels
        error = np.abs(unoptimized(model) - want).max() / np.abs(want).max()
        assert error < (INT8 if kernels == "native-int8" else BOUNDS[dtype]), kernels
        steps = [model.start(TOKENS[:, :9]), *(model.step(int(token)) for token in TOKENS[0, 9:])]
        error = np.abs(np.stack(steps) - want[0, 8:]).max() / np.abs(want).max()
        assert error < (INT8 if kernels == "native-int8" else BOUNDS[dtype]), kernels
