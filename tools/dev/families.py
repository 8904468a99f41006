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
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rankbook.tools.dev.docs import ROOT
from rankbook.tools.dev.family_models import FAMILIES, FURTHER, MOST_USED, tiny
from rankbook.tools.errors import CHECK_FAILED, OK, USAGE, describe
from rankbook.tools.report import Table

SERVED = ("standard", "ort", "static", "fp16")
"""Exports that are compared with PyTorch: the three graphs in float32, and the standard one in half precision."""
DEPLOYED = ("genai", "engine")
"""What else a checkpoint can be asked for: ONNX Runtime GenAI with the file of ``ort``, compared too, and an engine."""
_WORDS = "the quick brown fox jumps over a lazy dog while seven wizards boil strong tea in old pots".split()
_TOKENS = (2, 24)
_STEPS = 4
"""Tokens that GenAI is given one by one."""
_CLOSE = 1e-4
"""Largest difference of a float32 file in ONNX Runtime, relative to the largest logit."""
_SAME = 1e-5
"""Largest difference after a reload, relative to the largest logit: sums of float32 in another order."""
_REFUSED = "refused"
_ALL = (*FAMILIES, *FURTHER)
_NEW = "new.json"
"""What a child found; the row of a family stays until its run has ended."""


@dataclass
class Row:
    """What one family does.

    Attributes:
        family: Its ``model_type``.
        packed: Share of the weights in the blocks that are packed; None where quantization fails.
        cannot_export: What `quantize` says before it begins.
        reload: Largest relative difference of logits after a reload, from those of the original with decoded weights.
        errors: Largest relative difference of logits, with and without a cache, by export; None where it fails.
        passed: Whether that is within tolerance, by export; of an engine whether it was built.
        kept: Why layers of the export ``ort`` keep the standard attention, by number.
        reasons: Why a step ended, by step.
        seconds: Wall time.
        engine: What the builder made of attention.
    """

    family: str
    packed: float | None = None
    cannot_export: str = ""
    reload: float | None = None
    errors: dict[str, float | None] = field(default_factory=dict)
    passed: dict[str, bool] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    engine: str = ""

    @property
    def wrong(self) -> bool:
        """Whether something was written that computes other numbers: worse than any refusal."""
        stale = self.reload is not None and self.reload > _SAME
        return stale or any(error is not None and not self.passed[name] for name, error in self.errors.items())

    @property
    def served(self) -> bool:
        """Whether the family passes quantize, reload, export and parity on both graphs."""
        return not self.wrong and all(self.passed.get(name) for name in ("standard", "ort"))


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

    row.passed[name] = False
    options = BuildOptions(compute_capability=("SM86",), max_sequence=32, max_context=64, no_plugins=True)
    report = build(checkpoint, folder / name, options)
    row.passed[name] = report.passed
    if not report.passed:
        row.reasons[name] = "; ".join(f"{check.name}: {check.detail}" for check in report.checks if not check.passed)
    layers = sum(item["name"].startswith(PAST) and item["name"].endswith(".key") for item in report.inputs)
    fused = report.kernels["decode"].get(ATTENTION[0], 0)
    row.engine = "fused" if fused >= layers > 0 else f"{fused} of {layers} fused" if layers else "no attention"


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
        else:
            ended = f"ended after {limit_s:g} s" if process.exitcode == -9 else f"ended with {process.exitcode}"
            row = Row(family, reasons={"run": ended})
        _join(row, before, steps)
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


def document(rows: Mapping[str, Row]) -> str:
    """Return docs/families.md."""
    found, listed, further = (
        [rows[family] for family in names if family in rows] for names in (_ALL, FAMILIES, FURTHER)
    )
    wrong = sum(row.wrong for row in found)
    tried = [row for row in found if "static" in row.passed]
    fixed = sum(row.passed["static"] for row in tried)
    missing = [f"`{family}`" for family in _ALL if family not in rows]
    said = sum(bool(row.cannot_export or "quantize" in row.reasons) for row in found)
    columns = ("family", "packed", "reload", *SERVED, *DEPLOYED, "why not")
    lines = [
        "# Model families",
        "<!-- Made by `python -m rankbook.tools.dev.families`. -->",
        "The decoder families of transformers, each tried as a tiny random model (two blocks, 64 features, 4 experts of"
        " which 2 are used, attention windows shorter than the sequence), quantized with RTN at 4 bits in groups of 32."
        " *Packed* is the share of the blocks' weights that is quantized. *Reload* says whether the loaded checkpoint"
        " gives the logits of the original model with the decoded weights. The next five columns are differences of"
        " logits between PyTorch and ONNX Runtime, relative to the largest logit, with or without a cache, whichever is"
        " larger: `export`, `export --graph ort`, `export --graph static`, `export --dtype fp16`, and the file of"
        " `--graph ort` in ONNX Runtime GenAI. *Engine* is `rankbook build` (the static graph in fp16) for SM86 without"
        " plugins, built by TensorRT-RTX and not run on a GPU yet: *fused* means one fused attention kernel for every"
        " layer with keys and values, and caches written in place. `*`: some layers keep the standard attention,"
        " because ONNX Runtime's operator cannot express theirs. `-`: not measured.",
        f"Of the {len(listed)} families of a list that was made beforehand {sum(row.served for row in listed)} pass"
        " quantization, reload, export and parity on the graphs `standard` and `ort`; of"
        f" {len(further)} more, tried later, {sum(row.served for row in further)} do. Of {len(tried)} families tried on"
        f" the graph `static`, {fixed} pass. {said} are refused by `quantize`, or it says at once that they cannot be"
        f" exported; {wrong} give wrong numbers; the last column has the reasons.",
        *([f"Not run: {', '.join(missing)}."] if missing else []),
        Table("", columns, [_cells(row) for row in found]).markdown(),
    ]
    return "\n\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    packed = "-" if row.packed is None else f"{row.packed:.0%}"
    reload = "-" if row.reload is None else "same" if row.reload <= _SAME else f"**{row.reload:.0e}**"
    exports = [_verdict(row, name) for name in (*SERVED, *DEPLOYED)]
    own = [f"{name}: {row.reasons[name]}" for name in DEPLOYED if name in row.reasons]
    others = [reason for name, reason in row.reasons.items() if name not in DEPLOYED]
    why = dict.fromkeys([row.cannot_export] if row.cannot_export else [*others, *own])
    return f"`{row.family}`", packed, reload, *exports, "; ".join(why).replace("|", "\\|").replace("\n", " ")


def _verdict(row: Row, name: str) -> str:
    error = row.errors.get(name)
    if error is None and row.passed.get(name):
        return row.engine or "built"
    if error is None:
        return "-" if name not in row.passed and (name in DEPLOYED or not row.cannot_export) else _REFUSED
    mark = " *" if row.kept and name == "ort" else ""
    return f"{error:.0e}{mark}" if row.passed[name] else f"**{error:.0e}**"


def without_result(page: str, rows: Collection[str]) -> list[str]:
    """Return the families of a written document that ``rows`` would leave out."""
    return [family for family in re.findall(r"^\| `([^`]+)`", page, re.MULTILINE) if family not in rows]


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
    asked = {None: _ALL, "used": MOST_USED}.get(args.families) or tuple(args.families.split(","))
    if unknown := sorted(set(asked) - set(_ALL)):
        print(f"unknown families {', '.join(unknown)}; known are {', '.join(_ALL)}", file=sys.stderr)
        return USAGE
    os.environ.update({"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"})
    steps = tuple(args.steps.split(","))
    left = asked if not args.missing else tuple(family for family in asked if _lacks(args.output / family, steps))
    run(left, args.output, args.limit, steps)
    rows = {path.parent.name: _read(path) for path in args.output.glob("*/row.json")}
    page = ROOT / "docs" / "families.md"
    if lost := without_result(page.read_text(encoding="utf-8"), rows):
        print(
            f"NOTE: {page.name} is not written: {len(lost)} of its families have no result in {args.output}"
            f" ({', '.join(lost[:3])}, ...); run without --families once",
            file=sys.stderr,
        )
    else:
        page.write_text(document(rows), encoding="utf-8")
    return CHECK_FAILED if any(rows[family].wrong for family in asked) else OK


if __name__ == "__main__":
    sys.exit(main())
