"""An output folder is replaced as a whole, by one run, and nothing that somebody else wrote is deleted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rankbook.calibration.checkpoint import output
from rankbook.calibration.checkpoint.files import write_text_atomic
from rankbook.calibration.checkpoint.output import LISTING, check_replaceable, claim, locked, replaced_folder
from rankbook.calibration.notes import Note

MARK = "mark.json"
ROOT = Path(__file__).parents[3]


def write(target: Path, text: str = "new") -> None:
    """Write an output of two files, one of them in a folder and with the mode that safetensors gives."""
    with replaced_folder(target, MARK) as folder:
        (folder / MARK).write_text(text)
        (folder / "inner").mkdir()
        descriptor = os.open(folder / "inner" / "weights", os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(descriptor, text.encode())
        os.close(descriptor)


def child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python that has ``write`` and ``output``, in this place."""
    begin = "import os, signal, sys; from pathlib import Path; from tests.calibration.checkpoint.test_output import *;"
    paths = {**os.environ, "PYTHONPATH": f"{ROOT / '.pkg'}:{ROOT}"}
    command = [sys.executable, "-c", begin + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=paths, check=False)


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to swap."""
    if request.param == "two renames":
        monkeypatch.setattr(output, "_exchange", lambda *_: False)
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_written_as_a_whole_and_nothing_is_left_over(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    inode = (tmp_path / "out").stat().st_ino
    write(tmp_path / "out")
    assert (tmp_path / "out" / "inner" / "weights").read_text() == "new"
    assert (tmp_path / "out").stat().st_ino != inode
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["notes.txt", ".git/config", "inner/mine", "model.onnx"])
def test_files_of_others_are_never_deleted(name: str, tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "rankbook-quantize.yaml").write_text("of the command line")
    write(tmp_path / "out", "old")
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("precious")
    with pytest.raises(FileExistsError, match=rf"1 files that are not in its rankbook-files\.json \({name}\)"):
        write(tmp_path / "out")
    assert foreign.read_text() == "precious"
    assert (tmp_path / "out" / MARK).read_text() == "old"


def test_a_mark_that_anybody_may_have_is_not_enough(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARK).write_text("{}")
    with pytest.raises(FileExistsError, match=r"mark\.json"):
        write(tmp_path / "out")
    (tmp_path / "out" / MARK).unlink()
    (tmp_path / "out" / LISTING).write_text("{}")
    with pytest.raises(FileExistsError, match=r"holds no mark\.json"):
        check_replaceable(tmp_path / "out", MARK)


def test_files_that_appear_during_the_run_are_kept(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")

    def run() -> None:
        with replaced_folder(tmp_path / "out", MARK) as folder:
            (folder / MARK).write_text("new")
            (tmp_path / "out" / "late.txt").write_text("precious")

    with pytest.raises(OSError, match="the finished result is in"):
        run()
    assert (tmp_path / "out" / "late.txt").read_text() == "precious"
    (kept,) = [path for path in tmp_path.iterdir() if path.name != "out"]
    assert (kept / MARK).read_text() == "new"


def test_files_that_appear_at_the_swap_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "old")
    swap = output._swap

    def late(temporary: Path, target: Path) -> Path:
        if (target / MARK).is_file():
            (target / "late.txt").write_text("precious")
        return swap(temporary, target)

    monkeypatch.setattr(output, "_swap", late)
    with pytest.warns(Note, match="somebody else appeared"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / MARK).read_text() == "new"
    (kept,) = [path for path in tmp_path.iterdir() if path.name != "out"]
    assert (kept / "late.txt").read_text() == "precious"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_bigger_disk_stays_one(there: bool, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    if there:
        (tmp_path / "disk" / "real").mkdir()
    for text in ("old", "new"):
        write(tmp_path / "out", text)
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "disk" / "real" / MARK).read_text() == text
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_modes_are_those_of_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*")}
    assert modes.pop("inner") == (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    assert set(modes.values()) == {0o666 & ~mask}


def test_two_runs_do_not_write_one_folder(tmp_path: Path) -> None:
    with locked(tmp_path / "out") as target:
        second = child("write(Path(sys.argv[1]))", tmp_path / "out")
        assert f"another run (process {os.getpid()}) is writing {target}" in second.stderr
        refused: list[Exception] = []

        def other_thread() -> None:
            try:
                write(tmp_path / "out", "other")
            except FileExistsError as error:
                refused.append(error)

        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        assert len(refused) == 1
        (tmp_path / "link").symlink_to("out")
        with locked(tmp_path / "link") as same:  # the same run, by another name
            assert same == target
        write(tmp_path / "out", "mine")
        assert not child("write(Path(sys.argv[1]))", tmp_path / "else").returncode
    assert (tmp_path / "out" / MARK).read_text() == "mine"
    assert not child("write(Path(sys.argv[1]))", tmp_path / "out").returncode


def test_racing_runs_leave_one_whole_result(tmp_path: Path) -> None:
    begin = "import contextlib, sys; from tests.calibration.checkpoint.test_output import *\nfor _ in range(20):\n"
    code = " with contextlib.suppress(FileExistsError): write(Path(sys.argv[1]), sys.argv[2])"
    paths = {**os.environ, "PYTHONPATH": f"{ROOT / '.pkg'}:{ROOT}"}
    runs = [
        subprocess.Popen([sys.executable, "-c", begin + code, str(tmp_path / "out"), name], cwd=ROOT, env=paths)
        for name in ("first", "second")
    ]
    assert [run.wait() for run in runs] == [0, 0]
    assert (tmp_path / "out" / MARK).read_text() == (tmp_path / "out" / "inner" / "weights").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


_KILLS = {
    "while it writes": "output._complete = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
    "before the swap": "output._put = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
    "after the exchange": "output._foreign = lambda folder: os.kill(os.getpid(), 9) if 'tmp' in folder.name else []",
    "between two renames": (
        "output._exchange = lambda *_: False; rename = Path.rename; Path.rename = lambda a, b:"
        " rename(a, b) if 'old' in b.name or not (a / MARK).is_file() else os.kill(os.getpid(), 9)"
    ),
}


@pytest.mark.parametrize("moment", _KILLS)
def test_a_kill_loses_neither_the_old_nor_a_finished_result(moment: str, tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    assert child(f"{_KILLS[moment]}; write(Path(sys.argv[1]))", tmp_path / "out").returncode == -signal.SIGKILL
    if moment == "between two renames":
        assert not (tmp_path / "out").exists()
        with pytest.raises(FileExistsError, match=r"left .* finished but out of place; it is in place now"):
            write(tmp_path / "out")
    held = (tmp_path / "out" / MARK).read_text()
    assert held == ("old" if moment in ("while it writes", "before the swap") else "new")
    write(tmp_path / "out", "next")
    assert (tmp_path / "out" / MARK).read_text() == "next"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_swap_that_fails_keeps_the_result_and_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "old")
    exchange = output._exchange

    def busy(first: Path, second: Path) -> bool:
        if (second / MARK).is_file():
            raise OSError(16, "Device or resource busy")
        return exchange(first, second)

    monkeypatch.setattr(output, "_exchange", busy)
    with pytest.raises(OSError, match=r"busy\); the finished result is in (.*)$") as caught:
        write(tmp_path / "out")
    assert (Path(str(caught.value).rpartition(" in ")[2]) / MARK).read_text() == "new"
    assert (tmp_path / "out" / MARK).read_text() == "old"


def test_what_cannot_be_swapped_fails_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(target: Path) -> None:
        with locked(target):
            pytest.fail("the work began")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(output, "_is_mount", lambda folder: folder == tmp_path / "out")
    with pytest.raises(OSError, match="is a mount point"):
        work(tmp_path / "out")
    monkeypatch.setattr(output, "_is_mount", lambda folder: False)

    def refuse(*_: Path) -> bool:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(output, "_exchange", refuse)
    with pytest.raises(PermissionError):
        work(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_mount_points_are_seen() -> None:
    assert output._is_mount(Path("/proc"))
    assert not output._is_mount(Path(__file__).parent)


def test_hidden_files_with_similar_names_are_left_alone(tmp_path: Path) -> None:
    names = [".out.tmp", ".out.old", ".out.1234.rankbook-tmp", "out.rankbook-tmp"]
    for name in names:
        (tmp_path / name).write_text("precious")
    (tmp_path / ".out.12345678.rankbook-tmp").symlink_to(tmp_path)
    write(tmp_path / "out")
    assert all((tmp_path / name).read_text() == "precious" for name in names)


def test_text_goes_through_a_link_under_a_name_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / ".report.json.tmp").write_text("precious")
    (tmp_path / "report.json").symlink_to(tmp_path / "disk" / "real.json")
    write_text_atomic(tmp_path / "report.json", "text")
    assert (tmp_path / "report.json").is_symlink()
    assert (tmp_path / "disk" / "real.json").read_text() == "text"
    assert (tmp_path / ".report.json.tmp").read_text() == "precious"


def test_a_folder_that_is_filled_file_by_file_must_be_claimed(tmp_path: Path) -> None:
    claim(tmp_path / "demo")
    (tmp_path / "demo" / "report.md").write_text("of the demo")
    claim(tmp_path / "demo")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.md").write_text("precious")
    with pytest.raises(FileExistsError, match="rankbook did not write it"):
        claim(tmp_path / "mine")
