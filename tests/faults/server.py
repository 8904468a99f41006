"""The process that `tests.faults.machine` forks runs from: a request on each line of stdin, an answer on stdout."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
import time
from typing import Any


def main() -> None:
    """Import everything once, then fork for each request."""
    import torch
    import transformers.models.llama.modeling_llama

    from rankbook.calibration.driver import run
    from rankbook.exporter import export
    from rankbook.tools import cli

    del run, export, transformers
    torch.set_num_threads(1)
    disk = ctypes.CDLL(sys.argv[1])
    disk.faults_seen.restype = ctypes.c_long
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as year:
            child = os.fork()
            if child == 0:
                _child(disk, request, (said.fileno(), year.fileno()), cli)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said.seek(0)
            year.seek(0)
            answer = {"status": status, "seen": disk.faults_seen(), "said": said.read().decode()}
            answer["year"] = int(year.read() or 0) or None
        print(json.dumps(answer), flush=True)


def _child(disk: ctypes.CDLL, request: dict[str, Any], files: tuple[int, int], cli: Any) -> None:
    said, year = files
    os.dup2(said, 2)
    os.dup2(said, 1)
    disk.faults_arm(request["folder"].encode(), ctypes.c_long(request["number"]), request["mode"])
    status = 1
    try:
        status = cli.main(request["words"])
    finally:
        sys.stderr.flush()
        os.write(year, str(time.gmtime(time.time()).tm_year).encode())
        os._exit(status)


if __name__ == "__main__":
    main()
