"""Writing files and folders so that an interruption never damages what was there before."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_CHUNK_BYTES = 1 << 20


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_text_atomic(path: Path, text: str) -> None:
    """Write UTF-8 text beside ``path`` and rename it into place: readers see the old or the new file, never half."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(target: Path, marker: str) -> Iterator[Path]:
    """Give a temporary folder that takes the place of ``target`` when the block ends without an error.

    Args:
        target: The folder to write. It may exist if it is empty or holds ``marker`` (it is then replaced as a whole).
        marker: Name of the file that shows a folder to be one of ours.

    Raises:
        FileExistsError: ``target`` is something else.
        OSError: Writing failed, e.g. because the disk is full; ``target`` is as it was.
    """
    target = target.absolute()
    check_replaceable(target, marker)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    previous = target.with_name(f".{target.name}.old")
    _remove(temporary)
    temporary.mkdir()
    try:
        yield temporary
        _sync(temporary)
        _swap(temporary, target, previous)
    except BaseException:
        _remove(temporary)
        raise
    _remove(previous)


def check_replaceable(target: Path, marker: str) -> None:
    """Check that writing the folder ``target`` destroys nothing that is not ours.

    Raises:
        FileExistsError: It is a file, or a folder with other contents.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; the output is a folder: give a new name")
    if any(target.iterdir()) and not (target / marker).is_file():
        raise FileExistsError(
            f"{target} is not empty and holds no {marker}: it is not ours to replace; give a new folder"
        )


def _swap(temporary: Path, target: Path, previous: Path) -> None:
    _remove(previous)
    if target.exists():
        target.rename(previous)
    try:
        temporary.rename(target)
    except OSError:
        if previous.exists():
            previous.rename(target)
        raise


def _sync(folder: Path) -> None:
    """Ask the disk to hold every file before the rename makes them visible."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
