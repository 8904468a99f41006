"""Layers, blocks and statistics computed by the workers of a Ray cluster.

Ray schedules the tasks, moves tensors through its object store, and runs a task again if its worker is lost. A task is
a function of what it is given, and its results are put in the place of its layer: neither who solves a layer nor who
finishes first makes a difference.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rankbook.calibration.device import DeviceError, moved
from rankbook.calibration.driver.cluster_options import AUTO, STORE
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.parallel import BlockTask
from rankbook.calibration.driver.report import Reporter
from rankbook.calibration.driver.resume import BlockResult
from rankbook.calibration.driver.solve import LayerTask, Passage, Solved
from rankbook.calibration.driver.worker import (
    CPU,
    Files,
    Setting,
    narrow,
    send_tensors_as_arrays,
    solve_block,
    solve_layer,
    statistics_of,
)
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.model.capture import BlockStatistics
from rankbook.calibration.notes import note
from rankbook.calibration.versions import SHAPING, versions

_Entry = TypeVar("_Entry")
_RETRIES = 5
"""How often Ray runs a task again whose worker or machine is lost."""
_PATIENCE_S = 300.0
"""How long a machine may take to start a first worker."""
_SECONDS_TO_CONNECT = 5.0
_INSTRUCTIONS = "instructions"


@dataclass(frozen=True)
class Cluster:
    """A connection to a cluster whose machines have been checked; an `Executor`.

    Attributes:
        name: As the user gave it.
        machines: How many have room for a task.
        slots: Tasks that run at once.
        gpus: Of each task.
        device: Where workers compute, ``cpu`` or ``cuda``; Ray chooses which GPU.
        threads: Of each task, but of one whose layer is small.
        files: Where workers read the weights of whole blocks; None where they are sent.
    """

    name: str
    machines: int
    slots: int
    gpus: float
    device: str
    threads: int
    files: Files | None = None

    def reading(self, source: str | Path, options: QuantizeOptions) -> Cluster:
        """Return the cluster for a run on a model, whose workers may read it by themselves."""
        if options.cluster_weights == STORE:
            return self
        there = Path(source).absolute() if Path(source).exists() else source
        return replace(self, files=Files(str(there), options))

    def about(self) -> dict[str, Any]:
        """Return what the manifest says of it."""
        return {
            "address": self.name,
            "machines": self.machines,
            "tasks_at_once": self.slots,
            "threads_of_a_task": self.threads,
            "gpus_of_a_task": self.gpus,
        }

    def solve(self, tasks: Sequence[LayerTask], tell: Callable[[str, float], None]) -> list[Solved]:
        """See `rankbook.calibration.driver.solve.Executor`.

        Problems are made here, a few more at a time than the cluster solves at once.
        """
        import ray

        found: dict[int, Solved] = {}
        running: dict[Any, tuple[int, torch.device]] = {}

        def collect() -> None:
            (position, device), (record, errors) = _next(running, lambda entry: tasks[entry[0]].name)
            found[position] = moved(record, device), errors
            tell(f"solving layers on {self.machines} machines", len(found) / len(tasks))

        shared: tuple[LayerStatistics, Any] | None = None
        with _cancelled_at_the_end(running):
            for position, task in enumerate(tasks):
                while (
                    sum(self._threads(tasks[place]) for place, _ in running.values()) >= 2 * self.slots * self.threads
                ):
                    collect()
                problem = task.problem()
                if shared is None or shared[0] is not problem.statistics:  # those of q, k and v are sent once
                    shared = problem.statistics, ray.put(moved(problem.statistics, CPU))
                running[self._submit(task, problem, shared[1])] = position, problem.weight.device
            while running:
                collect()
        return [found[position] for position in range(len(tasks))]

    @contextlib.contextmanager
    def collecting(self, passage: Passage, parts: Sequence[Tensor]) -> Iterator[Iterator[BlockStatistics]]:
        """See `rankbook.calibration.driver.solve.Executor`; all parts are sent at once, the block a single time."""
        import ray

        if not parts:
            yield iter(())
            return
        file = self.files.block(passage.index, passage.block) if self.files else None
        block = passage.block if file is None else nn.Identity()
        sent = ray.put(replace(passage, block=block, call=passage.call.on(Tensor.cpu)))
        remote = self._remote(statistics_of, "statistics", self.threads)
        running = {remote.remote(sent, part.cpu(), file, self._setting(self.threads)): part for part in parts}
        with _cancelled_at_the_end(running):
            yield (_result(reference, "a part of the calibration text") for reference in list(running))

    def solve_blocks(self, tasks: Iterable[BlockTask]) -> Iterator[tuple[int, BlockResult]]:
        """See `rankbook.calibration.driver.solve.Executor`; one more is sent than the cluster solves at once.

        Where one fails, those that are done come first, so that they are kept and `--resume` need not solve them again.
        """
        import ray

        running: dict[Any, int] = {}
        sent: dict[int, tuple[Tensor, Any]] = {}

        def shared(values: Tensor | None) -> Any:
            """Return the reference to a stream, which is the targets of one block and the inputs of the next."""
            if values is None:
                return None
            if id(values) not in sent:
                sent[id(values)] = values, ray.put(values.cpu())
            return sent[id(values)][1]

        def send(task: BlockTask) -> None:
            nonlocal sent
            streams = shared(task.inputs), shared(task.targets)
            sent = {key: entry for key, entry in sent.items() if entry[0] is task.targets}
            file = self.files.block(task.site.index, task.site.block) if self.files else None
            site = task.site if file is None else replace(task.site, block=nn.Identity())
            call, empty = task.call.on(Tensor.cpu), torch.empty(0)
            given = replace(task, site=site, call=call, inputs=empty, targets=None, reporter=Reporter(1))
            remote = self._remote(solve_block, f"solve {site.prefix[:-1]}", self.threads)
            running[remote.remote(given, *streams, file, self._setting(self.threads))] = site.index

        with _cancelled_at_the_end(running):
            try:
                for task in tasks:
                    while len(running) > self.slots:
                        yield _next(running, _block)
                    send(task)
                while running:
                    yield _next(running, _block)
            except Exception:
                yield from _done(running, _block)
                raise

    def _submit(self, task: LayerTask, problem: LayerProblem, statistics: Any) -> Any:
        """Send one task; statistics are a reference to the object store."""
        given = moved(replace(problem, statistics=LayerStatistics.unseen(problem.weight.shape[1])), CPU)
        given = replace(given, weight=narrow(given.weight))
        remote = self._remote(solve_layer, f"solve {task.name}", self._threads(task))
        return remote.remote(task.name, given, statistics, task.options, self._setting(self._threads(task)))

    def _remote(self, function: Callable[..., Any], name: str, threads: int) -> Any:
        import ray

        taken = {"num_cpus": threads, "num_gpus": self.gpus, "max_retries": _RETRIES}
        return ray.remote(function).options(name=name, **taken)

    def _setting(self, threads: int) -> Setting:
        return Setting(self.device, threads)

    def _threads(self, task: LayerTask) -> int:
        return 1 if task.small else self.threads


@contextlib.contextmanager
def connected(options: QuantizeOptions) -> Iterator[Cluster | None]:
    """Connect to the cluster of the options; None where they name none.

    A process that Ray is connected in already keeps that connection.

    Raises:
        DeviceError: The cluster cannot be reached, lacks what a task needs, or has other versions installed.
        ModuleNotFoundError: Ray is not installed.
    """
    if options.cluster is None:
        yield None
        return
    import ray

    with contextlib.ExitStack() as held:
        if not ray.is_initialized():
            _connect(options, held)
            held.callback(ray.shutdown)
        send_tensors_as_arrays()
        yield _checked(options)


def _connect(options: QuantizeOptions, held: contextlib.ExitStack) -> None:
    """Start workers of this machine, or join a cluster."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    workers, name = options.local_workers(), options.cluster
    try:
        if workers is not None:
            # Closed after the cluster is shut down, whose processes may take a moment longer.
            kept = tempfile.TemporaryDirectory(prefix="rankbook-", ignore_cleanup_errors=True)
            quiet |= {"include_dashboard": False, "_temp_dir": held.enter_context(kept)}
            quiet |= {"_system_config": {"worker_niceness": 0}}  # this process only waits for them
            gpus = {"num_gpus": 0} if options.device == "cpu" else {}
            ray.init(num_cpus=workers * torch.get_num_threads(), **gpus, **quiet)
        else:
            if name != AUTO:
                _check_reachable(str(name))
            ray.init(address=name, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, DeviceError):
            raise
        raise DeviceError(f"--cluster {name}: Ray does not start or connect ({_first_line(error)}). {_HOW}") from error


_HOW = (
    "This machine must belong to the cluster: `ray start --address HOST:PORT` joins it, `ray start --head` begins one;"
    " or give local:N"
)


def _check_reachable(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise DeviceError(f"--cluster {address}: nothing answers there ({error}). {_HOW}") from error


def _checked(options: QuantizeOptions) -> Cluster:
    """Return the cluster once it is known that its machines can do what they will be asked."""
    import ray

    machines = [node for node in ray.nodes() if node["Alive"]]
    total = sum(node["Resources"].get("GPU", 0) for node in machines)
    on_gpus = options.device != "cpu" and (options.device != AUTO or total > 0)
    device, threads = ("cuda", 1) if on_gpus else ("cpu", torch.get_num_threads())
    wanted = {"CPU": float(threads), **({"GPU": options.cluster_gpus} if on_gpus else {})}
    slots = {node["NodeID"]: _slots(node["Resources"], wanted) for node in machines}
    used = [node for node, count in slots.items() if count]
    if not used:
        needs = " and ".join(f"{amount:g} {kind}s" for kind, amount in wanted.items())
        way = "--device cpu, or fewer --cluster-gpus" if on_gpus else "fewer --threads"
        raise DeviceError(f"--cluster {options.cluster}: no machine has the {needs} that a task takes; give {way}")
    _check_versions(str(options.cluster), used)
    return Cluster(str(options.cluster), len(used), sum(slots.values()), wanted.get("GPU", 0), device, threads)


def _slots(offered: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    return min(int(offered.get(kind, 0) / amount + 1e-6) for kind, amount in wanted.items())


def _check_versions(name: str, machines: Sequence[str]) -> None:
    """Ask every machine what is installed there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    asked = [ray.remote(_facts).options(num_cpus=0, scheduling_strategy=On(node, soft=False)) for node in machines]
    try:
        answers = ray.get([one.remote() for one in asked], timeout=_PATIENCE_S)
    except ray.exceptions.RayError as error:
        why = f"--cluster {name}: rankbook does not run on every machine ({_first_line(error)})"
        raise DeviceError(f"{why}; install the same version of it there as here") from error
    own = _facts()
    for package in SHAPING:
        if other := {answer[package] for answer in answers} - {own[package]}:
            there = " and ".join(sorted(other))
            raise DeviceError(
                f"--cluster {name}: workers have {package} {there}, this process has {own[package]}; install the same"
                " version everywhere"
            )
    kinds = sorted({answer[_INSTRUCTIONS] for answer in (*answers, own)})
    if len(kinds) > 1:
        note(
            f"the processors of the cluster differ ({', '.join(kinds)}): the last bits of a result depend on which of"
            " them solves a layer"
        )


def _facts() -> dict[str, str]:
    """Return what shapes a result on this machine."""
    return {**versions(), _INSTRUCTIONS: torch.backends.cpu.get_cpu_capability()}


@contextlib.contextmanager
def _cancelled_at_the_end(running: Mapping[Any, Any]) -> Iterator[None]:
    """Tell the cluster to stop what is still running when the block ends, which is so after an error.

    What has ended is left alone. Ray 2.60 aborts this process if a task is cancelled whose result has come and whose
    reply has not ("Tried to complete task that was not pending").
    """
    import ray

    try:
        yield
    finally:
        references = list(running)
        unfinished = ray.wait(references, num_returns=len(references), timeout=0)[1] if references else ()
        for reference in unfinished:
            ray.cancel(reference, force=False)


def _next(running: dict[Any, _Entry], name: Callable[[_Entry], str]) -> tuple[_Entry, Any]:
    """Wait for one of the tasks that run; return what was noted of it, and its result."""
    import ray

    ready = ray.wait(list(running), num_returns=1)[0][0]
    entry = running.pop(ready)
    return entry, _result(ready, name(entry))


def _done(running: dict[Any, _Entry], name: Callable[[_Entry], str]) -> Iterator[tuple[_Entry, Any]]:
    """Return what was noted of the tasks that are done, and their results; those that failed are left out."""
    import ray

    for ready in ray.wait(list(running), num_returns=len(running), timeout=0)[0] if running else ():
        entry = running.pop(ready)
        try:
            result = _result(ready, name(entry))
        except Exception:
            continue
        yield entry, result


def _block(index: int) -> str:
    return f"block {index}"


def _result(reference: Any, name: str) -> Any:
    """Return what a task gave, and say its notes; its own error where it failed."""
    import ray

    try:
        found, notes = ray.get(reference)
        for text in notes:
            note(text)
        return found
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, Exception) else error) from error
    except ray.exceptions.RayError as error:
        raise DeviceError(
            f"the cluster lost {name} {_RETRIES + 1} times ({_first_line(error)}); look for workers that run out of"
            " memory, and go on with --resume"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
