"""Output folders: written beside their place, put there as a whole, by one run; only own files are deleted."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

from rankbook.calibration.checkpoint.files import sync_folder, write_text_atomic
from rankbook.calibration.notes import note
from rankbook.calibration.schema import read_object
from rankbook.calibration.source import MANIFEST

LISTING = "rankbook-files.json"
"""Names every file that a run wrote into its folder; nobody else writes such a file."""
RESULTS = "rankbook-evaluation.json"
"""What `rankbook.calibration.checkpoint.results` keeps in a folder."""

_WRITING, _PREVIOUS, _LOCK = "rankbook-tmp", "rankbook-old", "rankbook-lock"
"""Ends of the names of what lies beside an output while it is written."""
_LATER = re.compile(rf"rankbook-[a-z]+\.yaml|runtime\.cache|{re.escape(RESULTS)}")
"""Written into a finished folder by the command line, by a run of an engine, and by `eval --card`."""
_SHOWN = 3
_NOT_WRITTEN = "rankbook did not write it; give a new folder"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)

_held = threading.local()
"""Folders that this thread has locked."""


@contextlib.contextmanager
def locked(target: Path) -> Iterator[Path]:
    """Hold a folder that is to be written for the whole run; give its real location (links are followed).

    A run that holds it may lock it again. Before the work begins, what interrupted runs left is cleared, and the swap
    at the end is tried on empty folders.

    Raises:
        FileExistsError: Another run writes there, or an interrupted run had finished, whose result is put in place.
        OSError: It cannot be written.
    """
    target = target.resolve()
    mine: set[Path] = _held.__dict__.setdefault("folders", set())
    if target in mine:
        yield target
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    path = _beside(target, _LOCK)
    descriptor = _lock(path, target)
    mine.add(target)
    try:
        _clear(target)
        _try_swap(target)
        yield target
    finally:
        mine.discard(target)
        path.unlink(missing_ok=True)  # while it is locked, so that nobody removes another's
        os.close(descriptor)


@contextlib.contextmanager
def replaced_folder(target: Path, marker: str) -> Iterator[Path]:
    """Give a temporary folder that takes the place of ``target`` when the block ends without an error.

    Files get the modes that the umask gives, and are on disk, with their names, before they are visible.

    Args:
        target: The folder to write. It may exist where `check_replaceable` allows it; a link to a folder stays one.
        marker: Name of the file that shows what kind of output a folder is.

    Raises:
        FileExistsError: ``target`` is something else, or another run writes there.
        OSError: Writing failed, e.g. because the disk is full; ``target`` is as it was.
    """
    with locked(target) as target:
        check_replaceable(target, marker)
        temporary = _beside(target, _WRITING, unique=True)
        temporary.mkdir()
        try:
            yield temporary
            _complete(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _put(temporary, target, marker)


def check_replaceable(target: Path, marker: str) -> None:
    """Check that replacing the folder ``target`` deletes nothing but what an earlier run wrote there.

    Raises:
        FileExistsError: It is a file, a folder of another kind, or holds files of somebody else.
    """
    target = target.resolve()
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; the output is a folder: give a new name")
    if not any(target.iterdir()):
        return
    if not (target / marker).is_file():
        raise FileExistsError(f"{target} is not empty and holds no {marker}: {_NOT_WRITTEN}")
    if foreign := _foreign(target):
        shown = ", ".join(foreign[:_SHOWN]) + (", ..." if len(foreign) > _SHOWN else "")
        raise FileExistsError(
            f"{target} holds {len(foreign)} files that are not in its {LISTING} ({shown}) and would be deleted with it;"
            " move them away, or give a new folder"
        )


def claim(folder: Path) -> None:
    """Make a folder that is written into file by file, and mark it; one with other contents is refused.

    Raises:
        FileExistsError: It holds something, but no mark.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not any((folder / name).is_file() for name in (LISTING, "rankbook-demo.yaml")):
        raise FileExistsError(f"{folder} is not empty and holds no {LISTING}: {_NOT_WRITTEN}")
    (folder / LISTING).write_text('{"files": []}\n', encoding="utf-8")


def add_to_listing(folder: Path, names: Collection[str]) -> None:
    """List files that were put into a finished folder as those of this project.

    Raises:
        SchemaError: Its listing is damaged.
    """
    listed = read_object(folder / LISTING, "write the folder again").get("files", [])
    content = {"files": sorted({*map(str, listed), *names})}
    write_text_atomic(folder / LISTING, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _beside(target: Path, end: str, *, unique: bool = False) -> Path:
    part = f".{secrets.token_hex(4)}" if unique else ""
    return target.with_name(f".{target.name}{part}.{end}")


def _lock(path: Path, target: Path) -> int:
    """Return the descriptor of the locked file; the lock ends with the process, however that ends."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(descriptor, 32).decode("ascii", "replace").strip()
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise FileExistsError(
                f"another run (process {owner or 'unknown'}) is writing {target}; wait for it, or give another folder"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        os.close(descriptor)  # the run before has just removed it


def _clear(target: Path) -> None:
    """Remove what interrupted runs left; a result that was finished but not yet in place is put there."""
    left = [path for end in (_WRITING, _PREVIOUS) for path in target.parent.iterdir() if _is_left(path, target, end)]
    finished = [path for path in left if path.name.endswith(_WRITING) and (path / LISTING).is_file()]
    previous = [path for path in left if path.name.endswith(_PREVIOUS)]
    if not target.exists() and (found := finished or previous):
        found[0].rename(target)
        raise FileExistsError(
            f"an interrupted run left {target} {'finished' if finished else 'as it was before'} but out of place; it is"
            " in place now: use it, or run again with --overwrite"
        )
    for path in left:
        shutil.rmtree(path)


def _is_left(path: Path, target: Path, end: str) -> bool:
    pattern = rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.{end}"
    return re.fullmatch(pattern, path.name) is not None and path.is_dir() and not path.is_symlink()


def _try_swap(target: Path) -> None:
    """Do what is done at the end, on empty folders, so that what cannot work fails before the work.

    Raises:
        OSError: The folder around the output cannot be written, or the output is a mount point.
    """
    if target.is_dir() and _is_mount(target):
        raise OSError(f"{target} is a mount point, which cannot be replaced as a whole; give a folder inside it")
    old, new = _beside(target, _WRITING, unique=True), _beside(target, _WRITING, unique=True)
    try:
        old.mkdir()
        new.mkdir()
        previous = _swap(new, old)
        previous.rmdir()
    finally:
        for path in (old, new):
            with contextlib.suppress(FileNotFoundError):
                path.rmdir()


def _is_mount(folder: Path) -> bool:
    """Return whether a folder is a mount point, of the same disk (bind) too."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return os.path.ismount(folder)
    return str(folder).replace(" ", r"\040") in {line.split(" ")[4] for line in lines}


def _complete(folder: Path) -> None:
    """List the files, give all the modes of the umask, and ask the disk to hold files and folders."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not _is_folder(path))
    (folder / LISTING).write_text(json.dumps({"files": names}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    mode = (folder / LISTING).stat().st_mode & 0o777  # libraries write weights as 0600
    for path in folder.rglob("*"):
        if path.is_symlink():
            continue
        if path.is_dir():
            path.chmod(folder.stat().st_mode & 0o7777)
            sync_folder(path)
        else:
            path.chmod(mode)
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    sync_folder(folder)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _put(temporary: Path, target: Path, marker: str) -> None:
    """Put a finished folder in its place; where that fails the result is kept and its place said."""
    kept = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
    try:
        if target.exists():
            check_replaceable(target, marker)  # hours may have passed
            previous = _swap(temporary, target)
        else:
            temporary.rename(target)
            previous = None
        sync_folder(target.parent)
    except OSError as error:
        if temporary.exists():
            temporary.rename(kept)
        raise OSError(f"{target} could not be replaced ({error}); the finished result is in {kept}") from error
    if previous is None:
        return
    if _foreign(previous):
        previous.rename(kept)
        note(f"files of somebody else appeared in {target} while it was written; what it held before is in {kept}")
    else:
        shutil.rmtree(previous)


def _swap(temporary: Path, target: Path) -> Path:
    """Exchange two folders and return where the former ``target`` is: at once where the system can."""
    if _exchange(temporary, target):
        return temporary
    previous = _beside(target, _PREVIOUS, unique=True)
    target.rename(previous)
    try:
        temporary.rename(target)
    except OSError:
        previous.rename(target)
        raise
    return previous


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step (Linux 3.15, renameat2); False where kernel or file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _foreign(folder: Path) -> list[str]:
    """Return the files of an output that no run of this project wrote."""
    listed = _listed(folder)
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not _is_folder(path))
    return sorted(name for name in names if name not in listed and not _LATER.fullmatch(name))


def _listed(folder: Path) -> set[str]:
    """Return the names that a folder's listing has; of an older checkpoint those that its manifest has."""
    name = LISTING if (folder / LISTING).is_file() else MANIFEST
    try:
        return {name, *map(str, json.loads((folder / name).read_text(encoding="utf-8"))["files"])}
    except (OSError, ValueError, LookupError, TypeError):
        return set()
