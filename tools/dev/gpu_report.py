"""What the CUDA kernels do on the GPU of this machine: ``make gpu-report``.

Builds them for its architecture, compares them with their definition, looks for bits that change from turn to turn,
times them, quantizes, evaluates and builds a small model, and writes ``docs/gpu/<name>.md`` and ``.json``. It needs
nvcc, torch, numpy, onnx and pytest; a part that needs more says what is missing. At most eight minutes.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rankbook.calibration.checkpoint.files import write_text_atomic
from rankbook.tools import child
from rankbook.tools.dev import kernel_library
from rankbook.tools.dev.gpu_parts import PARTS, Request
from rankbook.tools.errors import CheckFailedError, CommandError, MissingError
from rankbook.tools.report import Table, cell, to_json

FOLDER = kernel_library.ROOT / "docs" / "gpu"
WORK = kernel_library.ROOT / "build" / "gpu-report"
"""Where a run keeps the checkpoint, the engine and its log."""
SECONDS = 8 * 60.0
"""What all parts may take together."""
_LEAST_SECONDS = 10.0
"""A part that would get less is left out."""

Answer = dict[str, Any]
"""Of a part, see `rankbook.tools.dev.gpu_parts.answer`."""


@dataclass
class Report:
    """What was found.

    Attributes:
        parts: Answer of each part by its name, in the order of `PARTS`.
        seconds: Wall time of each part that ran.
    """

    parts: dict[str, Answer] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def found(self, name: str) -> dict[str, Any]:
        """Return what a part found, nothing if it did not end well."""
        return dict(self.parts.get(name, {}).get("found", {}))

    @property
    def timings(self) -> list[dict[str, Any]]:
        """Entries of the part ``speed`` with their comparison, see `compared`."""
        return compared(self.found("speed").get("timings", []), self.found("prediction").get("predictions", []))

    @property
    def wrong(self) -> list[str]:
        """What is not as it should be: parts that broke, and findings."""
        broken = [f"{name}: {answer['failed']}" for name, answer in self.parts.items() if "failed" in answer]
        return broken + [f"{name}: {each}" for name in self.parts for each in self.found(name).get("wrong", ())]

    @property
    def left_out(self) -> list[str]:
        """What did not run, with the reason."""
        missing = [f"{name}: {answer['missing']}" for name, answer in self.parts.items() if "missing" in answer]
        return missing + [f"{name}: {each}" for name in self.parts for each in self.found(name).get("left_out", ())]

    def to_json(self) -> dict[str, Any]:
        """Return everything, each timing once, with its comparison."""
        inside = {"timings", "predictions"}
        parts = {
            name: {**answer, "found": {key: value for key, value in self.found(name).items() if key not in inside}}
            for name, answer in self.parts.items()
        }
        told = {"wrong": self.wrong, "left_out": self.left_out, "parts": parts, "seconds": self.seconds}
        return {**told, "timings": self.timings}


def run(
    model: str = "",
    seconds: float = SECONDS,
    part: Callable[[Request], Answer] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Report:
    """Run all parts.

    Args:
        model: Source to quantize; empty: the demo's.
        seconds: For all of them.
        part: Runs one; `run_part` when None.
        clock: Returns seconds.

    Raises:
        MissingError: There is no GPU, or no compiler for the kernels.
        CheckFailedError: There is a GPU that does not answer.
    """
    shutil.rmtree(WORK, ignore_errors=True)  # nothing of an earlier run is taken for one of this
    report, end = Report(), clock() + seconds
    request = Request("", 0.0, str(WORK), model=model)
    for name, about in PARTS.items():
        start = clock()
        limit = min(about.seconds, end - start)
        print(f"{name} ...", file=sys.stderr, flush=True)
        if about.kernels and not request.library:
            answer: Answer = {"missing": "the library of the kernels could not be built"}
        elif limit < _LEAST_SECONDS:
            answer = {"missing": f"the {seconds / 60:.0f} minutes of the report were over"}
        else:
            answer = (part or run_part)(replace(request, part=name, seconds=limit))
            report.seconds[name] = clock() - start
        report.parts[name] = answer
        request = _learned(request, name, answer)
    return report


def _learned(request: Request, name: str, answer: Answer) -> Request:
    """Return the request for later parts after one has answered."""
    found = answer.get("found")
    if name in ("machine", "build") and "missing" in answer:
        raise MissingError(f"nothing to report on: {answer['missing']}")
    if name == "machine" and found is None:
        raise CheckFailedError(f"the GPU does not answer: {answer['failed']}")
    if found is None:
        return request
    if name == "machine":
        return replace(request, gpu=found["gpu"], architecture=found["architecture"])
    if name == "build":
        return replace(request, library=found["library"])
    return replace(request, timings=tuple(found["timings"])) if name == "speed" else request


def run_part(request: Request, module: str = "rankbook.tools.dev.gpu_parts") -> Answer:
    """Run a part in a child process."""
    folder = Path(request.folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = child.run_module(module, request=asdict(request), log=folder / "log")
    if done.code == -signal.SIGALRM:
        return {"failed": f"not at its end after {request.seconds:.3g} s, and was ended"}
    if done.report is None:
        return {"failed": f"its process ended with {done.code}: {done.message or 'no message'}"}
    return dict(done.report)


def compared(timings: Sequence[Mapping[str, Any]], predictions: Sequence[float | None]) -> list[dict[str, Any]]:
    """Return the timings with what they are compared with.

    ``predicted_seconds`` and ``times_predicted`` (measured over predicted), ``times_torch`` (how many times as fast as
    PyTorch's fp16 product of that shape), ``share_of_copy`` (bytes of the weight over time, as a share of what a copy
    moves): None where there is nothing to compare with.
    """
    key = ("rows", "columns", "tokens")
    torch = {tuple(item[name] for name in key): item["seconds"] for item in timings if item["what"] == "torch"}
    copy = {(item["rows"], item["columns"]): item["gb_per_s"] for item in timings if item["what"] == "copy"}
    expected = [*predictions, *[None] * (len(timings) - len(predictions))]
    found = []
    for item, predicted in zip(timings, expected, strict=True):
        own, rate = torch.get(tuple(item[name] for name in key)), copy.get((item["rows"], item["columns"]))
        ratios = {
            "predicted_seconds": predicted,
            "times_predicted": item["seconds"] / predicted if predicted else None,
            "times_torch": own / item["seconds"] if own else None,
            "share_of_copy": item["gb_per_s"] / rate if rate else None,
        }
        found.append({**item, **ratios})
    return found


def markdown(report: Report) -> str:
    """Return the report for people."""
    machine = report.found("machine")
    lines = [f"# {machine['gpu']}", "", "Written by `make gpu-report`; the JSON beside it holds every number.", ""]
    lines += [f"- {name.replace('_', ' ')}: {cell(value)}" for name, value in machine.items() if name != "gpu"]
    lines += ["", "## Verdict", ""]
    lines += [f"- **wrong**: {_line(text)}" for text in report.wrong] or ["Everything that ran is right."]
    lines += ["", *[f"- **did not run**: {_line(text)}" for text in report.left_out]]
    rows = [(name, report.seconds.get(name), _told(report.found(name))) for name in report.parts if name != "machine"]
    lines += ["", Table("", ("part", "seconds", "found"), rows).markdown(), ""]
    for shape in dict.fromkeys((item["rows"], item["columns"]) for item in report.timings):
        lines += _shape([item for item in report.timings if (item["rows"], item["columns"]) == shape], *shape)
    return "\n".join(lines)


def _line(text: str) -> str:
    return " ".join(text.split())[-500:]


def _told(found: Mapping[str, Any]) -> str:
    told = {name: value for name, value in found.items() if not isinstance(value, (list, tuple, dict)) and value != ""}
    return _line("; ".join(f"{name.replace('_', ' ')}: {cell(value)}" for name, value in told.items()))


def _shape(timings: Sequence[Mapping[str, Any]], rows: int, columns: int) -> list[str]:
    """Return the tables of one shape: microseconds, and how they stand to the prediction."""
    copies = [item["gb_per_s"] for item in timings if item["what"] == "copy"]
    counts = sorted({item["tokens"] for item in timings if item["tokens"]})
    forms: dict[str, dict[int, Mapping[str, Any]]] = {}
    for item in timings:
        if item["what"] != "copy":
            forms.setdefault(_form(item), {})[item["tokens"]] = item
    heads = tuple(f"M = {count}" for count in counts)
    lines = [
        f"## {rows} x {columns}",
        "",
        f"A copy within the memory moves {cell(*copies)} GB/s, read and written.",
        "",
    ]
    lines += ["Microseconds of a product in a CUDA graph, weights not in a cache (times as fast as torch in fp16):", ""]
    times = [
        (form, *(_cell(row.get(count), _microseconds) for count in counts), _cell(row.get(1), _share))
        for form, row in forms.items()
    ]
    lines += [Table("", ("", *heads, "share of the copy, M = 1"), times).markdown(), ""]
    against = [
        (form, *(_cell(row.get(count), _against) for count in counts))
        for form, row in forms.items()
        if any(item["times_predicted"] for item in row.values())
    ]
    if against:
        lines += ["Measured over predicted (`tools/dev/layer_time.py`), in parentheses the predicted microseconds:", ""]
        lines += [Table("", ("", *heads), against).markdown(), ""]
    return lines


def _form(item: Mapping[str, Any]) -> str:
    if item["what"] == "torch":
        return "torch, fp16"
    branch = f", branch of rank {item['branch_rank']}" if item["branch_rank"] else ""
    return f"{item['bits']} bits, planes {item['planes']}{branch}{', int8' if item['int8'] else ''}"


def _cell(item: Mapping[str, Any] | None, text: Callable[[Mapping[str, Any]], str]) -> str:
    return "" if item is None else text(item)


def _microseconds(item: Mapping[str, Any]) -> str:
    faster = f" ({item['times_torch']:.1f})" if item["what"] == "packed" and item["times_torch"] else ""
    return f"{1e6 * item['seconds']:.1f}{faster}"


def _share(item: Mapping[str, Any]) -> str:
    return f"{item['share_of_copy']:.0%}" if item["share_of_copy"] else ""


def _against(item: Mapping[str, Any]) -> str:
    ratio = item["times_predicted"]
    return f"{ratio:.2f} ({1e6 * item['predicted_seconds']:.1f})" if ratio else ""


def write(report: Report, folder: Path) -> Path:
    """Write both files, named for the GPU; return that for people."""
    stem = re.sub(r"[^a-z0-9]+", "-", report.found("machine")["gpu"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.md"
    for target, text in ((path.with_suffix(".json"), to_json(report.to_json()) + "\n"), (path, markdown(report))):
        write_text_atomic(target, text.replace(f"{kernel_library.ROOT}/", ""))  # a report may be published
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; return the exit code: 1 where something is wrong, 3 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m rankbook.tools.dev.gpu_report", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR", help="folder of the report")
    parser.add_argument("--model", default="", metavar="MODEL", help="quantize this one instead of the demo's")
    parser.add_argument(
        "--compile", type=int, metavar="SM", help="only compile the kernels, e.g. for 90, to copy them to such a GPU"
    )
    options = parser.parse_args(arguments)
    try:
        if options.compile is not None:
            print(kernel_library.build(options.compile, native=None))
            return 0
        report = run(options.model)
    except CommandError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    path = write(report, options.output)
    for text in (*report.wrong, *(f"did not run: {text}" for text in report.left_out)):
        print(_line(text), file=sys.stderr)
    print(path)
    return int(bool(report.wrong))


if __name__ == "__main__":
    sys.exit(main())
