"""Writing files so that an interruption never damages what was there before."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 20


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """Return size and hash of a file, as manifests hold them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def write_text_atomic(path: Path, text: str) -> None:
    """Write UTF-8 text, see `write_atomic`."""
    write_atomic(path, text.encode())


def write_atomic(path: Path, content: bytes) -> None:
    """Write bytes beside ``path`` and rename them into place: readers see the old or the new file, never half.

    Where ``path`` is a link, the file that it leads to is written.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Ask the disk to hold the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
