"""``export --graph ort``: ONNX Runtime's attention and normalization compute what the portable graph computes."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from rankbook.exporter.export import ExportOptions, export
from rankbook.exporter.file import ExportedModel
from rankbook.exporter.stored import ExportedFileError
from rankbook.tools import errors
from rankbook.tools.runtimes import open_model
from rankbook.tools.runtimes.ort import OrtModel
from rankbook.tools.runtimes.torch import TorchModel
from tests.exporter.checkpoints import make_checkpoint
from tests.tools.files import run_cli, stdout_json

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 20))
# float32 on both sides, sums in another order through two layers; 5e-7 is typical.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint ``checkpoint`` of a tiny Llama and its file ``onnx``, packed layers as MatMulNBits."""
    return written(tmp_path_factory.mktemp("llama"), "llama", "ort")


def written(folder: Path, family: str, dialect: str) -> Path:
    checkpoint = make_checkpoint(folder, family, model={"head_dim": 16}, bits=4)
    export(checkpoint, folder / "onnx", ExportOptions(logits="all", graph="ort", dialect=dialect))
    return folder


def relative(got: Any, want: Any) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def check_family(folder: Path) -> None:
    """Compare whole texts, a text in two parts, and token by token, with torch, which has no cache here.

    Without the library, and with it where it is built.
    """
    want = TorchModel(folder / "checkpoint").logits(TOKENS)
    for kernels in ("bodies", "auto"):
        file = open_model(folder / "onnx", kernels)
        assert relative(file.logits(TOKENS), want) < TOLERANCE
        steps = [file.start(TOKENS[:1, :10]), *(file.step(int(token)) for token in TOKENS[0, 10:])]
        assert relative(np.stack(steps), want[0, 9:]) < TOLERANCE


def test_a_llama_is_one_node_a_layer(work: Path) -> None:
    check_family(work)
    nodes = onnx.load(work / "onnx" / "model.onnx", load_external_data=False).graph.node
    kinds = collections.Counter(node.op_type for node in nodes)
    assert kinds["GroupQueryAttention"] == 2
    assert kinds["AddRMSNormalization"] == 4
    assert kinds["SwiGLU"] == 2
    assert kinds["RMSNormalization"] == 1, "the first one has no sum in front of it"
    assert not kinds["RotaryEmbedding"] + kinds["Concat"] + kinds["Softmax"]


def test_windows_and_a_softcap_are_attributes(tmp_path: Path) -> None:
    """Gemma 2, packed layers in operators of rankbook: every second layer sees 8 positions, scores are capped."""
    check_family(written(tmp_path, "gemma2", "rankbook"))
    nodes = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.node
    fused = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    found = [{item.name: onnx.helper.get_attribute_value(item) for item in node.attribute} for node in fused]
    assert [item["local_window_size"] for item in found] == [8, -1]
    assert {item["softcap"] for item in found} == {50.0}


def test_the_cache_grows_in_place(work: Path) -> None:
    """Buffers double; what was written before stays."""
    file, want = OrtModel(work / "onnx"), TorchModel(work / "checkpoint")
    tokens = np.random.default_rng(1).integers(0, 256, (1, 120))
    file.start(tokens[:, :3])
    buffer = next(iter(file._cache.values()))
    file.step(int(tokens[0, 3]))
    assert next(iter(file._cache.values())) is buffer, "no copy of the cache in a step"
    file._reserve(buffer.shape()[2] + 1)
    scores = [file.step(int(token)) for token in tokens[0, 4:]]
    assert relative(np.stack(scores), want.logits(tokens)[0, 4:]) < TOLERANCE


def test_steps_share_a_binding_until_the_buffers_change(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts after steps, scores of a batch between them, several tokens behind a past: all as without a cache."""
    file, want = OrtModel(work / "onnx"), TorchModel(work / "checkpoint").logits(TOKENS)
    bind, bound = file.session.io_binding, []

    def io_binding() -> Any:
        bound.append(bind())
        return bound[-1]

    monkeypatch.setattr(file.session, "io_binding", io_binding)
    for row, prompt in ((0, 7), (1, 3)):
        tokens = TOKENS[row]
        steps = [file.start(tokens[None, :prompt]), *(file.step(int(token)) for token in tokens[prompt:15])]
        last = file._advance(tokens[None, 15:])
        assert relative(np.stack([*steps, last]), want[row, [*range(prompt - 1, 15), 19]]) < TOLERANCE
        assert relative(file.logits(TOKENS), want) < TOLERANCE
    assert len(bound) == 4, "one for each generation, and one for each text that was scored without a cache"


def test_padding_at_the_end_of_a_row_is_not_seen(work: Path) -> None:
    file = OrtModel(work / "onnx")
    feeds = file.feeds(TOKENS)
    whole = file.session.run(["logits"], feeds)[0]
    feeds["attention_mask"][0, 12:] = 0
    padded = file.session.run(["logits"], feeds)[0]
    np.testing.assert_allclose(padded[0, :12], whole[0, :12], rtol=0, atol=TOLERANCE * np.abs(whole).max())
    np.testing.assert_array_equal(padded[1], whole[1])


def test_commands_know_such_files(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--checkpoint", work / "checkpoint", "--json", "--quiet"]
    assert run_cli("parity", work / "onnx", *flags) == 0
    report = stdout_json(capsys)
    assert report["cached"]["passed"]
    assert len(report["layers"]) == 14
    with pytest.raises(ExportedFileError, match="--graph standard"):
        ExportedModel.open(work / "onnx").require_standard()


def test_what_it_cannot_do_is_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--graph", "ort", "--quiet"]
    assert run_cli("export", work / "checkpoint", "-o", work / "no", *flags, "--kv", "int8") == errors.USAGE
    assert "kv float" in capsys.readouterr().err


HALF_TOLERANCE = 2e-3
"""Keys and values in float16 move by up to 2**-11 of themselves; 4e-4 is typical of two layers."""


@pytest.mark.parametrize(
    ("family", "operator", "options"),
    [
        ("llama", "GroupQueryAttentionRotaryKV16", {"head_dim": 16}),
        ("gemma2", "GroupQueryAttentionRotaryKV16", {"head_dim": 16}),
        ("opt", "GroupQueryAttentionKV16", {"hidden_size": 64}),
    ],
)
def test_a_cache_in_float16(family: str, operator: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Half the memory; what is computed stays float32, and is the same in one call and token by token."""
    checkpoint = make_checkpoint(tmp_path, family, model=options, bits=4)
    want = TorchModel(checkpoint).logits(TOKENS)
    for graph in ("ort", "standard"):
        folder = tmp_path / graph
        export(checkpoint, folder, ExportOptions(logits="all", graph=graph, kv="float16"))
        nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
        assert [node.op_type for node in nodes].count(operator) == (2 if graph == "ort" else 0)
        assert ExportedModel.open(folder).metadata.kv == "float16"
        types = {kind for name, kind in ExportedModel.open(folder).input_types.items() if name.startswith("past")}
        assert types == {"float16"}
        for kernels in ("bodies", "auto"):
            file = open_model(folder, kernels)
            whole = file.logits(TOKENS)
            assert relative(whole, want) < HALF_TOLERANCE
            steps = [file.start(TOKENS[:1, :10]), *(file.step(int(token)) for token in TOKENS[0, 10:])]
            assert relative(np.stack(steps), whole[0, 9:]) < HALF_TOLERANCE


def test_other_heads_keep_the_standard_attention_with_a_cache_in_float16(tmp_path: Path) -> None:
    """ONNX Runtime's node, which takes heads of 24 elements, has no such cache: the layers are named."""
    checkpoint = make_checkpoint(tmp_path, "llama", model={"head_dim": 24}, bits=4)
    export(checkpoint, tmp_path / "onnx", ExportOptions(logits="all", graph="ort", kv="float16"))
    kept = ExportedModel.open(tmp_path / "onnx").metadata.standard_attention
    assert list(kept) == ["0", "1"]
    assert all("a multiple of 16, and no sinks" in reason for reason in kept.values())
    file = open_model(tmp_path / "onnx", "bodies")
    assert relative(file.logits(TOKENS), TorchModel(checkpoint).logits(TOKENS)) < HALF_TOLERANCE


@pytest.mark.parametrize(
    ("graph", "dtype", "word"), [("static", "fp32", "graph 'static'"), ("ort", "fp16", "dtype 'fp32'")]
)
def test_a_cache_in_float16_is_refused_where_it_does_not_help(graph: str, dtype: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ExportOptions(graph=graph, dtype=dtype, kv="float16")
