"""Exported files compute the same in the lowest, a middle and the newest supported version of ONNX Runtime.

Bodies are standard ONNX: what the optimizers of a version make of them decides (1.25 and 1.26 took negative codes for
0).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rankbook.exporter.export import ExportOptions, export
from tests.exporter.checkpoints import make_checkpoint

VERSIONS = ("1.23.2", "1.26.0", "1.32.0")
"""Lowest (the last one for Python 3.10), middle, newest."""
FILES = {
    "standard": ExportOptions(),
    "int8": ExportOptions(activations="int8"),
    "merged": ExportOptions(graph="ort"),
    "qdq": ExportOptions(dialect="qdq"),
}
_CHILD = """
import sys
import onnxruntime
from rankbook.tools.cli import main
assert onnxruntime.__version__ == sys.argv[1], onnxruntime.__version__
failed = [file for file in sys.argv[3:] if main(["parity", file, "--checkpoint", sys.argv[2], "--tokens", "20",
          "--kernels", "bodies", "--quiet", "-o", file + ".json"])]
print(failed)
sys.exit(bool(failed))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in symmetric 4 bits with an error branch and a packed embedding, in every form."""
    work = tmp_path_factory.mktemp("versions")
    options = {"weight_format": "symmetric", "error_branch": "lqer", "error_rank": 2}
    checkpoint = make_checkpoint(work, "llama", model={"head_dim": 16}, bits=4, **options)
    for name, chosen in FILES.items():
        export(checkpoint, work / name, chosen)
    return work


def installed(version: str, target: Path) -> None:
    """Install one version of ONNX Runtime, alone, into a folder, or skip."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--target", str(target), f"onnxruntime=={version}"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"pip cannot download onnxruntime {version}: {' '.join(done.stderr.split())[-300:]}")


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_parity_in_every_version(version: str, folder: Path, tmp_path: Path) -> None:
    installed(version, tmp_path / "packages")
    path = os.pathsep.join([str(tmp_path / "packages"), os.environ.get("PYTHONPATH", "")])
    files = [str(folder / name) for name in FILES]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, version, str(folder / "checkpoint"), *files],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for file in files:
        assert json.loads(Path(f"{file}.json").read_text())["passed"]
