"""The page as a whole: its sections, as HTML and as what ``--json`` prints.

The HTML needs nothing but itself: no script, and a policy (Content-Security-Policy) by which a browser loads nothing
from elsewhere. All text is escaped by the template engine; only pictures, drawn here, are markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankbook.calibration.versions import versions
from rankbook.tools.page import sections, verdicts
from rankbook.tools.page.figures import SERIES
from rankbook.tools.page.runs import Collection, collect
from rankbook.tools.page.sections import Bars, Figure, Section
from rankbook.tools.report import Table, cell, plain

_TEMPLATE = Path(__file__).with_name("page.html")


def _numeric(table: Table) -> list[bool]:
    """Return which columns of a table hold numbers."""
    return [any(isinstance(row[index], (int, float)) for row in table.rows) for index in range(len(table.columns))]


@dataclass(frozen=True)
class Page:
    """What is shown.

    Attributes:
        title: The heading.
        collection: What it was made from.
        sections: In their order.
    """

    title: str
    collection: Collection
    sections: Sequence[Section]

    @property
    def summary(self) -> str:
        """One line on what was given."""
        runs, shared = self.collection.runs, self.collection.shared
        reports = len(shared) + sum(len(run.reports) for run in runs)
        folders = sum(len(run.parts) for run in runs)
        return f"{len(runs)} runs from {folders} folders and {reports} reports"

    def html(self) -> str:
        """Return the file."""
        from jinja2 import Environment, StrictUndefined

        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        environment.filters |= {"cell": cell, "numeric": _numeric}
        for name, kind in (("figure", Figure), ("table", Table), ("bars", Bars)):
            environment.tests[name] = lambda block, kind=kind: isinstance(block, kind)
        made = f"Written by `rankbook report`, rankbook {versions()['rankbook']}."
        values = {"title": self.title, "summary": self.summary, "sections": self.sections, "made": made}
        return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(values, series=SERIES)

    def report(self) -> dict[str, Any]:
        """Return what is shown, without the pictures."""
        runs = [
            {
                "letter": run.letter,
                "name": run.name,
                "folders": [{"kind": part.kind.name.lower(), "path": part.path} for part in run.parts],
                "bits_per_weight": sections.bits(run),
                "reports": [{"path": report.path, "content": plain(report.content)} for report in run.reports],
            }
            for run in self.collection.runs
        ]
        shown = [
            {
                "title": section.title,
                "pictures": [block.caption for block in section.blocks if isinstance(block, Figure)],
                "tables": [block for block in section.blocks if isinstance(block, Table)],
                "missing": section.missing,
            }
            for section in self.sections
        ]
        return {"title": self.title, "runs": runs, "sections": shown}


def make_page(paths: Iterable[Path], title: str, looks: int) -> Page:
    """Read what lies at ``paths`` and make the page of it.

    Args:
        paths: Checkpoints, exported folders, engine folders, JSON reports, or folders that hold them.
        title: The heading.
        looks: How many layers of each checkpoint are looked at closely: spectrum of the error, and codebooks.

    Raises:
        UsageError: A path is none of these, or damaged.
        ValueError: A report or a tensor is damaged.
    """
    given = collect(paths)
    before = [sections.overview(given), sections.accuracy(given), sections.errors(given)]
    close = sections.close_looks(given, looks) if looks else []
    after = [sections.sizes(given), verdicts.speed(given), verdicts.parity(given)]
    return Page(title, given, [*before, *close, *after, verdicts.environment(given), verdicts.commands(given)])
