"""Layers solved on a Ray cluster: the same bits as in one process, whatever happens to the workers."""

from __future__ import annotations

import importlib.abc
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from rankbook.calibration.checkpoint.format import MANIFEST
from rankbook.calibration.device import DeviceError
from rankbook.calibration.driver import cluster
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.report import Progress, QuantizeReport
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.driver.solve import InProcess, LayerTask
from rankbook.tools import errors
from rankbook.tools.dev import family_models
from tests.calibration import problems
from tests.calibration.runs import files, interrupted, options
from tests.tiny import tiny_model
from tests.tools.files import run_cli

WORKERS = 3
_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "closed form, branch and rule": (
        "llama",
        {"method": "lcq", "effort": "fast", "error_branch": "qera", "error_rank": 4, "rules": ("*.o_proj: bits=8",)},
    ),
    "scaled inputs and training": (
        "gemma2",
        {"method": "lcq", "scale_inputs": "awq", "method_options": {"steps": 2, "compute": "float32"}},
    ),
    "experts, two threads": ("mixtral", {"method": "gptq"}),
    "parts of the text, experts": ("mixtral", {"method": "gptq", "calib_shards": 3}),
    "blocks in parallel, training": (
        "gemma2",
        {
            **{"method": "lcq", "order": "parallel", "calib_shards": 2, "scale_inputs": "awq"},
            "method_options": {"steps": 2, "compute": "float32"},
        },
    ),
    "blocks in parallel, experts, weights from files": (
        "mixtral",
        {"method": "gptq", "order": "parallel", "cluster_weights": "path"},
    ),
    "parts of the text, weights from files": (
        "gemma2",
        {"method": "gptq", "calib_shards": 2, "cluster_weights": "path"},
    ),
}


@pytest.fixture(scope="module")
def workers() -> Iterator[cluster.Cluster]:
    """A cluster of three workers on this machine, to which this process is connected."""
    pytest.importorskip("ray", reason="needs ray: pip install 'rankbook[cluster]'")
    with cluster.connected(QuantizeOptions(cluster=f"local:{WORKERS}", device="cpu")) as found:
        assert found is not None
        yield found


def _model(family: str, folder: Path) -> None:
    (family_models.tiny if family == "mixtral" else tiny_model)(family, folder)


@pytest.mark.parametrize("name", _METHODS)
def test_a_cluster_gives_the_files_of_one_process(name: str, workers: cluster.Cluster, tmp_path: Path) -> None:
    family, changes = _METHODS[name]
    _model(family, tmp_path / "model")
    chosen = options(tmp_path, **changes)
    told: list[Progress] = []
    threads, before = (2 if "two threads" in name else 1), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        quantize_model(tmp_path / "model", tmp_path / "one", chosen)
        report = quantize_model(
            tmp_path / "model", tmp_path / "many", replace(chosen, cluster="auto"), progress=told.append
        )
    finally:
        torch.set_num_threads(before)
    assert files(tmp_path / "one") == files(tmp_path / "many")
    manifests = [json.loads((tmp_path / name / MANIFEST).read_text()) for name in ("one", "many")]
    assert manifests[0]["layers"] == manifests[1]["layers"]
    assert manifests[0]["run"]["cluster"] == {}
    assert manifests[1]["run"]["cluster"] == report.cluster
    assert (report.cluster["tasks_at_once"], report.cluster["threads_of_a_task"]) == (WORKERS // threads, threads)
    parallel = chosen.order == "parallel"
    shares = [step.fraction for step in told if step.stage.startswith("solved" if parallel else "solving layers")]
    assert len(shares) == (_blocks(report) if parallel else len(report.layers))
    assert shares == sorted(shares)


def _blocks(report: QuantizeReport) -> int:
    return len({name.split(".layers.")[1].split(".")[0] for name in report.layers})


def _idle() -> list[psutil.Process]:
    """Return the workers that have nothing to do."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "".join(child.cmdline()).startswith("ray::IDLE")]


def _held_up(
    monkeypatch: pytest.MonkeyPatch, then: Callable[[list[psutil.Process]], None]
) -> Callable[[Progress], None]:
    """Return a listener that stops all idle workers as the first block begins; ``then`` is called when they have work.

    A stopped worker counts as alive: Ray gives each of them a layer, and starts another one where a place is left. That
    is awaited from the moment when there are layers enough, however long the machine took until then.
    """
    import ray

    stopped: list[psutil.Process] = []
    submit, sent = cluster.Cluster._submit, list[Any]()
    nap = ray.remote(lambda: time.sleep(1))
    while len(_idle()) < 2:
        ray.get([nap.remote() for _ in range(WORKERS)])

    def progress(step: Progress) -> None:
        if step.stage == "solving" and not stopped:
            stopped.extend(_idle())
            assert len(stopped) >= 2
            for worker in stopped:
                worker.suspend()

    def sending(*args: Any) -> Any:
        sent.append(submit(*args))
        if len(sent) == WORKERS:
            threading.Timer(2, then, [stopped]).start()
        return sent[-1]

    monkeypatch.setattr(cluster.Cluster, "_submit", sending)
    return progress


def test_a_killed_and_a_slow_worker_change_nothing(
    workers: cluster.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama", tmp_path / "model")
    chosen = options(tmp_path, method="lcq", effort="fast")
    quantize_model(tmp_path / "model", tmp_path / "one", chosen)
    done: list[str] = []

    def one_dies(stopped: list[psutil.Process]) -> None:
        stopped[0].kill()
        for worker in stopped[2:]:
            worker.resume()
        time.sleep(2)  # the others finish what they can meanwhile
        done.append("slow")
        stopped[1].resume()

    everywhere = replace(chosen, cluster="auto")
    quantize_model(tmp_path / "model", tmp_path / "many", everywhere, progress=_held_up(monkeypatch, one_dies))
    assert done == ["slow"], "the run did not wait for the slow worker"
    assert files(tmp_path / "one") == files(tmp_path / "many")


def test_a_layer_that_is_lost_for_good_ends_the_run_which_goes_on_later(
    workers: cluster.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows as well that the workers that the test above kills were at work."""
    tiny_model("llama", tmp_path / "model")
    chosen = options(tmp_path, method="lcq", effort="fast")
    quantize_model(tmp_path / "model", tmp_path / "one", chosen)
    monkeypatch.setattr(cluster, "_RETRIES", 0)

    def all_die(stopped: list[psutil.Process]) -> None:
        for worker in stopped:
            worker.kill()

    everywhere = replace(chosen, cluster="auto")
    with pytest.raises(DeviceError, match=r"the cluster lost model\.layers\.0\S+ 1 times .* go on with --resume"):
        quantize_model(tmp_path / "model", tmp_path / "many", everywhere, progress=_held_up(monkeypatch, all_die))
    quantize_model(tmp_path / "model", tmp_path / "many", everywhere, resume=True)
    assert files(tmp_path / "one") == files(tmp_path / "many")


def test_a_run_of_one_process_goes_on_on_a_cluster(workers: cluster.Cluster, tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "model")
    chosen = options(tmp_path, method="gptq")
    quantize_model(tmp_path / "model", tmp_path / "whole", chosen)
    interrupted(tmp_path, chosen)
    report = quantize_model(tmp_path / "model", tmp_path / "out", replace(chosen, cluster="auto"), resume=True)
    assert report.resumed_at == 1
    assert files(tmp_path / "whole") == files(tmp_path / "out")


@pytest.mark.slow
def test_the_command_line_joins_a_cluster_by_its_address(workers: cluster.Cluster, tmp_path: Path) -> None:
    import ray

    tiny_model("llama", tmp_path / "model")
    chosen = options(tmp_path, method="rtn")
    command = [sys.executable, "-m", "rankbook.tools", "quantize", str(tmp_path / "model"), "--method", "rtn"]
    command += ["--cluster", ray.get_runtime_context().gcs_address, "--threads", "1", "--json", "--device", "cpu"]
    command += ["--calib", str(chosen.calib), "-o", str(tmp_path / "q")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / ".pkg")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == errors.OK, done.stderr
    assert json.loads(done.stdout)["cluster"]["tasks_at_once"] == WORKERS


def test_errors_of_workers_arrive(workers: cluster.Cluster) -> None:
    good, chosen = problems.layer(32, 64), QuantizeOptions(method="rtn", group_size=32)
    bad = replace(good, weight=torch.full_like(good.weight, torch.nan))
    tasks = [LayerTask("a.layer", chosen, lambda: good), LayerTask("b.layer", chosen, lambda: bad)]
    with pytest.raises(ValueError, match=r"^the weights of b\.layer hold NaN or infinity"):
        workers.solve(tasks, lambda *_: None)
    (record, error), (there, its_error) = (
        executor.solve(tasks[:1], lambda *_: None)[0] for executor in (InProcess([torch.device("cpu")]), workers)
    )
    assert error == its_error
    assert torch.equal(record.codes, there.codes)


def test_tasks_that_wait_are_cancelled_after_an_error(
    workers: cluster.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    good, chosen = problems.layer(512, 1024), QuantizeOptions(method="gptq", group_size=32)  # takes a while
    bad = replace(good, weight=torch.full_like(good.weight, torch.nan))
    cancelled: list[Any] = []
    monkeypatch.setattr(ray, "cancel", lambda one, force: cancelled.append(one))
    tasks = [LayerTask("bad", chosen, lambda: bad), *[LayerTask("good", chosen, lambda: good)] * (3 * WORKERS)]
    with pytest.raises(ValueError, match="hold NaN"):
        workers.solve(tasks, lambda *_: None)
    assert WORKERS <= len(cancelled) < 2 * WORKERS, "those that no worker had begun, and none that had ended"


def test_only_what_has_not_ended_is_cancelled(workers: cluster.Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray aborts the process at times if a task is cancelled that has ended a moment ago."""
    import ray

    cancelled: list[Any] = []
    monkeypatch.setattr(ray, "cancel", lambda one, force: cancelled.append(one))
    short, long = ray.remote(lambda: None).remote(), ray.remote(lambda: time.sleep(3)).remote()
    with cluster._cancelled_at_the_end({short: 0, long: 1}):
        ray.get(short)
    assert cancelled == [long]


def test_blocks_that_wait_are_cancelled_after_an_error(
    workers: cluster.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama", tmp_path / "model", num_hidden_layers=4)
    chosen = options(tmp_path, method="gptq", order="parallel", cluster="auto")
    cancelled: list[Any] = []
    monkeypatch.setattr("ray.cancel", lambda one, force: cancelled.append(one))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rankbook.calibration.driver.resume.PartialState.save", full)
    with pytest.raises(OSError, match="No space"):
        quantize_model(tmp_path / "model", tmp_path / "q", chosen)
    assert cancelled


def test_a_worker_with_other_weights_is_refused(workers: cluster.Cluster, tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "model")
    chosen = options(tmp_path, method="gptq", order="parallel", cluster="auto", cluster_weights="path")

    def change(*_: Any) -> None:
        weights = tmp_path / "model" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1000] ^= 1
        weights.unlink()  # this process has it mapped still
        weights.write_bytes(content)

    with pytest.raises(
        DeviceError, match=r"a worker has other weights at .*/model than the machine .* give --cluster-w"
    ):
        quantize_model(tmp_path / "model", tmp_path / "q", chosen, begin=change)


def test_a_cluster_that_does_not_fit_is_refused(
    workers: cluster.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = options(tmp_path, method="rtn", cluster="auto")
    with pytest.raises(DeviceError, match="no machine has the 1 CPUs and 1 GPUs that a task takes; give --device cpu"):
        quantize_model(tmp_path / "model", tmp_path / "q", replace(chosen, device="cuda"))
    there = cluster._facts()
    monkeypatch.setattr("rankbook.calibration.driver.cluster.versions", lambda: {**there, "torch": "0.1"})  # here alone
    with pytest.raises(DeviceError, match=rf"workers have torch {re.escape(there['torch'])}, this process has 0\.1;"):
        quantize_model(tmp_path / "model", tmp_path / "q", chosen)
    assert not (tmp_path / "q").exists()


class _Without(importlib.abc.MetaPathFinder):
    """Finds no Ray."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (["--cluster", "local:2"], errors.MISSING, "the package 'ray' is not installed"),
        (["--cluster", "local:0"], errors.USAGE, "'local:0' is not a cluster; give local:N"),
        (["--cluster", "ray://head:10001"], errors.USAGE, "is not a cluster; give local:N"),
        (["--cluster", "auto", "--devices", "0,1"], errors.USAGE, "leave one of them out"),
        (["--cluster", "auto", "--cluster-gpus", "0"], errors.USAGE, "give more than 0"),
    ],
)
def test_what_cannot_be_is_said(
    flags: list[str],
    code: int,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "meta_path", [_Without(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    assert run_cli("quantize", tmp_path / "model", "-o", tmp_path / "q", *flags) == code
    assert text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_address_where_nothing_answers_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        with pytest.raises(DeviceError, match=r"nothing answers there .* This machine must belong to the cluster"):
            cluster._check_reachable(f"127.0.0.1:{taken.getsockname()[1]}")
