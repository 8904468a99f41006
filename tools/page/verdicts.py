"""The sections of the page on what was measured and checked: speed, parity, the environment, and commands."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rankbook.calibration.source import Kind
from rankbook.tools.evaluate.engine_parity import EngineParityReport
from rankbook.tools.evaluate.parity import ParityReport
from rankbook.tools.page.documents import DemoReport, DeviceSpeeds, Evaluation, LayerSpeeds, ModelSpeeds, TaskScores
from rankbook.tools.page.runs import Collection, Part, Report, Run
from rankbook.tools.page.sections import Bar, Bars, Code, Section, share
from rankbook.tools.report import Table

_VERBS = {Kind.CHECKPOINT: ("quantize", "import"), Kind.ONNX: ("export",), Kind.ENGINE: ("build",)}
_LARGEST_CONFIGURATION = 1 << 20


def speed(given: Collection) -> Section:
    """Tokens per second by runtime."""
    section = Section("Speed", "Tokens per second of one text, medians over interleaved turns; longer is faster.")
    for report in given.shared:
        content, where = report.content, f"{report.path}"
        if isinstance(content, ModelSpeeds):
            for what in ("decode", "prefill"):
                rows = [(item.name, item.kernels, getattr(item, what)) for item in content.models]
                section.blocks += _bars(f"{what}, {where}", _lettered(given, report, rows))
        elif isinstance(content, DeviceSpeeds):
            for what, cells in (("decode", content.decode), ("prefill", content.prefill)):
                for tokens, batch in sorted({(cell.tokens, cell.batch) for cell in cells}):
                    same = [cell for cell in cells if (cell.tokens, cell.batch) == (tokens, batch)]
                    rows = [(cell.name, cell.contender, cell.tokens_per_second) for cell in same]
                    title = f"{what}, {tokens} tokens, batch {batch}, {where}"
                    section.blocks += _bars(title, _lettered(given, report, rows))
            section.missing += [f"{where}: {item.name}: {item.reason}" for item in content.missing]
        elif isinstance(content, LayerSpeeds):
            columns = ("layer", "N x K", "tokens", "threads", "µs", "GB/s", "peer", "times as fast")
            section.blocks.append(Table(f"single layers, {where}", columns, [_layer(item) for item in content.layers]))
    if not section.blocks:
        section.missing.append("no measurement was given; `rankbook bench MODEL... -o bench` makes one")
    return section


def _layer(item: Any) -> tuple[object, ...]:
    shape = f"{item.out_features} x {item.in_features}"
    rates = (item.microseconds, item.gigabytes_per_second, item.peer, item.ratio)
    return (item.name, shape, item.tokens, item.threads, *rates)


def _lettered(
    given: Collection, report: Report, rows: Iterable[tuple[str, str, float | None]]
) -> Iterator[tuple[str, float]]:
    """Yield labels with the letter of the run that a measured model belongs to."""
    for name, kernels, rate in rows:
        if rate is not None:
            path = name.rpartition("@")[0] or name.partition("=")[2] or name
            run = given.run_of(path, report.path)
            yield f"{f'{run.letter}: ' if run else ''}{name} ({kernels})", rate


def _bars(title: str, rows: Iterable[tuple[str, float]]) -> list[Bars]:
    bars = [
        Bar(label, [("", rate, 0)], f"{rate:,.1f} tokens/s")
        if math.isfinite(rate) and rate >= 0
        else Bar(label, [], "no number of tokens/s")
        for label, rate in rows
    ]
    return [Bars(title, bars)] if bars else []


def parity(given: Collection) -> Section:
    """Verdicts of parity, and the checks of engines."""
    section = Section(
        "Parity", "Whether the file computes what the checkpoint computes, and the engine what the file does."
    )
    rows = [row for run in given.runs for report in run.reports for row in _verdicts(run, report)]
    columns = ("run", "what", "compared with", "largest error", "of the tolerance", "same likeliest token", "verdict")
    section.blocks += [Table("", columns, rows)] if rows else []
    for run in given.runs:
        section.missing += [
            f"{run.letter}: {problem}"
            for report in run.reports
            if isinstance(report.content, (ParityReport, EngineParityReport))
            for problem in _problems(report.content)
        ]
        for part in run.of(Kind.ENGINE):
            checks = part.found.facts["checks"]
            rows = [(item["name"], _mark(item["passed"]), item["detail"]) for item in checks]
            section.blocks.append(Table(f"{run.letter}: checks of {part.path}", ("check", "verdict", "detail"), rows))
        checked = any(isinstance(report.content, (ParityReport, EngineParityReport)) for report in run.reports)
        if (run.of(Kind.ONNX) or run.of(Kind.ENGINE)) and not checked:
            model = (run.of(Kind.ONNX) or run.of(Kind.ENGINE))[0].path
            section.missing.append(f"{run.letter}: not compared; `rankbook parity {model} -o parity.json` does it")
    if not section.blocks and not section.missing:
        section.missing.append("nothing was exported, so that there is nothing to compare")
    return section


def _verdicts(run: Run, report: Report) -> Iterator[tuple[object, ...]]:
    content = report.content
    if isinstance(content, ParityReport):
        with_what = f"PyTorch, {content.checkpoint}"
        for what, item in (("logits", content.logits), ("cached decoding", content.cached)):
            if item is not None:
                top1 = share(content.top1_agreement) if what == "logits" else None
                label = f"{what} of {content.model}" + (f" ({content.kernels})" if content.kernels else "")
                yield run.letter, label, with_what, item.error, content.tolerance, top1, _mark(item.passed)
        yield from _greedy(run, content, with_what)
        yield run.letter, f"everything: {report.path}", "", None, content.tolerance, None, _mark(content.passed)
    elif isinstance(content, EngineParityReport):
        for reference in content.references:
            for what, item in (("logits", reference.logits), ("cached decoding", reference.cached)):
                top1 = share(reference.top1_agreement) if what == "logits" else None
                label = f"{what} of {content.engine} ({content.runtime})"
                yield run.letter, label, reference.reference, item.error, content.tolerance, top1, _mark(item.passed)
        yield from _greedy(run, content, content.model)
        yield run.letter, f"everything: {report.path}", "", None, content.tolerance, None, _mark(content.passed)


def _greedy(run: Run, content: ParityReport | EngineParityReport, with_what: str) -> Iterator[tuple[object, ...]]:
    if content.greedy:
        same, tokens = sum(item.same for item in content.greedy), sum(item.tokens for item in content.greedy)
        passed = all(item.passed for item in content.greedy)
        yield (
            run.letter,
            f"greedy tokens, {len(content.greedy)} prompts",
            with_what,
            None,
            None,
            f"{same} of {tokens}",
            _mark(passed),
        )


def _problems(content: ParityReport | EngineParityReport) -> Iterator[str]:
    """Yield what a report says beside its numbers."""
    if isinstance(content, ParityReport):
        yield from (f"structure of {content.model}: {problem}" for problem in content.problems)
        bad = [f"{item.op_type} {item.node}" for item in content.operators if not item.passed]
        yield from (f"{name} differs from the numpy reference" for name in bad)
    else:
        yield from (f"{content.engine} was not compared with {reason}" for reason in content.missing)
    if content.first_bad_layer is not None:
        yield f"the first layer out of tolerance is {content.first_bad_layer}"


def _mark(passed: bool) -> str:
    return "ok" if passed else "FAILED"


def environment(given: Collection) -> Section:
    """Versions and machines, as runs wrote them down."""
    section = Section("Environment", "Versions and machines as each step wrote them down.")
    rows = [(run.letter, *row) for run in given.runs for part in run.parts for row in _versions(part)]
    for report in given.shared:
        if isinstance(report.content, (ModelSpeeds, LayerSpeeds, DeviceSpeeds)):
            machine = report.content.machine.items()
            rows += [
                ("", f"machine of {report.path}", key, _text(value)) for key, value in machine if value is not None
            ]
    section.blocks += [Table("", ("run", "where", "what", "value"), rows)] if rows else []
    section.missing += [
        f"{run.letter}: no folder was given, which would name versions" for run in given.runs if not run.parts
    ]
    return section


def _versions(part: Part) -> Iterator[tuple[str, str, str]]:
    facts = part.found.facts
    where = str(part.path)
    if part.kind is Kind.CHECKPOINT:
        for key in ("versions", "source", "calibration", "run"):
            held = facts.get(key, {})
            items = held.items() if isinstance(held, Mapping) else [("", held)]
            for name, value in items:
                yield where, f"{key} {name}".strip().replace("versions ", ""), _text(value)
    elif part.kind is Kind.ONNX:
        known = ("versions", "dtype", "dialect", "graph", "kv", "logits", "activations", "context", "max_context")
        properties = facts["metadata"]
        yield from (
            (where, key, _text(properties[f"rankbook.{key}"])) for key in known if f"rankbook.{key}" in properties
        )
        yield where, "opset", _text(facts["opset"])
    else:
        yield where, f"TensorRT ({facts['target']})", _text(facts["version"])
        yield where, "GPUs", ", ".join(map(str, facts["capabilities"]))


def _text(value: object) -> str:
    """Return a value as text; of a structure what it holds."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def commands(given: Collection) -> Section:
    """What to type to get the same again."""
    section = Section("Commands", "What was run, as far as it was written down; each repeats its step.")
    for run in given.runs:
        for part in run.parts:
            section.blocks += _configurations(run, part, section)
        lines = [line for report in run.reports if (line := _command(report))]
        section.blocks += [Code(f"{run.letter}: reports", "\n".join(lines))] if lines else []
    for report in given.shared:
        if isinstance(report.content, DemoReport):
            stages = report.content.stages
            section.blocks.append(Code(f"stages of {report.path}", "\n".join(stage.command for stage in stages)))
            rows = [(s.name, s.seconds, f"{s.peak_rss_bytes / 1e9:.2f}", _mark(s.passed)) for s in stages]
            section.blocks.append(Table("", ("stage", "seconds", "peak memory, GB", "verdict"), rows))
            section.missing += [report.content.note] if report.content.note else []
    return section


def _configurations(run: Run, part: Part, section: Section) -> Iterator[Code]:
    files = [(verb, part.folder / f"rankbook-{verb}.yaml") for verb in _VERBS[part.kind]]
    held = [(verb, file) for verb, file in files if file.is_file() and file.stat().st_size <= _LARGEST_CONFIGURATION]
    for verb, file in held:
        text = file.read_text(encoding="utf-8", errors="replace")
        yield Code(f"{run.letter}: rankbook {verb} --config {file}", text, folded=True)
    if not held:
        section.missing.append(f"{run.letter}: {part.folder} holds no {' or '.join(file.name for _, file in files)}")
    for tool, command in (part.found.facts.get("commands") or {}).items():
        yield Code(f"{run.letter}: the same engine by {tool}", str(command), folded=True)


def _command(report: Report) -> str:
    """Return the command that made a report, from what it says about itself."""
    content = report.content
    if isinstance(content, (Evaluation, TaskScores)):
        return content.command
    if isinstance(content, ParityReport):
        return _typed(["rankbook", "parity", content.model, "--checkpoint", content.checkpoint])
    if isinstance(content, EngineParityReport):
        return _typed(["rankbook", "parity", content.model, content.engine])
    return ""


def _typed(words: Iterable[object]) -> str:
    import shlex

    return shlex.join(map(str, words))
