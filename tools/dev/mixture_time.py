"""How fast a token goes through the experts of a block, on the CPU, beside ONNX Runtime's QMoE.

    python -m rankbook.tools.dev.mixture_time --threads 1 2

A random block of the shape of Qwen3-30B-A3B: the gate and up matrices of the chosen experts, SwiGLU, their down
matrices, the weighted sum; without the router, which QMoE reads as scores. Each call chooses other experts, so that
their bytes come from memory. A turn goes once through all experts. *Share* is what it reads a second over what a plain
read of as many bytes gets on the same threads, in the same minute: the median of all turns, and of the fastest ones.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rankbook.plugins import contract, experts, rows
from rankbook.plugins.operators import OPERATORS
from rankbook.tools.bench.bandwidth import reader
from rankbook.tools.bench.layers import packed_matmul
from rankbook.tools.bench.timing import interleave, median_ratio, seconds
from rankbook.tools.report import Table
from rankbook.tools.runtimes.ort import session

if TYPE_CHECKING:
    import onnx

Array = np.ndarray[Any, Any]
Work = Callable[[Array], object]
"""A step with the chosen experts (k,)."""
BLOCK = 64
"""Weights that share parameters, here and in QMoE."""
_PAUSE = 0.05
"""Seconds before a turn in which the workers of other sessions stop spinning."""


@dataclass(frozen=True)
class Shape:
    """A block: inputs, inner features of an expert, experts, chosen ones of a token, bits of a code."""

    hidden: int = 2048
    inner: int = 768
    experts: int = 128
    chosen: int = 8
    bits: int = 4

    def choices(self, rng: np.random.Generator) -> list[Array]:
        """Return the experts of as many tokens as choose each expert once."""
        order = rng.permutation(self.experts)
        return [np.sort(part) for part in np.split(order, self.experts // self.chosen)]


@dataclass(frozen=True)
class Result:
    """One kind of block.

    Attributes:
        name: Of the kind.
        threads: That it ran on.
        microseconds: Of a token, median.
        bytes: Of the chosen experts.
        share: Bytes a second over those of a plain read, median of the turns.
        fastest: The same of the fastest turn of each.
    """

    name: str
    threads: int
    microseconds: float
    bytes: int
    share: float
    fastest: float


def packed(shape: Shape, planes: int) -> tuple[onnx.ModelProto, int]:
    """Return a block of rankbook's operators on x (1, hidden), experts (k,) and weights (k, 1); bytes of an expert."""
    from onnx import helper, numpy_helper

    rng, size = np.random.default_rng(0), 0
    nodes: list[Any] = []
    initializers: list[Any] = []
    member = packed_matmul(shape.bits, planes, group=BLOCK)

    def product(name: str, x: str, n: int, k: int) -> None:
        nonlocal size
        drawn = [member.constants(n, k, rng) for _ in range(shape.experts)]
        stacked = {part: np.stack([one[part] for one in drawn]) for part in drawn[0]}
        size += sum(value.nbytes for value in drawn[0].values())
        names = [f"{name}_{part}" for part in stacked]
        initializers.extend(map(numpy_helper.from_array, stacked.values(), names))
        operator = OPERATORS[experts.name_of(contract.PACKED[member.op_type])]
        given = {item.name: member.attributes(n, k)[item.name] for item in operator.attributes}
        nodes.append(
            helper.make_node(operator.name, [x, experts.NUMBERS, *names], [name], name, domain=contract.DOMAIN, **given)
        )

    def node(op_type: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        nodes.append(helper.make_node(op_type, inputs, outputs, **attributes))

    initializers += [numpy_helper.from_array(np.array([shape.chosen, 1]), "rows")]
    node("Expand", ["x", "rows"], ["xs"])
    product("gate_up", "xs", 2 * shape.inner, shape.hidden)
    node("Split", ["gate_up"], ["gate", "up"], axis=1, num_outputs=2)
    node(rows.SWIGLU.name, ["gate", "up"], ["inner"], domain=contract.DOMAIN)
    product("down", "inner", shape.hidden, shape.inner)
    node("Mul", ["down", "weights"], ["weighted"])
    initializers += [numpy_helper.from_array(np.array([0]), "axes")]
    node("ReduceSum", ["weighted", "axes"], ["y"], keepdims=1)
    inputs = [_floats("x", 1, shape.hidden), _floats("weights", shape.chosen, 1)]
    inputs.append(helper.make_tensor_value_info(experts.NUMBERS, 7, [shape.chosen]))
    return _model(nodes, inputs, [_floats("y", 1, shape.hidden)], initializers), size


def qmoe(shape: Shape) -> tuple[onnx.ModelProto, int]:
    """Return ONNX Runtime's block on x (1, hidden) and scores (1, experts); bytes of an expert."""
    from onnx import helper, numpy_helper

    rng, size = np.random.default_rng(0), 0
    initializers: list[Any] = []
    for name, n, k in (("fc1", 2 * shape.inner, shape.hidden), ("fc2", shape.hidden, shape.inner)):
        codes = np.frombuffer(rng.bytes(shape.experts * n * k * shape.bits // 8), np.uint8)
        scales = np.full((shape.experts, n, k // BLOCK), 1e-4, np.float32)
        initializers.append(numpy_helper.from_array(codes.reshape(shape.experts, n, -1), f"{name}_codes"))
        initializers.append(numpy_helper.from_array(scales, f"{name}_scales"))
        size += (codes.nbytes + scales.nbytes) // shape.experts
    inputs = ["x", "scores", "fc1_codes", "fc1_scales", "", "fc2_codes", "fc2_scales"]
    how: dict[str, Any] = {
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
    }
    how |= {"k": shape.chosen, "expert_weight_bits": shape.bits, "block_size": BLOCK, "accuracy_level": 4}
    node = helper.make_node("QMoE", inputs, ["y"], "experts", domain=contract.STOCK_DOMAIN, **how)
    given = [_floats("x", 1, shape.hidden), _floats("scores", 1, shape.experts)]
    return _model([node], given, [_floats("y", 1, shape.hidden)], initializers), size


def _floats(name: str, *sizes: int) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info(name, 1, sizes)


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], initializers: list[Any]) -> onnx.ModelProto:
    from onnx import helper

    graph = helper.make_graph(nodes, "mixture", inputs, outputs, initializers)
    opsets = [helper.make_opsetid(name, 21 if not name else 1) for name in ("", contract.STOCK_DOMAIN, contract.DOMAIN)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def subjects(shape: Shape, threads: int) -> Mapping[str, tuple[Work, int]]:
    """Return a step of each kind of block, and the bytes that it reads of its experts."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, shape.hidden)).astype(np.float32)
    even = np.full((shape.chosen, 1), 1 / shape.chosen, np.float32)
    found: dict[str, tuple[Work, int]] = {}
    for planes, activations in ((1, "int8"), (2, "int8"), (1, "fp32")):
        model, size = packed(shape, planes)
        held = session(model.SerializeToString(), threads=threads, native=True, activations=activations)

        def step(chosen: Array, held: Any = held) -> object:
            return held.run(None, {"x": x, "weights": even, experts.NUMBERS: chosen})

        found[f"rankbook {shape.bits} bits rank {planes} {activations}"] = (step, size * shape.chosen)
    model, size = qmoe(shape)
    peer = session(model.SerializeToString(), threads=threads)

    def scored(chosen: Array) -> object:
        scores = np.zeros((1, shape.experts), np.float32)
        scores[0, chosen] = 1
        return peer.run(None, {"x": x, "scores": scores})

    found["QMoE"] = (scored, size * shape.chosen)
    return found


def measure(shape: Shape, threads: int, repeats: int) -> list[Result]:
    """Time every kind of block in turns; a turn is a token for each choice."""
    every, choices = subjects(shape, threads), shape.choices(np.random.default_rng(1))

    def turn(work: Work) -> Callable[[], object]:
        return lambda: [work(chosen) for chosen in choices]

    runs = {name: _rested(seconds(turn(work), threads)) for name, (work, _) in every.items()}
    amounts = {name: size * len(choices) for name, (_, size) in every.items()}
    amounts["read"] = max(amounts.values())
    runs["read"] = _rested(seconds(reader(threads, amounts["read"]), threads))
    times = interleave(runs, repeats, lambda _: None)
    # Seconds of a plain read of one byte.
    plain = [value / amounts["read"] for value in times.pop("read")]
    results = []
    for name, values in times.items():
        share = median_ratio([second * amounts[name] for second in plain], values)
        fastest = min(plain) * amounts[name] / min(values)
        one = statistics.median(values) / len(choices)
        results.append(Result(name, threads, one * 1e6, every[name][1], share, fastest))
    return results


def _rested(run: Callable[[], float]) -> Callable[[], float]:
    """Return a run that begins when the workers of other sessions have stopped spinning."""

    def later() -> float:
        time.sleep(_PAUSE)
        return run()

    return later


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m rankbook.tools.dev.mixture_time", description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args(argv)
    results = [result for threads in args.threads for result in measure(Shape(), threads, args.repeats)]
    header = ("block", "threads", "us a token", "MB", "share of a plain read", "fastest turns")
    cells = [
        (r.name, r.threads, round(r.microseconds), round(r.bytes / 1e6, 1), round(r.share, 2), round(r.fastest, 2))
        for r in results
    ]
    sys.stdout.write(Table("", header, cells).markdown() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
