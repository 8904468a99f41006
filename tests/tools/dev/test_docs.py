"""The generated documents are those that the options of today make."""

from __future__ import annotations

import pytest

from rankbook.tools.commands import discover
from rankbook.tools.dev import docs
from rankbook.tools.flags import flags_of

DOCUMENTS = docs.documents()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_file_is_not_stale(name: str) -> None:
    stored = (docs.ROOT / name).read_text("utf-8")
    assert stored == DOCUMENTS[name], "run `python -m rankbook.tools.dev.docs`"


def test_every_flag_is_there() -> None:
    for name, command in discover().items():
        section = DOCUMENTS["docs/cli.md"].partition(f"## rankbook {name}\n")[2].partition("\n## ")[0]
        common = DOCUMENTS["docs/cli.md"].partition("## Every verb\n")[2].partition("\n## ")[0]
        for flag in flags_of(command.options).values():
            assert f"`{flag.shown}" in section + common
            assert docs._escaped(flag.option.about.text) in section + common
