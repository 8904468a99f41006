"""Tries a release without publishing anything: ``make release-check``.

    python -m rankbook.tools.dev.release [--output dist] [--allow-dirty]

Builds sdist and wheel twice from a clean export of the commit and compares the bytes, looks at version, changelog and
tag, and writes checksums and a bill of materials (CycloneDX) beside the files.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from rankbook.tools.errors import CheckFailedError, MissingError

ROOT = Path(__file__).resolve().parents[2]
CHECKSUMS, MATERIALS = "SHA256SUMS", "sbom.cdx.json"
_NEXT = """everything is in {output}; to publish (nothing has been published):
  git tag -s v{version} && git push origin v{version}
  python -m twine upload {output}/*.whl {output}/*.tar.gz
  gh release create v{version} --notes-file CHANGELOG.md {output}/*"""


def version(pyproject: str) -> str:
    """Return the version that ``pyproject.toml`` states.

    Raises:
        CheckFailedError: There is none.
    """
    found = re.search(r'^version = "(\d+\.\d+\.\d+)"$', pyproject, re.MULTILINE)
    if not found:
        raise CheckFailedError('pyproject.toml has no line version = "MAJOR.MINOR.PATCH"')
    return found[1]


def check_changelog(changelog: str, released: str) -> None:
    """Check that the newest section is that of the version, with something in it.

    Raises:
        CheckFailedError: It is another one, or empty.
    """
    newest, *earlier = re.split(r"^## ", changelog, flags=re.MULTILINE)[1:] or [""]
    if not newest.startswith(f"[{released}]"):
        raise CheckFailedError(f"the newest section of CHANGELOG.md is not [{released}]; add it, with a date")
    if any(section.startswith(f"[{released}]") for section in earlier):
        raise CheckFailedError(f"CHANGELOG.md has [{released}] twice; raise the version in pyproject.toml")
    if "\n- " not in newest:
        raise CheckFailedError(f"the section [{released}] of CHANGELOG.md lists nothing")


def build(source: Path, output: Path, epoch: str) -> list[Path]:
    """Build sdist and wheel of an exported commit.

    Args:
        source: The exported commit.
        output: Where they go.
        epoch: Seconds since 1970 that every time stamp in them gets.

    Raises:
        CheckFailedError: The build fails.
    """
    command = [sys.executable, "-m", "build", "--quiet", "--outdir", str(output), str(source)]
    if subprocess.run(command, env={**os.environ, "SOURCE_DATE_EPOCH": epoch}, check=False).returncode:
        raise CheckFailedError(f"`{' '.join(command)}` failed; its messages are above")
    return sorted(path for path in output.iterdir() if path.suffix in (".whl", ".gz"))


def differing(first: Sequence[Path], second: Sequence[Path]) -> list[str]:
    """Return the names of built files that are not the same to the byte, with the members of wheels that differ."""
    found = []
    for one, other in zip(first, second, strict=True):
        if one.name == other.name and one.read_bytes() == other.read_bytes():
            continue
        members = [f"{one.name}: {name}" for name in _members(one, other)] if one.suffix == ".whl" else []
        found += members or [one.name]
    return found


def _members(one: Path, other: Path) -> list[str]:
    with zipfile.ZipFile(one) as first, zipfile.ZipFile(other) as second:
        names = sorted({*first.namelist(), *second.namelist()})
        held = [{item.filename: item.CRC for item in archive.infolist()} for archive in (first, second)]
    return [name for name in names if held[0].get(name) != held[1].get(name)]


def checksums(files: Sequence[Path]) -> str:
    """Return lines as ``sha256sum --check`` reads them."""
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(files))


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _export(folder: Path) -> Path:
    folder.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)
    return folder


def _bill(output: Path) -> None:
    """Write the bill of materials of this environment, which holds what the package needs."""
    command = shutil.which("cyclonedx-py", path=str(Path(sys.executable).parent))
    if command is None:
        raise MissingError("the bill of materials needs cyclonedx-py: pip install cyclonedx-bom")
    target = ["--output-reproducible", "--pyproject", str(ROOT / "pyproject.toml"), "--of", "JSON"]
    subprocess.run([command, "environment", *target, "-o", str(output / MATERIALS), sys.executable], check=True)


def main(words: Sequence[str] | None = None) -> int:
    """Try a release; return 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("dist"))
    parser.add_argument("--allow-dirty", action="store_true", help="only say that files are not committed")
    given = parser.parse_args(words)
    try:
        released = version((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        check_changelog((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), released)
        _check_tree(released, dirty=given.allow_dirty)
        _release(given.output, released)
    except (CheckFailedError, MissingError) as error:
        print(f"release-check: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _check_tree(released: str, *, dirty: bool) -> None:
    if _git("tag", "--list", f"v{released}"):
        raise CheckFailedError(f"v{released} is tagged already; raise the version in pyproject.toml")
    if changed := _git("status", "--porcelain"):
        message = f"{len(changed.splitlines())} files are not committed; they are not part of the release"
        if not dirty:
            raise CheckFailedError(f"{message}; commit them, or give --allow-dirty")
        print(f"NOTE: {message}")


def _release(output: Path, released: str) -> None:
    epoch = _git("log", "-1", "--format=%ct")
    with tempfile.TemporaryDirectory() as work:
        built = []
        for name in ("first", "second"):
            source = _export(Path(work) / name)
            (Path(work) / f"{name}-out").mkdir()
            built.append(build(source, Path(work) / f"{name}-out", epoch))
        if others := differing(*built):
            raise CheckFailedError(f"built twice, these are not the same to the byte: {', '.join(others)}")
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        files = [Path(shutil.copy2(path, output)) for path in built[0]]
    _bill(output)
    (output / CHECKSUMS).write_text(checksums([*files, output / MATERIALS]), encoding="utf-8")
    for path in files:
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, the same to the byte when built twice")
    wheel = next(path for path in files if path.suffix == ".whl")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [item for item in archive.infolist() if item.filename.endswith(".so")]
    told = [f"{Path(item.filename).name} {item.file_size / 1e6:.1f} MB" for item in libraries]
    print(f"native libraries in the wheel: {', '.join(told) or 'none'}")
    print(_NEXT.format(output=output, version=released))


if __name__ == "__main__":
    sys.exit(main())
