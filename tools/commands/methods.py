"""``rankbook methods``: the quantization methods, where they come from, and their options."""

from __future__ import annotations

from dataclasses import dataclass

from rankbook.calibration.option import argument
from rankbook.tools.command import Command, Common, Outcome
from rankbook.tools.report import Table


@dataclass(frozen=True, kw_only=True)
class Methods(Common):
    """Options of the verb."""

    names: tuple[str, ...] = argument(
        "methods whose options to list; default: a list of all methods", (), metavar="METHOD"
    )


def run(options: Methods) -> Outcome:
    """List them."""
    from rankbook.tools import method_list

    found = [method_list.find(name) for name in options.names] or method_list.entries()
    tables = [Table("methods", ("method", "what it does", "source"), [(m.name, m.summary, m.source) for m in found])]
    for method in found if options.names else ():
        rows = [(item.name, str(item.default), item.meaning(), item.flag) for item in method.options]
        tables.append(Table(f"options of {method.name}", ("option", "default", "meaning", "flag of quantize"), rows))
    text = "" if options.names else "`rankbook methods METHOD` lists the options of a method"
    return Outcome(found, tables, text)


COMMAND = Command(
    name="methods",
    summary="list the quantization methods, or the options of some of them",
    example="rankbook methods lcq lrq",
    options=Methods,
    run=run,
)
