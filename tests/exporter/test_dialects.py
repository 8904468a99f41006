"""Every dialect computes the same from the same checkpoint, and says what it cannot express."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.imports.base import Numbers
from rankbook.calibration.methods import METHODS
from rankbook.calibration.model.loading import load_model
from rankbook.calibration.record.halves import NotHeldError
from rankbook.calibration.record.quantized_linear import Factor, GroupParams, LowRank, QuantizedLinear
from rankbook.exporter import dialects
from rankbook.exporter.affine import AffineLayer, NotAffineError, pack_bits
from rankbook.exporter.conform import check_model
from rankbook.exporter.dialects.base import DialectError, LayerWriter, PackedLayer, check_layers
from rankbook.exporter.dialects.ort import block_size
from rankbook.exporter.export import ExportOptions, export
from rankbook.tools.runtimes import ort
from tests.calibration.records import random_record
from tests.exporter.checkpoints import make_checkpoint
from tests.exporter.compare import worst_error
from tests.exporter.rtx import assert_builds, build, needs_rtx

# float32 on all sides, sums in another order, through two layers; 1e-6 is typical.
TOLERANCE = 1e-4
SYMMETRIC = {"weight_format": "symmetric"}

CASES: dict[str, dict[str, Any]] = {
    "symmetric 4": {"bits": 4, **SYMMETRIC},
    "per channel 8": {"bits": 8, "group_size": 48, **SYMMETRIC},
    "groups of 8": {"bits": 8, **SYMMETRIC},
    "mxint": {"bits": 4, "weight_format": "mxint"},
    "asymmetric 4": {"bits": 4},
    "asymmetric 2": {"bits": 2, "param_bits": 16},
}


@pytest.mark.parametrize("branch_bits", [0, 8, 16])
@pytest.mark.parametrize("case", CASES)
def test_one_layer_is_the_product_with_its_weight(case, branch_bits):
    record = quantized(branch_bits=branch_bits, **CASES[case])
    x = np.random.default_rng(0).standard_normal((2, 3, 48)).astype(np.float32)
    assert record.bias is not None
    want = x @ record.weight(with_low_rank=True).numpy().T + record.bias.numpy()
    for name in ("ort",) if case.startswith("asymmetric") else ("qdq", "ort"):
        got = run_layer(name, record, x)
        # float32 sums of 48 products in another order.
        assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(("bits", "zero"), [(4, 7), (4, 9), (8, 127)])
def test_levels_beyond_the_integers_of_qdq_are_refused(bits: int, zero: int) -> None:
    """One zero point for all groups, next to the middle, as other tools may write it: level 8 became -8 in INT4."""
    codes = torch.arange(40 * 48).reshape(40, 48).remainder(1 << bits).to(torch.uint8)
    record = Numbers(codes, bits, [torch.rand(40, 3) + 0.5], "gptq", zeros=zero).record()
    layer = PackedLayer("a.b", "a.b", record.spec(), False, record.pack().__getitem__)
    with pytest.raises(DialectError, match="it is asymmetric"):
        check_layers(dialects.dialect("qdq"), [layer])
    x = np.random.default_rng(0).standard_normal((2, 3, 48)).astype(np.float32)
    want = x @ record.weight().numpy().T
    assert np.abs(run_layer("ort", record, x) - want).max() < 1e-5 * np.abs(want).max()


def quantized(*, branch_bits: int = 0, **options: Any) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(40, 48, generator=generator), torch.randn(40, generator=generator)
    values = {"group_size": 16, "format": options.pop("weight_format", "affine"), **options}
    method = METHODS["rtn"]
    problem = LayerProblem("layer", weight, bias, LayerStatistics.empty(48))
    record = method.quantize(problem, method.config_type(**values))
    if branch_bits:
        down, up = torch.randn(3, 48, generator=generator), torch.randn(40, 3, generator=generator) / 10
        low_rank = LowRank(Factor.quantize(down, branch_bits, 0), Factor.quantize(up, branch_bits, 1))
        return record.with_low_rank(low_rank)
    return record


def run_layer(name: str, record: QuantizedLinear, x: Any) -> Any:
    """Return what stock ONNX Runtime computes for one layer in a dialect."""
    model = ir.from_onnx_text(
        '<ir_version: 11, opset_import: ["" : 23]> g (float[b,s,48] x) => (float[b,s,40] y) { y = Identity (x) }'
    )
    graph, language = model.graph, dialects.dialect(name)
    layer = PackedLayer("a.b", "a.b", record.spec(), False, record.pack().__getitem__)
    assert language.refuse(layer) == ""
    nodes = language.lower(LayerWriter(graph, layer), graph.inputs[0])
    assert nodes[-1].name == "a.b"
    (old,) = list(graph)
    ir.convenience.replace_nodes_and_values(graph, old, [old], nodes, list(old.outputs), [nodes[-1].outputs[0]])
    graph.outputs[0].shape = ir.Shape(["b", "s", 40])
    return ort.session(ir.to_proto(model).SerializeToString()).run(None, {"x": x})[0]


@pytest.mark.parametrize(("int8", "level"), [(False, 1), (True, 4)])
def test_int8_activations_are_a_level_of_accuracy_or_refused(int8, level):
    graph = ir.from_onnx_text(
        '<ir_version: 11, opset_import: ["" : 23]> g (float[b,s,48] x) => (float[b,s,48] y) { y = Identity (x) }'
    ).graph
    record = quantized(bits=4, weight_format="symmetric")
    layer = PackedLayer("a.b", "a.b", record.spec(), False, record.pack().__getitem__, int8_activations=int8)
    product = dialects.dialect("ort").lower(LayerWriter(graph, layer), graph.inputs[0])[0]
    assert product.attributes["accuracy_level"].as_int() == level
    assert ("--activations float" in dialects.dialect("qdq").refuse(layer)) == int8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Llama of one layer in symmetric 4 bits."""
    folder = tmp_path_factory.mktemp("symmetric")
    return make_checkpoint(folder, "llama", model={"num_hidden_layers": 1}, bits=4, **SYMMETRIC)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """The checkpoint in every dialect: folder and report by name."""
    folder = tmp_path_factory.mktemp("dialects")
    return {
        name: (folder / name, export(checkpoint, folder / name, ExportOptions(dialect=name)))
        for name in dialects.names()
    }


def test_the_same_logits_in_every_dialect(checkpoint, exported):
    model, _ = load_model(checkpoint)
    assert len(exported) == 4
    for name, (folder, report) in exported.items():
        assert report.dialect == name
        assert worst_error(folder, model, logits="last") < TOLERANCE
        assert check_model(folder) == []


@pytest.mark.parametrize(("name", "kind"), [("qdq", "DequantizeLinear"), ("ort", "MatMulNBits")])
def test_the_nodes_are_those_of_the_dialect_and_named_after_their_layers(name, kind, exported):
    folder, report = exported[name]
    assert report.nodes[kind] == report.layers == 7
    assert not any(operator.startswith("Codebook") for operator in report.nodes)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert "model.layers.0.mlp.down_proj" in {node.name for node in model.graph.node}
    assert {entry.key: entry.value for entry in model.metadata_props}["rankbook.dialect"] == name
    assert not model.functions
    # Codes in 4 bits and a float32 scale for every 16 of them.
    assert report.bits_per_weight == pytest.approx(4 + 32 / 16)


def test_a_dense_file_holds_decoded_weights_with_their_branches(tmp_path):
    """As large as an unquantized model; tied embeddings are one tensor, biases stay."""
    one_block = {"num_hidden_layers": 1}
    how = {"bits": 4, "quantize_embeddings": 4, "error_branch": "lqer", "error_rank": 2}
    checkpoint = make_checkpoint(tmp_path, "opt", model=one_block, **how)
    report = export(checkpoint, tmp_path / "out", ExportOptions(dialect="dense"))
    assert not any(name.startswith("Codebook") for name in report.nodes)
    assert report.bits_per_weight == pytest.approx(32)
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    names = [tensor.name for tensor in graph.initializer if tensor.name.endswith(".weight") and 259 in tensor.dims]
    assert len(names) == 1
    model, _ = load_model(checkpoint)
    assert worst_error(tmp_path / "out", model, logits="last") < TOLERANCE
    assert check_model(tmp_path / "out") == []


@needs_rtx
@pytest.mark.trt
def test_tensorrt_builds_plain_products(exported):
    assert_builds(exported["dense"][0])


def test_a_missing_node_is_named(exported, tmp_path):
    shutil.copytree(exported["qdq"][0], tmp_path / "out")
    path = tmp_path / "out" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    next(node for node in model.graph.node if node.name == "model.layers.0.mlp.up_proj").name = "other"
    path.write_bytes(model.SerializeToString())
    assert any("model.layers.0.mlp.up_proj" in problem for problem in check_model(path))


def test_packed_embeddings_tied_or_not(tmp_path):
    """The embedding stays an operator of rankbook; an output layer that shares its codes is one of the dialect."""
    one_block = {"num_hidden_layers": 1}
    checkpoint = make_checkpoint(tmp_path, "opt", model=one_block, bits=4, quantize_embeddings=4)
    report = export(checkpoint, tmp_path / "out", ExportOptions(dialect="ort"))
    assert report.nodes["CodebookGather4"] == 1
    assert report.nodes["MatMulNBits"] == report.layers - 1
    model, _ = load_model(checkpoint)
    assert worst_error(tmp_path / "out", model, logits="last") < TOLERANCE
    assert check_model(tmp_path / "out") == []


@needs_rtx
@pytest.mark.trt
def test_tensorrt_builds_the_standard_form(exported):
    assert_builds(exported["qdq"][0])


@needs_rtx
@pytest.mark.trt
def test_tensorrt_keeps_the_integers_packed_in_half_precision(tmp_path):
    for bits, group in ((4, 64), (4, 512), (8, 512)):
        weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
        config = METHODS["rtn"].config_type(bits=bits, group_size=group, format="symmetric")
        problem = LayerProblem("layer", weight, None, LayerStatistics.empty(512))
        record = METHODS["rtn"].quantize(problem, config)
        model = ir.from_onnx_text(
            '<ir_version: 11, opset_import: ["" : 23]> g (float16[b,512] x) => (float16[b,512] y) { y = Identity (x) }'
        )
        layer = PackedLayer("a", "a", record.spec(), False, record.pack().__getitem__, torch.float16)
        (old,) = list(model.graph)
        nodes = dialects.dialect("qdq").lower(LayerWriter(model.graph, layer), model.graph.inputs[0])
        outputs = list(old.outputs), [nodes[-1].outputs[0]]
        ir.convenience.replace_nodes_and_values(model.graph, old, [old], nodes, *outputs)
        path = tmp_path / f"{bits}-{group}.onnx"
        ir.save(model, path)
        report = build(path, {"x": ([1, 512], [8, 512], [16, 512])})
        assert report["errors"] == []
        # Integers, scales of at most one float32 per 64 weights, and small constants.
        assert report["weight_bytes"] < 512 * 512 * (bits / 8 + 4 / 64) + 4096


REFUSED = [
    ("qdq", {"bits": 3, "weight_format": "symmetric"}, r"3 bits.*--bits 4 or 8"),
    ("qdq", {"bits": 2, "weight_format": "symmetric"}, r"2 bits.*--dialect rankbook"),
    ("qdq", {"bits": 4}, r"asymmetric.*--weight-format symmetric"),
    ("qdq", {"bits": 4, "weight_format": "nf4"}, r"not evenly spaced.*--dialect rankbook"),
    ("ort", {"bits": 3}, r"3 bits.*--bits 2, 4 or 8"),
    ("ort", {"bits": 8}, r"8 bits.*not whole.*--weight-format symmetric"),
    ("ort", {"bits": 4, "weight_format": "nf4"}, r"not evenly spaced"),
    ("ort", {"planes": 2}, r"rank 2.*--dialect rankbook"),
]


@pytest.mark.parametrize(("name", "options", "said"), REFUSED)
def test_what_cannot_be_expressed_is_refused_with_the_reason(name, options, said):
    record = random_record(40, 48, bits=4) if "planes" in options else quantized(**options)
    layers = [PackedLayer(name, name, record.spec(), False, record.pack().__getitem__) for name in ("layer", "another")]
    with pytest.raises(DialectError, match=rf"dialect '{name}'.*layer and 1 more.*{said}"):
        check_layers(dialects.dialect(name), layers)


def test_a_refused_export_writes_nothing(tmp_path):
    checkpoint = make_checkpoint(tmp_path, "llama", model={"num_hidden_layers": 1}, bits=3)
    with pytest.raises(DialectError, match=r"self_attn.*and 6 more.*3 bits"):
        export(checkpoint, tmp_path / "out", ExportOptions(dialect="ort"))
    assert not (tmp_path / "out").exists()


def test_whole_zero_points_are_stored_as_integers():
    kinds = {}
    formats: dict[str, dict[str, Any]] = {"mxint": {"weight_format": "mxint"}, "affine": {}}
    for name, options in formats.items():
        record = quantized(bits=4, **options)
        graph = ir.Graph([ir.Value(name="x")], [], nodes=[])
        layer = PackedLayer("a", "a", record.spec(), False, record.pack().__getitem__)
        dialects.dialect("ort").lower(LayerWriter(graph, layer), graph.inputs[0])
        kinds[name] = graph.initializers["a.zero_points"].dtype
    assert kinds == {"mxint": ir.DataType.UINT8, "affine": ir.DataType.FLOAT}


def test_an_unknown_dialect_is_refused_with_those_there_are(tmp_path):
    assert dialects.names() == ("rankbook", "dense", "ort", "qdq")
    with pytest.raises(ValueError, match=r"'gguf' is not supported; choose one of rankbook, dense, ort, qdq"):
        export(tmp_path, tmp_path / "out", ExportOptions(dialect="gguf"))


def test_half_precision_rounds_scales_and_products_only(checkpoint, tmp_path):
    model, _ = load_model(checkpoint)
    export(checkpoint, tmp_path / "qdq", ExportOptions(dialect="qdq", dtype="fp16"))
    # 11 bits in every intermediate result, as in the dialect of rankbook.
    assert worst_error(tmp_path / "qdq", model, logits="last") < 1e-2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_bytes_hold_the_first_values_in_the_low_bits(bits):
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 1 << bits, (3, 16)).astype(np.uint8))
    packed = pack_bits(values, bits).int()
    per_byte = 8 // bits
    for index in range(16):
        got = packed[:, index // per_byte] >> bits * (index % per_byte) & ((1 << bits) - 1)
        assert torch.equal(got, values[:, index].int())


@pytest.mark.parametrize(
    ("group", "columns", "size"),
    [
        (16, 48, 16),
        (48, 48, 16),
        (64, 128, 64),
        (192, 384, 64),
        (576, 576, 64),
        (256, 512, 256),
        (50, 50, 16),
        (300, 300, 256),
    ],
)
def test_groups_are_cut_into_the_largest_blocks(group, columns, size):
    assert block_size(group, columns) == size


def test_negative_scales_and_dead_groups_with_an_offset_are_named():
    for params, said in (([-1.0, 0.0], "negative"), ([0.0, 1.0], "scale of zero")):
        record = QuantizedLinear(
            torch.zeros(32, 32, dtype=torch.uint8),
            4,
            torch.arange(16).to(torch.int8)[None],
            GroupParams(values=torch.tensor(params).expand(32, 2, 2).contiguous()),
            has_offset=True,
        )
        affine = AffineLayer.of(record.spec(), record.pack().__getitem__)
        with pytest.raises(NotAffineError, match=said):
            affine.scales()


SMALL = ({"scale": 1e-8}, {"bias": 1e6}, {"branch": 1e-12})


@pytest.mark.parametrize("change", SMALL, ids=str)
@pytest.mark.parametrize("name", ["rankbook", "qdq", "ort"])
def test_weights_that_float16_does_not_hold_are_refused_in_fp16_alone(name: str, change: dict[str, float]) -> None:
    record = quantized(branch_bits=16 if "branch" in change else 0, bits=4, weight_format="symmetric", param_bits=16)
    if "scale" in change:
        record = replace(record, params=GroupParams.quantize(record.params.dense() * change["scale"], 16))
    if "bias" in change and record.bias is not None:
        record = replace(record, bias=record.bias * change["bias"])
    if "branch" in change and record.low_rank is not None:
        down, up = (factor.dense() * change["branch"] for factor in (record.low_rank.down, record.low_rank.up))
        record = record.with_low_rank(LowRank(Factor.quantize(down, 16, 0), Factor.quantize(up, 16, 1)))
    read = record.pack().__getitem__
    for dtype in (torch.float32, torch.bfloat16):
        check_layers(dialects.dialect(name), [PackedLayer("a.b", "a.b", record.spec(), False, read, dtype)])
    with pytest.raises(NotHeldError, match=r"float16 does not hold .*a\.b.*--dtype bf16 or fp32"):
        check_layers(dialects.dialect(name), [PackedLayer("a.b", "a.b", record.spec(), False, read, torch.float16)])


def test_constants_that_float16_does_not_hold_are_never_written() -> None:
    graph = ir.from_onnx_text(
        '<ir_version: 11, opset_import: ["" : 23]> g (float16[b,48] x) => (float16[b,48] y) { y = Identity (x) }'
    ).graph
    record = random_record()
    layer = PackedLayer("a", "a", record.spec(), False, record.pack().__getitem__, torch.float16)
    value = LayerWriter(graph, layer).floats("scales", (2,), lambda: torch.tensor([1e-9, 2e-9]))
    assert value.const_value is not None
    with pytest.raises(NotHeldError, match=r"float16 does not hold a\.scales, whose largest magnitude is 2e-09"):
        value.const_value.numpy()
