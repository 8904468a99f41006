"""``export --graph static``: a cache of a fixed length computes what PyTorch computes without a cache."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from rankbook.calibration.model.families.masked import Masked
from rankbook.exporter.export import ExportOptions, export
from rankbook.exporter.file import ExportedModel
from rankbook.exporter.options import BEST, NO_TOKEN
from rankbook.exporter.trace import chosen
from rankbook.tools import errors
from rankbook.tools.dev.family_models import tiny
from rankbook.tools.runtimes import exported, open_model
from rankbook.tools.runtimes.ort import OrtModel
from rankbook.tools.runtimes.torch import TorchModel
from tests.exporter.checkpoints import FAMILY_OPTIONS, make_checkpoint
from tests.tiny import tiny_model
from tests.tools.files import run_cli, stdout_json

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 20))
CONTEXT = 24
# float32 on both sides, sums in another order through two layers.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint ``checkpoint`` of a tiny Llama, and its files ``all`` and ``greedy``."""
    folder = tmp_path_factory.mktemp("llama")
    checkpoint = make_checkpoint(folder, "llama", model={"head_dim": 16}, bits=4)
    export(checkpoint, folder / "all", ExportOptions(logits="all", graph="static", max_context=CONTEXT))
    export(checkpoint, folder / "greedy", ExportOptions(graph="static", max_context=CONTEXT, sample="greedy"))
    return folder


@pytest.fixture(scope="module")
def expected(work: Path) -> Any:
    """What PyTorch computes."""
    return TorchModel(work / "checkpoint").logits(TOKENS)


def relative(got: Any, want: Any) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def check(folder: Path, want: Any, tolerance: float = TOLERANCE) -> None:
    """Compare a batch, a prompt with steps, and steps behind several tokens at once."""
    file = OrtModel(folder)
    assert relative(file.logits(TOKENS), want) < tolerance
    steps = [file.start(TOKENS[:1, :10]), *(file.step(int(token)) for token in TOKENS[0, 10:])]
    assert relative(np.stack(steps), want[0, 9:]) < tolerance
    parts = [file.start(TOKENS[1:, :3]), file._advance(TOKENS[1:, 3:9]), file._advance(TOKENS[1:, 9:])]
    assert relative(np.stack(parts), want[1, [2, 8, 19]]) < tolerance


def test_a_llama_writes_its_cache_in_place(work: Path, expected: Any) -> None:
    check(work / "all", expected)
    model = onnx.load(work / "all" / "model.onnx", load_external_data=False)
    kinds = collections.Counter(node.op_type for node in model.graph.node)
    assert kinds["TensorScatter"] == 4
    assert not kinds["Concat"] + kinds["Attention"]
    assert {item.version for part in (model, *model.functions) for item in part.opset_import if not item.domain} == {24}
    file = ExportedModel.open(work / "all")
    file.require_standard()
    assert (file.metadata.graph, file.metadata.max_context, file.metadata.context) == ("static", "24", "24")
    assert list(file.inputs)[:2] == ["input_ids", "write_indices"]
    assert file.inputs["past_key_values.1.value"] == file.outputs["present.1.value"] == ["batch", 2, CONTEXT, 16]


@pytest.mark.parametrize("family", ["gemma2", "phi3", "opt", "gpt_neo"])
def test_families(family: str, tmp_path: Path) -> None:
    """Windows and a softcap, packed query, key and value, learned positions, attention of its own with local layers."""
    checkpoint = make_checkpoint(tmp_path, family, **FAMILY_OPTIONS.get(family, {"bits": 4}))
    export(checkpoint, tmp_path / "out", ExportOptions(logits="all", graph="static", max_context=CONTEXT))
    check(tmp_path / "out", TorchModel(checkpoint).logits(TOKENS))


def test_attention_of_its_own_that_sees_by_the_mask_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BLOOM's biases; of a family that nobody vouches for, keys may be counted from the end of the cache."""
    checkpoint = make_checkpoint(tmp_path, "bloom", bits=4)
    chosen = ExportOptions(logits="all", graph="static", max_context=CONTEXT)
    export(checkpoint, tmp_path / "out", chosen)
    check(tmp_path / "out", TorchModel(checkpoint).logits(TOKENS))
    monkeypatch.setattr(Masked, "sees_by_mask", False)
    with pytest.raises(ValueError, match=r"'bloom' computes attention in code of its own.*--graph standard"):
        export(checkpoint, tmp_path / "no", chosen)


def test_a_text_sees_nothing_of_the_text_before(work: Path, expected: Any) -> None:
    file = OrtModel(work / "all")
    file.logits(TOKENS[::-1].copy())
    buffer = next(iter(file._cache.values()))
    assert relative(file.logits(TOKENS), expected) < TOLERANCE
    assert next(iter(file._cache.values())) is buffer, "the same buffers serve every text"


def test_padding_at_the_end_of_a_row_is_overwritten(work: Path, expected: Any) -> None:
    """Rows of 12 and 5 tokens in one call, then 3 and 0, then one each: the cache of each row has no gaps."""
    file = OrtModel(work / "greedy")
    past = {name: value.numpy() for name, value in _buffers(file, 2).items()}
    filled = np.zeros(2, np.int64)
    for counts in ((12, 5), (3, 0), (1, 1), (2, 4)):
        lengths = np.array(counts)
        tokens = np.full((2, lengths.max()), 7)
        for row, (begin, count) in enumerate(zip(filled, lengths, strict=True)):
            tokens[row, :count] = TOKENS[row, begin : begin + count]
        feeds = {"input_ids": tokens, "write_indices": filled, "lengths": lengths, **past}
        found = dict(zip(file.file.outputs, file.session.run(None, feeds), strict=True))
        past = {name.replace("present", "past_key_values"): found[name] for name in found if name.startswith("present")}
        filled = filled + lengths
        for given in np.flatnonzero(lengths):
            assert relative(found["logits"][given, 0], expected[given, filled[given] - 1]) < TOLERANCE
        np.testing.assert_array_equal(found["next_token"], found["logits"].argmax(-1))


@pytest.mark.parametrize("sample", ["greedy", "top-k"])
def test_no_token_is_chosen_among_logits_that_are_no_numbers(sample: str) -> None:
    """A search for the largest passes over NaN, or takes it, by where it is; a hidden token is no fault."""

    class Chooser(torch.nn.Module):
        def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return chosen(logits, sample)

    logits = np.random.default_rng(0).standard_normal((9, 1, 100)).astype(np.float32)
    marks: list[tuple[int, Any, float]] = [(0, 0, np.nan), (1, 50, np.nan), (2, 99, np.nan), (3, 7, np.inf)]
    marks += [(4, slice(None), np.nan), (5, slice(None), -np.inf), (6, 3, -np.inf)]
    for row, place, value in marks:
        logits[row, 0, place] = value
    logits[4, 0, 1], logits[7, 0, :4] = -np.inf, np.finfo(np.float32).min  # of these the sum is minus infinity
    program = torch.onnx.export(Chooser().eval(), (torch.zeros(9, 1, 100),), dynamo=True, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    found = session.run(None, {session.get_inputs()[0].name: logits})
    whole = np.s_[6:]
    if sample == "greedy":
        np.testing.assert_array_equal(found[0][:6], np.full((6, 1), NO_TOKEN))
        np.testing.assert_array_equal(found[0][whole], logits[whole].argmax(-1))
    else:
        assert np.isnan(found[0][:6]).all()
        np.testing.assert_array_equal(found[0][whole], -np.sort(-logits[whole], axis=-1)[..., :BEST])
        np.testing.assert_array_equal(np.take_along_axis(logits, found[1], -1)[whole], found[0][whole])


def test_a_token_that_the_graph_could_not_choose_is_an_error(work: Path) -> None:
    """NaN in the cache, as of activations that overflowed."""
    file = OrtModel(work / "greedy")
    token = file.start_best([TOKENS[0]])
    assert file.step_best(token.tolist()) >= 0
    for value in file._cache.values():
        value.update_inplace(np.full(value.shape(), np.nan, np.float32))
    with pytest.raises(errors.CheckFailedError, match="NaN or infinite, from which no token can be chosen"):
        file.step_best([1])
    np.testing.assert_array_equal(file.start_best([TOKENS[0]]), token)


def test_a_text_that_was_nan_leaves_nothing_to_the_next(work: Path) -> None:
    """A mask multiplies what it hides by 0, which leaves NaN."""
    file = OrtModel(work / "all")
    want = file.start(TOKENS[:1])
    for value in file._cache.values():
        value.update_inplace(np.full(value.shape(), np.nan, np.float32))
    assert np.isnan(file.step(1)).all()
    np.testing.assert_array_equal(file.start(TOKENS[:1]), want)


def test_tokens_that_a_model_has_not_are_refused(work: Path) -> None:
    """A GPU fails for good where it looks one up, or looks up something; -1 is the last row to ONNX Runtime."""
    export(work / "checkpoint", work / "grows", ExportOptions())
    files = [OrtModel(work / name) for name in ("grows", "all", "greedy")]
    original = TorchModel(work / "checkpoint")
    for model in (*files, original):
        want, said = model.start(TOKENS[:1]), r"token (-1|259) is not one of .*, whose tokens are 0 to 258"
        for token in (-1, 259):
            with pytest.raises(errors.UsageError, match=said):
                model.scores(np.array([[1, token]]))
        model.start(TOKENS[:1, :-1])
        for token in (-1, 259):
            with pytest.raises(errors.UsageError, match=said):
                model.step(token)
        found = model.step(int(TOKENS[0, -1]))
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())
    with pytest.raises(errors.UsageError, match="token -1 is not one of"):
        files[2].start_best([np.array([3, -1])])
    with pytest.raises(errors.UsageError, match="token 300 is not one of"):
        original.generated(np.array([[300]]), 2)


def _buffers(file: OrtModel, batch: int) -> dict[str, Any]:
    file._reset(batch)
    return file._cache


def test_a_cache_of_int8_holds_what_the_growing_one_holds(work: Path) -> None:
    """Codes are read as attention sees them, so a batch, a prompt with steps, and the standard graph are one."""
    for graph, context in (("standard", None), ("static", CONTEXT)):
        chosen = ExportOptions(logits="all", graph=graph, kv="int8", max_context=context)
        export(work / "checkpoint", work / f"int8-{graph}", chosen)
    want = OrtModel(work / "int8-standard").logits(TOKENS)
    check(work / "int8-static", want)


def test_half_precision_keeps_one_attention_node_a_layer(work: Path, expected: Any) -> None:
    for dtype in ("fp16", "bf16"):
        chosen = ExportOptions(logits="all", graph="static", max_context=CONTEXT, dtype=dtype)
        export(work / "checkpoint", work / dtype, chosen)
        nodes = onnx.load(work / dtype / "model.onnx", load_external_data=False).graph.node
        kinds = collections.Counter(node.op_type for node in nodes)
        assert (kinds["Attention"], kinds["RotaryEmbedding"], kinds["TensorScatter"]) == (2, 4, 4)
        assert all(len(node.input) == 4 for node in nodes if node.op_type == "Attention"), "an explicit mask alone"
    check(work / "fp16", expected, tolerance=1e-2)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "llama"])
def test_half_precision_is_made_for_the_kernels_of_attention(family: str, tmp_path: Path) -> None:
    """Values narrower than keys (16 of 32), computed from a latent cache; sinks; heads of 12."""
    if family == "llama":
        tiny_model(family, tmp_path / "model")
    else:
        tiny(family, tmp_path / "model")
    assert run_cli("quantize", tmp_path / "model", "--method", "rtn", "--bits", 4, "-o", tmp_path / "q", "--quiet") == 0
    want = TorchModel(tmp_path / "q").logits(TOKENS)
    for dtype in ("fp16", "fp32"):
        chosen = ExportOptions(logits="all", graph="static", max_context=CONTEXT, dtype=dtype)
        export(tmp_path / "q", tmp_path / dtype, chosen)
        check(tmp_path / dtype, want, tolerance=1e-2 if dtype == "fp16" else TOLERANCE)
        file = ExportedModel.open(tmp_path / dtype)
        sizes = {file.inputs[f"past_key_values.1.{part}"][3] for part in ("key", "value")}
        assert sizes == {"deepseek_v3": {16, 32}, "gpt_oss": {16}, "llama": {16 if dtype == "fp16" else 12}}[family]
        more = family == "gpt_oss" and dtype == "fp16"
        assert file.inputs["past_key_values.1.value"][2] == CONTEXT + more
        assert sum(node.op_type == "Attention" for node in file.proto.graph.node) == (2 if dtype == "fp16" else 0)


def test_positions_beyond_the_cache_are_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = OrtModel(work / "all")
    file.start(np.zeros((1, CONTEXT - 1), np.int64))
    file.step(0)
    with pytest.raises(errors.UsageError, match=f"{CONTEXT + 1} positions.*holds {CONTEXT}"):
        file.step(0)
    with pytest.raises(errors.UsageError, match=f"{CONTEXT + 2} positions"):
        file.logits(np.zeros((2, CONTEXT + 2), np.int64))
    flags = ["--graph", "static", "--quiet", "--max-context"]
    assert run_cli("export", work / "checkpoint", "-o", work / "no", *flags, 129) == errors.USAGE
    assert "up to 128 positions" in capsys.readouterr().err


def test_a_call_that_failed_changes_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that only ONNX Runtime refuses: the text is what it was, and the next call of that shape is its own."""
    monkeypatch.setattr(exported, "check_tokens", lambda *_: None)
    export(work / "checkpoint", work / "ort", ExportOptions(graph="ort"))
    export(work / "checkpoint", work / "standard", ExportOptions())
    for name in ("all", "ort", "standard"):
        file, whole = OrtModel(work / name), OrtModel(work / name)
        with pytest.raises(errors.UsageError, match="a step comes after the start"):
            file.step(1)
        want = [whole.start(TOKENS[:1, :5]), whole.step(7), whole.step(8)]
        for call in (lambda file=file: file.start(np.full((1, 5), 9999)), lambda file=file: file.step_batch([7])):
            with pytest.raises(Exception, match=r"out of data bounds|a step comes after the start"):
                call()
        found = [file.start(TOKENS[:1, :5])]
        for token in (7, 8):
            with pytest.raises(Exception, match="out of data bounds"):
                file.step(9999)
            found.append(file.step(token))
        np.testing.assert_array_equal(np.stack(found), np.stack(want))


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="belong to graph 'static'"):
        ExportOptions(max_context=8)
    with pytest.raises(ValueError, match="give logits 'last'"):
        ExportOptions(graph="static", sample="greedy", logits="all")


def test_commands_know_such_files(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--checkpoint", work / "checkpoint", "--json", "--quiet", "--tokens", 16]
    assert run_cli("parity", work / "all", *flags) == 0
    report = stdout_json(capsys)
    assert report["cached"]["passed"]
    assert len(report["layers"]) == 14
    said = []
    for kind in ("greedy", "checkpoint"):
        assert run_cli("generate", work / kind, "-p", "the", "--max-new-tokens", 8, "--quiet") == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_the_native_library_runs_it_too(work: Path, expected: Any) -> None:
    file = open_model(work / "all", "auto")
    assert relative(file.logits(TOKENS), expected) < TOLERANCE
