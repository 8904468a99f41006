"""The memory of this process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_rss_bytes(*, children: bool = False) -> int:
    """Return the largest resident memory of this process so far, in bytes; mapped files count.

    Args:
        children: Take the largest one of its finished children instead where that is more.
    """
    # Where Linux says it itself: what `getrusage` tells begins with the memory of the process that started this one.
    lines = _STATUS.read_text("ascii", "replace").splitlines() if _STATUS.is_file() else []
    own = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
    unit = 1 if sys.platform == "darwin" else 1024
    if own is None:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit) if children else own
