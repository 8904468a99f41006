"""Packed layers computed by the kernels' operators, here over the emulation of the CUDA kernels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankbook.calibration.model import experts, packed_ops
from rankbook.calibration.model.experts import ExpertMatrices
from rankbook.calibration.model.packed_modules import (
    CodebookEmbedding,
    CodebookLinear,
    TiedCodebookLinear,
    materialize_all,
)
from rankbook.calibration.model.placement import in_float32
from rankbook.calibration.notes import Note
from rankbook.plugins import cuda_abi, library
from tests.calibration.records import random_record
from tests.ops.runners import emulated_operators
from tests.plugins import emulated

pytestmark = pytest.mark.skipif(emulated.compiler() is None or emulated.ON_GPU, reason="needs the emulation")
RECORD = random_record(70, 96, bits=4, group=48, bias=True, rank=3)
TABLE = random_record(70, 96, bits=4, group=48)


@pytest.fixture
def kernels() -> Iterator[None]:
    """The operators compute on the CPU."""
    with emulated_operators():
        yield


@pytest.mark.usefixtures("kernels")
def test_a_layer_is_computed_from_its_packed_tensors_and_stores_them_unchanged() -> None:
    x = torch.randn(2, 3, 96)
    layer, dense = CodebookLinear.from_record(RECORD), RECORD.weight(with_low_rank=True)
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    y = layer(x)
    assert layer.served()
    assert not layer.packed().keys() - stored.keys()
    torch.testing.assert_close(y, nn.functional.linear(x, dense, RECORD.bias), rtol=1e-5, atol=1e-4)
    for name, tensor in {**layer.state_dict(), **layer.packed()}.items():
        assert torch.equal(tensor, stored[name]), name
    torch.testing.assert_close(layer.weight, dense)
    twin = copy.deepcopy(layer)
    twin.load_state_dict(stored)
    assert torch.equal(twin(x), y)
    assert torch.equal(layer.double().float()(x), y)


@pytest.mark.usefixtures("kernels")
def test_embedding_and_tied_output_layer_share_the_constants() -> None:
    embedding = CodebookEmbedding.from_record(TABLE, torch.float16, scale=3.0)
    head, ids = TiedCodebookLinear(embedding), torch.tensor([[0, 69, 31]])
    rows, scores = embedding(ids), head(torch.ones(1, 96))
    assert rows.dtype == torch.float16
    torch.testing.assert_close(rows, TABLE.weight().half()[ids] * 3, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scores, TABLE.weight().sum(1)[None], rtol=1e-4, atol=1e-3)
    assert torch.equal(embedding.state_dict()["codes"], TABLE.pack()["codes"])


@pytest.mark.usefixtures("kernels")
def test_experts_are_one_call_where_nothing_watches_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [random_record(40, 96, bits=4, group=48, bias=True, rank=3, seed=seed) for seed in range(3)]
    layers = ExpertMatrices(CodebookLinear.from_record(record) for record in records)
    stored = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    x, numbers, calls = torch.randn(5, 96), torch.tensor([2, 0, 2, 1, 0]), []
    weights = [record.weight(with_low_rank=True) for record in records]
    want = torch.stack(
        [
            nn.functional.linear(row, weights[number], records[number].bias)
            for row, number in zip(x, numbers.tolist(), strict=True)
        ]
    )
    product = packed_ops.product

    def counted(*given: Any, **more: Any) -> torch.Tensor:
        calls.append(more)
        return product(*given, **more)

    monkeypatch.setattr(packed_ops, "product", counted)

    def computed(held: ExpertMatrices) -> int:
        calls.clear()
        torch.testing.assert_close(held(x, numbers), want, rtol=1e-5, atol=1e-4)
        return len(calls)

    assert [computed(layers), computed(layers), computed(copy.deepcopy(layers))] == [1, 1, 1]
    assert layers[1].get_buffer("codes").data_ptr() == layers._stack["codes"][1].data_ptr()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in layers.state_dict().items())
    seen: list[torch.Size] = []
    with layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape)):
        assert computed(layers) == len(layers)
    assert seen == [(2, 96)]
    layers.load_state_dict({name: stored[name.replace("1.", "2.", 1)] for name in stored})
    want[3] = nn.functional.linear(x[3], weights[2], records[2].bias)
    assert computed(layers.double().float()) == 1
    with in_float32(layers):
        layers(x, numbers)
        assert layers._stack
    assert not layers._stack, "a block that leaves its device leaves nothing there"
    layers[2] = CodebookLinear.from_record(random_record(40, 96, bits=4, group=48, planes=1))
    experts._say_one_by_one.cache_clear()
    with pytest.warns(Note, match="stored in several forms"):
        layers(x, numbers)
    assert calls[-1] == {}


@pytest.mark.usefixtures("kernels")
def test_gradients_many_planes_and_other_types_take_the_decoded_weight() -> None:
    layer = CodebookLinear.from_record(RECORD)
    x = torch.randn(3, 96, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, RECORD.weight(with_low_rank=True).sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert layer(x.double()).dtype == torch.float64
    many = CodebookLinear.from_record(random_record(bits=4, planes=5))
    assert not many.served()
    model = nn.ModuleList([many, layer])
    materialize_all(model)
    assert layer.served()
    assert many._dense is not None


@pytest.mark.usefixtures("kernels")
def test_the_compiler_traces_the_operators() -> None:
    layer = CodebookLinear.from_record(RECORD)
    x = torch.randn(2, 96)
    layer.served()  # what `.to("cuda")` and the first call do
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    constants, spec = packed_ops.constants(RECORD.spec(), RECORD.pack()), RECORD.spec()
    names = [constants[name] for name in packed_ops._ORDER]
    torch.library.opcheck(torch.ops.rankbook.product.default, (x, names, packed_ops._sizes(spec), False))


def test_without_kernels_a_layer_says_that_it_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no kernels for tensors on cpu" in str(packed_ops.unavailable("cpu"))
    monkeypatch.setattr(library, "_FOLDER", Path("nowhere"))
    reason = packed_ops.unavailable("cuda")
    assert reason is not None
    assert "make native-cuda" in reason
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        from rankbook.calibration.model.packed_modules import _say_decoded

        _say_decoded.cache_clear()
        _say_decoded(reason)
        _say_decoded(reason)
    assert [str(item.message) for item in said] == [f"packed layers are decoded to dense weights, once: {reason}"]


def _missing() -> str | None:
    source = Path(__file__).parents[3] / "plugins/csrc/shims/c/kernels.cpp"
    if reason := library.unavailable("ort-cuda"):
        return reason
    old = library.library("ort-cuda").stat().st_mtime < source.stat().st_mtime
    return "the library is older than its sources: run `make native-cuda`" if old else None


@pytest.mark.skipif(_missing() is not None, reason=str(_missing()))
def test_the_library_has_the_structures_of_this_package() -> None:
    found = cuda_abi.Kernels(library.library("ort-cuda"))
    job = cuda_abi.product(
        lambda tensor: tensor.data_ptr(),
        packed_ops.constants(RECORD.spec(), RECORD.pack()),
        {"in_features": 96, "out_features": 70, "offset": 1},
    )
    job.tokens, job.type = 40, 1
    assert found.workspace(job) > 0


def test_a_library_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no C interface"):
        cuda_abi.Kernels(emulated.build("emulation", emulated.SOURCES))
