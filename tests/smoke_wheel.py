"""Try an installed wheel: ``python tests/smoke_wheel.py PYTHON``; the environment of PYTHON holds the wheel alone.

The dependencies are lent by the environment that runs this script through a .pth file, which adds a folder to the path
but does not run the editable install that lies there. So a module that the wheel forgot is not found.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

MODULES = """
import importlib, pkgutil, sys
from pathlib import Path
import rankbook
home = Path(rankbook.__file__).parent
if not home.is_relative_to(sys.prefix):
    sys.exit(f"rankbook comes from {home}, not from the wheel in {sys.prefix}")
names = ["rankbook." + part for part in ("plugins", "calibration", "exporter", "tools")]
for name in list(names):
    package = importlib.import_module(name)
    names += [info.name for info in pkgutil.walk_packages(package.__path__, name + ".")]
for name in names:
    module = importlib.import_module(name)
    if not Path(module.__file__).is_relative_to(sys.prefix):
        sys.exit(f"{name} comes from {module.__file__}")
print(len(names), "modules imported from", home)
"""


NATIVE = """
from rankbook.plugins import library
print(library.unavailable("ort") or library.native_info("ort"))
"""


def run(*command: str) -> None:
    """Run a command outside the checkout; stop with its output when it fails."""
    done = subprocess.run(command, cwd=sys.prefix, capture_output=True, text=True, check=False, timeout=300)
    print("$", Path(command[0]).name, *(word for word in command[1:] if "\n" not in word))
    if done.returncode:
        sys.exit(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    print("  " + done.stdout.strip().splitlines()[0])


def main() -> None:
    """Lend the dependencies, import every module, start the command."""
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/smoke_wheel.py PYTHON")
    python = Path(sys.argv[1]).absolute()
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", query], capture_output=True, text=True, check=True).stdout.strip())
    lent = sysconfig.get_path("purelib")
    (packages / "lent_dependencies.pth").write_text(f"{lent}\n", encoding="utf-8")
    run(str(python), "-c", MODULES)
    run(str(python), "-c", NATIVE)
    if extra := [path.name for path in packages.glob("rankbook/tools/dev/*")]:
        sys.exit(f"the wheel holds what only developers run: {extra}")
    if "RANKBOOK_EXPECT_NATIVE" in os.environ and not list(packages.glob("rankbook/plugins/lib/*.so")):
        sys.exit("the wheel does not hold the native library, although the checkout could build it")
    held = {path.name: path.stat().st_size / 1e6 for path in packages.glob("rankbook/plugins/lib/*")}
    print("native files, MB:", ", ".join(f"{name} {size:.1f}" for name, size in sorted(held.items())) or "none")
    if "RANKBOOK_EXPECT_CUDA" in os.environ and not {"librankbook_trt.so", "librankbook_ort_cuda.so"} <= set(held):
        sys.exit("the wheel does not hold the libraries with CUDA kernels, although the checkout could build them")
    command = str(python.with_name("rankbook"))
    run(command, "--help")
    run(command, "doctor", "--json")


if __name__ == "__main__":
    main()
