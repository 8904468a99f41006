"""The real ONNX Runtime GenAI runs exported folders as they are, and continues texts as `rankbook generate` does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from rankbook.calibration.checkpoint.extras import GENAI_CONFIG, LIBRARY
from rankbook.exporter.export import export
from rankbook.exporter.genai import write_genai_config
from rankbook.exporter.options import ExportOptions
from rankbook.plugins.library import unavailable as library_unavailable
from rankbook.tools.generation.loop import GenerateOptions, generate, prompt_ids
from rankbook.tools.runtimes import Setting, genai, open_model
from rankbook.tools.runtimes.ort import OrtModel
from tests.exporter.checkpoints import make_checkpoint
from tests.plugins.toolchain import ROOT, ort_headers, output, required_tool
from tests.tiny import tiny_tokenizer

needs_genai = pytest.mark.skipif(genai.unavailable() is not None, reason=str(genai.unavailable()))
PROMPTS = ("the quick", "brown fox jumps over", "a", "lazy dog, while seven wizards boil", "He said: 12 + 34 =")
TEMPLATE = "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}{% endfor %}<s>answer: "
NEW, END = 12, 257
VARIED = {"initializer_range": 0.2}
"""With the small weights of tiny models a text is one token again and again, whatever the prompt."""


def tokenizer_with_template(folder: Path) -> None:
    """Give a folder's tokenizer a chat template."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny Llama with a chat template."""
    folder = make_checkpoint(tmp_path_factory.mktemp("genai"), "llama", bits=4, model={"hidden_size": 64, **VARIED})
    tokenizer_with_template(folder)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint) -> dict[str, Path]:
    """The checkpoint in both graphs: `ort` with the library where there is one and all logits, `standard` without."""
    folders = {graph: checkpoint.parent / graph for graph in ("ort", "standard")}
    for graph, logits in (("ort", "all"), ("standard", "last")):
        export(checkpoint, folders[graph], ExportOptions(graph=graph, logits=logits))
    return folders


def described(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / GENAI_CONFIG).read_text("utf-8"))
    return found


def continued(folder: Path, prompts: list[str] | tuple[str, ...], *, chat: bool = False) -> list[list[int]]:
    """Continue prompts side by side with GenAI; return the new tokens of each, up to the first end token."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)
    if chat:
        told = [json.dumps([{"role": "user", "content": prompt}]) for prompt in prompts]
        prompts = [tokenizer.apply_chat_template(messages, add_generation_prompt=True) for messages in told]
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=128, batch_size=len(prompts), do_sample=False)
    generator = og.Generator(model, parameters)
    tokens = tokenizer.encode_batch(list(prompts)) if len(prompts) > 1 else tokenizer.encode(prompts[0])
    generator.append_tokens(tokens)
    begun = len(generator.get_sequence(0))
    for _ in range(NEW):
        if not generator.is_done():
            generator.generate_next_token()
    rows = [[int(token) for token in generator.get_sequence(row)[begun:]] for row in range(len(prompts))]
    return [row[: row.index(END)] if END in row else row for row in rows]


def expected(folder: Path, prompt: str, *, chat: bool = False) -> list[int]:
    model = open_model(folder, "bodies")
    options = GenerateOptions(max_new_tokens=NEW, chat=chat)
    return list(generate(model, prompt, options).ids)


@needs_genai
@pytest.mark.parametrize("with_library", [True, False])
@pytest.mark.parametrize("graph", ["ort", "standard"])
def test_the_same_tokens_as_generate(graph, with_library, exported, tmp_path):
    """Five prompts, two side by side of which the shorter is padded, and a chat; both ways of computing."""
    if with_library and (reason := library_unavailable("ort")):
        pytest.skip(reason)
    folder = shutil.copytree(exported[graph], tmp_path / "model")
    config = described(folder)
    session = config["model"]["decoder"]["session_options"]
    if with_library and graph == "standard":
        from rankbook.plugins.library import library

        shutil.copy(library("ort"), folder / LIBRARY)
        session["custom_ops_library"] = LIBRARY
    elif not with_library:
        session.pop("custom_ops_library", None)
        (folder / LIBRARY).unlink(missing_ok=True)
    (folder / GENAI_CONFIG).write_text(json.dumps(config))
    alone = [expected(folder, prompt) for prompt in PROMPTS]
    assert [continued(folder, [prompt])[0] for prompt in PROMPTS] == alone
    assert len({tuple(tokens) for tokens in alone}) > 1
    assert continued(folder, PROMPTS[:2]) == alone[:2]
    assert continued(folder, PROMPTS[:1], chat=True)[0] == expected(folder, PROMPTS[0], chat=True)


@needs_genai
@pytest.mark.parametrize("with_library", [True, False])
@pytest.mark.parametrize("graph", ["ort", "standard"])
def test_a_cache_in_float16(graph, with_library, checkpoint, tmp_path):
    """GenAI makes the cache in the type of the file's inputs."""
    if with_library and (reason := library_unavailable("ort")):
        pytest.skip(reason)
    options = ExportOptions(graph=graph, kv="float16", with_library=with_library)
    export(checkpoint, tmp_path / "model", options)
    alone = [expected(tmp_path / "model", prompt) for prompt in PROMPTS[:2]]
    assert [continued(tmp_path / "model", [prompt])[0] for prompt in PROMPTS[:2]] == alone
    assert continued(tmp_path / "model", PROMPTS[:2]) == alone


@needs_genai
def test_a_row_of_the_bench(exported):
    """``bench MODEL@genai``: the same scores as ONNX Runtime gives, and the same packed bytes."""
    here, there = open_model(exported["ort"], "bodies"), open_model(exported["ort"], "genai", Setting(1, 32))
    assert there.packed == here.packed
    tokens = np.array([[3, 4, 5]])
    for _ in range(2):  # a start forgets what was before
        np.testing.assert_allclose(there.start(tokens), here.start(tokens), atol=1e-4)
        np.testing.assert_allclose(there.step(9), here.step(9), atol=1e-4)


@needs_genai
def test_a_type_that_is_not_known(tmp_path):
    """It runs as the closest decoder, with learned positions too."""
    folder = make_checkpoint(tmp_path, "opt", model={"init_std": 0.2})
    report = export(folder, tmp_path / "out", ExportOptions(with_library=False))
    assert (report.genai.type, report.genai.closest) == ("llama", True)
    assert continued(tmp_path / "out", PROMPTS[1:2])[0] == expected(tmp_path / "out", PROMPTS[1])
    assert continued(tmp_path / "out", PROMPTS[3:]) == [expected(tmp_path / "out", prompt) for prompt in PROMPTS[3:]]


def test_what_is_written(exported, checkpoint):
    """Sizes from the graph, tokens and search settings from the model; shared buffers for `--graph ort` alone."""
    native = library_unavailable("ort") is None
    standard, ort = described(exported["standard"]), described(exported["ort"])
    decoder = ort["model"]["decoder"]
    sizes = ("head_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "hidden_size")
    assert [decoder[name] for name in sizes] == [16, 4, 2, 2, 64]
    wanted = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, "vocab_size": 259, "context_length": 128}
    assert {name: ort["model"][name] for name in wanted} == wanted
    assert decoder["session_options"].get("custom_ops_library") == (LIBRARY if native else None)
    assert "custom_ops_library" not in standard["model"]["decoder"]["session_options"]
    assert [found["search"]["past_present_share_buffer"] for found in (ort, standard)] == [True, False]
    assert (exported["ort"] / LIBRARY).is_file() == native
    assert not (exported["standard"] / LIBRARY).exists()
    listed = json.loads((exported["ort"] / "rankbook-files.json").read_text())["files"]
    assert GENAI_CONFIG in listed
    umask = os.umask(0)
    os.umask(umask)
    modes = {name: (exported["ort"] / name).stat().st_mode & 0o777 for name in listed}
    assert set(modes.values()) == {0o666 & ~umask}
    assert "onnxruntime_genai" in (exported["ort"] / "README.md").read_text("utf-8")


def graph_of(*inputs: str) -> ir.Model:
    """Return a graph without nodes: these inputs, the cache of a layer, and logits."""
    cache = [("past_key_values.0.key", 2), ("past_key_values.0.value", 2)]
    values = [ir.val(name, shape=ir.Shape(["batch", "sequence"])) for name in inputs]
    values += [ir.val(name, shape=ir.Shape(["batch", heads, "past", 16])) for name, heads in cache]
    logits = ir.val("logits", shape=ir.Shape(["batch", 1, 259]))
    return ir.Model(ir.Graph(values, [logits], nodes=[], opset_imports={"": 23}), ir_version=10)


def test_end_tokens_and_search_settings_of_the_model(tmp_path):
    """All end tokens, that of the tokenizer too; what GenAI cannot obey is named; names are those of the graph."""
    tiny_tokenizer().save_pretrained(tmp_path)
    given = {"eos_token_id": [10, 11], "do_sample": True, "temperature": 0.5, "top_k": 7, "suppress_tokens": [5]}
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    config = {"model_type": "gptj", "n_head": 8, "n_embd": 128, "n_positions": 99}
    report = write_genai_config(tmp_path, graph_of("input_ids"), config, ExportOptions(), with_library=False)
    found = described(tmp_path)
    assert found["model"]["eos_token_id"] == [10, 11, 257]
    assert (found["model"]["bos_token_id"], found["model"]["pad_token_id"]) == (256, 258)
    assert found["model"]["decoder"]["inputs"].keys() == {"input_ids", "past_key_names", "past_value_names"}
    assert found["model"]["decoder"]["num_attention_heads"] == 8
    settings = {"do_sample": True, "temperature": 0.5, "top_k": 7, "max_length": 99, "past_present_share_buffer": False}
    assert found["search"] == settings
    assert (report.type, report.closest, report.not_obeyed) == ("llama", True, ("suppress_tokens",))
    assert str(report) == "type llama (the closest one); without the native library; not obeyed: suppress_tokens"


def test_a_long_context_is_not_reserved_as_a_whole(tmp_path):
    options, config = ExportOptions(graph="ort"), {"model_type": "qwen3", "max_position_embeddings": 131072}
    graph = graph_of("input_ids")
    graph.metadata_props["rankbook.graph"] = "ort"
    write_genai_config(tmp_path, graph, config, options, with_library=False)
    found = described(tmp_path)
    assert (found["model"]["context_length"], found["search"]["max_length"]) == (131072, 4096)


@pytest.mark.parametrize(
    ("options", "graph", "reason"),
    [
        ({"kv": "int8"}, graph_of("input_ids"), "scales of a cache"),
        ({"graph": "static"}, graph_of("input_ids", "write_indices"), "does not give the input write_indices"),
        ({"inputs": "embeds"}, graph_of("inputs_embeds"), "does not give the input inputs_embeds"),
        ({"dtype": "bf16"}, graph_of("input_ids"), "bf16 does not run on a CPU"),
    ],
)
def test_what_genai_cannot_run_is_said(options, graph, reason, tmp_path):
    report = write_genai_config(tmp_path, graph, {}, ExportOptions(**options), with_library=False)
    assert reason in str(report)
    assert not (tmp_path / GENAI_CONFIG).exists()


def test_a_library_that_is_not_built_is_refused_at_once(checkpoint, tmp_path, monkeypatch):
    from rankbook.plugins import library

    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="make native"):
        export(checkpoint, tmp_path / "out", ExportOptions(with_library=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("tokens", "past", "total"), [(1, 1, 1), (2, 5, 4), (3, 3, 6)])
def test_a_mask_shorter_than_past_and_tokens(tokens, past, total, exported) -> None:
    """Both graphs take the end of the past for room that nothing was written to yet."""
    scores = []
    for folder in exported.values():
        model = OrtModel(folder)
        names: dict[str, Any] = model.file.inputs
        feeds = {"input_ids": np.arange(tokens)[None], "attention_mask": np.ones((1, total), np.int64)}
        feeds["position_ids"] = np.arange(total - tokens, total)[None]
        random = np.random.default_rng(0)
        for name, shape in names.items():
            if name not in feeds:
                feeds[name] = random.standard_normal((1, shape[1], past, shape[3])).astype(np.float32)
        if past + tokens > total:  # room is not read
            for name in names.keys() - {"input_ids", "attention_mask", "position_ids"}:
                feeds[name][:, :, total - tokens :] = np.inf if folder.name == "ort" else 1e3
        scores.append(model.session.run(["logits"], feeds)[0][:, -1])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)


def test_inputs_that_polygraphy_makes(exported):
    """By default each axis without a size is 1: a mask of one element beside a past of one position."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator, DataLoader

    runners = [OnnxrtRunner(SessionFromOnnx(str(folder / "model.onnx"))) for folder in exported.values()]
    found = Comparator.run(runners, data_loader=DataLoader(val_range={"attention_mask": (1, 1)}))
    logits = [iterations[0]["logits"] for _, iterations in found]
    assert logits[0].shape == (1, 1, 259)
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


def test_a_mask_shorter_than_the_tokens_is_refused(exported):
    """One of a single element would fit any number of keys."""
    model = OrtModel(exported["standard"])
    feeds = model.feeds(np.array([[3, 4, 5]]))
    with pytest.raises(Exception, match="Gather"):
        model.session.run(["logits"], feeds | {"attention_mask": np.ones((1, 1), np.int64)})


def example(language: str, page: str = "runtimes.md") -> str:
    """Return the program in a language that a page of docs/ shows."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return str(found)


def compiled(program: str, work: Path, library: Path, *options: str) -> Path:
    """Compile a program against a library whose names without a version are links in ``work``, and return it."""
    compiler = required_tool("c++")
    (work / "program.cpp").write_text(program)
    where = [f"-L{work}", f"-L{library.parent}", f"-Wl,-rpath,{work}:{library.parent}"]
    output(
        compiler,
        "-std=c++17",
        "-O1",
        work / "program.cpp",
        *where,
        *options,
        f"-l:{library.name}",
        "-o",
        work / "program",
    )
    return work / "program"


def onnxruntime_library(work: Path) -> Path:
    """Link ONNX Runtime's library under the names by which others ask for it."""
    import onnxruntime

    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*.*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (work / name).symlink_to(library)
    return work / "libonnxruntime.so"


@needs_genai
def test_the_example_in_python(exported):
    """As it stands in the documents, but for the model: a tiny one, whose text ends after 64 tokens at most."""
    done = subprocess.run(
        [sys.executable, "-c", example("python").replace('"onnx"', repr(str(exported["standard"])))],
        capture_output=True,
        check=True,
    )
    assert len(done.stdout) > 5


@needs_genai
def test_the_example_in_cpp_of_genai(exported, tmp_path):
    """The tokens of `rankbook generate` as GenAI decodes them: it leaves out bytes that are no character."""
    import onnxruntime_genai as og

    library = Path(og.__file__).parent / "libonnxruntime-genai.so"
    onnxruntime_library(tmp_path)  # which GenAI's library loads by name
    program = compiled(example("cpp", "deploy.md"), tmp_path, library, f"-I{ROOT / 'tests' / 'native'}")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    texts = []
    for folder in exported.values():
        tokenizer = og.Tokenizer(og.Model(str(folder)))
        for prompt in PROMPTS:
            command = [program, folder, prompt, str(NEW)]
            done = subprocess.run(command, capture_output=True, check=True, env=environment)
            stream = tokenizer.create_stream()
            texts.append("".join(map(stream.decode, expected(folder, prompt))))
            assert done.stdout.decode("utf-8") == texts[-1] + "\n"
    assert len("".join(texts)) > 20


@pytest.mark.parametrize("graph", ["ort", "standard"])
def test_the_example_in_cpp(graph, exported, tmp_path):
    """The same tokens as `rankbook generate`, with the library for `--graph ort`."""
    if (headers := ort_headers()) is None:
        pytest.skip("ONNX Runtime's headers are needed: make native gets them")
    program = compiled(example("cpp"), tmp_path, onnxruntime_library(tmp_path), f"-I{headers}")
    own = exported[graph] / LIBRARY
    model = open_model(exported[graph], "bodies")
    tokens = prompt_ids(model.tokenizer, PROMPTS[1])
    wanted = expected(exported[graph], PROMPTS[1])
    given = [exported[graph] / "model.onnx", own if own.is_file() else "-", len(wanted), *map(str, tokens)]
    assert list(map(int, output(program, *map(str, given)).split())) == wanted
    assert wanted
