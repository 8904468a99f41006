"""Configuration files: keys of flags, sections of verbs, and sentences for what does not belong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rankbook.calibration.option import WHERE, Options, option
from rankbook.tools import config
from rankbook.tools.commands.quantize import Quantize
from rankbook.tools.errors import UsageError
from rankbook.tools.flags import flags_of


@dataclass(frozen=True)
class One(Options):
    """Options of a verb."""

    bits: int = option(4, "width", choices=(2, 4))
    group_size: int = option(64, "group")
    tokens: tuple[int, ...] = option((1,), "tokens", flags=("--tokens", "--rows"))


@dataclass(frozen=True)
class Two(Options):
    """Options of another verb."""

    method: str = option("lcq", "method")


FLAGS = {"one": flags_of(One), "two": flags_of(Two)}


def selected(values: dict[str, Any], verb: str = "one") -> dict[str, Any]:
    return config.select(values, verb, FLAGS, "file")


def test_a_key_is_for_every_verb_that_has_it_and_a_section_for_one() -> None:
    values = {"bits": 2, "method": "rtn", "one": {"group-size": 32}, "two": {"method": "gptq"}}
    assert selected(values) == {"bits": 2, "group_size": 32}
    assert selected(values, "two") == {"method": "gptq"}
    assert selected({"bits": None}) == {}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bitss": 2}, "file: unknown key 'bitss'.*did you mean bits"),
        ({"one": {"method": "x"}}, "file, section one: unknown key 'method'"),
        ({"bits": 3}, "file: bits is 3: invalid choice"),
        ({"bits": True}, "file: bits is True; give a value"),
        ({"tokens": [1], "rows": [2]}, "tokens and rows are one option"),
    ],
)
def test_what_does_not_belong_is_said(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        selected(values)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "a: [", "is not valid YAML"),
        ("a.toml", "a = ", "is not valid TOML"),
        ("a.yaml", "- 1", "holds a list; it must map"),
        ("a.json", "{}", "has suffix '.json'"),
    ],
)
def test_a_file_that_is_no_configuration(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=said):
        config.read(tmp_path / name)


def test_rules_of_a_file_are_those_of_the_flag(tmp_path: Path) -> None:
    flags = {"quantize": flags_of(Quantize)}
    (tmp_path / "file.yaml").write_text("rule:\n- '*.q_proj: bits=8'\n- '*: skip'\n")
    (tmp_path / "file.toml").write_text("[quantize]\nrule = ['*.q_proj: bits=8', '*: skip']\n")
    for name in ("file.yaml", "file.toml"):
        found = config.select(config.read(tmp_path / name), "quantize", flags, name)
        assert found == {"rules": ("*.q_proj: bits=8", "*: skip")}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = config.write_resolved(tmp_path, "one", FLAGS["one"], One(bits=2, tokens=(1, 8)))
    assert selected(config.read(path)) == {"bits": 2, "group_size": 64, "tokens": (1, 8)}
    assert config.read(tmp_path / "rankbook-one.yaml") == {"one": {"bits": 2, "group_size": 64, "tokens": [1, 8]}}


def test_paths_are_written_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the file means the same from every folder; a model id is no path, though it may look like one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q").mkdir()

    @dataclass(frozen=True)
    class Places:
        output: Path = option(Path("out"), "where", group=WHERE)
        model: str = option("q", "what", group=WHERE)
        hub: str = option("owner/q", "what", group=WHERE)
        method: str = option("q", "how")

    path = config.write_resolved(tmp_path / "out", "place", flags_of(Places), Places())
    wanted = {"output": str(tmp_path / "out"), "model": str(tmp_path / "q"), "hub": "owner/q", "method": "q"}
    assert config.read(path) == {"place": wanted}
