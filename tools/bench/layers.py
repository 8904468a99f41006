"""Single linear layers as ONNX models whose weights are too many for any cache: of rankbook and of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rankbook.plugins import contract, layout
from rankbook.tools.errors import UsageError

if TYPE_CHECKING:
    import onnx

Array = np.ndarray[Any, Any]
Constants = dict[str, Array]
BLOCK = 64
"""Block size of the peer MatMulNBits, and group size of rankbook's operators unless another is asked for."""


@dataclass(frozen=True)
class LayerSubject:
    """One kind of layer to time.

    Attributes:
        name: For tables.
        bits: Bits per code; 32 for fp32.
        constants: Draws the constants of one layer (N, K) by name.
        op_type: The node's operator.
        domain: Its domain.
        attributes: Its attributes for (N, K).
        native: Runs in the native library.
        activations: What the library computes with.
        dtype: Of x and y, and of the floats of a peer's constants: ``float32`` or ``float16``.
    """

    name: str
    bits: int
    constants: Callable[[int, int, np.random.Generator], Constants]
    op_type: str
    domain: str
    attributes: Callable[[int, int], dict[str, Any]]
    native: bool = False
    activations: str = "fp32"
    dtype: str = "float32"

    def model(self, shape: tuple[int, int], stream: int) -> tuple[onnx.ModelProto, int, int]:
        """Return a model, its number of layers and the bytes of constants of one layer.

        Args:
            shape: (N, K).
            stream: Bytes of constants that the model must have at least, so that each run reads them from memory.
        """
        from onnx import helper, numpy_helper

        rng = np.random.default_rng(0)
        n, k = shape
        first = self._draw(n, k, rng)
        size = sum(value.nbytes for value in first.values())
        copies = max(1, -(-stream // size))
        # One sum of all outputs is handed over: each of them would cost more than a small layer.
        nodes, initializers, outputs = [], [], []
        for copy in range(copies):
            constants = first if copy == 0 else self._draw(n, k, rng)
            names = [f"{name}_{copy}" for name in constants]
            initializers += [
                numpy_helper.from_array(value, name) for name, value in zip(names, constants.values(), strict=True)
            ]
            output = f"y_{copy}"
            nodes.append(
                helper.make_node(
                    self.op_type, ["x", *names], [output], f"layer_{copy}", domain=self.domain, **self.attributes(n, k)
                )
            )
            outputs.append(output)
        nodes.append(helper.make_node("Sum", outputs, ["y"], "sum"))
        elem = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        y = helper.make_tensor_value_info("y", elem, ["M", n])
        x = helper.make_tensor_value_info("x", elem, ["M", k])
        graph = helper.make_graph(nodes, self.name, [x], [y], initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        opsets.append(helper.make_opsetid(contract.DOMAIN, contract.VERSION))
        return helper.make_model(graph, opset_imports=opsets, ir_version=10), copies, size

    def _draw(self, n: int, k: int, rng: np.random.Generator) -> Constants:
        drawn = self.constants(n, k, rng)
        if self.native:  # its parameters have types of their own
            return drawn
        return {name: value.astype(self.dtype) if value.dtype.kind == "f" else value for name, value in drawn.items()}


def packed_matmul(
    bits: int, rank: int, *, branch: int = 0, group: int = BLOCK, activations: str = "int8", gpu: bool = False
) -> LayerSubject:
    """Return a packed product: ``rank`` planes and an offset per group of ``group`` inputs, int8 parameters.

    Args:
        bits: Bits per code.
        rank: Planes of levels.
        branch: Rank of the error branch; 0 for none.
        group: Group size.
        activations: ``int8`` or ``fp32``.
        gpu: x is fp16, also where it would be fp32 on the CPU; ``int8`` is an operator, not an entry of the session.
    """
    kind = contract.matmul_kind(low_rank=branch > 0, int8_activations=gpu and activations == "int8")

    def constants(n: int, k: int, rng: np.random.Generator) -> Constants:
        if k % group:
            raise UsageError(f"groups of {group} do not divide {k} inputs; give another shape or --group-size")
        panels = layout.ceil_div(n, layout.PANEL)
        levels = np.ones((rank + 1, 1 << bits), np.float16)
        levels[:rank] = rng.integers(-64, 64, (rank, 1 << bits))
        if bits == 8:
            levels[:rank] = np.arange(256) - 128
        drawn = {
            "codes": _bytes(layout.packed_shape(n, k, bits), rng),
            "levels": levels,
            "params": _bytes((panels, k // group, rank + 1, layout.PANEL), rng),
            "step": np.full((panels, 1, rank + 1, 1), 1e-6, np.float32),
            "base": np.zeros((panels, 1, rank + 1, 1), np.float32),
            "bias": np.zeros(1, np.float32),
        }
        if branch:
            drawn |= {"down": _bytes((branch, k), rng), "down_scale": np.full((branch, 1), 1e-3, np.float32)}
            drawn |= {"up": _bytes((n, branch), rng), "up_scale": np.full((1, branch), 1e-3, np.float32)}
        return drawn

    def attributes(n: int, k: int) -> dict[str, Any]:
        names = {"plugin_namespace": contract.PLUGIN_NAMESPACE, "plugin_version": contract.PLUGIN_VERSION}
        return {"in_features": k, "out_features": n, "offset": 1, **names}

    name = f"rankbook {bits} bits rank {rank}" + (f" branch {branch}" if branch else "")
    name += " fp16" if gpu and activations == "fp32" else f" {activations}"
    op_type = contract.op_name(kind, bits)
    dtype = "float16" if gpu else "float32"
    return LayerSubject(name, bits, constants, op_type, contract.DOMAIN, attributes, True, activations, dtype)


def matmul_nbits(bits: int, dtype: str = "float32") -> LayerSubject:
    """Return ONNX Runtime's MatMulNBits: blocks of 64, zero points, int8 activations (accuracy level 4) on the CPU."""

    def constants(n: int, k: int, rng: np.random.Generator) -> Constants:
        blocks = layout.ceil_div(k, BLOCK)
        return {
            "codes": _bytes((n, blocks, BLOCK * bits // 8), rng).view(np.uint8),
            "scales": rng.uniform(1e-4, 2e-4, n * blocks).astype(np.float32),
            "zero_points": _bytes((n * layout.ceil_div(blocks * bits, 8),), rng).view(np.uint8),
        }

    def attributes(n: int, k: int) -> dict[str, Any]:
        return {"K": k, "N": n, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}

    return LayerSubject(
        f"MatMulNBits {bits} bits", bits, constants, "MatMulNBits", "com.microsoft", attributes, dtype=dtype
    )


def plain_float() -> LayerSubject:
    """Return ONNX Runtime's MatMul in fp32."""

    def constants(n: int, k: int, rng: np.random.Generator) -> Constants:
        return {"weight": rng.standard_normal((k, n), np.float32)}

    return LayerSubject("MatMul fp32", 32, constants, "MatMul", "", lambda *_: {})


def _bytes(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    return np.frombuffer(rng.bytes(int(np.prod(shape))), np.int8).reshape(shape)
