"""Runs the small graphs of the tests of passes."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxruntime


def run(model: ir.Model, feeds: dict[str, Any]) -> Any:
    """Return the first output in stock ONNX Runtime."""
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)[0]
