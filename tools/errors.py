"""What a command can fail with, and the exit code of each."""

from __future__ import annotations

import errno

from rankbook.calibration.device import DeviceError

OK = 0
CHECK_FAILED = 1
USAGE = 2
MISSING = 3
INTERRUPTED = 130


class CommandError(Exception):
    """An error whose message is for the user: what happened; what is allowed; what to do."""

    exit_code = CHECK_FAILED


class CheckFailedError(CommandError):
    """A check ran and said no, or a step that should have worked did not."""

    exit_code = CHECK_FAILED


class UsageError(CommandError):
    """A wrong flag, a missing file, an input that is not what the command reads."""

    exit_code = USAGE


class MissingError(CommandError):
    """A package, a device or a driver that is missing."""

    exit_code = MISSING


def describe(error: BaseException) -> tuple[str, int]:
    """Return the sentence and the exit code for an exception that ended a command."""
    if isinstance(error, CommandError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; earlier outputs are as they were", INTERRUPTED
    if isinstance(error, DeviceError):
        return str(error), MISSING
    if isinstance(error, ImportError):
        return _missing(error), MISSING
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}; earlier outputs are as they were; free some space and run again", USAGE
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename} does not exist; check the path", USAGE
    if isinstance(error, (ValueError, OSError)):
        return _first_lines(str(error)) or type(error).__name__, USAGE
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # pathlib before Python 3.13
        return f"{error}: a link leads to itself; replace it by the file", USAGE
    if isinstance(error, MemoryError):
        return "out of memory; use fewer calibration sequences or a shorter context", CHECK_FAILED
    if out_of_memory(error):
        said = _first_lines(str(error), 200)
        return f"the device is out of memory ({said}); give --device cpu, a smaller batch or a shorter context", MISSING
    return f"{type(error).__name__}: {_first_lines(str(error))}; run again with --debug for the traceback", CHECK_FAILED


def out_of_memory(error: BaseException) -> bool:
    """Return whether PyTorch, ONNX Runtime (neither is imported for a message) or Python found no memory."""
    kind = type(error)
    if kind.__module__.startswith("onnxruntime"):
        return any(words in str(error).lower() for words in ("allocate memory", "out of memory"))
    return isinstance(error, MemoryError) or kind.__name__ == "OutOfMemoryError"


def _missing(error: ImportError) -> str:
    """Return the sentence of an import that failed: that of whoever wrote one, in place of Python's own."""
    if isinstance(error, ModuleNotFoundError) and str(error).startswith("No module named"):
        return f"the package {error.name!r} is not installed; `rankbook doctor` lists what each package enables"
    if str(error).startswith("cannot import name"):
        return f"{_first_lines(str(error))}; another version of the package is needed: `rankbook doctor` lists them"
    return _first_lines(str(error))


def _first_lines(text: str, limit: int = 600) -> str:
    """Keep messages of other libraries readable: no blank lines, a bounded length."""
    joined = " ".join(line.strip() for line in text.splitlines() if line.strip())
    return joined if len(joined) <= limit else joined[: limit - 3] + "..."
