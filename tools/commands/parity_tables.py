"""What `rankbook parity` prints of its reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rankbook.tools.report import Table

if TYPE_CHECKING:
    from rankbook.tools.evaluate.engine_parity import EngineParityReport
    from rankbook.tools.evaluate.node_checks import LayerCheck
    from rankbook.tools.evaluate.parity import ParityReport


def of_file(report: ParityReport) -> list[Table]:
    """Tables of the comparison of a file with its checkpoint."""
    whole = [
        (what, item.error, item.mean_error, _mark(item.passed))
        for what, item in (("logits", report.logits), ("logits, cached decoding", report.cached))
        if item is not None
    ]
    kinds = [
        (item.op_type, f"{item.shape[0]} x {item.shape[1]}", item.nodes, item.error, _mark(item.passed))
        for item in report.operators
    ]
    columns = ("operator", "N x K", "nodes", "error", "verdict")
    tables = [Table("torch and the exported file", ("what", "max error", "mean error", "verdict"), whole)]
    if kinds:
        tables.append(Table("the exported file and the numpy reference", columns, kinds))
    tables += _growth(report.layers)
    if report.greedy:
        prompts = [
            (item.prompt, f"{item.same} of {item.tokens}", _of(item.generated, item.tokens), _mark(item.passed))
            for item in report.greedy
        ]
        heads = ("prompt", "both runtimes", "transformers' generate", "verdict")
        tables.append(Table("greedy tokens that agree", heads, prompts))
    return tables


def _of(part: int | None, whole: int) -> str:
    return "not compared" if part is None else f"{part} of {whole}"


def _growth(layers: Sequence[LayerCheck], most: int = 12) -> list[Table]:
    """A few layers evenly over the depth, and the first bad ones; the JSON report has all."""
    step = max(1, len(layers) // most)
    bad = [index for index, layer in enumerate(layers) if not layer.passed][:3]
    shown = sorted({*range(0, len(layers), step), *bad, len(layers) - 1} if layers else set())
    rows = [(layers[index].name, layers[index].error, _mark(layers[index].passed)) for index in shown]
    title = f"growth of the error over {len(layers)} layers"
    return [Table(title, ("layer", "error", "verdict"), rows)] if rows else []


def _mark(passed: bool) -> str:
    return "ok" if passed else "FAILED"


def verdict_of_file(report: ParityReport) -> str:
    """Lines below them."""
    lines = [f"structure: {problem}" for problem in report.problems]
    if report.top1_agreement is not None:
        lines.append(f"the most likely token is the same at {100 * report.top1_agreement:.1f} % of the positions")
    if report.first_bad_layer is not None and report.own_error is not None:
        own = report.own_error > report.tolerance
        where = "the layer itself is wrong" if own else "its input is already wrong: look before it"
        lines.append(
            f"first layer out of tolerance: {report.first_bad_layer}; {where} (own error {report.own_error:.2g})"
        )
    lines.append(f"{'parity' if report.passed else 'NO PARITY'} at tolerance {report.tolerance:g}")
    return "\n".join(lines)


def of_engine(report: EngineParityReport) -> list[Table]:
    """Tables of the comparison of an engine."""
    rows = [
        (item.reference, what, one.error, one.mean_error, _mark(one.passed))
        for item in report.references
        for what, one in (("logits", item.logits), ("cached decoding", item.cached))
    ]
    columns = ("compared with", "what", "max error", "mean error", "verdict")
    tables = [Table(f"{report.runtime}: {report.engine}", columns, rows), *_growth(report.layers)]
    if report.greedy:
        prompts = [(item.prompt, f"{item.same} of {item.tokens}", _mark(item.passed)) for item in report.greedy]
        tables.append(Table("greedy tokens that agree", ("prompt", "both runtimes", "verdict"), prompts))
    return tables


def verdict_of_engine(report: EngineParityReport) -> str:
    """Lines below them."""
    lines = [f"not compared with {reason}" for reason in report.missing]
    share = min(item.top1_agreement for item in report.references)
    lines.append(f"the most likely token is the same at {100 * share:.1f} % of the positions")
    if report.first_bad_layer is not None:
        lines.append(f"first layer out of tolerance: {report.first_bad_layer}")
    elif report.layers:
        lines.append("every packed layer is within tolerance: look behind the last of them")
    if report.results is not None:
        lines.append(f"all outputs: {report.results} (polygraphy's RunResults)")
    lines.append(f"{'parity' if report.passed else 'NO PARITY'} at tolerance {report.tolerance:g}")
    return "\n".join(lines)
