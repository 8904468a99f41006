"""How every method is run in tests: its flags, by its name and what is special about the run."""

from __future__ import annotations

SHORT: list[object] = ["--method-option", "steps=2", "compute=float32"]
RUNS: dict[str, list[object]] = {
    "lrq": ["--rank", 4, *SHORT],
    "lrq-symmetric-channel": ["--weight-format", "symmetric", "--group-size", "channel", *SHORT],
    "lrq-branch": ["--error-branch", "qera", "--error-rank", 4, "--branch-passes", 2, *SHORT],
    "lrq-compat": [*SHORT, "compat=true"],
    "lrq-full": [*SHORT, "full_rank=true"],
    "flexround": SHORT,
    "gptq": ["--clip-search", "--method-option", "act_order=false"],
    "awq": [],
    "smoothquant": ["--scale-strength", 0.7],
    "omniquant": SHORT,
    "lcq": ["--scale-inputs", "awq", *SHORT],
    "rtn": ["--weight-format", "mxint"],
    "lqer": ["--branch-passes", 2, "--error-rank", 4],
}
