"""Layers solved by the workers of a Ray cluster.

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
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rankbook.calibration.device import DeviceError, moved, resolve
from rankbook.calibration.driver.cluster_options import AUTO
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.report import Errors
from rankbook.calibration.driver.solve import LayerTask, Solved, solve_task
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.notes import Note, note
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.calibration.versions import SHAPING, versions

_CPU = torch.device("cpu")
_RETRIES = 5
"""How often Ray runs a task again whose worker or machine is lost."""
_PATIENCE_S = 300.0
"""How long a machine may take to start a first worker."""
_SECONDS_TO_CONNECT = 5.0
_INSTRUCTIONS = "instructions"


@dataclass(frozen=True)
class _Setting:
    """How a worker computes.

    Attributes:
        device: ``cpu`` or ``cuda``; Ray chooses which GPU.
        threads: They order the sums of products: as many as in a run without a cluster, so that results are equal.
    """

    device: str
    threads: int


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
    """

    name: str
    machines: int
    slots: int
    gpus: float
    device: str
    threads: int

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
            ready = ray.wait(list(running), num_returns=1)[0][0]
            position, device = running.pop(ready)
            record, errors, notes = _result(ready, tasks[position].name)
            for text in notes:
                note(text)
            found[position] = moved(record, device), errors
            tell(f"solving layers on {self.machines} machines", len(found) / len(tasks))

        shared: tuple[LayerStatistics, Any] | None = None
        for position, task in enumerate(tasks):
            while sum(self._threads(tasks[place]) for place, _ in running.values()) >= 2 * self.slots * self.threads:
                collect()
            problem = task.problem()
            if shared is None or shared[0] is not problem.statistics:  # those of q, k and v are sent once
                shared = problem.statistics, ray.put(moved(problem.statistics, _CPU))
            running[self._submit(task, problem, shared[1])] = position, problem.weight.device
        while running:
            collect()
        return [found[position] for position in range(len(tasks))]

    def _submit(self, task: LayerTask, problem: LayerProblem, statistics: Any) -> Any:
        """Send one task; statistics are a reference to the object store."""
        import ray

        given = moved(replace(problem, statistics=LayerStatistics.unseen(problem.weight.shape[1])), _CPU)
        given = replace(given, weight=_narrow(given.weight))
        setting = _Setting(self.device, self._threads(task))
        taken = {"num_cpus": setting.threads, "num_gpus": self.gpus, "max_retries": _RETRIES}
        remote = ray.remote(_solve).options(name=f"solve {task.name}", **taken)
        return remote.remote(task.name, given, statistics, task.options, setting)

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
        _send_tensors_as_arrays()
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


def _result(reference: Any, name: str) -> Any:
    """Return what a task gave; its own error where it failed."""
    import ray

    try:
        return ray.get(reference)
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


def _solve(
    name: str, problem: LayerProblem, statistics: LayerStatistics, options: QuantizeOptions, setting: _Setting
) -> tuple[QuantizedLinear, Errors, list[str]]:
    """Solve one layer in a worker; return its record, its errors and the notes that were made meanwhile."""
    _send_tensors_as_arrays()
    torch.set_num_threads(setting.threads)
    device = resolve(setting.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Note)
        given = replace(problem, weight=problem.weight.float(), statistics=statistics)
        try:
            record, errors = solve_task(name, moved(given, device), options, device)
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"the memory of a worker's {device} does not suffice for {name}; give more --cluster-gpus, so that"
                " fewer tasks share one, or --device cpu, with --resume to go on at this block"
            ) from error
    return moved(record, _CPU), errors, [str(one.message) for one in caught if issubclass(one.category, Note)]


def _narrow(weight: Tensor) -> Tensor:
    """Return a float32 weight in 16 bits where these hold it: the model is stored so, and half as much travels."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal((half := weight.to(dtype)).float(), weight):
            return half
    return weight


def _send_tensors_as_arrays() -> None:
    """Let Ray send tensors as arrays of numpy, which processes of a machine share without a copy."""
    from ray.util.serialization import register_serializer

    register_serializer(Tensor, serializer=_to_array, deserializer=_from_array)


_Sent = tuple[Any, torch.dtype, tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def _to_array(tensor: Tensor) -> _Sent:
    """Return the bytes of a tensor, what they hold, and how it lies in memory: products depend on that in last bits."""
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.ndim), key=lambda axis: -strides[axis]))
    values = tensor.detach().cpu().permute(order)
    small = values[tuple(slice(1) if stride == 0 else slice(None) for stride in values.stride())]
    array = small.contiguous().as_strided((small.numel(),), (1,)).view(torch.uint8).numpy()
    back = tuple(order.index(axis) for axis in range(tensor.ndim))
    return array, tensor.dtype, tuple(small.shape), tuple(values.shape), back


def _from_array(sent: _Sent) -> Tensor:
    array, dtype, small, shape, back = sent
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to what was sent
        flat = torch.from_numpy(array).view(dtype) if len(array) else torch.empty(0, dtype=dtype)
    return flat.view(small).expand(shape).permute(back)
