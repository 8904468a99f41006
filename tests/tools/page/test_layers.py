"""What is shown of layers is what is stored of them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from rankbook.calibration.checkpoint.format import open_checkpoint
from rankbook.calibration.source import Kind
from rankbook.tools.inspect.inspection import inspect
from rankbook.tools.page import layers
from rankbook.tools.page.layers import LayerError
from rankbook.tools.page.runs import Part
from tests.tiny import tiny_model

NAME = "model.layers.1.mlp.up_proj"


def part(folder, kind=Kind.CHECKPOINT):
    return Part(kind, folder, inspect(folder, verify=False))


def test_the_branch_makes_errors_smaller_and_both_are_there(made):
    found = {item.name: item for item in layers.errors(part(made / "three"))}
    assert len(found) == 14
    assert all(0 < (item.error or 0) < (item.bare or 0) for item in found.values())
    assert all(item.bare is None for item in layers.errors(part(made / "four")))


def test_errors_go_by_kind_and_block_and_experts_are_averaged():
    given = [
        LayerError("model.layers.0.mlp.experts.0.up_proj", 1.0, 2.0),
        LayerError("model.layers.0.mlp.experts.1.up_proj", 3.0, None),
        LayerError("model.layers.10.self_attn.q_proj", None, None),
        LayerError("lm_head", 5.0, None),
    ]
    assert layers.by_depth(given) == {
        "up_proj": {0: (2.0, 2.0)},
        "q_proj": {10: (None, None)},
        "lm_head": {0: (5.0, None)},
    }


def test_layers_are_chosen_from_the_worst_to_the_best():
    given = [LayerError(name, error, None) for name, error in (("a", 0.2), ("b", 0.9), ("c", None), ("d", 0.1))]
    assert layers.chosen(given, [], 3) == ["b", "a", "d"]
    assert layers.chosen(given, [], 1) == ["b"]
    assert layers.chosen([], ["x", "y", "z"], 2) == ["x", "z"]
    assert layers.chosen([], ["x"], 3) == ["x"]
    assert layers.chosen(given, [], 0) == layers.chosen([], [], 3) == []


def test_the_spectrum_is_that_of_the_weights(made):
    opened = open_checkpoint(made / "three")
    source = layers.SourceWeights(opened.manifest)
    assert source.missing == ""
    weight = source.weight(NAME)
    assert isinstance(weight, torch.Tensor)
    assert torch.equal(weight, tiny_model("llama").get_submodule(NAME).weight)
    found = layers.spectrum(opened, NAME, weight)
    record = opened.record(NAME)
    for values, matrix in (
        (found.codes, weight - record.weight()),
        (found.left, weight - record.weight(with_low_rank=True)),
        (found.branch, record.weight(with_low_rank=True) - record.weight()),
    ):
        assert values is not None
        want = torch.linalg.svdvals(matrix.double()) / weight.norm()
        assert torch.allclose(torch.tensor(values, dtype=torch.double), want[: len(values)], atol=1e-6)
    assert found.rank == len(found.branch or ()) == 4


def test_without_its_source_the_branch_alone_is_shown(made, tmp_path):
    opened = open_checkpoint(made / "three")
    found = layers.spectrum(opened, NAME, None)
    assert found.codes is found.left is None
    assert len(found.branch or ()) == 4
    assert layers.spectrum(open_checkpoint(made / "four"), NAME, None).branch is None
    gone = {**opened.manifest, "source": {"name": "/not/there", "sha256": "0"}}
    assert "is not on this machine" in layers.SourceWeights(gone).weight(NAME)
    assert "is not on this machine" in layers.SourceWeights({"source": "text"}).weight(NAME)
    shutil.copytree(made / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "changed": 1}))
    other = {**opened.manifest, "source": {**opened.manifest["source"], "name": str(tmp_path / "model")}}
    assert "is another one now" in layers.SourceWeights(other).weight(NAME)


def test_a_scaled_or_unknown_layer_says_why_there_is_no_spectrum(made):
    source = layers.SourceWeights({**open_checkpoint(made / "three").manifest, "scaled_inputs": [NAME]})
    assert "inputs were scaled" in source.weight(NAME)
    assert "no matrix of its name" in source.weight("model.layers.9.nothing")


def test_codebooks_are_a_sample_by_width(made):
    opened = open_checkpoint(made / "three")
    found = layers.codebooks(opened, NAME)
    widths = [max(book) - min(book) for book in found.books]
    assert found.count == 80 * 3
    assert len(found.books) == 64
    assert widths == sorted(widths)
    every = opened.record(NAME).codebooks().flatten(0, 1).tolist()
    assert all(book in every for book in found.books)


@pytest.mark.parametrize(("name", "kind"), [("three", Kind.CHECKPOINT), ("onnx", Kind.ONNX)])
def test_bytes_of_the_parts_are_those_of_the_files(made, name, kind):
    held = layers.bytes_of(part(made / name, kind))
    pattern = "*.safetensors" if kind is Kind.CHECKPOINT else "model.onnx*"
    assert sum(held.values()) == sum(file.stat().st_size for file in (made / name).glob(pattern))
    specs = open_checkpoint(made / "three").layers.values()
    assert held["codes"] == sum(spec.stored_bits()["codes"] for spec in specs) // 8
    assert held["error branch"] > 0


def test_thinned_spectra_keep_their_ends():
    values = list(range(1000, 0, -1))
    places, shown = layers.thinned(values)
    assert (places[0], places[-1], shown[0], shown[-1]) == (1, 1000, 1000, 1)
    assert len(places) <= 200
    assert layers.thinned([3.0]) == ([1], [3.0])
    assert layers.thinned([]) == ([], [])
