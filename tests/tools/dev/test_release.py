"""The rehearsal of a release: what must hold before a version goes out."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from rankbook.tools.dev import release
from rankbook.tools.errors import CheckFailedError


def test_this_repository_could_be_released() -> None:
    version = release.version((release.ROOT / "pyproject.toml").read_text())
    release.check_changelog((release.ROOT / "CHANGELOG.md").read_text(), version)


@pytest.mark.parametrize(
    ("changelog", "message"),
    [
        ("", r"not \[1\.2\.3\]"),
        ("## [1.2.2]\n- a\n", r"not \[1\.2\.3\]"),
        ("## [1.2.3]\n\n## [1.2.2]\n- a\n", "lists nothing"),
        ("## [1.2.3]\n- b\n## [1.2.3]\n- a\n", "twice"),
    ],
)
def test_a_changelog_that_does_not_tell_of_the_version(changelog: str, message: str) -> None:
    release.check_changelog("# Changelog\n\n## [1.2.3] - 2030-01-01\n- a\n", "1.2.3")
    with pytest.raises(CheckFailedError, match=message):
        release.check_changelog(changelog, "1.2.3")
    with pytest.raises(CheckFailedError, match="no line version"):
        release.version("version = 1")


def test_what_differs_between_two_builds_is_named(tmp_path: Path) -> None:
    files = []
    for name, content in (("first", "a"), ("second", "b")):
        folder = tmp_path / name
        folder.mkdir()
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            archive.writestr(zipfile.ZipInfo("same.py"), "x")
            archive.writestr(zipfile.ZipInfo("other.so"), content)
        (folder / "x.tar.gz").write_text(content)
        files.append([folder / "x.tar.gz", folder / "x.whl"])
    assert release.differing(*files) == ["x.tar.gz", "x.whl: other.so"]
    assert release.differing(files[0], files[0]) == []


def test_checksums_are_what_sha256sum_reads(tmp_path: Path) -> None:
    (tmp_path / "b.whl").write_bytes(b"b")
    (tmp_path / "a.json").write_bytes(b"a")
    (tmp_path / release.CHECKSUMS).write_text(release.checksums(sorted(tmp_path.iterdir(), reverse=True)))
    done = subprocess.run(["sha256sum", "--check", release.CHECKSUMS], cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout.splitlines() == [b"a.json: OK", b"b.whl: OK"]
