"""What the pages tell to type can be typed, and what they point to is there."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankbook.tools import cli
from rankbook.tools.commands import discover

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("*/README.md"),
        *ROOT.glob("plugins/csrc/*.md"),
    ]
    if path.name != "CHANGELOG.md"
)
_VALUES = re.compile(r"\.\.\.|\[.*?\]|#.*$|[|&>].*$")
"""What stands in a command for more words, and what a shell takes away."""


def commands(page: str) -> Iterator[str]:
    """Yield the lines of code blocks that call the program, and what is quoted in the text with flags."""
    text = page.replace("\\\n", " ")
    yield from re.findall(r"^\s*(rankbook [a-z].*)$", text, re.MULTILINE)
    yield from re.findall(r"`(rankbook [a-z]+ [^`\n]*--[^`\n]*)`", text)


def parses(command: str) -> str:
    """Return what the command line says against a command, or ""."""
    words = shlex.split(_VALUES.sub("", command))[1:]
    if words[0].isupper():
        return ""
    parser, known = cli._build_parser(discover(), words)
    try:
        parsed, unknown = parser.parse_known_args(words)
    except Exception as error:
        return str(error)
    return cli._not_a_flag(unknown, words[0], known, vars(parsed)) if unknown else ""


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_is_one_that_the_program_takes(page: Path) -> None:
    wrong = {command: said for command in commands(page.read_text("utf-8")) if (said := parses(command))}
    assert wrong == {}


def test_a_wrong_command_is_found() -> None:
    assert list(commands("```sh\nrankbook eval q \\\n  --text a\n```\nsee `rankbook build onnx --target rtx`")) == [
        "rankbook eval q    --text a",
        "rankbook build onnx --target rtx",
    ]
    assert parses("rankbook eval q --text a  # why") == ""
    assert "--txt is not a flag of `rankbook eval`" in parses("rankbook eval q --txt a")
    assert "invalid choice" in parses("rankbook evl q")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def sentences() -> list[str]:
    """Return the strings of the package, with ``...`` in place of what is filled in."""
    files = (path for part in ("calibration", "exporter", "plugins", "tools") for path in (ROOT / part).rglob("*.py"))
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (str(item.value) if isinstance(item, ast.Constant) else "..." for item in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [text.replace("`", "") for text in found if len(text) > 15]


def unknown(headings: list[str]) -> list[str]:
    """Return the messages that no string of the package has."""
    said = sentences()
    patterns = {text: re.compile(".*?".join(map(re.escape, text.split("...")))) for text in headings}
    return [text for text, pattern in patterns.items() if not any(map(pattern.search, said))]


def test_the_messages_that_are_explained_are_messages_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    headings = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(headings) == page.count("\n### ") > 30
    assert unknown([*headings, "a message that ... nobody says"]) == ["a message that ... nobody says"]
