"""Engines run: over the stand-in of TensorRT they give the text and the figures of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankbook.exporter.options import BEST
from rankbook.plugins import library
from rankbook.tools import errors
from rankbook.tools.deploy.options import BuildOptions
from rankbook.tools.dev import family_models
from rankbook.tools.runtimes import open_model, trt
from rankbook.tools.runtimes.trt_engine import RUNTIME_CACHE_NAME
from rankbook.tools.runtimes.trt_model import EngineModel
from tests import tensorrt_stand_in as stand_in
from tests.tensorrt_stand_in import HostMemory, State
from tests.tiny import tiny_model, write_text
from tests.tools.files import chain_model, run_cli, stdout_json

FILES = ("standard-last", "static-last", "static-all")
"""Exported files by graph and logits."""
FILE = "static-last"
CONTEXT = 64
LIBRARIES = {"tensorrt": "trt", "tensorrt_rtx": "rtx"}
LIMITS: dict[str, Any] = {"max_batch": 3, "max_sequence": 8}
PROMPT = "the quick brown fox"  # 19 tokens: three pieces of at most 8


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama's checkpoint ``q`` and its exported files, by graph and logits."""
    folder = tmp_path_factory.mktemp("engines")
    tiny_model("llama", folder / "model")
    write_text(folder / "text.txt")
    assert run_cli("quantize", folder / "model", "--method", "rtn", "--bits", 4, "-o", folder / "q", "--quiet") == 0
    for name in FILES:
        graph, logits = name.split("-")
        how = ["--graph", graph, "--logits", logits, *(["--max-context", CONTEXT] if graph == "static" else [])]
        assert run_cli("export", folder / "q", "-o", folder / name, *how, "--quiet") == 0
    return folder


@pytest.fixture(params=LIBRARIES)
def state(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> State:
    return stand_in.install(monkeypatch, request.param)


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> State:
    return stand_in.install(monkeypatch)


def build(state: State, source: Path, output: Path, **options: Any) -> Path:
    target = LIBRARIES[state.module.__name__]
    context = {} if source.name.startswith("static") else {"max_context": CONTEXT}
    return stand_in.build(state, source, output, BuildOptions(target=target, **LIMITS | context | options))


@pytest.mark.parametrize("file", [name for name in FILES if name.endswith("last")])
def test_generate_gives_the_text_of_onnx_runtime(file, work, tmp_path, state, capsys):
    """A prompt of several pieces, then single tokens until the context is full."""
    engine = build(state, work / file, tmp_path / "engine")
    found = []
    for model in (engine, work / file):
        flags = ["--max-new-tokens", 100, "--ignore-eos", "--json", "--quiet"]
        kernels = [] if model is engine else ["--no-native"]
        assert run_cli("generate", model, "-p", PROMPT, *flags, *kernels) == errors.OK
        found.append(stdout_json(capsys))
    want = found[1]["ids"][: CONTEXT - len(PROMPT)]
    assert found[0]["ids"] == want
    assert len(want) == CONTEXT - len(PROMPT)
    assert (found[0]["finish_reason"], found[0]["kernels"]) == ("context", stand_in.RUNTIMES[state.module.__name__])


def test_an_engine_that_chooses_the_token(work, tmp_path, state, capsys):
    """Of a step 8 bytes a text come to the host; texts of several lengths, and the text of the one that does not."""
    how = ["--graph", "static", "--max-context", CONTEXT, "--sample", "greedy", "--quiet"]
    assert run_cli("export", work / "q", "-o", tmp_path / "greedy", *how) == 0
    greedy, plain = (
        build(state, source, tmp_path / name, max_context=None)
        for name, source in (("engine", tmp_path / "greedy"), ("plain", work / FILE))
    )
    said = []
    for model in (greedy, plain):
        capsys.readouterr()
        assert run_cli("generate", model, "-p", PROMPT, "--max-new-tokens", 12, "--ignore-eos", "--quiet") == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""
    tokens = np.random.default_rng(0).integers(0, 256, (2, 19))
    texts = [tokens[0], tokens[1, :3]]
    found = []
    for folder in (greedy, plain):
        held = opened(folder)
        state.memory.downloaded.clear()
        best = [held.start_best(texts)]
        best += [held.step_best(best[-1].tolist()) for _ in range(4)]
        found.append(np.stack(best))
        assert (set(state.memory.downloaded) == {8 * 2}) == (folder is greedy)
    np.testing.assert_array_equal(found[0], found[1])
    held = opened(greedy)
    held.start_best(texts)
    spoil(held)
    with pytest.raises(errors.CheckFailedError, match="NaN or infinite, from which no token can be chosen"):
        held.step_best([1, 2])
    np.testing.assert_array_equal(held.start_best(texts), found[0][0], "a new text finds no NaN in the cache")


def spoil(model: EngineModel) -> None:
    """Fill the caches with NaN, as activations that overflow do."""
    for name in model.caches:
        region: Any = model.engine.region(name)
        region.array.view(np.float32)[:] = np.nan


def test_an_engine_that_gives_the_best_tokens(work, tmp_path, rtx, capsys):
    """Sampling from a few of them needs these alone, and draws what it draws from all logits; more need the logits."""
    how = ["--graph", "static", "--max-context", CONTEXT, "--sample", "top-k", "--quiet"]
    assert run_cli("export", work / "q", "-o", tmp_path / "top", *how) == 0
    engine = build(rtx, tmp_path / "top", tmp_path / "engine", max_context=None)
    for count, moved in ((7, {BEST * 4, BEST * 8}), (BEST + 1, {4 * 259})):
        rtx.memory.downloaded.clear()
        said = []
        for model in (engine, tmp_path / "top"):
            capsys.readouterr()
            flags = ["--temperature", 1.5, "--top-k", count, "--seed", 3, "--max-new-tokens", 12, "--ignore-eos"]
            assert run_cli("generate", model, "-p", PROMPT, *flags, "--json", "--quiet") == 0
            said.append(stdout_json(capsys)["ids"])
        assert said[0] == said[1]
        assert set(rtx.memory.downloaded) == moved
    held = opened(engine)
    scores, tokens = held.start_top([np.arange(19), np.arange(5)], 3).transpose(1, 0, 2)
    logits = held.start_batch([np.arange(19), np.arange(5)])
    np.testing.assert_array_equal(tokens, np.argsort(-logits, axis=-1, kind="stable")[:, :3])
    np.testing.assert_array_equal(scores, np.take_along_axis(logits, tokens.astype(int), axis=-1))
    spoil(held)
    assert np.isnan(held.step_top([1, 2], 3)[:, 0]).all()
    spoil(held)
    assert np.isnan(held.step_batch([1, 2])).all()
    np.testing.assert_array_equal(held.start_batch([np.arange(19), np.arange(5)]), logits)


@pytest.mark.parametrize("file", [name for name in FILES if name.endswith("all")])
def test_eval_gives_the_figures_of_onnx_runtime(file, work, tmp_path, state, capsys):
    """Windows longer than a call, two at once."""
    engine = build(state, work / file, tmp_path / "engine")
    found = []
    for model in (engine, work / file):
        flags = ["--text", work / "text.txt", "--context", 20, "--max-tokens", 80, "--batch", 2, "--json", "--quiet"]
        kernels = [] if model is engine else ["--no-native"]
        assert run_cli("eval", model, *flags, *kernels) == errors.OK
        found.append(stdout_json(capsys))
    assert found[0]["tokens"] == found[1]["tokens"] == 76
    assert found[0]["perplexity"] == pytest.approx(found[1]["perplexity"], rel=1e-6)


@pytest.mark.parametrize("file", FILES)
def test_texts_of_several_lengths_side_by_side(file, work, tmp_path, state):
    """Shorter ones are padded, over several pieces; each gets the logits that it gets alone."""
    check_side_by_side(opened(build(state, work / file, tmp_path / "engine")))


@pytest.mark.parametrize("graph", ["standard", "static"])
@pytest.mark.parametrize("family", ["gemma2", "mistral", "mpt"])
def test_windows_and_biases_count_tokens_and_no_padding(family, graph, tmp_path, rtx):
    """Windows of 8 tokens, and biases that grow with the distance between two."""
    family_models.tiny(family, tmp_path / "model")
    assert run_cli("quantize", tmp_path / "model", "--method", "rtn", "--bits", 8, "-o", tmp_path / "q", "--quiet") == 0
    how = ["--graph", graph, *(["--max-context", CONTEXT] if graph == "static" else [])]
    assert run_cli("export", tmp_path / "q", "-o", tmp_path / graph, *how, "--quiet") == 0
    model = opened(build(rtx, tmp_path / graph, tmp_path / "engine"))
    check_side_by_side(model)
    file, tokens = open_model(tmp_path / graph, "bodies"), np.arange(19)[None]
    np.testing.assert_allclose(model.start(tokens), file.start(tokens), atol=1e-4)


def check_side_by_side(model: EngineModel) -> None:
    tokens = np.random.default_rng(0).integers(0, 250, (3, 32))
    rows = [tokens[0, :19], tokens[1, :3], tokens[2, :8]]
    together = [model.start_batch(rows), *(model.step_batch(tokens[:, 20 + step].tolist()) for step in range(9))]
    for index, row in enumerate(rows):
        alone = [model.start(row[None]), *(model.step(int(tokens[index, 20 + step])) for step in range(9))]
        for one, many in zip(alone, together, strict=True):
            np.testing.assert_allclose(many[index], one, rtol=0, atol=1e-5 * np.abs(one).max())


@pytest.mark.parametrize("file", ["standard-last", "static-last"])
def test_a_step_that_failed_changes_nothing(file, work, tmp_path, state, monkeypatch):
    """Whether the engine wrote into the cache before or not, the step can be taken again; half a start is none."""
    model = opened(build(state, work / file, tmp_path / "engine"))
    want = [model.start(np.arange(19)[None]), *(model.step(token) for token in range(4))]
    run, broken = model.engine.run, ["before", "after"]

    def failing(*given: Any) -> None:
        when = broken.pop() if broken else ""
        if when != "before":
            run(*given)
        if when:
            raise errors.CheckFailedError("the device is gone")

    found = [model.start(np.arange(19)[None])]
    monkeypatch.setattr(model.engine, "run", failing)
    for token in range(4):
        while broken:
            with pytest.raises(errors.CheckFailedError):
                model.step(token)
        found.append(model.step(token))
        broken += ["after", "before"][: token % 3]
    np.testing.assert_array_equal(found, want)
    broken[:] = ["before", "", ""]  # the third piece of the prompt
    with pytest.raises(errors.CheckFailedError):
        model.start(np.arange(19)[None])
    with pytest.raises(errors.UsageError, match="a step comes after the start"):
        model.step(1)


def test_a_shape_that_is_refused_is_told_again(work, tmp_path, rtx, monkeypatch):
    """The library has some of the new shapes then; the next call must not take it to have the old ones."""
    model = opened(build(rtx, work / FILE, tmp_path / "engine"))
    tokens = np.arange(6)
    want, other = model.start(tokens[None]), model.start(tokens[None, :3])
    context = model.engine._context
    told: list[str] = []

    def refusing(name: str, shape: tuple[int, ...]) -> bool:
        told.append(name)
        return len(told) != 2 and type(context).set_input_shape(context, name, shape)

    with monkeypatch.context() as patch:
        patch.setattr(context, "set_input_shape", refusing)
        with pytest.raises(errors.CheckFailedError, match="refuses the shape"):
            model.start_batch([tokens, tokens])
    np.testing.assert_array_equal(model.start(tokens[None, :3]), other)
    np.testing.assert_array_equal(model.start(tokens[None]), want)


def test_texts_without_tokens_or_with_others_are_refused(work, tmp_path, rtx):
    model = opened(build(rtx, work / FILE, tmp_path / "engine"))
    with pytest.raises(errors.UsageError, match="text 1 of 2 has no tokens; give each at least one"):
        model.start_batch([np.arange(3), np.arange(0)])
    for token in (-1, 259):  # which a GPU would look up somewhere
        with pytest.raises(errors.UsageError, match=f"token {token} is not one of .*, whose tokens are 0 to 258"):
            model.start_batch([np.arange(3), np.array([5, token])])


def opened(folder: Path) -> EngineModel:
    model = open_model(folder)
    assert isinstance(model, EngineModel)
    return model


def test_caches_of_a_fixed_length_stay_where_they_are(work, tmp_path, state):
    """One buffer for past and present; growing ones need two, which change places."""
    sizes = {}
    for file in {name.split("-")[0]: name for name in FILES}.values():
        graph = file.split("-")[0]
        model = opened(build(state, work / file, tmp_path / graph))
        engine = model.engine
        caches = [name for name in engine.outputs if name.startswith("present")]
        assert len(caches) == 4
        places = {engine.region(name).address for name in caches}
        places |= {engine.region(name.replace("present", "past_key_values")).address for name in caches}
        assert len(places) == (4 if graph == "static" else 8)
        sizes[graph] = sum(engine.region(name).size for name in caches)
        taken = state.memory.room()[0]
        model.start(np.array([[1, 2, 3]]))
        for token in range(5):
            model.step(token)
        assert state.memory.room()[0] == taken, "device memory is taken once"
    assert set(sizes.values()) == {4 * 3 * 2 * CONTEXT * 12 * 4}


def test_a_cache_of_a_fixed_length_that_the_library_copies(work, tmp_path, rtx):
    """It needs two buffers, and computes the same."""
    folder = build(rtx, work / FILE, tmp_path / "engine")
    found = []
    for copies in (False, True):
        rtx.copies = copies
        model = opened(folder)
        assert bool(model.engine.aliased) != copies
        found.append([model.start(np.arange(19)[None]), *(model.step(token) for token in range(4))])
    np.testing.assert_array_equal(found[0], found[1])


def test_decoding_is_one_cuda_graph(work, tmp_path, state):
    """TensorRT-RTX is told to record them; for TensorRT the second step is recorded and every later one replayed."""
    model = opened(build(state, work / FILE, tmp_path / "engine"))
    (config,) = state.configs
    for _ in range(2):  # a new text begins with another profile
        model.start(np.array([[1, 2, 3]]))
        for token in range(6):
            model.step(token)
    if state.module.__name__ == "tensorrt":
        assert config is None
        assert state.memory.launches == (2 * 5 if model.engine.aliased else 0)
    else:
        assert config.cuda_graph_strategy == state.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        assert state.memory.launches == 0
    assert state.runs == 2 * 7


def test_an_engine_that_cannot_be_recorded_runs_without_a_graph(work, tmp_path, monkeypatch):
    state = stand_in.install(monkeypatch, "tensorrt")
    folder = build(state, work / FILE, tmp_path / "engine")
    want = [(model := opened(folder)).start(np.arange(3)[None]), *(model.step(token) for token in range(4))]
    assert state.memory.launches == 3
    state.waits = True
    model = opened(folder)
    found = [model.start(np.arange(3)[None]), model.step(0)]
    with pytest.warns(UserWarning, match=r"launched kernel by kernel \(.*not permitted when stream is capturing"):
        found.append(model.step(1))
    found += [model.step(token) for token in (2, 3)]
    np.testing.assert_array_equal(found, want)
    assert state.memory.launches == 3


def test_what_rtx_compiled_is_kept_beside_the_engine(work, tmp_path, rtx):
    folder = build(rtx, work / FILE, tmp_path / "engine")
    for again in (False, True):
        model = open_model(folder)
        model.start(np.array([[1, 2]]))
        model.step(3)
        assert (folder / RUNTIME_CACHE_NAME).read_bytes() == b"compiled on a stand-in"
        assert rtx.caches == ([b"compiled on a stand-in"] if again else [])


@pytest.mark.trt
@pytest.mark.skipif(trt.rtx_unavailable() is not None, reason=str(trt.rtx_unavailable()))
def test_a_folder_that_the_real_builder_wrote(work, tmp_path, rtx, capsys):
    """Its manifest has all that running needs."""
    flags = ["--max-batch", 1, "--max-sequence", 8, "--compute-capability", "SM86", "--no-plugins", "--quiet"]
    assert run_cli("build", work / FILE, "-o", tmp_path / "engine", *flags) == errors.OK
    rtx.folders.append(tmp_path / "engine")
    found = []
    for model in (tmp_path / "engine", work / FILE):
        capsys.readouterr()
        assert run_cli("generate", model, "-p", PROMPT, "--max-new-tokens", 8, "--ignore-eos", "--json", "--quiet") == 0
        found.append(stdout_json(capsys)["ids"])
    assert found[0] == found[1]


def refused(folder: Path, capsys: pytest.CaptureFixture[str], code: int, *words: str) -> None:
    """Check how generation is refused: an exit code and one sentence, and nothing on stdout."""
    capsys.readouterr()
    assert run_cli("generate", folder, "-p", "x", "--quiet") == code
    shown = capsys.readouterr()
    assert not shown.out
    for word in words:
        assert word in shown.err


def test_an_engine_of_another_gpu(work, tmp_path, monkeypatch, capsys):
    state = stand_in.install(monkeypatch, memory=HostMemory(capability="SM120"))
    folder = build(state, work / FILE, tmp_path / "engine", compute_capability=("SM86", "SM89"))
    refused(folder, capsys, errors.USAGE, "is SM120", "SM86 and SM89", "--compute-capability SM120")
    monkeypatch.setattr(state.memory, "capability", "SM90")
    refused(folder, capsys, errors.USAGE, "is SM90", "TensorRT-RTX builds none for this GPU", "--target trt")


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        ("CUDA initialization failure: CUDA driver version is insufficient", errors.MISSING, "update the driver"),
        ("The engine plan file is generated on an incompatible device", errors.USAGE, "another GPU"),
        ("Version tag does not match", errors.USAGE, "build it again, or install"),
        ("Cuda Runtime (out of memory)", errors.USAGE, "--max-batch 3"),
        ("something new", errors.CHECK_FAILED, "something new"),
    ],
)
def test_what_the_library_refuses_is_explained(said, code, words, work, tmp_path, monkeypatch, capsys):
    state = stand_in.install(monkeypatch, "tensorrt")
    folder = build(state, work / FILE, tmp_path / "engine")
    for where in ("refusal", "broken", "no_context"):
        monkeypatch.setattr(state, where, said)
        refused(folder, capsys, code, words)
        monkeypatch.setattr(state, where, "")


def test_an_engine_of_another_version(work, tmp_path, rtx, capsys):
    folder = build(rtx, work / FILE, tmp_path / "engine")
    stand_in.change(folder, version="1.2.0.54")
    rtx.refusal = "it does not look like an engine"
    refused(folder, capsys, errors.USAGE, "was built by tensorrt_rtx 1.2.0.54 and 1.7.1.116 is installed")


def test_an_engine_that_needs_the_plugin_library(work, tmp_path, rtx, capsys, monkeypatch):
    """It is registered before the engine is read; an engine that holds it must be alone."""
    folder = build(rtx, work / FILE, tmp_path / "engine")
    stand_in.change(folder, plugin_layers=14, plugin_form="library loaded from its file")
    monkeypatch.setattr(library, "unavailable", lambda _: "librankbook_trt.so is not built: run `make native-cuda`")
    refused(folder, capsys, errors.MISSING, "14 layers of the plugin library", "make native-cuda", "--self-contained")
    monkeypatch.setattr(library, "unavailable", lambda _: None)
    monkeypatch.setattr(library, "library", lambda _: Path("librankbook_trt.so"))
    for _ in range(2):
        open_model(folder)
    assert rtx.plugins == ["librankbook_trt.so"]
    holding = build(rtx, work / FILE, tmp_path / "holding")
    stand_in.change(holding, plugin_layers=14, self_contained=True, plugin_form="library in the engine")
    refused(holding, capsys, errors.USAGE, "one by one")
    rtx.plugins.clear()


def test_an_engine_that_holds_the_plugin_library(work, tmp_path, rtx):
    folder = build(rtx, work / FILE, tmp_path / "engine")
    stand_in.change(folder, plugin_layers=14, self_contained=True, plugin_form="library in the engine")
    assert open_model(folder).context == CONTEXT
    assert rtx.plugins == []


def test_too_little_device_memory(work, tmp_path, monkeypatch, capsys):
    """Tensors are counted before one of them is taken; the share that would fit is said."""
    state = stand_in.install(monkeypatch, memory=HostMemory(total=60_000))
    folder = build(state, work / FILE, tmp_path / "engine")
    refused(folder, capsys, errors.USAGE, "Stand-in GPU has 0.00", "% of its --max-batch times --max-context would fit")
    assert state.memory.room()[0] == 60_000


def test_shapes_outside_of_the_profiles(work, tmp_path, state):
    model = opened(build(state, work / FILES[-1], tmp_path / "engine"))
    with pytest.raises(errors.UsageError, match=r"input_ids 4 x 8.* outside of the profiles .*--max-batch"):
        model.scores(np.zeros((4, 8), np.int64))
    with pytest.raises(errors.UsageError, match=f"holds {CONTEXT}"):
        model.scores(np.zeros((1, CONTEXT + 1), np.int64))
    with pytest.raises(errors.UsageError, match="a step comes after"):
        opened(state.folders[0]).step(1)


def test_an_engine_without_tokens(tmp_path, rtx, capsys):
    folder = build(rtx, chain_model(tmp_path / "onnx"), tmp_path / "engine")
    refused(folder, capsys, errors.USAGE, "no input_ids and logits")


def test_a_truncated_engine(work, tmp_path, rtx, capsys):
    folder = build(rtx, work / FILE, tmp_path / "engine")
    (folder / "model.engine").write_bytes(b"half")
    refused(folder, capsys, errors.USAGE, "does not have the size")


@pytest.mark.skipif(trt.has_gpu(), reason="there is a GPU")
def test_without_a_driver_it_says_so(work, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        folder = build(stand_in.install(patch), work / FILE, tmp_path / "engine")
    refused(folder, capsys, errors.MISSING)
