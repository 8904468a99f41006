"""Which model families are served: tiny random models of each through quantize, reload, export and parity.

    python -m rankbook.tools.dev.families [--families llama,mixtral] [-o build/families]

Each family runs in a child of its own with a time limit. What was found is kept as one JSON file a family, so that a
run of some families updates the table, and docs/families.md is written from all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rankbook.tools.dev.docs import ROOT
from rankbook.tools.dev.family_models import MOST_USED, tiny
from rankbook.tools.dev.family_page import ALL, DEPLOYED, SERVED, Row, changed, document, without_result
from rankbook.tools.errors import CHECK_FAILED, OK, USAGE, CheckFailedError, describe

_WORDS = "the quick brown fox jumps over a lazy dog while seven wizards boil strong tea in old pots".split()
_TOKENS = (2, 24)
_STEPS = 4
"""Tokens that GenAI is given one by one."""
_CLOSE = 1e-4
"""Largest difference of a float32 file in ONNX Runtime, relative to the largest logit."""
_NEW = "new.json"
"""What a child found; the row of a family stays until its run has ended."""


def sweep(family: str, folder: Path, steps: Sequence[str] = SERVED) -> Row:
    """Take one family through all steps in this process; what fails is noted, and ends what depends on it."""
    import torch

    from rankbook.calibration.driver.options import QuantizeOptions
    from rankbook.calibration.driver.run import quantize_model
    from rankbook.calibration.model.source_config import read_config
    from rankbook.exporter.exportable import check_exportable

    torch.set_num_threads(1)
    row, start = Row(family), time.monotonic()

    def said() -> str:
        return check_exportable(read_config(str(source))) if row.errors.get("standard", 0) is None else ""

    source, checkpoint = folder / "model", folder / "checkpoint"
    text = folder / "text.txt"
    text.write_text(" ".join(_WORDS[i * i % len(_WORDS)] for i in range(400)), encoding="utf-8")
    how = QuantizeOptions(
        method="rtn", bits=4, group_size=32, calib=str(text), calib_sequences=4, calib_length=64, allow_partial=True
    )

    def quantized() -> None:
        report = quantize_model(source, checkpoint, how)
        row.packed = 1 - report.totals["blocks"]["float_share"]

    if _step(row, "build", lambda: tiny(family, source)) and _step(row, "quantize", quantized):
        _step(row, "reload", lambda: _reload(row, source, checkpoint))
        with traced_once():
            for name in steps:
                work = {"genai": _genai, "engine": _engine}.get(name, _parity)
                done = row.cannot_export or _step(row, name, functools.partial(work, row, name, checkpoint, folder))
                if not done and name in SERVED:
                    row.cannot_export = said()
    row.seconds = round(time.monotonic() - start, 1)
    return row


@contextlib.contextmanager
def traced_once() -> Iterator[None]:
    """Trace one checkpoint once for all files that differ by the passes alone: tracing is most of an export's time."""
    from rankbook.exporter import export
    from rankbook.exporter.trace import trace

    found: dict[Any, Any] = {}

    def once(skeleton: Any, options: Any) -> Any:
        kind = (skeleton.dtype, options.graph == "static", options.logits, options.inputs, options.sample)
        if kind not in found:
            found[kind] = trace(skeleton, options)
        return found[kind].clone()

    module: Any = export
    module.trace = once
    try:
        yield
    finally:
        module.trace = trace


def _step(row: Row, name: str, work: Callable[[], object]) -> bool:
    """Run a step; return whether it came to its end."""
    try:
        work()
    except Exception as error:  # whatever a family's code raises is what is to be found out
        row.reasons[name] = describe(error)[0].removesuffix("; run again with --debug for the traceback")
        return False
    return True


def _reload(row: Row, source: Path, checkpoint: Path) -> None:
    """Compare a checkpoint with the original model in which every packed weight is the decoded one."""
    import torch

    from rankbook.calibration.checkpoint.format import load_records
    from rankbook.calibration.model.adapter import adapter_of
    from rankbook.calibration.model.loading import load_model

    dense, loaded = (load_model(folder, torch.float32)[0] for folder in (source, checkpoint))
    adapter_of(dense).unify_experts()
    for name, record in load_records(checkpoint).items():
        _put(dense, name, record.weight(with_low_rank=True))
    tokens = torch.arange(_TOKENS[0] * _TOKENS[1]).reshape(_TOKENS) * 5 % 250
    with torch.no_grad():
        want, got = (model(input_ids=tokens, use_cache=False).logits for model in (dense, loaded))
    row.reload = float((got - want).abs().max() / want.abs().max())


def _put(model: Any, name: str, weight: Any) -> None:
    """Give a layer of the original model another weight (N, K), whatever its class."""
    import torch

    from rankbook.calibration.model.experts import layout, matrix_of

    if found := matrix_of(name):
        owner, matrix = found[0].rpartition(".")[::2]
        module = model.get_submodule(owner)
        fused = module._parameters[matrix]
        if hasattr(module, "experts_below"):
            fused = fused.unflatten(0, (module.experts_below, -1))
        fused[found[1]] = weight.T if layout(module)[matrix] else weight
        return
    module = model.get_submodule(name)
    transposed = type(module).__name__ == "Conv1D"
    module.weight = torch.nn.Parameter(weight.T if transposed else weight, requires_grad=False)


def _random() -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, 250, _TOKENS)


def _parity(row: Row, name: str, checkpoint: Path, folder: Path) -> None:
    """Export and compare, without and with a cache."""
    from rankbook.exporter.export import ExportOptions, export
    from rankbook.tools.evaluate import parity
    from rankbook.tools.evaluate.options import ParityOptions
    from rankbook.tools.runtimes.ort import OrtModel
    from rankbook.tools.runtimes.torch import TorchModel

    row.errors[name], row.passed[name] = None, False
    graph = name if name in ("ort", "static") else "standard"
    options = ExportOptions(graph=graph, dtype="fp16" if name == "fp16" else "fp32")
    written = export(checkpoint, folder / name, options)
    row.kept |= written.standard_attention
    model, torch_model = OrtModel(folder / name, threads=1), TorchModel(checkpoint, threads=1)
    report = parity.check(model, torch_model, _random(), ParityOptions(), lambda *_: None)
    row.errors[name] = max(item.error for item in (report.logits, report.cached) if item is not None)
    row.passed[name] = report.passed
    if not report.passed:
        row.reasons[name] = f"parity fails; first at {report.first_bad_layer or report.problems or 'the logits'}"


def _genai(row: Row, name: str, checkpoint: Path, folder: Path) -> None:
    """Compare a prompt and steps in ONNX Runtime GenAI with PyTorch."""
    import numpy as np
    import onnx_ir as ir

    from rankbook.calibration.checkpoint.extras import GENAI_CONFIG
    from rankbook.exporter import genai
    from rankbook.exporter.export import MODEL, ExportOptions
    from rankbook.tools.runtimes.base import Setting
    from rankbook.tools.runtimes.genai import GenAiModel
    from rankbook.tools.runtimes.torch import TorchModel

    row.errors[name], row.passed[name] = None, False
    if not (folder / "ort" / GENAI_CONFIG).is_file():
        raise ValueError(genai.refusal(ir.load(folder / "ort" / MODEL), ExportOptions(graph="ort")))
    tokens = _random()[:1]
    want = TorchModel(checkpoint, threads=1).logits(tokens)[0, -_STEPS - 1 :]
    model = GenAiModel(folder / "ort", Setting(threads=1))
    rows = [model.start(tokens[:, :-_STEPS]), *(model.step(int(token)) for token in tokens[0, -_STEPS:])]
    error = float(np.abs(np.stack(rows) - want).max() / np.abs(want).max())
    row.errors[name], row.passed[name] = error, error <= _CLOSE


def _engine(row: Row, name: str, checkpoint: Path, folder: Path) -> None:
    """Build an engine of TensorRT-RTX, which takes no GPU; so none has run it."""
    from rankbook.exporter.cache_names import PAST
    from rankbook.tools.deploy.engine import build
    from rankbook.tools.deploy.options import BuildOptions
    from rankbook.tools.deploy.step import ATTENTION

    row.passed[name], how = False, ""
    options = BuildOptions(compute_capability=("SM86",), max_sequence=32, max_context=64, no_plugins=True)
    try:
        report = build(checkpoint, folder / name, options)
    except CheckFailedError:  # bodies that it cannot build
        with_plugins = replace(options, no_plugins=False)
        if with_plugins.plugin_library() is None:
            raise
        report, how = build(checkpoint, folder / name, with_plugins), ", with plugins"
    row.passed[name] = report.passed
    if not report.passed:
        row.reasons[name] = "; ".join(f"{check.name}: {check.detail}" for check in report.checks if not check.passed)
    layers = sum(item["name"].startswith(PAST) and item["name"].endswith(".key") for item in report.inputs)
    fused = report.kernels["decode"].get(ATTENTION[0], 0)
    row.engine = "fused" if fused >= layers > 0 else f"{fused} of {layers} fused" if layers else "no attention"
    row.engine += how


def _child(family: str, folder: Path, steps: Sequence[str]) -> None:
    """Write the row of a family; what its code prints goes to a file."""
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _keep(folder, sweep(family, folder, steps), _NEW)


def _keep(folder: Path, row: Row, name: str = "row.json") -> None:
    (folder / name).write_text(json.dumps(asdict(row), indent=1), encoding="utf-8")


def run(families: Sequence[str], folder: Path, limit_s: float, steps: Sequence[str] = SERVED) -> None:
    """Run families one after another, each in a fork of this process: libraries are loaded once."""
    _load()
    for family in families:
        place = folder / family
        before = _read(place / "row.json") if (place / "row.json").is_file() else Row(family)
        (place / _NEW).unlink(missing_ok=True)
        process = multiprocessing.get_context("fork").Process(target=_child, args=(family, place, steps))
        process.start()
        process.join(limit_s)
        if process.is_alive():
            process.kill()
            process.join()
        if (place / _NEW).is_file():
            row = _read(place / _NEW)
            _join(row, before, steps)
        elif process.exitcode == -9:  # of a busy machine, which says nothing of the family: what is known stays
            row = replace(before, reasons={**before.reasons, "run": f"ended after {limit_s:g} s"})
        else:
            row = Row(family, reasons={"run": f"ended with {process.exitcode}"})
        _keep(place, row)
        print(json.dumps(asdict(row)), flush=True)


def _join(row: Row, before: Row, steps: Sequence[str]) -> None:
    """Keep what is known of steps that were not run, of a family that is quantized still."""
    if row.packed is None:
        return
    for name in {*SERVED, *DEPLOYED} - set(steps):
        row.errors |= {name: before.errors[name]} if name in before.errors else {}
        row.passed |= {name: before.passed[name]} if name in before.passed else {}
        row.reasons |= {name: before.reasons[name]} if name in before.reasons else {}
        row.kept = before.kept if name == "ort" else row.kept
        row.engine = before.engine if name == "engine" else row.engine


def _load() -> None:
    """Import what every family needs, the tables of torch's exporter too."""
    import onnxruntime  # noqa: F401
    import torch

    from rankbook.exporter import export  # noqa: F401
    from rankbook.tools.evaluate import parity  # noqa: F401

    torch.set_num_threads(1)
    torch.onnx.export(torch.nn.Linear(4, 4), (torch.zeros(2, 4),), dynamo=True, verbose=False)


def _lacks(folder: Path, steps: Sequence[str]) -> bool:
    """Return whether a family has no result for a step that it can get to."""
    if not (folder / "row.json").is_file():
        return True
    row = _read(folder / "row.json")
    return not row.cannot_export and row.packed is not None and not {*steps} <= {*row.passed}


def _read(path: Path) -> Row:
    return Row(**json.loads(path.read_text(encoding="utf-8")))


def main(argv: Sequence[str] | None = None) -> int:
    """Run families and write the document; 1 where one gives wrong numbers or another result than the table said."""
    parser = argparse.ArgumentParser(prog="python -m rankbook.tools.dev.families", description=__doc__.split("\n")[0])
    parser.add_argument("--families", help="names, separated by commas; all without it, `used` for the most used ones")
    parser.add_argument(
        "--steps",
        default=",".join(SERVED),
        help=f"what to do with a checkpoint, of {','.join((*SERVED, *DEPLOYED))} (default: the exports)",
    )
    parser.add_argument("--missing", action="store_true", help="only families that have no result for one of the steps")
    parser.add_argument("--limit", type=float, default=600, help="seconds for a family (default: 600)")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build" / "families", help="folder for the models")
    args = parser.parse_args(argv)
    asked = {None: ALL, "used": MOST_USED}.get(args.families) or tuple(args.families.split(","))
    if unknown := sorted(set(asked) - set(ALL)):
        print(f"unknown families {', '.join(unknown)}; known are {', '.join(ALL)}", file=sys.stderr)
        return USAGE
    os.environ.update({"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"})
    steps = tuple(args.steps.split(","))
    left = asked if not args.missing else tuple(family for family in asked if _lacks(args.output / family, steps))
    run(left, args.output, args.limit, steps)
    rows = {path.parent.name: _read(path) for path in args.output.glob("*/row.json")}
    page = ROOT / "docs" / "families.md"
    written = page.read_text(encoding="utf-8")
    others = changed(written, {family: rows[family] for family in asked})
    if others:
        print(f"NOTE: another result than {page.name} had: {', '.join(others)}", file=sys.stderr)
    if lost := without_result(written, rows):
        print(
            f"NOTE: {page.name} is not written: {len(lost)} of its families have no result in {args.output}"
            f" ({', '.join(lost[:3])}, ...); run without --families once",
            file=sys.stderr,
        )
    else:
        page.write_text(document(rows), encoding="utf-8")
    return CHECK_FAILED if others or any(rows[family].wrong for family in asked) else OK


if __name__ == "__main__":
    sys.exit(main())
