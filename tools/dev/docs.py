"""Writes docs/cli.md and docs/methods.md from the options: ``python -m rankbook.tools.dev.docs``, in the checkout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING
from pathlib import Path

from rankbook.calibration.option import COMMON
from rankbook.tools import method_list
from rankbook.tools.command import Command, Common
from rankbook.tools.commands import discover
from rankbook.tools.flags import Flag, flags_of, grouped, usage
from rankbook.tools.report import Table

ROOT = Path(__file__).resolve().parents[2]
_NOTE = "<!-- Made by `python -m rankbook.tools.dev.docs`; a test fails when it is stale. -->"


def documents() -> dict[str, str]:
    """Return the text of every generated file by its name in the checkout."""
    return {"docs/cli.md": _cli(), "docs/methods.md": _methods()}


def _cli() -> str:
    commands = discover().values()
    parts = [
        "# The command line",
        _NOTE,
        "Every flag can also be set in a YAML or TOML file given with `--config`, under its name with underscores"
        " (`group_size: 64`): at the top level for every verb that has it, or in a section named after a verb. Flags"
        " override the file. A verb that writes a folder also writes `rankbook-VERB.yaml` there, which repeats the run."
        " Exit codes: 0 fine, 1 a check failed, 2 usage or bad input, 3 a missing dependency or device.",
        Table(
            "", ("verb", "what it does"), [(f"[`{c.name}`](#rankbook-{c.name})", c.summary) for c in commands]
        ).markdown(),
        "## Every verb",
        _flags(flags_of(Common).values()),
        *[part for command in commands for part in _verb(command)],
    ]
    return "\n\n".join(parts) + "\n"


def _links(columns: tuple[str, ...], prefix: str, rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table whose first column links to the headings below."""
    return Table("", columns, [(f"[`{name}`](#{prefix}{name})", *rest) for name, *rest in rows]).markdown()


def _verb(command: Command) -> list[str]:
    flags = flags_of(command.options)
    groups = {title: items for title, items in grouped(flags.values()).items() if title != COMMON}
    parts = [
        f"## rankbook {command.name}",
        command.summary[0].upper() + command.summary[1:] + ".",
        f"```sh\n{usage(command.name, flags)}\n{command.example}\n```",
    ]
    for title, items in groups.items():
        parts += [f"### {title[0].upper()}{title[1:]}"] if title and len(groups) > 1 else []
        parts.append(_flags(items))
    return parts


def _flags(flags: Iterable[Flag]) -> str:
    rows = [(_spelled(flag), _values(flag), _default(flag), _escaped(flag.option.about.text)) for flag in flags]
    return Table("", ("flag", "value", "default", "meaning"), rows).markdown()


def _spelled(flag: Flag) -> str:
    names = flag.flags or (flag.shown,)
    if flag.switch and flag.option.default is not False:
        names = (*names, f"--no-{names[-1].removeprefix('--')}")
    return ", ".join(f"`{name}`" for name in names)


def _values(flag: Flag) -> str:
    if flag.switch or not flag.flags:
        return "several" if flag.option.many else ""
    about, many = flag.option.about, ", several" if flag.option.many else ""
    return (", ".join(f"`{choice}`" for choice in about.choices) if about.choices else flag.placeholder()) + many


def _default(flag: Flag) -> str:
    if flag.option.default is MISSING:
        return "required"
    return f"`{shown}`" if (shown := flag.option.shown_default()) else ""


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*.", "\\*.").replace("; * and", "; `*` and")


def _methods() -> str:
    entries = method_list.entries()
    parts = [
        "# Methods",
        _NOTE,
        "`rankbook quantize --method M` chooses one; options without a flag of their own are given with"
        " `--method-option KEY=VALUE`. Each method is one file in `calibration/methods/`.",
        Table(
            "",
            ("method", "what it does", "source"),
            [(f"[`{m.name}`](#{m.name})", m.summary, m.source) for m in entries],
        ).markdown(),
    ]
    for entry in entries:
        rows = [
            (f"`{item.name}`", f"`{item.default}`", _escaped(item.meaning()), f"`{item.flag}`" if item.flag else "")
            for item in entry.options
        ]
        parts += [f"## {entry.name}", Table("", ("option", "default", "meaning", "flag"), rows).markdown()]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the files."""
    for name, text in documents().items():
        path = ROOT / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
