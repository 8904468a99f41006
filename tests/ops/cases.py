"""Cases of the operators: what to draw, and the operator with its input, its model and its expected output.

A case is drawn as a record and written by the exporter's own code, so every runner gets what a file would hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import torch
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.exporter.bodies import functions
from rankbook.exporter.dialects.rankbook import attributes, initializers
from rankbook.exporter.functions import OPSET
from rankbook.plugins import contract, experts, layout
from rankbook.plugins.operators import OPERATORS
from tests.calibration import records

Array = npt.NDArray[Any]

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
EPSILON = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative error of one rounding."""
RECORD_FIELDS = (
    "out_features in_features bits group planes has_offset param_bits float_levels linear_levels bias rank factor_bits"
    " seed"
).split()


@dataclass(frozen=True)
class Case:
    """One operator on one input; sizes and forms as in `tests.calibration.records.random_record`.

    Attributes:
        gather: Rows of W in place of a product.
        int8_activations: The operator rounds x to 8 bits.
        dtype: Type of x and y.
        tokens: Leading dimensions of x, or the shape of the indices.
        experts: A product of so many experts on rows of x, of which the third has none; 0 for one of a single layer.
    """

    bits: int = 3
    out_features: int = 40
    in_features: int = 48
    group: int = 16
    planes: int = 2
    has_offset: bool = True
    param_bits: int = 8
    float_levels: bool = False
    linear_levels: bool = False
    bias: bool = False
    rank: int = 0
    factor_bits: int = 8
    gather: bool = False
    int8_activations: bool = False
    dtype: str = "float32"
    tokens: tuple[int, ...] = (2, 3)
    seed: int = 0
    experts: int = 0

    def draw(self, **changes: Any) -> Op:
        """Return the operator and a random input, after changes to the case."""
        return replace(self, **changes)._draw()

    def _draw(self) -> Op:
        fields = {name: getattr(self, name) for name in RECORD_FIELDS}
        record = records.random_record(**fields)
        if self.experts:
            others = [records.random_record(**{**fields, "seed": self.seed + i}) for i in range(1, self.experts)]
            numbers = np.random.default_rng(self.seed).integers(0, self.experts, self.tokens)
            x = random_x(record, self.dtype, self.tokens, self.seed)
            numbers[numbers == UNCHOSEN] = self.experts - 1
            return Op.of_experts([record, *others], x, numbers, int8_activations=self.int8_activations)
        if self.gather:
            rows = np.random.default_rng(self.seed).integers(0, self.out_features, self.tokens)
            return Op.of(record, rows, gather=True)
        x = random_x(record, self.dtype, self.tokens, self.seed)
        return Op.of(record, x, int8_activations=self.int8_activations)


UNCHOSEN = 2
"""The expert of drawn cases that no row is sent to."""


def constants_of(record: QuantizedLinear, operator: contract.Operator) -> dict[str, Array]:
    """Return the constants that a file holds of a record, by formal name."""
    tensors = initializers(record.spec(), operator, record.pack().__getitem__, "layer")
    return {name: tensor.numpy() for name, tensor in tensors.items()}


@dataclass
class Op:
    """One operator and its input.

    Attributes:
        op_type: Its name.
        inputs: By formal name: what the operator is applied to, then the constants.
        attributes: By name.
        record: What the constants were written from, before any change to them.
        records: Those of all experts; empty for a single layer.
    """

    op_type: str
    inputs: dict[str, Array]
    attributes: dict[str, Any]
    record: QuantizedLinear
    records: tuple[QuantizedLinear, ...] = ()

    @classmethod
    def of(cls, record: QuantizedLinear, x: Array, *, gather: bool = False, int8_activations: bool = False) -> Op:
        """Return the operator of a record on x: activations (..., K), or row numbers where it looks rows up."""
        spec = record.spec()
        kind = contract.matmul_kind(low_rank=record.low_rank is not None, int8_activations=int8_activations)
        operator = contract.PACKED[contract.op_name(contract.GATHER if gather else kind, spec.bits)]
        inputs = {operator.inputs[0].name: x, **constants_of(record, operator)}
        return cls(operator.name, inputs, dict(attributes(spec)), record)

    @classmethod
    def of_experts(
        cls, records: Sequence[QuantizedLinear], x: Array, numbers: Array, *, int8_activations: bool = False
    ) -> Op:
        """Return the product of the rows x (S, K) with the records of their experts, numbers (S,)."""
        spec, packed = records[0].spec(), [record.pack() for record in records]
        kind = contract.matmul_kind(low_rank=bool(spec.branch_rank), int8_activations=int8_activations)
        operator = OPERATORS[experts.name_of(contract.PACKED[contract.op_name(kind, spec.bits)])]

        def read(part: str) -> torch.Tensor:
            return torch.stack([tensors[part] for tensors in packed])

        tensors = initializers(spec, operator, read, "layer", len(records))
        inputs = {"x": x, experts.NUMBERS: numbers, **{name: tensor.numpy() for name, tensor in tensors.items()}}
        given = {item.name: attributes(spec)[item.name] for item in operator.attributes}
        return cls(operator.name, inputs, given, records[0], tuple(records))

    @property
    def contract(self) -> contract.Operator:
        """What the operator says about itself."""
        return OPERATORS[self.op_type]

    @property
    def gather(self) -> bool:
        """Whether rows are looked up."""
        return self.contract.kind == contract.GATHER

    @property
    def dtype(self) -> str:
        """Type of x and y; of looked-up rows float32."""
        return "float32" if self.gather else str(self.x.dtype)

    @property
    def x(self) -> Array:
        """The first input."""
        return next(iter(self.inputs.values()))

    @property
    def numbers(self) -> Array:
        """The experts of the rows."""
        return self.inputs[experts.NUMBERS]

    def constants(self) -> dict[str, Array]:
        """Return the constants by formal name."""
        return {name: value for name, value in list(self.inputs.items())[1:] if name != experts.NUMBERS}

    def with_x(self, x: Array) -> Op:
        """Return the operator on another input."""
        return replace(self, inputs={name: x if value is self.x else value for name, value in self.inputs.items()})

    def with_numbers(self, numbers: Array) -> Op:
        """Return the product with other experts of the rows."""
        return replace(self, inputs={**self.inputs, experts.NUMBERS: numbers})

    def expected(self) -> Array:
        """Return the output of the numpy reference, in the type of x."""
        return self.contract.compute(list(self.inputs.values()), self.attributes)[0]

    def unrounded(self) -> Array:
        """Return the output of the numpy reference before it is rounded to the type of x, (..., N) or (..., K)."""
        return self.expected() if self.gather else self.with_x(self.x.astype(np.float32)).expected().astype(np.float64)

    @cached_property
    def magnitude(self) -> tuple[Array, Array]:
        """Sums of the magnitudes of all products, of the weight's and of the error branch's, each (..., N) float64.

        Those of a weight are sum_p |coefficient * level| + |offset|: what the errors of its rounding scale with.
        """
        if self.records:
            weights, branches = np.zeros((2, *self.x.shape[:-1], self.record.out_features))
            for expert, record in enumerate(self.records):
                rows = self.numbers == expert
                weights[rows], branches[rows] = Op.of(record, self.x[rows]).magnitude
            return weights, branches
        record = self.record
        params, levels = record.params.dense().abs(), record.levels.float().abs()
        codebooks = params[..., : record.planes] @ levels
        if record.has_offset:
            codebooks = codebooks + params[..., record.planes :]
        grouped = record.codes.view(record.out_features, -1, record.group).long()
        weight = codebooks.gather(2, grouped).reshape(record.out_features, -1).numpy().astype(np.float64)
        if self.gather:
            return weight[self.x], np.zeros(())
        x = np.abs(self.x.astype(np.float64))
        branch = np.zeros(())
        if record.low_rank is not None:
            down, up = (f.dense().abs().numpy().astype(np.float64) for f in (record.low_rank.down, record.low_rank.up))
            branch = (x @ down.T) @ up.T
        return x @ weight.T, branch

    def model(self, *, bodies: bool = False) -> onnx.ModelProto:
        """Return a model whose only node is the operator, every constant an initializer; with or without its body."""
        first, *_ = self.inputs
        node = helper.make_node(
            self.op_type, list(self.inputs), ["y"], name="layer", domain=contract.DOMAIN, **self.attributes
        )
        kind = helper.np_dtype_to_tensor_dtype(self.x.dtype)
        sizes = [f"d{i}" for i in range(self.x.ndim - (not self.gather))]
        x = helper.make_tensor_value_info(first, kind, sizes if self.gather else [*sizes, self.x.shape[-1]])
        width = int(self.attributes["in_features" if self.gather else "out_features"])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT if self.gather else kind, [*sizes, width])
        constants = [numpy_helper.from_array(value, name) for name, value in self.constants().items()]
        numbers = [helper.make_tensor_value_info(experts.NUMBERS, TensorProto.INT64, sizes)] if self.records else []
        graph = helper.make_graph([node], "op", [x, *numbers], [y], constants)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(contract.DOMAIN, contract.VERSION)]
        held = functions([self.op_type]) if bodies else []
        return helper.make_model(graph, opset_imports=opsets, functions=held, ir_version=11)


def random_x(record: QuantizedLinear, dtype: str = "float32", tokens: tuple[int, ...] = (2, 3), seed: int = 0) -> Array:
    """Return random activations (*tokens, K) for a record."""
    return np.random.default_rng(seed).standard_normal((*tokens, record.in_features)).astype(DTYPES[dtype])


def op_model(record: QuantizedLinear, dtype: str = "float32", *, int8_activations: bool = False) -> onnx.ModelProto:
    """Return a model of the product of a record, with its body."""
    return Op.of(record, random_x(record, dtype), int8_activations=int8_activations).model(bodies=True)


def look_up_model(record: QuantizedLinear) -> onnx.ModelProto:
    """Return a model that looks up rows of a record, with its body."""
    return Op.of(record, np.zeros((2, 3), np.int64), gather=True).model(bodies=True)


def relative_error(got: Array, want: Array) -> float:
    """Return the largest difference as a share of the largest expected magnitude."""
    scale = float(np.abs(want.astype(np.float64)).max()) or 1.0
    return float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max()) / scale


WIDE = Case(bits=4, out_features=64, in_features=128, group=64, tokens=(3,))
"""Rows of several blocks and groups, for tests that vary something else."""

FORMS: dict[str, Case] = {
    **{name: Case(**changes) for name, changes in records.FORMS.items()},
    "3 bits, wide": Case(out_features=64, in_features=128, group=64),
    "4 bits, half block groups": Case(bits=4, in_features=80, group=16, out_features=70),
    "4 bits, branch, bias": Case(bits=4, rank=3, bias=True, in_features=96, group=48),
    "2 bits, odd": Case(bits=2, in_features=45, group=45, out_features=31),
    "8 bits, branch, fp32 params": Case(bits=8, rank=2, param_bits=32, factor_bits=32, planes=1),
    "8 bits, odd": Case(bits=8, in_features=45, group=45, out_features=65, planes=1),
    "one of everything": Case(out_features=1, in_features=16, planes=1, has_offset=False),
    "linear levels": Case(bits=4, linear_levels=True),
}
"""Every stored form of every constant."""

SHAPES = ((33, 50, 50), (1, 16, 16), (70, 96, 48), (32, 144, 16), (40, 640, 160), (65, 24, 24))
"""N, K, group: odd sizes, one group per row, groups of a half block, groups across blocks and warps."""


def _shapes() -> dict[str, Case]:
    """Every shape, number of planes and of tokens meets every width, though not every one of the others."""
    tokens = (1, 2, 5, 8, 9, 16)
    return {
        f"{bits} bits, {rows} x {columns}": Case(
            bits=bits,
            out_features=rows,
            in_features=columns,
            group=group,
            planes=1 + (i + bits) % 4,
            has_offset=i % 2 == 0,
            bias=i % 3 == 0,
            float_levels=i % 3 == 1,
            tokens=(tokens[(i + bits) % len(tokens)],),
        )
        for bits, (i, (rows, columns, group)) in product(layout.BITS, enumerate(SHAPES))
    }


def _long_rows() -> dict[str, Case]:
    """Rows so long that CUDA blocks share a panel; one group a row is decoded in parts."""
    return {
        f"{bits} bits, long rows, {tokens} tokens": Case(
            bits=bits, out_features=33, in_features=2560, group=group, rank=2, bias=True, tokens=(tokens,)
        )
        for bits, (tokens, group) in product(layout.BITS, ((1, 64), (7, 128), (12, 2560), (17, 128)))
    }


def _many_tokens() -> dict[str, Case]:
    """More tokens than decode kernels take; tiles are cut by tokens, rows and inputs, and none of them is full."""
    sizes: dict[str, Any] = {"out_features": 70, "in_features": 96, "group": 32, "bias": True, "rank": 5}
    found = {
        f"{bits} bits, {planes} planes, {tokens} tokens": Case(bits=bits, planes=planes, tokens=(tokens,), **sizes)
        for bits, (planes, tokens) in product(layout.BITS, ((2, 17), (1, 70), (3, 17)))
    }
    for bits, group in product(layout.BITS, (32, 64, 640)):
        found[f"{bits} bits, 20 tokens of long rows, group {group}"] = Case(
            bits=bits, out_features=300, in_features=640, group=group, planes=1, bias=True, tokens=(20,)
        )
    odd = Case(out_features=33, in_features=50, group=50, rank=3, factor_bits=16, tokens=(131,))
    return {**found, "131 tokens of odd sizes": odd}


def _groups() -> dict[str, Case]:
    """Groups that cut the steps and units of kernels."""
    cut = ((3, 16), (3, 48), (3, 80), (2, 16), (2, 48), (4, 80), (4, 16), (8, 16))
    return {
        f"{bits} bits, groups of {group}": Case(bits=bits, in_features=480, group=group, tokens=(3,))
        for bits, group in cut
    }


def _branches() -> dict[str, Case]:
    return {
        f"branch of rank {rank}, {tokens} tokens": Case(rank=rank, in_features=80, tokens=(tokens,))
        for rank, tokens in product((1, 4, 9, 40), (1, 11))
    }


PRODUCTS: dict[str, Case] = {**FORMS, **_shapes(), **_long_rows(), **_groups(), **_branches(), **_many_tokens()}
"""Products by name: exact ones in float32; runners take them in their other types, and rounding x, too."""
LOOK_UPS: dict[str, Case] = {
    name: replace(case, gather=True, bias=False, rank=0, tokens=(2, 3))
    for name, case in {**FORMS, **_shapes()}.items()
    if not case.rank and not case.bias
}
"""Rows looked up, by name."""


def _experts() -> dict[str, Case]:
    """Every form; one row alone, none, and so many that one expert's are cut into chunks."""
    many: dict[str, Any] = {"in_features": 96, "group": 48, "rank": 3, "bias": True}
    cases = {
        **FORMS,
        "one row": Case(tokens=(1,)),
        "no row": Case(tokens=(0,)),
        "many rows": Case(tokens=(900,), **many),
    }
    return {
        f"experts, {name}": replace(case, experts=5, tokens=(7,) if name in FORMS else case.tokens)
        for name, case in cases.items()
    }


EXPERTS: dict[str, Case] = _experts()
"""Products of experts, by name."""


def expand(dtypes: tuple[str, ...], *, int8: bool = True, experts: bool = True) -> dict[str, Case]:
    """Return all cases in these types of x: products, the same with x rounded to 8 bits, and rows looked up."""
    found: dict[str, Case] = {}
    for name, case in {**PRODUCTS, **(EXPERTS if experts else {})}.items():
        for dtype in dtypes:
            found[f"{name}, {dtype}"] = replace(case, dtype=dtype)
            if int8:
                found[f"{name}, {dtype}, int8"] = replace(case, dtype=dtype, int8_activations=True)
    return found | {f"{name}, rows": case for name, case in LOOK_UPS.items()}


@st.composite
def drawn(sample: Callable[..., Any]) -> Case:
    """Draw any product that the exporter may write, odd sizes included."""
    bits = sample(st.sampled_from(layout.BITS))
    group = sample(st.sampled_from((16, 32, 48, 64, 112, 128)))
    groups = sample(st.integers(1, 5))
    per_row = sample(st.booleans())
    in_features = sample(st.integers(1, 300)) if per_row else group * groups
    planes = sample(st.integers(1, 4 if bits == 2 else 6))
    return Case(
        bits=bits,
        out_features=sample(st.integers(1, 100)),
        in_features=in_features,
        group=in_features if per_row else group,
        planes=planes,
        has_offset=sample(st.booleans()) and planes < 1 << bits,
        param_bits=sample(st.sampled_from((8, 16, 32))),
        float_levels=sample(st.booleans()),
        linear_levels=sample(st.booleans()),
        rank=sample(st.sampled_from((0, 0, 1, 8, 33))),
        factor_bits=sample(st.sampled_from((8, 16, 32))),
        bias=sample(st.booleans()),
        tokens=sample(st.sampled_from(((1,), (2,), (1, 1), (2, 7), (13,), (40,), (0,), (1, 200)))),
        seed=sample(st.integers(0, 2**31)),
    )
