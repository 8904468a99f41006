"""Draws tokens per second against stored bits."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rankbook.tools.bench.model_bench import ModelResult


def unavailable() -> str | None:
    """Return why nothing can be drawn, or None."""
    return None if find_spec("matplotlib") else "matplotlib is not installed: pip install 'rankbook[bench]'"


def draw(results: Sequence[ModelResult], path: Path) -> None:
    """Write a PNG: one point for each model whose stored bits are known."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for result in results:
        if result.bits is not None:
            axes.plot(result.bits, result.decode, "o")
            axes.annotate(result.name, (result.bits, result.decode), textcoords="offset points", xytext=(5, 5))
    axes.set_xlabel("stored bits per weight of packed layers")
    axes.set_ylabel("decoded tokens/s")
    axes.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
