"""The command line as a whole: verbs, help, configuration files, exit codes, errors."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.notes import note
from rankbook.calibration.option import argument, option
from rankbook.tools import cli, config, errors
from rankbook.tools.command import Command, Common, Outcome
from rankbook.tools.commands import ORDER, discover
from tests.tools.files import run_cli, stdout_json

SHOWN = ("source", "size", "names", "fast", "seed")
ROOT = Path(__file__).resolve().parents[2]


def test_the_verbs_are_there_in_order():
    assert tuple(discover())[: len(ORDER)] == ORDER


@pytest.mark.parametrize("verb", ORDER)
def test_help_of_every_verb_has_an_example_and_the_common_flags(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        run_cli(verb, "--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  rankbook {verb}" in text
    for flag in ("--json", "--seed", "--config", "--quiet"):
        assert flag in text


@pytest.mark.parametrize("verb", ["", *ORDER])
def test_help_loads_no_heavy_library(verb):
    """A shell waits for --help: torch alone takes seconds."""
    code = (
        "import sys\nfrom rankbook.tools.cli import main\n"
        f"try: main({[verb, '--help'] if verb else ['--help']!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'onnx', 'polygraphy', 'numpy'}\n"
        "print('loaded', sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    assert done.stderr.splitlines()[-1] == "loaded []"


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / ".pkg")}


def test_no_verb_prints_the_help_and_is_a_usage_error(capsys):
    assert run_cli() == errors.USAGE
    assert "quantize" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frobnicate"], "invalid choice"),
        (["quantise", "x"], "did you mean quantize?"),
        (["--versoin"], "--versoin is not a flag of `rankbook`; `rankbook --help` shows"),
        (["--versoin"], "did you mean --version?"),
        (
            ["quantize", "x", "--bit", "3"],
            "--bit is not a flag of `rankbook quantize`; `rankbook quantize --help`",
        ),
        (["quantize", "x", "--bit", "3"], "did you mean --bits or"),
        (["export", "x", "--bits=3", "-o", "y"], "--bits is not a flag of `rankbook export`"),
        (["export", "x", "--bits=3", "-o", "y"], "it is a flag of quantize"),
        (["inspect", "x", "y"], "'y' is one argument too many for `rankbook inspect`"),
        (["build", "x", "-o"], "expected one argument; `rankbook build --help`"),
        (["build"], "MODEL and -o are missing"),
        (["build", "x", "-o", "y", "--target", "cpu"], "invalid choice"),
        (["quantize", "x", "-o", "y", "--bits", "5"], "invalid choice"),
        (["quantize", "x", "-o", "y", "--bits", "three"], "argument --bits: 'three' is not a whole number"),
        (["quantize", "x", "-o", "y", "--target-bits", "few"], "argument --target-bits: 'few' is not a number"),
        (["quantize", "x", "-o", "y", "--preset", "balance"], "fast, balanced, best; did you mean balanced?"),
        (["quantize", "x", "-o", "y", "--method", "gtpq"], "did you mean gptq?"),
        (["quantize", "x", "y"], "'y' is one argument too many for `rankbook quantize`"),
        (["quantize", "x", "y"], "did you mean -o y?"),
        (["-o", "y", "quantize", "x"], "-o stands before the verb, which comes first: rankbook quantize ..."),
        (["help"], "did you mean --help?"),
        (["inspect", "no/such/file"], "does not exist"),
        (["doctor", "--config", "no.yaml"], "does not exist"),
        (["doctor", "--config", "no.json"], ".yaml, .yml or .toml"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_cli(*arguments) == errors.USAGE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("rankbook: error: ")
    assert said in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (errors.CheckFailedError("logits differ"), 1, "logits differ"),
        (errors.MissingError("no GPU"), 3, "no GPU"),
        (ValueError("bits 5; choose 2, 3, 4, 8"), 2, "choose"),
        (ModuleNotFoundError("No module named 'gguf'", name="gguf"), 3, "'gguf' is not installed"),
        (
            ModuleNotFoundError("it needs scipy: pip install scipy", name="scipy"),
            3,
            "it needs scipy: pip install scipy",
        ),
        (
            ImportError("FP8 needs\n\naccelerate: pip install accelerate"),
            3,
            "FP8 needs accelerate: pip install accelerate",
        ),
        (ImportError("cannot import name 'a' from 'onnx' (x.py)", name="onnx"), 3, "another version of the package"),
        (OSError(errno.ENOSPC, "No space left on device", "out/model.onnx"), 2, "disk is full while writing out/model"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), 2, "a.txt does not exist"),
        (RuntimeError("Symlink loop from '/a'"), 2, "a link leads to itself"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("a\n\nb"), 1, "RuntimeError: a b; run again with --debug"),
    ],
)
def test_every_error_has_a_sentence_and_a_code(error, code, said):
    message, exit_code = errors.describe(error)
    assert exit_code == code
    assert said in message
    assert "\n" not in message


def test_errors_and_notes_give_the_terminal_no_commands(tmp_path, capsys):
    assert run_cli("inspect", tmp_path / "a\x1b[2Jb") == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert r"a\x1b[2Jb" in said


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(errors.UsageError):
        run_cli("inspect", tmp_path / "nothing", "--debug")


@dataclass(frozen=True, kw_only=True)
class Echo(Common):
    """Options of every kind."""

    source: str = argument("where from", metavar="SOURCE")
    size: int = option(1, "how much", choices=(1, 2, 3), group="sizes")
    names: tuple[str, ...] = option((), "which")
    fast: bool | None = option(None, "how")
    tokens: tuple[int, ...] = option((1,), "how many", flags=("--tokens", "--rows"), least=1)
    pairs: Mapping[str, Any] = option({}, "more", metavar="KEY=VALUE", flags=("--pair",))
    output: Path | None = option(None, "where to", flags=("-o", "--output"))


@dataclass(frozen=True, kw_only=True)
class Other(Common):
    """Options of another verb."""

    colour: str | None = option(None, "of the other verb")


@pytest.fixture
def echo(monkeypatch):
    """A verb that reports what it was given."""

    def run(options):
        sys.stdout.write("noise of a library")
        return Outcome({k: getattr(options, k) for k in SHOWN}, config_folder=options.output)

    commands = {
        "echo": Command("echo", "repeat", "rankbook echo x", Echo, run),
        "other": Command("other", "else", "rankbook other", Other, run),
    }
    monkeypatch.setattr(cli, "discover", lambda: commands)


@pytest.mark.usefixtures("echo")
@pytest.mark.parametrize(
    ("given", "spins"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_wait_briefly_for_each_other_unless_told_otherwise(given, spins, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(given))
    assert run_cli("echo", "x", "--json") == 0
    assert os.environ.get("GOMP_SPINCOUNT") == spins


@pytest.mark.usefixtures("echo")
class TestConfiguration:
    def test_json_is_all_there_is_on_stdout(self, capsys):
        assert run_cli("echo", "x", "--json") == 0
        assert stdout_json(capsys) == {"source": "x", "size": 1, "names": [], "fast": None, "seed": 0}

    def test_notes_are_in_the_json_and_on_stderr_once(self, capsys, monkeypatch):
        def run(options):
            for _ in range(2):
                note("a tensor was left out")
            return Outcome({"source": options.source})

        monkeypatch.setattr(cli, "discover", lambda: {"echo": Command("echo", "say", "rankbook echo x", Echo, run)})
        assert run_cli("echo", "x", "--json", "--quiet") == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["notes"] == ["a tensor was left out"]
        assert printed.err.count("rankbook: note: a tensor was left out") == 1

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("c.yaml", "size: 2\nseed: 7\necho: {source: a, names: [b, c], fast: true}\nother: {colour: red}\n"),
            (
                "c.toml",
                'size = 2\nseed = 7\n[echo]\nsource = "a"\nnames = ["b", "c"]\nfast = true\n[other]\ncolour = "red"\n',
            ),
        ],
    )
    def test_a_file_sets_flags_and_flags_win(self, name, text, tmp_path, capsys):
        path = tmp_path / name
        path.write_text(text)
        assert run_cli("echo", "--config", path, "--size", 3, "--json") == 0
        assert stdout_json(capsys) == {"source": "a", "size": 3, "names": ["b", "c"], "fast": True, "seed": 7}

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (
                "sise: 2",
                "c.yaml: unknown key 'sise'; keys are flags without dashes, which `rankbook echo --help` lists;",
            ),
            ("echo: {sise: 2}", "section echo: unknown key 'sise'; keys are flags"),
            ("other: {sise: 2}", "which `rankbook other --help` lists"),
            ("other: {size: 2}", "section other: unknown key 'size'"),
            ("size: 9", "choose one of 1, 2, 3"),
            ("size: many", "is not a whole number"),
            ("fast: 1", "give true or false"),
            ("source: yes", "source is True; give a value, in quotes"),
            ("names: [a, ~]", "names is None; give a value"),
            ("[1, 2]", "must map names"),
            ("a: [", "not valid YAML"),
            ("siz: 2", "did you mean size?"),
            ("echo: {rows: 2, tokens: 3}", "tokens and rows are one option"),
            ("pair: x", "x' has no value; write KEY=VALUE"),
        ],
    )
    def test_mistakes_in_a_file_are_named(self, text, said, tmp_path, capsys):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        assert run_cli("echo", "x", "--config", path) == errors.USAGE
        assert said in capsys.readouterr().err

    @pytest.mark.parametrize("flags", [["--rows", 2, 3], ["--tokens", 2, "--rows", 3]])
    def test_one_option_has_two_names_and_a_repeated_flag_adds(self, flags, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(sys.modules[__name__], "SHOWN", ("tokens",))
        assert run_cli("echo", "x", *flags, "--json") == 0
        assert stdout_json(capsys) == {"tokens": [2, 3]}
        (tmp_path / "c.yaml").write_text("rows: [2, 3]")
        assert run_cli("echo", "x", "--config", tmp_path / "c.yaml", "--json") == 0
        assert stdout_json(capsys) == {"tokens": [2, 3]}
        assert run_cli("echo", "x", "--rows", 0) == errors.USAGE
        assert "tokens is 0; give at least 1" in capsys.readouterr().err

    @pytest.mark.parametrize("text", ["pair: [a-b=2, 'c=[x]']", "echo: {pair: {a-b: 2, c: [x]}}"])
    def test_pairs_come_from_flags_lists_and_mappings(self, text, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(sys.modules[__name__], "SHOWN", ("pairs",))
        want = {"pairs": {"a_b": 2, "c": ["x"]}}
        assert run_cli("echo", "x", "--pair", "a-b=2", "--pair", "c=[x]", "-o", tmp_path, "--json") == 0
        assert stdout_json(capsys) == want
        (tmp_path / "c.yaml").write_text(text)
        for path in ("c.yaml", "rankbook-echo.yaml"):
            assert run_cli("echo", "x", "--config", tmp_path / path, "--json") == 0
            assert stdout_json(capsys) == want

    def test_a_key_without_a_value_says_nothing(self, tmp_path, capsys):
        (tmp_path / "c.yaml").write_text("size:\nnames: ~\nfast: null\n")
        assert run_cli("echo", "x", "--config", tmp_path / "c.yaml", "--json") == 0
        assert stdout_json(capsys) == {"source": "x", "size": 1, "names": [], "fast": None, "seed": 0}

    def test_help_groups_options_and_shows_defaults(self, capsys):
        with pytest.raises(SystemExit):
            run_cli("echo", "--help")
        text = " ".join(capsys.readouterr().out.split())
        assert "usage: rankbook echo SOURCE [flags]" in text
        assert "sizes: --size {1,2,3} how much (default: 1)" in text
        assert text.index("options: SOURCE where from") < text.index("sizes:") < text.index("every verb:")

    def test_the_resolved_configuration_repeats_the_run(self, tmp_path, capsys):
        assert run_cli("echo", "x", "--size", 2, "--names", "a", "b", "-o", tmp_path, "--json") == 0
        first = stdout_json(capsys)
        written = tmp_path / "rankbook-echo.yaml"
        assert set(config.read(written)["echo"]) == {"source", "size", "names", "tokens", "pair", "output", "seed"}
        assert run_cli("echo", "--config", written, "--json") == 0
        assert stdout_json(capsys) == first


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_polite_kill_ends_like_an_interrupt(monkeypatch, capsys):
    """Temporary folders and child processes are cleaned up by `finally`, which a plain SIGTERM would skip."""
    cleaned = []

    def run(_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            cleaned.append(True)

    monkeypatch.setattr(cli, "discover", lambda: {"wait": Command("wait", "wait", "rankbook wait", Common, run)})
    before = signal.getsignal(signal.SIGTERM)
    assert run_cli("wait") == errors.INTERRUPTED
    assert cleaned == [True]
    assert signal.getsignal(signal.SIGTERM) is before
    assert "interrupted" in capsys.readouterr().err


def test_quantize_has_a_flag_for_every_option():
    """An option that no flag sets would be out of reach from the command line."""
    found = cli._build_parser(discover())[1]["quantize"]
    for item in dataclasses.fields(QuantizeOptions):
        assert found[item.name].flags[0].startswith("--")
        assert found[item.name].keys[0] == found[item.name].flags[0][2:].replace("-", "_")
        assert found[item.name].option.about.text


def test_export_notes_its_checkpoint_so_that_it_is_found_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = cli._build_parser(discover())[1]
    flag = known["export"]["checkpoint"]
    assert flag.parse("q") == tmp_path.resolve() / "q"
    assert config.select({"checkpoint": "q"}, "export", known, "c.yaml") == {"checkpoint": tmp_path.resolve() / "q"}
