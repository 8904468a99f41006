"""One report of each kind, as the verbs make them."""

from __future__ import annotations

import math
from typing import Any

from rankbook.tools.bench.device_bench import Cell
from rankbook.tools.bench.layer_bench import LayerResult
from rankbook.tools.bench.memory import Memory
from rankbook.tools.bench.model_bench import ModelResult
from rankbook.tools.evaluate.engine_parity import EngineParityReport, ReferenceCheck
from rankbook.tools.evaluate.greedy import GreedyCheck
from rankbook.tools.evaluate.node_checks import LayerCheck, OperatorCheck
from rankbook.tools.evaluate.parity import ParityReport
from rankbook.tools.evaluate.runners import Agreement

GOOD, BAD = Agreement("logits", 1e-6, 1e-7, 3.0, 1e-3, True), Agreement("logits", math.inf, 1.0, 3.0, 1e-3, False)
FILE = ParityReport(
    model="onnx/model.onnx",
    checkpoint="q",
    tolerance=1e-3,
    tokens=(2, 8),
    logits=GOOD,
    cached=GOOD,
    operators=(OperatorCheck("CodebookMatMul3", "a", 2, (8, 16), 1e-6, True),),
    layers=(LayerCheck("a", 1e-6, True),),
    greedy=(GreedyCheck("Once", 4, 4, None, True, 4),),
    kernels="native",
    passed=True,
)
ENGINE = EngineParityReport(
    engine="e", model="onnx", runtime="TensorRT-RTX 1.7", tolerance=1e-2, tokens=(1, 8),
    references=(ReferenceCheck("ONNX Runtime", BAD, GOOD, 0.5),), missing=("PyTorch: gone",), first_bad_layer="b",
)  # fmt: skip
SPEED = ModelResult("onnx@native", "native", 3.25, 10, 100.0, 110.0, {"x": 2.0}, None, {}, Memory(1000, 2000, 1500))
LAYER = LayerResult("3 bits", 3, 8, 16, 1, 2, 4.5, 4.0, 100, 20.0, "matmulnbits", 1.5)
CELL = Cell("e@auto", "TensorRT, fp16", 128, 1, 1.0, 2.0, 3.0, 500.0, None, 0.5)
LOST: dict[str, Any] = {
    "model": "gone",
    "perplexity": 9.0,
    "kl": None,
    "top1_agreement": None,
    "tokens": 3,
    "seconds": 1.0,
}
"""Of a model whose folder is not given."""
