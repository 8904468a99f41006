"""Which GPUs the kernels in a library were compiled for, without a GPU and without NVIDIA's tools.

nvcc puts the code of all architectures side by side into the file ("fat binary"): a header, then for each architecture
a header of its own, which names the kind (1: PTX, 2: machine code) and the architecture, e.g. 80.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from rankbook.tools.errors import MissingError, UsageError

_MAGIC = struct.pack("<IHH", 0xBA55ED50, 1, 16)  # with version and size of the header; its content's size follows
_PTX = 1


def architectures(path: Path) -> frozenset[tuple[str, int]]:
    """Return what a library holds: ``("code", 90)`` runs on 9.x from 9.0 on, ``("ptx", 80)`` on everything from 8.0 on.

    Raises:
        MissingError: It holds no code for a GPU.
    """
    data, found, at = path.read_bytes(), set(), 0
    while (at := data.find(_MAGIC, at)) >= 0:
        size = struct.unpack_from("<Q", data, at + 8)[0]
        entry, end = at + 16, at + 16 + size
        while entry < end:
            kind, _, header, body = struct.unpack_from("<HHIQ", data, entry)
            found.add(("ptx" if kind == _PTX else "code", struct.unpack_from("<I", data, entry + 28)[0]))
            entry += header + body
        at = end
    if not found:
        raise MissingError(f"{path} holds no code for a GPU; build it again: make native-cuda")
    return frozenset(found)


def check(path: Path, capabilities: Sequence[str]) -> None:
    """Refuse GPUs that no code of a library runs on: an engine for them would build, and fail in its first launch.

    Args:
        path: The plugin library.
        capabilities: Compute capabilities, e.g. ``SM86``.

    Raises:
        UsageError: One is not served.
    """
    held = architectures(path)

    def served(capability: int) -> bool:
        return any(
            architecture <= capability and (kind == "ptx" or architecture // 10 == capability // 10)
            for kind, architecture in held
        )

    unserved = [name for name in capabilities if not served(int(name.removeprefix("SM")))]
    if unserved:
        has = ", ".join(f"{'PTX' if kind == 'ptx' else 'code'} for SM{number}" for kind, number in sorted(held))
        raise UsageError(
            f"--compute-capability {', '.join(unserved)}: {path.name} holds {has}, which does not run there. Leave it"
            " out, give --no-plugins for the function bodies, or build the library for it: make native-cuda"
            f' CMAKE_ARGS="-DRANKBOOK_CUDA_ARCHITECTURES={unserved[0].removeprefix("SM")}"'
        )
