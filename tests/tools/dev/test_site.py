"""The pages of the repository, copied with their places, make a site without a warning."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import yaml

from rankbook.tools.dev import site


def test_every_page_and_what_it_links_to_is_copied_to_its_place(tmp_path):
    copied = {str(path) for path in site.stage(tmp_path / "source")}
    assert {"README.md", "docs/start.md", "docs/accuracy.svg", "plugins/csrc/README.md", "LICENSE"} <= copied
    assert all((tmp_path / "source" / name).read_bytes() == (site.ROOT / name).read_bytes() for name in copied)


def test_every_page_is_in_the_navigation():
    text = (site.ROOT / "mkdocs.yml").read_text("utf-8")
    named = set(re.findall(r": ([\w/-]+\.md)$", text, re.MULTILINE))
    assert named == set(map(str, site.pages()))
    assert yaml.safe_load(text)["docs_dir"] == str(site.SOURCE.relative_to(site.ROOT))


def test_a_link_that_leads_nowhere_is_named(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("[there](nothing.md)")
    monkeypatch.setattr(site, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"README.md links to nothing.md"):
        site.stage(tmp_path / "out")


@pytest.mark.skipif(
    find_spec("mkdocs") is None or find_spec("material") is None, reason="the extra docs is not installed"
)
def test_the_site_is_built_without_a_warning(tmp_path):
    site.stage(tmp_path / "build" / "site" / "source")
    shutil.copy(site.ROOT / "mkdocs.yml", tmp_path)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "build" / "site" / "html" / "docs" / "start.html").is_file()
