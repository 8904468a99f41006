"""A network with the plugins in it for polygraphy, which runs this file as a "trt-network-script".

`rankbook build` prints the whole command. Model and plugin library come from two environment variables.
"""

from __future__ import annotations

import os
from typing import Any

MODEL_VARIABLE = "RANKBOOK_ONNX"
"""Names the ONNX file."""
LIBRARY_VARIABLE = "RANKBOOK_TRT_LIBRARY"
"""Names the plugin library."""


def load_network() -> tuple[Any, Any, Any]:
    """Parse the model with the plugins registered; polygraphy calls this.

    Returns:
        Builder, network and parser.

    Raises:
        RuntimeError: The library or the model was refused.
        KeyError: A variable is not set.
    """
    from polygraphy.backend.trt import create_network, get_trt_logger
    from polygraphy.backend.trt.util import trt

    path, model = os.environ[LIBRARY_VARIABLE], os.environ[MODEL_VARIABLE]
    builder, network = create_network(strongly_typed=True)
    if trt.get_plugin_registry().load_library(path) is None:
        raise RuntimeError(f"TensorRT refused the plugin library {path}")
    parser = trt.OnnxParser(network, get_trt_logger())
    if not parser.parse_from_file(model):
        errors = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise RuntimeError(f"TensorRT refused {model}: {errors}")
    return builder, network, parser
