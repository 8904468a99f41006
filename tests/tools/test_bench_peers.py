"""`rankbook bench` beside other runtimes."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from rankbook.tools import errors
from rankbook.tools.bench import model_bench
from rankbook.tools.bench.memory import Memory
from rankbook.tools.bench.model_bench import ModelRace, measure_models
from rankbook.tools.bench.options import ModelOptions
from rankbook.tools.bench.subject import ModelSubject, random_tokens
from rankbook.tools.inspect.sizes import foreign_size
from rankbook.tools.runtimes import LanguageModel, Setting, genai, llamacpp, matmulnbits, open_model
from tests.tools.files import pretend, run_cli

if TYPE_CHECKING:
    from rankbook.tools.runtimes.base import Logits

SETTING = Setting(threads=1, capacity=32, shared=True)


class Fake(LanguageModel):
    """Counts: the next token is one more."""

    name, kernels, file_bytes, packed = "fake", "fake", 8, (4, 8)

    def __init__(self) -> None:
        self.seen: list[int] = []

    def start(self, tokens) -> Logits:
        self.seen = tokens[0].tolist()
        return np.eye(300, dtype=np.float32)[self.seen[-1] + 1]

    def step(self, token: int) -> Logits:
        self.seen.append(token)
        return np.eye(300, dtype=np.float32)[token + 1]


def test_subjects_are_compared_with_every_peer(tmp_path, monkeypatch) -> None:
    """Decoding goes on behind the prompt with the model's own tokens; ratios are against the peers alone."""
    opened: dict[str, Fake] = {}

    def open_fake(self, setting) -> Fake:
        assert setting == Setting(threads=1, capacity=13, shared=True)
        return opened.setdefault(self.name, Fake())

    monkeypatch.setattr(ModelSubject, "open", open_fake)
    monkeypatch.setattr(model_bench, "measure_memory", lambda subject, threads: Memory(8, 30, 20))
    subjects = (
        ModelSubject(tmp_path),
        ModelSubject(tmp_path, "genai", is_peer=True),
        ModelSubject(tmp_path, "llamacpp", is_peer=True),
    )
    race = ModelRace(subjects, ModelOptions(threads=1, repeats=2, prompt=4, steps=8, prefill=0))
    results = measure_models(race, lambda *_: None)
    prompt = random_tokens(4)[0].tolist()
    assert all(fake.seen == prompt + [prompt[-1] + 1 + index for index in range(8)] for fake in opened.values())
    mine, first, second = results
    assert set(mine.decode_ratios) == {first.name, second.name} == set(race.references)
    assert set(first.decode_ratios) == {second.name}
    assert mine.bits == 4
    assert mine.memory.ratio == 10 / 8


def test_without_peers_the_last_model_is_the_reference(tmp_path) -> None:
    """As in a comparison of two exports."""
    subjects = (ModelSubject(tmp_path / "a"), ModelSubject(tmp_path / "b"))
    assert ModelRace(subjects, ModelOptions()).references == (subjects[1].name,)


@pytest.mark.parametrize(
    ("peer", "words"),
    [("torch=.", "genai=PATH"), ("matmulnbits", "genai=PATH"), ("llamacpp=no/such.gguf", "does not exist")],
)
def test_wrong_peers_are_named(peer, words) -> None:
    """What is allowed beside models."""
    with pytest.raises(errors.UsageError, match=words):
        ModelSubject.parse_peer(peer)


def test_layers_have_other_peers(capsys) -> None:
    """A model's peer beside single layers is a usage error."""
    assert run_cli("bench", "--peers", "genai=.", "--quiet") == errors.USAGE
    assert "matmulnbits, fp32, none" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "module"), [("genai", genai), ("llamacpp", llamacpp)])
def test_missing_packages_are_named(name, module, tmp_path, monkeypatch) -> None:
    """The package, and how to get it."""
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(errors.MissingError, match="pip install"):
        open_model(tmp_path, name, SETTING)


def nbits_model(path: Path) -> Path:
    """Write a file with one MatMulNBits node (N 4, K 32, 4 bits, blocks of 16) that asks for exact activations."""
    constants: dict[str, np.ndarray] = {
        "codes": np.zeros((4, 2, 8), np.uint8),
        "scales": np.ones((4, 2), np.float32),
        "zeros": np.zeros((4, 1), np.uint8),
    }
    attributes: dict[str, Any] = {"N": 4, "K": 32, "bits": 4, "block_size": 16, "accuracy_level": 1}
    node = helper.make_node("MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["M", 32])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["M", 4])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("com.microsoft", 1)]), path)
    return path


def test_sizes_of_foreign_operators(tmp_path) -> None:
    """Codes, scales and zero points count as bytes, N x K as weights."""
    model = onnx.load(nbits_model(tmp_path / "model.onnx"))
    assert foreign_size(model) == (4 * 2 * 8 + 4 * 2 * 4 + 4, 4 * 32)


def test_accuracy_level_of_the_peer(tmp_path) -> None:
    """The file asks for exact activations, the peer runs the fast form."""
    nbits_model(tmp_path / "model.onnx")
    model = onnx.load_from_string(matmulnbits.fast_graph(tmp_path / "model.onnx"))
    assert {item.name: item.i for item in model.graph.node[0].attribute}["accuracy_level"] == 4


def test_accuracy_level_needs_the_operator(tmp_path) -> None:
    """Another dialect has none."""
    model = onnx.load(nbits_model(tmp_path / "model.onnx"))
    model.graph.node[0].op_type = "MatMul"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(errors.UsageError, match="--dialect ort"):
        matmulnbits.fast_graph(tmp_path / "model.onnx")


class FakeLlama:
    """The C interface as far as the adapter uses it: the most likely token is the sum of what it was given."""

    LLAMA_FTYPE_MOSTLY_Q4_0 = 2

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.settings = SimpleNamespace(n_ctx=0, n_batch=2048, n_threads=0, n_threads_batch=0)

    def __getattr__(self, name: str):
        answers = {
            "llama_model_load_from_file": 1,
            "llama_context_default_params": self.settings,
            "llama_init_from_model": 2,
            "llama_vocab_n_tokens": 64,
            "llama_model_size": 72,
            "llama_model_n_params": 128,
            "llama_model_quantize": 0,
            "llama_model_quantize_default_params": ctypes.c_int(),
        }
        return lambda *arguments: answers.get(name)

    def llama_memory_clear(self, memory, data) -> None:
        self.tokens = []

    def llama_batch_get_one(self, tokens, count):
        return list(tokens)[:count]

    def llama_decode(self, context, batch) -> int:
        self.tokens += batch
        return int(99 in batch)

    def llama_get_logits_ith(self, context, index):
        scores = np.zeros(64, np.float32)
        scores[sum(self.tokens) % 64] = 1
        self.scores = scores  # the caller reads this memory
        return scores.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


@pytest.fixture
def llama(monkeypatch) -> FakeLlama:
    """A library in place of the real one."""
    library = FakeLlama()
    monkeypatch.setattr(llamacpp, "_library", lambda: library)
    monkeypatch.setattr(llamacpp, "version", lambda _: "0")
    pretend(monkeypatch, "llamacpp")
    monkeypatch.setattr(llamacpp, "unavailable", lambda: None)
    return library


def test_llamacpp_adapter(tmp_path, llama) -> None:
    """A start forgets what was before; threads and capacity reach the context; errors are named."""
    (tmp_path / "model.gguf").write_bytes(b"12345")
    model = open_model(tmp_path / "model.gguf", "llamacpp", SETTING)
    assert (model.file_bytes, model.packed) == (5, (72, 128))
    assert vars(llama.settings) == {"n_ctx": 32, "n_batch": 2048, "n_threads": 1, "n_threads_batch": 1}
    for _ in range(2):
        assert model.start(np.array([[3, 4]])).argmax() == 7
        assert model.step(7).argmax() == 14
    with pytest.raises(errors.CheckFailedError, match="status 1"):
        model.step(99)


@pytest.mark.parametrize(("arguments", "code"), [(["a.gguf", "Q4_0", "b.gguf"], errors.OK), (["a.gguf"], errors.USAGE)])
def test_requantizing(arguments, code, llama) -> None:
    """Three arguments, the type one of those known."""
    assert llamacpp._main(arguments) == code


def test_genai_needs_its_folder(tmp_path, monkeypatch) -> None:
    """A folder without the builder's configuration is refused with what to run."""
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", SimpleNamespace(__version__="0"))
    pretend(monkeypatch, "genai")
    with pytest.raises(errors.UsageError, match=r"models\.builder"):
        open_model(tmp_path, "genai", SETTING)


@pytest.mark.skipif(genai.unavailable() is not None, reason=str(genai.unavailable()))
def test_genai_beside_itself(tmp_path) -> None:
    """A tiny model of its own builder decodes, fills its cache and starts anew."""
    from tests.tiny import tiny_model

    source, made = tmp_path / "source", tmp_path / "made"
    tiny_model("llama", source, hidden_size=64, intermediate_size=128, attention_bias=False)
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu", "-c", str(tmp_path)]
    subprocess.run([*builder, "-i", str(source), "-o", str(made)], check=True, capture_output=True)
    subject = ModelSubject.parse_peer(f"genai={made}")
    model = subject.open(SETTING)
    first = model.start(random_tokens(8))
    model.step(int(first.argmax()))
    np.testing.assert_array_equal(model.start(random_tokens(8)), first)
    race = ModelRace((subject,), ModelOptions(threads=1, repeats=1, prompt=4, steps=2, prefill=8))
    (result,) = measure_models(race, lambda *_: None)
    assert result.decode > 0
    assert result.prefill is not None
    assert result.prefill > 0
    assert result.memory.file_bytes == model.file_bytes
    assert 4 < (result.bits or 0) < 8
    assert json.loads((made / "genai_config.json").read_text("utf-8"))["model"]["type"] == "llama"
