"""Builds the documents as a site: ``python -m rankbook.tools.dev.site``, in the checkout, with the extra ``docs``.

The pages lie all over the repository, beside what they describe, and link to each other there. They are copied as they
are, with the files that they link to, so that each link leads where it leads in the repository.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "build" / "site" / "source"
"""Where `mkdocs.yml` looks for the pages."""
PAGES = ("*.md", "docs/*.md", "*/README.md", "plugins/csrc/*.md")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def pages() -> list[Path]:
    """Return the pages, relative to the root."""
    found = {path.relative_to(ROOT) for pattern in PAGES for path in ROOT.glob(pattern)}
    return sorted(path for path in found if path.parts[0][0] != "." and path.parts[0] not in ("build", "demo"))


def stage(target: Path = SOURCE) -> list[Path]:
    """Copy the pages and the files that they link to; return what was copied, relative to the root.

    Raises:
        FileNotFoundError: A page links to what is not there.
    """
    shutil.rmtree(target, ignore_errors=True)
    wanted = dict.fromkeys(pages())
    for page in list(wanted):
        for link in _LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            if "://" in link or link.startswith("mailto:"):
                continue
            path = (ROOT / page.parent / link).resolve()
            if not path.exists():
                raise FileNotFoundError(f"{page} links to {link}, which is not there")
            if path.is_file():
                wanted[path.relative_to(ROOT)] = None
    for name in wanted:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target / name)
    return list(wanted)


def main() -> int:
    """Copy and build; warnings are errors."""
    stage()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--clean"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
