"""Damaged files chosen by the code that they reach: ``python -m tests.fuzz.guided TARGET [--seconds N]``.

Atheris (libFuzzer for Python) keeps inputs that reach new branches of this project and changes them further; the
changes are those of `tests.fuzz.mutations`. It stops at the first failure and leaves the input as ``crash-...``: a byte
for the number of the file among those of the target, then the file. ``make fuzz-guided`` runs every target.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

MORE_MEGABYTES = 1024
"""What the process may take, with PyTorch in it; `tests.fuzz.runner` measures each input."""
HANGS = 10
"""Seconds of the clock that an input may take."""


def main() -> None:
    """Fuzz one target; the process ends with the fuzzer's exit code, 0 where nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--inputs", type=int, default=-1, help="at most")
    given = parser.parse_args()
    import atheris  # the environment of `make fuzz-guided` has it

    with atheris.instrument_imports(include=["rankbook"]):  # also those of the loader, the first time that it runs
        from tests.fuzz.mutations import mutated
        from tests.fuzz.runner import is_undeclared, made, place
        from tests.fuzz.targets import TARGETS

        load, valid = TARGETS[given.target].load, made(given.target)
        load(valid)
    files = sorted(path.relative_to(valid) for path in valid.rglob("*") if path.is_file() and path.suffix != ".md")

    def change(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        number = data[0] % len(files) if data else 0
        return (bytes([number]) + mutated(data[1:], files[number].name, rng))[:most]

    def try_one(data: bytes) -> None:
        if not data:
            return
        folder = Path(tempfile.mkdtemp(dir=place()))
        try:
            shutil.copytree(valid, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
            (folder / files[data[0] % len(files)]).write_bytes(data[1:])
            load(folder)
        except Exception as error:
            if is_undeclared(error):
                raise
        finally:
            shutil.rmtree(folder)

    seeds = Path(tempfile.mkdtemp(dir=place()))
    for number, path in enumerate(files[:256]):
        (seeds / f"{number:03d}").write_bytes(bytes([number]) + (valid / path).read_bytes())
    limits = [f"-max_total_time={given.seconds}", f"-runs={given.inputs}", f"-timeout={HANGS}", "-max_len=1000000"]
    limits += [f"-rss_limit_mb={2048 + MORE_MEGABYTES}", "-print_final_stats=1", "-verbosity=1"]
    atheris.Setup([sys.argv[0], *limits, str(seeds)], try_one, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
