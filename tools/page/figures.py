"""Pictures as SVG for a page: their colours are those of the page's style, light or dark, and their text is text.

Drawn by matplotlib with placeholders for colours, which become CSS variables; what matplotlib writes around the
picture (document type, metadata, names of groups) is left out.
"""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from rankbook.tools.page.layers import Codebooks, Spectrum, thinned

SERIES = 8
"""Colours of series, ``--s0`` ... of the style."""
_SIZE = (4.6, 3.1)
"""Inches; a phone shows one picture in its width, a desk several beside each other."""
_INK, _GRID, _PAPER = "#fe0001", "#fe0002", "#fe0003"
_COLOURS = {_INK: "currentColor", _GRID: "var(--line)", _PAPER: "var(--card)"} | {
    f"#fd00{index:02x}": f"var(--s{index})" for index in range(SERIES)
}
_LONGEST = 28
"""Letters of a name in a legend."""
Points = Sequence[tuple[float, float]]


def unavailable() -> str | None:
    """Return why nothing can be drawn, or None."""
    return None if find_spec("matplotlib") else "matplotlib is not installed: pip install 'rankbook[report]'"


def _series(index: int) -> str:
    return f"#fd00{index % SERIES:02x}"


def draw(paint: Callable[[Any], None], size: tuple[float, float] = _SIZE) -> str:
    """Return what ``paint`` draws on a figure of matplotlib, as an SVG element."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: Any = {
        **{"svg.fonttype": "none", "svg.hashsalt": "rankbook", "font.size": 9, "text.parse_math": False},
        **{"text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _GRID, "grid.color": _GRID},
        **{"xtick.color": _INK, "ytick.color": _INK, "axes.grid": True, "grid.linewidth": 0.6},
        **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8},
        **{"font.family": ["sans-serif"], "axes.axisbelow": True},
    }
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser's font has it
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return _inline(written.getvalue())


def _inline(svg: str) -> str:
    """Turn a file of matplotlib into an element of a page."""
    svg = svg[svg.index("<svg") :]
    for pattern in (r"<!--.*?-->", r"<metadata>.*?</metadata>", r"<style.*?</style>", r' xmlns(:\w+)?="[^"]*"'):
        svg = re.sub(pattern, "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    svg = re.sub(r' (width|height)="[^"]*pt"', "", svg, count=2)
    svg = svg.replace("<svg", '<svg role="img"', 1)
    for placeholder, colour in _COLOURS.items():
        svg = svg.replace(placeholder, colour)
    return re.sub(r"\n\s*", "\n", svg).strip()


def short(name: str) -> str:
    """Return a name for a legend: printable, and not too long."""
    clean = "".join(letter if letter.isprintable() else "?" for letter in name)
    return clean if len(clean) <= _LONGEST else f"...{clean[-_LONGEST:]}"


def _number(value: float, _: object = None) -> str:
    return f"{value:.4g}"


def _logarithmic(axes: Any, *which: str) -> None:
    """Make axes logarithmic with ticks that are numbers, not powers in mathematical notation."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name in which:
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        low, high = axis.get_view_interval()
        narrow = high < 20 * max(low, 1e-300)
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0) if narrow else (1.0,)))
        axis.set_major_formatter(FuncFormatter(_number))
        axis.set_minor_formatter(NullFormatter())


def accuracy(points: Mapping[str, Points], bases: Sequence[float]) -> str:
    """Perplexity over stored bits: a mark for each run, by its letter, and the line that no run lies below.

    Args:
        points: (stored bits per weight, perplexity) by the run's letter.
        bases: Perplexities of unquantized models.
    """

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        every = [point for given in points.values() for point in given]
        front = pareto(every)
        if len(front) > 1:
            axes.plot(*zip(*front, strict=True), "--", color=_INK, linewidth=1, alpha=0.6, label="Pareto line")
        for index, (letter, given) in enumerate(points.items()):
            axes.plot(*zip(*given, strict=True), "o", color=_series(index), markersize=7)
            for point in given:
                axes.annotate(letter, point, (6, 5), textcoords="offset points", fontweight="bold")
        for index, base in enumerate(bases):
            label = None if index else f"unquantized model{'s' if len(bases) > 1 else ''}"
            axes.axhline(base, color=_INK, linewidth=1, linestyle=":", label=label)
        axes.margins(0.12)
        if max(value for _, value in every) > 3 * min(value for _, value in every):
            _logarithmic(axes, "y")
        axes.set(xlabel="stored bits per weight of quantized layers", ylabel="perplexity")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()

    return draw(paint)


def pareto(points: Points) -> list[tuple[float, float]]:
    """Return the points that no other one beats in both, by growing bits."""
    front: list[tuple[float, float]] = []
    for bits, value in sorted(points):
        if not front or value < front[-1][1]:
            front.append((bits, value))
    return front


def layer_errors(kinds: Mapping[str, Mapping[int, tuple[float | None, float | None]]]) -> str:
    """Errors of layers over the depth: a line for each kind of layer, dashed without the error branch."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for index, (kind, blocks) in enumerate(kinds.items()):
            style = {"color": _series(index), "linewidth": 1.5, "marker": ["o", "s", "^", "v"][index // SERIES % 4]}
            for which, line in ((0, "-"), (1, "--")):
                given = [(block, pair[which]) for block, pair in blocks.items() if pair[which]]
                if given:
                    label = short(kind) if which == 0 else None
                    axes.plot(*zip(*given, strict=True), line, **style, markersize=2.5, label=label)
        _logarithmic(axes, "y")
        axes.set(xlabel="block", ylabel="relative output error")
        figure.legend(loc="outside upper center", ncols=4)

    return draw(paint)


def error_spectrum(found: Spectrum) -> str:
    """Singular values of a layer's error, without and with the branch."""
    lines = [
        ("without the branch" if found.rank else "codes", found.codes, "-", 0),
        ("with the branch", found.left, "-", 1),
        ("the branch itself", found.branch, "--", 2),
    ]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for label, values, line, index in lines:
            if values:
                axes.plot(*thinned(values), line, color=_series(index), linewidth=1.7, label=label)
        if found.rank:
            axes.axvline(found.rank, color=_INK, linewidth=0.8, linestyle=":", label=f"rank {found.rank}")
        _logarithmic(axes, "x", "y")
        top = max(max(values) for _, values, _, _ in lines if values)
        axes.set_ylim(bottom=top * 1e-3)
        axes.set(xlabel="number of the singular value", ylabel="of the weight's norm")
        axes.legend(loc="lower left")

    return draw(paint)


def codebook_picture(found: Codebooks) -> str:
    """A sample of codebooks, one in a line, and the levels that they are combined from."""

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        gap = (float("nan"), float("nan"))
        marks = [((x, y), (x, y + 0.8), gap) for y, book in enumerate(found.books) for x in book]
        left.plot(*zip(*itertools.chain(*marks), strict=True), color=_series(0), linewidth=1)
        left.set(xlabel="value of a weight", ylabel=f"{len(found.books)} of {found.count} codebooks", yticks=[])
        for index, plane in enumerate(found.levels):
            right.plot(plane, "o-", color=_series(index + 1), markersize=2.5, linewidth=1, label=f"plane {index + 1}")
        right.set(xlabel="code", ylabel="level")
        if len(found.levels) <= SERIES:
            right.legend()

    return draw(paint)
