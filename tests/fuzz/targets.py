"""Every loader of files from strangers, and valid files for it to begin with."""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from tests.calibration.checkpoint.writing import write
from tests.tools.files import chain_model

FIXTURES = Path(__file__).parents[1] / "calibration" / "imports" / "fixtures"
FOREIGN = ("gptq", "awq", "bitsandbytes-nf4", "compressed-nvfp4")


@dataclass(frozen=True)
class Target:
    """A loader.

    Attributes:
        make: Writes valid files into an empty folder.
        load: Reads the folder; what `rankbook.tools.errors.describe` has a sentence for may be raised.
    """

    make: Callable[[Path], object]
    load: Callable[[Path], object]


def _load_checkpoint(folder: Path) -> None:
    from rankbook.calibration.checkpoint.format import load_records, open_checkpoint

    opened = open_checkpoint(folder)
    for name in opened.unquantized():
        opened.tensor(name)
    load_records(folder)


def _inspect(folder: Path, name: str = "") -> None:
    from rankbook.tools.inspect.inspection import inspect

    inspect(folder / name, verify=False)


def _load_exported(folder: Path) -> None:
    from rankbook.exporter.conform import check
    from rankbook.exporter.file import ExportedModel
    from rankbook.tools.inspect.sizes import packed_size

    model = ExportedModel.open(folder / "model.onnx")
    check(model)
    for node in model.packed:
        node.ports()
    packed_size(model)
    _inspect(folder, "model.onnx")
    model.verify()


def _make_model(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = {f"model.layers.{i}.self_attn.q_proj.weight": torch.zeros(8, 8) for i in range(3)}
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(config))


def _make_gguf(folder: Path) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((32, 64), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def _make_engine(folder: Path) -> None:
    from rankbook.calibration.checkpoint.files import sha256_file
    from rankbook.tools.deploy.manifest import Check, EngineReport, EngineSource
    from rankbook.tools.report import to_json

    (folder / "model.engine").write_bytes(b"engine")
    graph = chain_model(folder / "onnx", nodes=1)
    shapes = {"input_ids": ([1, 1], [1, 1], [1, 1])}
    report = EngineReport(
        target="rtx",
        version="1.2",
        source=EngineSource("/gone/onnx/model.onnx", sha256_file(graph), {"rankbook.method": "lcq"}),
        capabilities=("80",),
        engine_bytes=6,
        engine_sha256="0" * 64,
        weights_bytes=1,
        stored_bytes=1,
        constant_bytes={"Int8": 1},
        activation_bytes=1,
        network_layers=1,
        plugin_layers=1,
        layers={"kgen": 1},
        kernels={"decode": {"kernels": 1}},
        step_bytes={"weights": 1},
        inputs=[{"name": "input_ids"}],
        outputs=[{"name": "logits"}],
        profiles={"decode": shapes},
        checks=(Check("names", passed=True, detail=""),),
        self_contained=False,
        plugin_form="library",
        commands={"trtexec": "trtexec"},
        seconds=0.5,
    )
    (folder / "engine.json").write_text(to_json(report))


def _load_engine(folder: Path) -> None:
    from rankbook.tools.deploy.manifest import Manifest

    manifest = Manifest.read(folder)
    _ = manifest.metadata, manifest.needs_library
    _inspect(folder)
    manifest.exported()


def _make_state(folder: Path) -> None:
    from rankbook.calibration.driver.resume import BlockResult, PartialState
    from rankbook.calibration.model.packed_modules import CodebookLinear
    from tests.calibration.records import random_record

    state = PartialState(folder / "out", {"bits": 3, "model": {"hash": "0"}}, resume=False)
    layers = {"a.b": CodebookLinear.from_record(random_record(32, 64, bits=3, group=32, seed=0))}
    state.save(0, BlockResult(layers, {"a.b": 0.1}, {"a.norm": torch.ones(4)}, ["a.b"], []))
    state.save_tokens(torch.ones(2, 4, dtype=torch.int32), "a text")


def _load_state(folder: Path) -> None:
    from rankbook.calibration.driver.resume import PartialState

    state = PartialState(folder / "out", {"bits": 3, "model": {"hash": "0"}}, resume=True)
    state.tokens()
    for index in range(min(state.finished(), 2)):
        state.load(index)


def _make_import(folder: Path, name: str) -> None:
    shutil.copytree(FIXTURES / name, folder, ignore=shutil.ignore_patterns("expected.json"), dirs_exist_ok=True)


def _load_import(folder: Path) -> None:
    """Read every quantized layer of another tool's folder, without a model to put it into."""
    from rankbook.calibration.checkpoint.integrity import read_json
    from rankbook.calibration.imports.base import refusing
    from rankbook.calibration.imports.folder import Stored, check_entry, read_layer
    from rankbook.calibration.imports.formats import format_of

    entry = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(entry, dict):  # the configuration's own class refuses it
        return
    form = format_of(str(folder), entry)
    stored = Stored.of(str(folder), form)
    check_entry(form, entry)
    stored.others()
    for name in stored.layers:
        numbers, _ = read_layer(name, form, stored, entry)
        with refusing("what is stored"):
            numbers.record()


def _load_foreign(folder: Path) -> None:
    from rankbook.calibration.imports.folder import load_folder

    load_folder(str(folder))


def _make_texts(folder: Path) -> None:
    rows = [{"text": "a text"}, {"text": "another", "id": 3}]
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "list.json").write_text(json.dumps(rows))
    (folder / "plain.txt").write_text("a text with words\n" * 20)


def _load_texts(folder: Path) -> None:
    from rankbook.calibration.text import read_text

    for name in ("lines.jsonl", "list.json", "plain.txt"):
        for chat in (False, True):
            with suppress(ValueError):
                deque(read_text(folder / name, chat=chat).rows(), maxlen=0)


def _make_settings(folder: Path) -> None:
    settings = {
        **{"eos_token_id": [1, 2], "stop_strings": ["x"], "bad_words_ids": [[1, 2]], "suppress_tokens": [3]},
        **{"forced_bos_token_id": 1, "forced_eos_token_id": [2], "do_sample": True, "temperature": 0.5, "top_k": 40},
    }
    (folder / "generation_config.json").write_text(json.dumps(settings))


def _load_settings(folder: Path) -> None:
    from rankbook.tools.generation.settings import GenerationSettings, read_settings

    settings = GenerationSettings.of(read_settings(folder), None)
    _ = settings.restricts, settings.advice()


def _make_config(folder: Path) -> None:
    (folder / "run.yaml").write_text("bits: 3\nquantize:\n  method: lcq\n  calib: a.txt\n  group-size: 64\n")
    (folder / "run.toml").write_text('bits = 3\n[quantize]\nmethod = "lcq"\ncalib = "a.txt"\n')


@cache
def _flags() -> dict[str, dict[str, Any]]:
    from rankbook.tools import flags
    from rankbook.tools.commands import discover

    return {name: flags.flags_of(command.options) for name, command in discover().items()}


def _load_config(folder: Path) -> None:
    from rankbook.tools import config

    for name in ("run.yaml", "run.toml"):
        config.select(config.read(folder / name), "quantize", _flags(), name)


def _make_log(folder: Path) -> None:
    lines = [
        "VERBOSE Name: __myl_Move_myl0_1, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [1,8], Datatype: Half }],"
        " Constants: [ { Name: c_myl0_2, Dimensions: [2,8], Datatype: Int8 }],"
        " Outputs: [ { Name: y, Dimensions: [1,8], Datatype: Half }], TacticName: t, StreamId: 0, Metadata: ",
        " Name: x, IOMode: Input, DataType: Float, Dimensions: [-1,64]",
        "[I] [MS] Total Weights Memory: 4096 bytes",
        "[V] Input: input_ids, Dimensions: [1,1]",
    ]
    (folder / "build.log").write_text("\n".join(lines) + "\n")


def _load_log(folder: Path) -> None:
    from rankbook.tools.deploy.engine_log import read

    read(folder / "build.log")


def _make_checkpoint(folder: Path) -> None:
    write(folder / "q", forms=("plain", "8 bits", "fp32 params", "fp16 branch"))  # few: each input reads all


TARGETS = {
    "checkpoint": Target(_make_checkpoint, lambda folder: _load_checkpoint(folder / "q")),
    "inspect-checkpoint": Target(_make_checkpoint, partial(_inspect, name="q")),
    "exported": Target(lambda folder: chain_model(folder, nodes=2), _load_exported),
    "model": Target(_make_model, _inspect),
    "gguf": Target(_make_gguf, partial(_inspect, name="model.gguf")),
    "engine": Target(_make_engine, _load_engine),
    "resume": Target(_make_state, _load_state),
    "config": Target(_make_config, _load_config),
    "texts": Target(_make_texts, _load_texts),
    "generation": Target(_make_settings, _load_settings),
    **{f"import-{name}": Target(partial(_make_import, name=name), _load_import) for name in FOREIGN},
    "import-model": Target(partial(_make_import, name="awq"), _load_foreign),
    "engine-log": Target(_make_log, _load_log),
}
