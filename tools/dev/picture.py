"""Draws the picture of the README, ``docs/accuracy.svg``, from the table of ``docs/accuracy.md``.

python -m rankbook.tools.dev.picture
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE, PICTURE = ROOT / "docs" / "accuracy.md", ROOT / "docs" / "accuracy.svg"
CURVES = {
    "LCQ rank 1": ("#c2410c", "o"),
    "AutoRound 0.16.1, 50 iterations": ("#2563eb", "s"),
    "GPTQ, activation order, clip search": ("#6b7280", "^"),
}
"""Methods that are drawn, by how their names begin, with colour and mark."""
Points = Mapping[str, Sequence[tuple[float, float]]]


def points(markdown: str) -> Points:
    """Return (stored bits, perplexity) of the methods that are drawn, from the first table of the page.

    Raises:
        ValueError: The page has no line for one of them.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in CURVES}
    for line in markdown.splitlines():
        cells = [cell.strip().replace("*", "") for cell in line.strip("|").split("|")]
        if len(cells) < 9 or not re.fullmatch(r"\d", cells[0]):
            continue
        for name in CURVES:
            if cells[1].startswith(name):
                found[name].append((float(cells[2]), float(cells[3].replace(",", ""))))
    if missing := [name for name, given in found.items() if not given]:
        raise ValueError(f"{TABLE.name} has no line of {missing[0]}")
    return found


def original(markdown: str) -> float:
    """Return the perplexity of the model itself, which the page states above the table."""
    stated = re.search(r"the original has a perplexity of ([\d.]+\d)", " ".join(markdown.split()))
    if not stated:
        raise ValueError(f"{TABLE.name} does not state the perplexity of the original")
    return float(stated[1])


def draw(found: Points, base: float, target: Path) -> None:
    """Write the picture."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "rankbook", "font.size": 11})
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, given in found.items():
        colour, mark = CURVES[name]
        axes.plot(*zip(*given, strict=True), color=colour, marker=mark, label=name.partition(",")[0], linewidth=2)
    axes.axhline(base, color="black", linewidth=1, linestyle=":")
    end = max(bits for given in found.values() for bits, _ in given)
    axes.annotate("original model", (end, base), (0, -12), textcoords="offset points", ha="right", fontsize=9)
    axes.set(yscale="log", xlabel="stored bits per weight, everything counted", ylabel="perplexity, WikiText-2")
    axes.set_yticks([30, 40, 60, 80], ["30", "40", "60", "80"])
    axes.minorticks_off()
    axes.set_ylim(base * 0.92, None)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(target, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def main() -> int:
    """Draw it."""
    markdown = TABLE.read_text(encoding="utf-8")
    draw(points(markdown), original(markdown), PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
