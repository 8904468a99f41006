"""`rankbook bench` measures what it says, in turns, and stores it."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from rankbook.plugins.library import unavailable as library_unavailable
from rankbook.tools import errors
from rankbook.tools.bench import bandwidth, layer_bench, plot, timing
from rankbook.tools.bench.layers import matmul_nbits, packed_matmul, plain_float
from rankbook.tools.bench.memory import Memory
from rankbook.tools.bench.model_bench import ModelResult
from rankbook.tools.bench.subject import ModelSubject
from rankbook.tools.inspect.sizes import packed_size
from rankbook.tools.runtimes.ort import session
from tests.tools.files import run_cli, stdout_json

built = pytest.mark.skipif(library_unavailable("ort") is not None, reason=str(library_unavailable("ort")))


def test_turns_are_interleaved() -> None:
    """Each subject runs once a turn, in order; the first turn does not count."""
    ran: list[str] = []

    def subject(name: str) -> float:
        ran.append(name)
        return float(len(ran))

    fractions: list[float] = []
    values = timing.interleave({"a": lambda: subject("a"), "b": lambda: subject("b")}, 2, fractions.append)
    assert ran == ["a", "b"] * 3
    assert values == {"a": [3, 5], "b": [4, 6]}
    assert fractions[-1] == 1


def test_ratio_of_the_same_turn() -> None:
    """A turn in which everything is slow does not move the ratio."""
    assert timing.median_ratio([2, 20, 2], [1, 10, 1]) == 2


def test_a_single_thread_has_its_own_clock() -> None:
    """Waiting, as for other programs, counts on the wall only."""
    assert timing.clock(1) is time.thread_time
    assert timing.clock(2) is timing.clock(None) is time.perf_counter


def test_bandwidth_is_positive() -> None:
    """One thread, and several, which share the work."""
    assert bandwidth.read_bandwidth(1, size=1 << 22, repeats=1) > 0
    assert bandwidth.read_bandwidth(2, size=1 << 20, repeats=1) > 0


def test_models_hold_distinct_constants() -> None:
    """As many layers as the bytes to stream need, no two of them with the same codes."""
    model, copies, size = packed_matmul(4, 1).model((64, 128), 20_000)
    assert copies == -(-20_000 // size)
    codes = [tensor.raw_data for tensor in model.graph.initializer if tensor.name.startswith("codes")]
    assert len(codes) == len(set(codes)) == copies
    stored = {tensor.name: len(tensor.raw_data) for tensor in model.graph.initializer if tensor.name.endswith("_0")}
    assert sum(stored.values()) == size


@built
@pytest.mark.parametrize(
    "subject",
    [packed_matmul(3, 2), packed_matmul(4, 1, branch=4), packed_matmul(8, 1), packed_matmul(2, 1, activations="fp32")],
)
def test_ours_runs(subject) -> None:
    """The drawn layers are valid nodes."""
    model, copies, _ = subject.model((64, 128), 1)
    held = session(model.SerializeToString(), native=True, activations=subject.activations)
    (y,) = held.run(None, {"x": np.ones((2, 128), np.float32)})
    assert copies == 1
    assert y.shape == (2, 64)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("subject", [matmul_nbits(4), matmul_nbits(2), plain_float()])
def test_peers_run(subject) -> None:
    """So are those of the peers."""
    model, _, _ = subject.model((64, 128), 1)
    (y,) = session(model.SerializeToString()).run(None, {"x": np.ones((1, 128), np.float32)})
    assert y.shape == (1, 64)


def test_who_is_compared_with_whom() -> None:
    """Widths that MatMulNBits lacks are compared with its 4 bits; peers with nobody."""
    names = ["MatMulNBits 4 bits", "MatMulNBits 2 bits", "MatMul fp32"]
    assert layer_bench.peer_of(packed_matmul(3, 1), names) == "MatMulNBits 4 bits"
    assert layer_bench.peer_of(packed_matmul(2, 1), names) == "MatMulNBits 2 bits"
    assert layer_bench.peer_of(packed_matmul(2, 1), names[2:]) == "MatMul fp32"
    assert layer_bench.peer_of(matmul_nbits(4), names) is None


@built
def test_layers_from_the_command_line(tmp_path, capsys) -> None:
    """One small layer: a report with every subject, and the stored table."""
    shape = ["--shapes", "64x128", "--bits", 4, "--ranks", 1, "--repeats", 2, "--stream", 1, "--threads", 1]
    assert run_cli("bench", *shape, "--json", "--quiet", "-o", tmp_path) == errors.OK
    report = stdout_json(capsys)
    assert [item["name"] for item in report["layers"]] == ["rankbook 4 bits rank 1 int8", "MatMulNBits 4 bits"]
    mine, peer = report["layers"]
    assert mine["ratio"] > 0
    assert peer["ratio"] is None
    assert mine["gigabytes_per_second"] == pytest.approx(mine["bytes"] / mine["microseconds"] / 1e3)
    assert report["bandwidth"]["1"] > 0
    assert json.loads((tmp_path / "bench.json").read_text("utf-8"))["machine"] == report["machine"]
    assert "| rankbook 4 bits rank 1 int8 | 64 x 128 |" in (tmp_path / "bench.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shapes", "64"], "4096x14336"),
        (["--bits", "5"], "choose one of 2, 3, 4, 8"),
        (["--repeats", "0"], "at least 1"),
        (["no/such/model"], "does not exist"),
        (["--shapes", "64x100", "--stream", "1"], "do not divide"),
        (["--no-native"], "native library"),
    ],
)
@built
def test_wrong_flags_are_named(flags, words, capsys) -> None:
    """A usage error with what is allowed."""
    assert run_cli("bench", *flags, "--quiet") == errors.USAGE
    assert words in capsys.readouterr().err


def test_subjects_name_their_kernels(tmp_path) -> None:
    """``PATH@KERNELS`` chooses; a path that holds an @ stays a path."""
    odd = tmp_path / "model@home"
    odd.mkdir()
    assert ModelSubject.parse(f"{tmp_path}@bodies", "auto") == ModelSubject(tmp_path, "bodies")
    assert ModelSubject.parse(str(odd), "native") == ModelSubject(odd, "native")


def test_plot(tmp_path) -> None:
    """A picture where matplotlib is, a sentence where it is not."""
    result = ModelResult("m", "native", 3.4, 1, 10.0, 11.0, {}, None, {}, Memory(1, 2, 3))
    if plot.unavailable():
        assert "rankbook[bench]" in str(plot.unavailable())
    else:
        plot.draw([result], tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 1000


def test_sizes_add_up(tmp_path) -> None:
    """Packed bytes are those of the nodes' constants, weights N x K of each layer."""
    import onnx

    from rankbook.exporter.file import ExportedModel

    model, copies, size = packed_matmul(4, 1).model((64, 128), 20_000)
    onnx.save(model, tmp_path / "model.onnx")
    assert packed_size(ExportedModel.open(tmp_path)) == (copies * size, copies * 64 * 128)


def test_reading_a_file_loads_no_torch(tmp_path) -> None:
    """What a process holds before it opens a model is small beside the model: torch takes 230 MB."""
    import onnx

    onnx.save(packed_matmul(4, 1).model((64, 128), 1)[0], tmp_path / "model.onnx")
    code = (
        "import pathlib, sys\nfrom rankbook.tools.bench.subject import ModelSubject\n"
        f"ModelSubject(pathlib.Path({str(tmp_path)!r})).prepare()\nprint({{'onnx', 'torch'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'onnx'}"
