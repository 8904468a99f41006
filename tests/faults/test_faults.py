"""Each moment at which a run touches its files may be its last: nothing is lost, and going on gives the same files."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from rankbook.calibration.checkpoint.format import MANIFEST
from rankbook.tools import errors
from tests.faults.machine import Machine, Mode
from tests.plugins import emulated
from tests.tiny import tiny_model, write_text

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulated.compiler() is None, reason="needs a compiler"),
]
MOMENTS = int(os.environ.get("RANKBOOK_FAULTS", "3"))
"""Moments of each kind for each verb."""
_SIGKILL = -9


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a text, and what undisturbed runs made of them."""
    folder = tmp_path_factory.mktemp("faults")
    tiny_model("llama", folder / "model")
    write_text(folder / "text.txt")
    return folder


@pytest.fixture(scope="module")
def machine(work: Path) -> Iterator[Machine]:
    """The process that runs are forked from."""
    with Machine(work) as running:
        yield running


def quantize(work: Path, output: Path) -> list[object]:
    """Words of a run with training, which keeps finished blocks."""
    calib = ["--calib", work / "text.txt", "--calib-sequences", 2, "--calib-length", 16]
    steps = ["--method-option", "steps=2", "compute=float32"]
    return ["quantize", work / "model", "--method", "lcq", *steps, *calib, "-o", output, "--resume", "--threads", 1]


def export(work: Path, output: Path) -> list[object]:
    """Words of an export over one that is there."""
    return ["export", work / "whole" / "quantize", "-o", output, "--overwrite"]


VERBS = {"quantize": quantize, "export": export}


@pytest.fixture(scope="module")
def events(work: Path, machine: Machine) -> dict[str, int]:
    """How often an undisturbed run of each verb touches files; what it makes is kept in ``whole``."""
    found = {}
    (work / "whole").mkdir()
    for verb, words in VERBS.items():
        done = machine.run(work, Mode.COUNT, 0, *words(work, work / "whole" / verb))
        assert done["status"] == 0, done["said"]
        assert done["seen"] > 10
        found[verb] = done["seen"]
    return found


def moments(verb: str, kind: str, count: int, wanted: int = MOMENTS) -> list[int]:
    """Return events at which something happens: the first, the last, and random ones."""
    rng = random.Random(f"{verb} {kind}")
    return sorted({1, count, *(rng.randrange(1, count + 1) for _ in range(wanted - 2))})


def contents(folder: Path) -> dict[str, Any]:
    """Return every file of a result; of those that tell of the run, what does not."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.name == MANIFEST:
            manifest = json.loads(path.read_text())
            found[path.name] = {key: manifest[key] for key in ("layers", "format_version")}
        elif path.is_file() and path.suffix not in (".yaml", ".md") and path.name != "rankbook-files.json":
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_a_run_that_is_killed_is_repeated_with_the_same_files(
    verb: str, work: Path, machine: Machine, events: dict[str, int], tmp_path: Path
) -> None:
    whole = contents(work / "whole" / verb)
    for moment in moments(verb, "kill", events[verb]):
        place = tmp_path / str(moment)
        place.mkdir()
        words = VERBS[verb](work, place / "out")
        assert machine.run(place, Mode.KILL, moment, *words)["status"] == _SIGKILL, moment
        again = machine.run(place, Mode.COUNT, 0, *words)
        # Between the last two renames the result is finished, but out of place: the next run puts it there and says so.
        placed = again["status"] == errors.USAGE and "finished but out of place; it is in place now" in again["said"]
        assert again["status"] == 0 or placed, (moment, again["said"])
        assert contents(place / "out") == whole, moment
        left = [path.name for path in place.iterdir() if path.name != "out" and not path.name.endswith(".lock")]
        assert left == [], moment
        shutil.rmtree(place)


@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_is_named_and_the_earlier_result_stays(
    verb: str, work: Path, machine: Machine, events: dict[str, int], tmp_path: Path
) -> None:
    whole = contents(work / "whole" / verb)
    for moment in moments(verb, "full", events[verb], -(-MOMENTS // 2)):
        place = tmp_path / str(moment)
        place.mkdir()
        shutil.copytree(work / "whole" / verb, place / "out")
        words = [*VERBS[verb](work, place / "out"), *(["--overwrite"] if verb == "quantize" else [])]
        done = machine.run(place, Mode.FULL, moment, *words)
        if done["status"] == 0:  # nothing that needs space came after this moment
            assert moment > events[verb] // 2
        else:
            assert done["status"] == errors.USAGE, (moment, done["said"])
            assert "the disk is full" in done["said"] or "No space left" in done["said"], (moment, done["said"])
        assert contents(place / "out") == whole, moment
        shutil.rmtree(place)


@pytest.mark.parametrize("verb", VERBS)
def test_a_clock_that_goes_back_changes_nothing(
    verb: str, work: Path, machine: Machine, events: dict[str, int], tmp_path: Path
) -> None:
    """By ten years: in the middle of a run, and while an interrupted one waits to go on."""
    whole, words = contents(work / "whole" / verb), VERBS[verb]
    middle, now = events[verb] // 2, datetime.now(timezone.utc).year
    for name in ("during", "between"):
        place = tmp_path / name
        place.mkdir()
        if name == "between":
            assert machine.run(place, Mode.KILL, middle, *words(work, place / "out"))["status"] == _SIGKILL
        moment = middle if name == "during" else 0
        done = machine.run(place, Mode.BACK, moment, *words(work, place / "out"))
        assert done["status"] == 0, done["said"]
        assert done["year"] in (now - 11, now - 10), "the clock was not set back"
        assert contents(place / "out") == whole, name
        left = [path.name for path in place.iterdir() if path.name != "out" and not path.name.endswith(".lock")]
        assert left == [], name


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_that_cannot_be_written_is_named_before_the_work(
    verb: str, work: Path, machine: Machine, events: dict[str, int], tmp_path: Path
) -> None:
    shutil.copytree(work / "whole" / verb, tmp_path / "out")
    words = [*VERBS[verb](work, tmp_path / "out"), *(["--overwrite"] if verb == "quantize" else [])]
    done = machine.run(tmp_path, Mode.READ_ONLY, 0, *words)
    assert done["status"] == errors.USAGE, done["said"]
    assert "Read-only file system" in done["said"]
    assert str(tmp_path) in done["said"]
    assert contents(tmp_path / "out") == contents(work / "whole" / verb)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
