"""The console script ``rankbook``: parses flags and configuration, runs a verb and prints its report."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from rankbook.calibration.model.custom_code import trusted_code
from rankbook.calibration.notes import Note
from rankbook.calibration.option import near
from rankbook.calibration.versions import versions
from rankbook.tools import config, errors, flags
from rankbook.tools.command import Command, Outcome
from rankbook.tools.commands import discover
from rankbook.tools.errors import UsageError
from rankbook.tools.flags import Flag
from rankbook.tools.report import plain, printable, to_json

DESCRIPTION = "Quantize LLMs with low-rank codebooks, export one ONNX file, run it and check it in every runtime."
EPILOG = """exit codes: 0 ok, 1 a check failed, 2 usage or bad input, 3 missing dependency or device

a first run:
  rankbook quantize MODEL --method lcq --bits 3 --rank 2 --calib text.txt -o q
  rankbook export q -o onnx
  rankbook parity onnx
  rankbook build onnx --target rtx -o engine"""


class _Parser(argparse.ArgumentParser):
    """Reports errors like every other error of the program instead of exiting by itself."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `{self.prog} --help` shows what is allowed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; ``sys.argv[1:]`` when None.

    Returns:
        The exit code: 0 ok, 1 a check failed, 2 usage or bad input, 3 missing dependency or device.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or os.environ.get("RANKBOOK_DEBUG", "") not in ("", "0")
    try:
        with _stopping_on_sigterm():
            return _run(given)
    except BrokenPipeError:
        # The reader of the output left (`rankbook inspect ... | head`): that is not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return errors.OK
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        message, code = errors.describe(error)
        print(f"rankbook: error: {printable(message)}", file=sys.stderr)
        return code


@contextlib.contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """Treat a polite kill like Ctrl-C, so that children are ended and temporary folders removed."""

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    # Python allows this in the main thread only; elsewhere the caller keeps its own handling.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run(arguments: list[str]) -> int:
    commands = discover()
    verb = next((word for word in arguments if not word.startswith("-")), None)
    if verb is not None and verb not in commands:
        if later := next((word for word in arguments if word in commands), None):
            raise UsageError(f"{arguments[0]} stands before the verb, which comes first: rankbook {later} ...")
        meant = near(verb, [*commands, "--help"])
        raise UsageError(f"verb: invalid choice: {verb!r}; choose one of {', '.join(commands)}{meant}")
    parser, known = _build_parser(commands, arguments)
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UsageError(_not_a_flag(unknown, verb, known, vars(parsed)))
    given = vars(parsed)
    if given.pop("verb", None) is None or verb is None:
        parser.print_help()
        return errors.USAGE
    options = _resolve(commands[verb], given, known)
    # Bars of other libraries would mix with the progress shown and fill log files; tqdm reads this when it is imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # PyTorch's threads wait for each other in a loop, by default for 20 ms: where other programs run too, mostly for a
    # thread that does not run. This many rounds take half a millisecond. The library reads it when it is loaded.
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "10000"
    if options.quiet:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Libraries that print must not spoil the JSON on stdout.
    quiet = contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext()
    with quiet, _notes() as notes, trusted_code(getattr(options, "trust_remote_code", False)):
        outcome = commands[verb].run(options)
    if outcome.config_folder is not None:
        config.write_resolved(outcome.config_folder, verb, known[verb], options)
    _print(outcome, notes, as_json=options.json)
    return errors.OK if outcome.passed else errors.CHECK_FAILED


def _build_parser(
    commands: dict[str, Command], arguments: Sequence[str] = ()
) -> tuple[_Parser, dict[str, dict[str, Flag]]]:
    """Return the parser, whose help may depend on ``arguments``, and the flags of every verb by the names of fields."""
    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="rankbook", description=DESCRIPTION, epilog=EPILOG, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"rankbook {versions()['rankbook']}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs", parser_class=_Parser)
    known = {name: flags.flags_of(command.options) for name, command in commands.items()}
    helped = arguments[:1] if {"-h", "--help"} & {*arguments} else ()
    for name, command in commands.items():
        more = command.more_help(arguments) if name in helped else ""
        sub = verbs.add_parser(
            name,
            help=command.summary,
            usage=flags.usage(name, known[name]),
            add_help=False,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog="\n\n".join(filter(None, [more, f"example:\n  {command.example}"])),
            formatter_class=form,
            allow_abbrev=False,
        )
        flags.add_flags(sub, known[name])
    return parser, known


def _not_a_flag(
    unknown: Sequence[str], verb: str | None, known: dict[str, dict[str, Flag]], given: Mapping[str, Any]
) -> str:
    """Say which of the words that no flag takes is wrong, and what may have been meant."""
    wrong = next((word.partition("=")[0] for word in unknown if word.startswith("-")), unknown[0])
    flags_of = {name: [text for flag in items.values() for text in flag.flags] for name, items in known.items()}
    others = [name for name, texts in flags_of.items() if wrong in texts]
    mine = flags_of.get(verb or "", ["--version"])
    meant = f"; it is a flag of {', '.join(others)}" if others else near(wrong, [*mine, "--help"])
    command = f"rankbook {verb}" if verb else "rankbook"
    missing = [flag.shown for flag in known.get(verb or "", {}).values() if flag.lacks(given)]
    if missing and not wrong.startswith("-"):
        meant = f"; did you mean {missing[0]} {wrong}?"
    what = f"{wrong} is not a flag of" if wrong.startswith("-") else f"{wrong!r} is one argument too many for"
    return f"{what} `{command}`; `{command} --help` shows what is allowed{meant}"


def _resolve(command: Command, given: dict[str, Any], known: dict[str, dict[str, Flag]]) -> Any:
    """Return the options of a verb: defaults, overridden by the configuration file, overridden by flags."""
    mine = known[command.name]
    # argparse passes the placeholder of an absent positional argument through.
    values = {name: mine[name].collected(value) for name, value in given.items() if value != argparse.SUPPRESS}
    if "config" in values:
        chosen = config.select(config.read(values["config"]), command.name, known, str(values["config"]))
        values = chosen | values
    return flags.make(command.options, command.name, mine, values)


@contextlib.contextmanager
def _notes() -> Iterator[list[str]]:
    """Print each `Note` of a run on stderr, also with --quiet, and collect them for the report."""
    notes: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", Note)
        show = warnings.showwarning

        def keep(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if not issubclass(category, Note):
                show(message, category, *rest, **more)
            elif str(message) not in notes:
                notes.append(str(message))
                print(f"rankbook: note: {printable(str(message))}", file=sys.stderr)

        warnings.showwarning = keep
        yield notes


def _print(outcome: Outcome, notes: list[str], *, as_json: bool) -> None:
    if as_json:
        print(to_json({**plain(outcome.report), "notes": notes} if notes else outcome.report))
        return
    for table in outcome.tables:
        table.show(sys.stdout)
    if outcome.text:
        print(printable(outcome.text))


if __name__ == "__main__":
    sys.exit(main())
