"""What the workers of a Ray cluster do, and how tensors and blocks travel to them."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankbook.calibration.device import DeviceError, moved, resolve
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.parallel import BlockTask
from rankbook.calibration.driver.report import Errors
from rankbook.calibration.driver.resume import BlockResult
from rankbook.calibration.driver.selection import select
from rankbook.calibration.driver.solve import Passage, solve_task
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.capture import BlockStatistics
from rankbook.calibration.model.loading import load_model
from rankbook.calibration.model.placement import Placement, in_float32
from rankbook.calibration.model.plain import make_plain, restore
from rankbook.calibration.notes import Note
from rankbook.calibration.record.quantized_linear import QuantizedLinear

CPU = torch.device("cpu")
_SMALL_BYTES = 1 << 16
"""Tensors up to this size are copied on arrival: a block may write to its buffers, and what was sent is read-only."""


@dataclass(frozen=True)
class Setting:
    """How a worker computes.

    Attributes:
        device: ``cpu`` or ``cuda``; Ray chooses which GPU.
        threads: They order the sums of products: as many as in a run without a cluster, so that results are equal.
    """

    device: str
    threads: int


@dataclass(frozen=True)
class Files:
    """The files of a model, which every machine has.

    Attributes:
        source: As `rankbook.calibration.model.loading.load_model` takes it.
        options: Of the run: they decide which layers of a block are taken apart.
    """

    source: str
    options: QuantizeOptions

    def block(self, index: int, block: nn.Module) -> FileBlock:
        """Return what a worker needs to read a block, which is in float32 here."""
        return FileBlock(self, index, digest(block))


@dataclass(frozen=True)
class FileBlock:
    """A block that a worker reads by itself.

    Attributes:
        files: Where.
        index: Its number.
        digest: Of its weights.
    """

    files: Files
    index: int
    digest: str

    def read(self) -> nn.Module:
        """Return a copy of the block.

        Raises:
            DeviceError: There is no such model on this machine, or another one.
        """
        source = self.files.source
        for _ in range(2):
            try:
                block = copy.deepcopy(_blocks(self.files)[self.index])
            except (OSError, ValueError, LookupError) as error:
                raise DeviceError(f"a worker cannot read the weights of {source} ({error}); {_OTHER}") from error
            if digest(block) == self.digest:
                return block
            _read.clear()  # the files may have been replaced after this process read them
        raise DeviceError(f"a worker has other weights at {source} than the machine that started the run; {_OTHER}")


_OTHER = "give --cluster-weights store, or the same files at this path on every machine"
_read: list[tuple[Files, Sequence[nn.Module]]] = []
"""The blocks of the model that this process has read last; their weights stay in the files."""


def _blocks(files: Files) -> Sequence[nn.Module]:
    if not _read or _read[0][0] != files:  # other options take other layers apart
        _read.clear()
        model, _ = load_model(files.source)
        blocks = adapter_of(model).blocks()
        forms = make_plain(model)
        restore(model, forms, select(model, blocks, files.options).names(blocks))
        _read.append((files, blocks.modules))
    return _read[0][1]


def digest(block: nn.Module) -> str:
    """Return a SHA-256 of the names and values of what a block has in its file, whatever floating dtype they are in.

    Buffers count too, such as the bias by which a router corrects its scores.
    """
    found = hashlib.sha256()
    for name, tensor in block.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)}\0".encode())
        found.update(narrow(tensor.float()).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def solve_layer(
    name: str, problem: LayerProblem, statistics: LayerStatistics, options: QuantizeOptions, setting: Setting
) -> tuple[tuple[QuantizedLinear, Errors], list[str]]:
    """Solve one layer; return its record and its errors, and the notes that were made meanwhile."""
    with _working(setting, name) as (device, notes):
        given = replace(problem, weight=problem.weight.float(), statistics=statistics)
        record, errors = solve_task(name, moved(given, device), options, device)
        found = moved(record, CPU), errors
    return found, notes


def solve_block(
    task: BlockTask, inputs: Tensor, targets: Tensor | None, file: FileBlock | None, setting: Setting
) -> tuple[BlockResult, list[str]]:
    """Solve one block; the streams are given apart, because tasks share them, and the block where it is in a file."""
    with _working(setting, task.site.prefix[:-1]) as (device, notes):
        if file is not None:
            task = replace(task, site=replace(task.site, block=file.read()))
        found = replace(task, inputs=inputs, targets=targets).solved(Placement((device,)))
        layers: dict[str, Any] = {name: layer.on(CPU) for name, layer in found.layers.items()}
        tensors = {name: tensor.to(CPU) for name, tensor in found.tensors.items()}
    return replace(found, layers=layers, tensors=tensors), notes


def statistics_of(
    passage: Passage, part: Tensor, file: FileBlock | None, setting: Setting
) -> tuple[BlockStatistics, list[str]]:
    """Return the statistics of a part of the calibration text, on the CPU."""
    with _working(setting, "a part of the calibration text") as (device, notes):
        if file is not None:
            passage = replace(passage, block=file.read())
        call = passage.call.on(lambda tensor: tensor.to(device))
        with in_float32(passage.block, device):
            found = replace(passage, call=call).statistics(part, device)
    return found.on(CPU), notes


@contextmanager
def _working(setting: Setting, what: str) -> Iterator[tuple[torch.device, list[str]]]:
    """Prepare this process for a task; give its device, and a list that holds the notes of the block afterwards.

    Raises:
        DeviceError: The device is not there, or its memory does not suffice.
    """
    send_tensors_as_arrays()
    torch.set_num_threads(setting.threads)
    device, notes = resolve(setting.device), list[str]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Note)
        try:
            yield device, notes
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"the memory of a worker's {device} does not suffice for {what}; give more --cluster-gpus, so that"
                " fewer tasks share one, or --device cpu, with --resume to go on at this block"
            ) from error
    notes += [str(one.message) for one in caught if issubclass(one.category, Note)]


def narrow(weight: Tensor) -> Tensor:
    """Return a weight in 16 bits where these hold it: the model is stored so, and half as much travels."""
    for dtype in (torch.bfloat16, torch.float16) if weight.dtype == torch.float32 else ():
        if torch.equal((half := weight.to(dtype)).float(), weight):
            return half
    return weight


def send_tensors_as_arrays() -> None:
    """Let Ray send tensors as arrays of numpy, which processes of a machine share; weights in 16 bits, see `narrow`."""
    from ray.util.serialization import register_serializer

    register_serializer(Tensor, serializer=_to_array, deserializer=_from_array)
    register_serializer(nn.Parameter, serializer=_from_parameter, deserializer=_to_parameter)


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
    if flat.nbytes <= _SMALL_BYTES:
        flat = flat.clone()
    return flat.view(small).expand(shape).permute(back)


def _from_parameter(parameter: nn.Parameter) -> tuple[_Sent, torch.dtype, bool]:
    return _to_array(narrow(parameter.data)), parameter.dtype, parameter.requires_grad


def _to_parameter(sent: tuple[_Sent, torch.dtype, bool]) -> nn.Parameter:
    array, dtype, trained = sent
    return nn.Parameter(_from_array(array).to(dtype, copy=True), trained)
