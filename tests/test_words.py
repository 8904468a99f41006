"""Words: docs/glossary.md is the authority, names in texts are names in the code, and nothing is "ours"."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("plugins", "calibration", "exporter", "tools")
REFERENCE = re.compile(rf"`(rankbook\.(?:{'|'.join(PARTS)})(?:\.\w+)*)`")


def lines(*patterns: str) -> Iterator[tuple[str, str]]:
    """Yield place and text of every line of the committed files that match."""
    command = ["git", "ls-files", "-z", *patterns]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, found.split("\0")):
        for number, line in enumerate((ROOT / name).read_text("utf-8").splitlines(), 1):
            yield f"{name}:{number}", line


def exists(reference: str) -> bool:
    """Whether a dotted name is a module or, statically, a name in one."""
    parts = reference.split(".")[1:]
    for count in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:count])
        if place.is_dir() and count == len(parts):
            return True
        if (file := place.with_suffix(".py")).is_file():
            source = file.read_text("utf-8")
            return all(re.search(rf"\b{name}\b", source) for name in parts[count:])
    return False


def test_names_in_backticks_are_names_of_the_code() -> None:
    texts = lines("*.py", "*.md", "*.h", "*.cuh", "*.cpp", ":!CHANGELOG.md", ":!tests")
    wrong = [f"{place} {name}" for place, line in texts for name in REFERENCE.findall(line) if not exists(name)]
    assert not wrong, "\n".join(wrong)


def test_a_name_that_is_not_there_is_found() -> None:
    assert exists("rankbook.plugins.layer_spec.LayerSpec")
    assert exists("rankbook.calibration.methods")
    assert not exists("rankbook.plugins.layer_spec.Layerspec")
    assert not exists("rankbook.exporter.nothing")


def test_texts_say_what_a_thing_is_not_whose() -> None:
    texts = lines("*.py", "*.md", "*.h", "*.cuh", "*.cpp", ":!tests/test_words.py", ":!tests/tools/generation")
    wrong = [f"{place} {line.strip()}" for place, line in texts if re.search(r"\bours?\b", line, re.IGNORECASE)]
    assert not wrong, "\n".join(wrong)


def test_the_glossary_names_what_there_is() -> None:
    """Files, classes, functions, flags and attributes in its backticks occur in the code."""
    source = "\n".join(line for _, line in lines("*.py", ":!tests"))
    glossary = (ROOT / "docs/glossary.md").read_text("utf-8")
    words = {word for span in re.findall(r"`([^`]+)`", glossary) for word in re.findall(r"[\w/]+(?:\.\w+)?", span)}
    missing = [
        word
        for word in sorted(words)
        if not ((ROOT / word).exists() or all(part in source for part in word.split(".")))
    ]
    assert not missing
