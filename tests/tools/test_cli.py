"""The command line as a whole: verbs, help, configuration files, exit codes, errors."""

from __future__ import annotations

import argparse
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankbook.tools import cli, config, errors
from rankbook.tools.command import Command, Outcome
from rankbook.tools.commands import ORDER, discover
from tests.tools.files import run_cli, stdout_json

ROOT = Path(__file__).resolve().parents[2]


def test_the_nine_verbs_are_there_in_order():
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
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    assert done.stderr.splitlines()[-1] == "loaded []"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU time, since the machine may be busy with other tests: 0.2 s, which grows when cores share their caches.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 0.5


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / ".pkg")}


def test_no_verb_prints_the_help_and_is_a_usage_error(capsys):
    assert run_cli() == errors.USAGE
    assert "quantize" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frobnicate"], "invalid choice"),
        (["build"], "MODEL, -o is missing"),
        (["build", "x", "-o", "y", "--target", "cpu"], "invalid choice"),
        (["quantize", "x", "-o", "y", "--bits", "5"], "invalid choice"),
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
        (OSError(errno.ENOSPC, "No space left on device", "out/model.onnx"), 2, "disk is full while writing out/model"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), 2, "a.txt does not exist"),
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


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(errors.UsageError):
        run_cli("inspect", tmp_path / "nothing", "--debug")


@pytest.fixture
def echo(monkeypatch):
    """A verb that reports what it was given."""

    def add_flags(flags):
        flags.add("source", metavar="SOURCE", required=True, text="where from")
        flags.add("--size", type=int, choices=(1, 2, 3), default=1, text="how much")
        flags.add("--names", nargs="+", default=(), text="which")
        flags.add("--fast", action=argparse.BooleanOptionalAction, text="how")
        flags.add("-o", "--output", type=Path, text="where to")

    def run(options):
        sys.stdout.write("noise of a library")
        return Outcome(
            {k: getattr(options, k) for k in ("source", "size", "names", "fast", "seed")}, config_folder=options.output
        )

    def other(flags):
        flags.add("--colour", text="of the other verb")

    commands = {
        "echo": Command("echo", "repeat", "rankbook echo x", add_flags, run),
        "other": Command("other", "else", "rankbook other", other, run),
    }
    monkeypatch.setattr(cli, "discover", lambda: commands)


@pytest.mark.usefixtures("echo")
class TestConfiguration:
    def test_json_is_all_there_is_on_stdout(self, capsys):
        assert run_cli("echo", "x", "--json") == 0
        assert stdout_json(capsys) == {"source": "x", "size": 1, "names": [], "fast": None, "seed": 0}

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
            ("sise: 2", "unknown key 'sise'; the known ones are colour, "),
            ("echo: {sise: 2}", "section echo: unknown key 'sise'; the known ones are config, "),
            ("other: {size: 2}", "section other: unknown key 'size'"),
            ("size: 9", "choose one of 1, 2, 3"),
            ("size: many", "invalid literal"),
            ("fast: 1", "give true or false"),
            ("[1, 2]", "must map names"),
            ("a: [", "not valid YAML"),
        ],
    )
    def test_mistakes_in_a_file_are_named(self, text, said, tmp_path, capsys):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        assert run_cli("echo", "x", "--config", path) == errors.USAGE
        assert said in capsys.readouterr().err

    def test_the_resolved_configuration_repeats_the_run(self, tmp_path, capsys):
        assert run_cli("echo", "x", "--size", 2, "--names", "a", "b", "-o", tmp_path, "--json") == 0
        first = stdout_json(capsys)
        written = tmp_path / "rankbook-echo.yaml"
        assert set(config.read(written)["echo"]) == {"source", "size", "names", "output", "seed"}
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

    monkeypatch.setattr(
        cli, "discover", lambda: {"wait": Command("wait", "wait", "rankbook wait", lambda _: None, run)}
    )
    before = signal.getsignal(signal.SIGTERM)
    assert run_cli("wait") == errors.INTERRUPTED
    assert cleaned == [True]
    assert signal.getsignal(signal.SIGTERM) is before
    assert "interrupted" in capsys.readouterr().err


def test_quantize_has_a_flag_for_every_option():
    """An option that no flag sets would be out of reach from the command line."""
    import dataclasses

    from rankbook.calibration.model.options import QuantizeOptions
    from rankbook.tools.commands import quantize

    parser = cli._build_parser(discover())[1]["quantize"]
    names = {field.name for field in dataclasses.fields(QuantizeOptions)} - {"method_options"}
    assert names <= set(parser.defaults)
    assert names - {"skip"} == set(quantize._OPTIONS)
    defaults = QuantizeOptions()
    for name in names - {"skip"}:
        assert parser.defaults[name] == getattr(defaults, name), name
