"""Builds an engine with TensorRT-RTX in a child process; runs as a script there.

A child, because the first logger of a process stays the only one, and a crash of the builder must not end pytest.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed (extra 'cpu')"
)

Profile = dict[str, tuple[list[int], list[int], list[int]]]


def build(path: Path, profile: Profile, timeout_s: float = 300) -> dict[str, Any]:
    """Build the model for SM86 and return errors, layers, engine_bytes and weight_bytes."""
    command = [sys.executable, __file__, str(path), json.dumps(profile)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout_s)
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {"errors": [f"exit {result.returncode}: {(result.stdout + result.stderr)[-2000:]}"]}
    report: dict[str, Any] = json.loads(lines[-1])
    return report


def main() -> None:
    import tensorrt_rtx as trt

    lines: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            lines.append(message)
            if severity <= trt.ILogger.ERROR:
                errors.append(message)

    errors: list[str] = []
    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network()
    parser = trt.OnnxParser(network, logger)
    report: dict[str, Any] = {"errors": errors}
    if not parser.parse_from_file(sys.argv[1]):
        errors.extend(parser.get_error(i).desc() for i in range(parser.num_errors))
        sys.stdout.write(json.dumps(report) + "\n")
        return
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    for name, (low, usual, high) in json.loads(sys.argv[2]).items():
        profile.set_shape(name, low, usual, high)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        errors.append("the builder returned no engine")
    weights = [re.search(r"Total Weights Memory: (\d+)", line) for line in lines]
    report["layers"] = network.num_layers
    report["engine_bytes"] = 0 if engine is None else engine.nbytes
    report["weight_bytes"] = next((int(match[1]) for match in weights if match), 0)
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()


def assert_builds(folder: Path) -> None:
    """Build an engine of an exported language model for a batch of 2, prompts of 8 and a context of 24 tokens."""
    import onnx

    from rankbook.exporter.export import MODEL

    sizes = {"batch": (1, 1, 2), "sequence": (1, 1, 8), "past_sequence": (0, 8, 16), "total_sequence": (1, 9, 24)}
    profile = {}
    for value in onnx.load(folder / MODEL, load_external_data=False).graph.input:
        dims = [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        low, usual, high = ([sizes[d][i] if isinstance(d, str) else d for d in dims] for i in range(3))
        profile[value.name] = (low, usual, high)
    report = build(folder / MODEL, profile, timeout_s=600)
    assert report["errors"] == []
    assert report["engine_bytes"] > 0
