"""Pictures are SVG that stands in a page: text as text, colours of the page, nothing from elsewhere."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from rankbook.tools.page import figures
from rankbook.tools.page.layers import Codebooks, Spectrum

ERRORS: dict[str, dict[int, tuple[float | None, float | None]]] = {
    "up_proj": {0: (0.01, 0.02), 1: (0.02, 0.05)},
    "<b>$x$&": {0: (0.03, None)},
}


def pictures() -> dict[str, str]:
    points = {"A": [(3.0, 20.0)], "B": [(4.0, 15.0)], "C": [(4.5, 90.0)]}
    return {
        "accuracy": figures.accuracy(points, [14.0]),
        "errors": figures.layer_errors(ERRORS),
        "spectrum": figures.error_spectrum(Spectrum("a", [1.0, 0.5, 0.0], [0.5, 0.2, 0.0], [0.9], 1)),
        "branch": figures.error_spectrum(Spectrum("a", None, None, [0.9, 0.4], 2)),
        "codebooks": figures.codebook_picture(Codebooks("a", [[-1, 0, 1], [-2, 0, 2]], [[-1, 0, 1]], 7)),
    }


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    return pictures()


def test_pictures_are_whole_elements_with_nothing_from_elsewhere(drawn):
    for svg in drawn.values():
        root = ET.fromstring(svg)
        assert root.tag == "svg"
        assert "http" not in svg
        assert {tag.tag for tag in root.iter()} <= {
            "svg",
            "g",
            "path",
            "text",
            "defs",
            "use",
            "clipPath",
            "rect",
            "tspan",
        }
        held = {item.get("id") for item in root.iter() if item.get("id")}
        used = {item.get("href") for item in root.iter("use")} | set(re.findall(r"url\((#\w+)\)", svg))
        assert {f"#{name}" for name in held} >= used
        assert len(svg) < 60_000


def test_colours_are_those_of_the_page(drawn):
    for svg in drawn.values():
        colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
        assert {item for item in colours if item.startswith("#")} == set()
        assert "currentColor" in colours


def test_text_is_shown_as_it_is(drawn):
    texts = ["".join(item.itertext()) for svg in drawn.values() for item in ET.fromstring(svg).iter("text")]
    assert "<b>$x$&" in texts
    assert {"A", "B", "C", "unquantized model", "Pareto line", "rank 1", "plane 1"} <= set(texts)
    assert figures.short("a\x1b\nb") == "a??b"
    assert figures.short("x" * 50) == "..." + "x" * 28


def test_one_point_is_no_line():
    texts = [item.text for item in ET.fromstring(figures.accuracy({"A": [(3.0, 20.0)]}, [])).iter("text")]
    assert "A" in texts
    assert "Pareto line" not in texts


def test_the_same_is_drawn_in_the_same_bytes(drawn):
    assert pictures() == drawn


def test_the_pareto_line_has_what_no_other_beats():
    points = [(4.0, 15.0), (3.0, 20.0), (4.5, 15.0), (3.5, 21.0), (3.0, 25.0), (5.0, 14.0)]
    assert figures.pareto(points) == [(3.0, 20.0), (4.0, 15.0), (5.0, 14.0)]
