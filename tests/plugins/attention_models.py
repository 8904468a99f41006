"""Small models of one attention node: rankbook's, with or without its body, or ONNX Runtime's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from rankbook.exporter.bodies import body
from rankbook.plugins import attention, contract, library

Array = npt.NDArray[Any]
POSITIONS = 400


@dataclass
class Node:
    """One attention node, with a cache in float16 if ``half``; ``own`` without ``body``: only the library runs it."""

    heads: int = 6
    kv_heads: int = 2
    size: int = 64
    softcap: float = 0.0
    window: int = -1
    rotary: bool = True
    scale: float = 0.2
    own: bool = True
    body: bool = True
    half: bool = False
    dropped: tuple[str, ...] = ()
    changed: dict[str, int | float] = field(default_factory=dict)

    @property
    def operator(self) -> contract.Operator:
        """The operator of rankbook."""
        if self.half:
            return attention.ROTARY_HALF if self.rotary else attention.HALF
        return attention.OPERATOR

    def model(self) -> onnx.ModelProto:
        """Return the model; its inputs are those of the node but for the tables."""
        kinds = {"seqlens_k": (TensorProto.INT32, 1), "total_sequence_length": (TensorProto.INT32, 0)}
        kinds["position_ids"] = (TensorProto.INT64, 2)
        names = [port.name for port in self.operator.given({attention.ROTARY: self.rotary})]
        cache = TensorProto.FLOAT16 if self.half else TensorProto.FLOAT
        names = [name for name in names if name not in self.dropped]
        values = []
        for name in names:
            kind, axes = kinds.get(name, (cache, 4) if name.startswith("past") else (TensorProto.FLOAT, 3))
            if name not in ("cos", "sin"):
                values.append(helper.make_tensor_value_info(name, kind, [None] * axes))
        outputs = [
            helper.make_tensor_value_info(
                name, *((TensorProto.FLOAT, [None] * 3) if name == "output" else (cache, [None] * 4))
            )
            for name in (port.name for port in self.operator.outputs)
        ]
        domain = contract.DOMAIN if self.own else contract.STOCK_DOMAIN
        node = helper.make_node(
            self.operator.name, names, [value.name for value in outputs], "att", domain=domain, **self.attributes()
        )
        tables = [numpy_helper.from_array(table, name) for name, table in self.tables().items() if name in names]
        graph = helper.make_graph([node], "attention", values, outputs, tables)
        domains = {"": 23, contract.DOMAIN: contract.VERSION, contract.STOCK_DOMAIN: 1}
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(*item) for item in domains.items()],
            functions=[body(self.operator.name)] if self.body else [],
            ir_version=11,
        )

    def attributes(self) -> dict[str, Any]:
        """Return the attributes."""
        attributes: dict[str, Any] = {"num_heads": self.heads, "kv_num_heads": self.kv_heads, "scale": self.scale}
        attributes |= {"softcap": self.softcap, "local_window_size": self.window}
        if not self.half:
            attributes["do_rotary"] = int(self.rotary)
        return attributes | self.changed

    def expected(self, feeds: dict[str, Array]) -> tuple[Array, ...]:
        """Return the outputs of the numpy reference."""
        given = {**feeds, **self.tables()}
        attributes = self.attributes()
        return self.operator.compute([given[port.name] for port in self.operator.given(attributes)], attributes)

    def tables(self) -> dict[str, Array]:
        """Return cos and sin."""
        angles = np.arange(POSITIONS)[:, None] * 100.0 ** (-np.arange(self.size // 2) / (self.size // 2))
        return {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}


@dataclass(frozen=True)
class Call:
    """What one call sees: rows of the batch by their keys, new tokens of each, and positions of the past's buffer."""

    keys: tuple[int, ...]
    tokens: int
    past: int

    @property
    def total(self) -> int:
        """Keys of the longest row."""
        return max(self.keys)

    def before(self) -> list[int]:
        """Return the keys that each row had before."""
        return [0 if self.tokens == self.total else keys - self.tokens for keys in self.keys]

    def feeds(self, node: Node, seed: int = 0) -> dict[str, Array]:
        """Return random inputs."""
        rng, rows = np.random.default_rng(seed), len(self.keys)

        def draw(*shape: int) -> Array:
            return rng.standard_normal(shape).astype(np.float32)

        feeds: dict[str, Array] = {"query": draw(rows, self.tokens, node.heads * node.size)}
        for name in ("key", "value"):
            feeds[name] = draw(rows, self.tokens, node.kv_heads * node.size)
            past = draw(rows, node.kv_heads, self.past, node.size)
            feeds[f"past_{name}"] = past.astype(np.float16) if node.half else past
        feeds["seqlens_k"] = np.array(self.keys, np.int32) - 1
        feeds["total_sequence_length"] = np.array(self.total, np.int32)
        if node.rotary:
            feeds["position_ids"] = np.array(self.before())[:, None] + np.arange(self.tokens)[None] + 3
        return feeds


def session(node: Node, *, native: bool = True, threads: int = 1) -> Any:
    """Return an ONNX Runtime session."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if native:
        options.register_custom_ops_library(str(library.library("ort")))
    return ort.InferenceSession(node.model().SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_in_place(runs: Any, feeds: dict[str, Array]) -> list[Array]:
    """Run with the past's buffers as those of the present; return the output and the buffers."""
    import onnxruntime as ort

    held = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in feeds.items()}
    binding = runs.io_binding()
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("output")
    for name in ("key", "value"):
        binding.bind_ortvalue_output(f"present_{name}", held[f"past_{name}"])
    runs.run_with_iobinding(binding)
    return [binding.get_outputs()[0].numpy(), held["past_key"].numpy(), held["past_value"].numpy()]
