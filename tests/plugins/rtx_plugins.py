"""Builds one engine per operator with the plugin library in TensorRT-RTX; runs as a script in a child process.

A child, because the library path must be set before it starts and the first logger of a process stays the only one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def build_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Build a model of each operator; return by op_type the number of plugin layers and whether an engine came out."""
    import onnx

    from rankbook.plugins import contract, layout, library
    from rankbook.tools.runtimes import trt
    from tests.calibration.records import random_record
    from tests.ops.cases import Case, look_up_model, op_model

    for bits in layout.BITS:
        for case in (Case(bits=bits), Case(bits=bits, rank=4, int8_activations=True)):
            op = case.draw(experts=5, tokens=(3,), dtype="float16")
            onnx.save(op.model(bodies=True), folder / f"{op.op_type}.onnx")
        for kind in contract.KINDS:
            name = contract.op_name(kind, bits)
            operator = contract.PACKED[name]
            record = random_record(bits=bits, rank=4 if operator.low_rank else 0)
            dtype = {2: "float32", 3: "float16", 4: "bfloat16", 8: "float16"}[bits]
            if kind == contract.GATHER:
                model = look_up_model(record)
            else:
                model = op_model(record, dtype, int8_activations=operator.int8_activations)
            onnx.save(model, folder / f"{name}.onnx")
    command = [sys.executable, __file__, str(library.library("trt")), str(folder)]
    environment = trt.rtx_environment(folder / "libraries")
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    results: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


def main(plugin_library: str, folder: str) -> None:
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.WARNING)
    if trt.get_plugin_registry().load_library(plugin_library) is None:
        raise SystemExit("the library was refused")
    results = {}
    for path in sorted(Path(folder).glob("*.onnx")):
        builder = trt.Builder(logger)
        network = builder.create_network()
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(path)):
            raise SystemExit(f"{path.name}: {parser.get_error(0).desc()}")
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM80, 0)
        profile = builder.create_optimization_profile()
        for given in map(network.get_input, range(network.num_inputs)):
            sizes = [[size if size > 0 else free for size in given.shape] for free in (1, 2, 8)]
            profile.set_shape(given.name, *sizes)
        config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(network, config)
        kinds = [network.get_layer(index).type for index in range(network.num_layers)]
        results[path.stem] = {"plugins": kinds.count(trt.LayerType.PLUGIN_V3), "built": engine is not None}
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
