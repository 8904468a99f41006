"""What `rankbook.tools.dev.gpu_report` asks of the kernels: right results, the same bits each time, how long it takes.

Everything goes through the operators of PyTorch (`rankbook.calibration.model.packed_ops`), on any device that they have
kernels for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from rankbook.calibration.device import moved
from rankbook.calibration.model import packed_ops
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.plugins import contract
from rankbook.plugins.layer_spec import LayerSpec
from rankbook.plugins.widths import BITS
from rankbook.tools.dev.layer_time import Layer

TOKENS = (1, 2, 4, 8, 16, 512, 4096)
SHAPES = ((4096, 4096), (4096, 14336), (8192, 28672))
"""N and K of the layers that are timed."""
FORMS = ((1, 0), (2, 0), (1, 32))
"""Planes and branch rank of the layers that are timed."""
GROUP = 128
EXPERTS = 5
"""Layers of the stacks that are checked; no row is sent to the last one."""
_FP16 = 16
_RELATIVE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error allowed, as a share of the largest output. The cases of tests/ops have narrower bounds."""
_INT8 = 1e-2
"""The same where x is rounded to 8 bits: beyond 16 tokens factors stay unrounded, which the definition does not."""


def spec_of(layer: Layer) -> LayerSpec:
    """Return the description of a layer with an offset beside its planes."""
    return LayerSpec(
        kind="linear",
        method="random",
        bits=layer.bits,
        out_features=layer.rows,
        in_features=layer.columns,
        group=layer.group,
        planes=layer.planes,
        has_offset=True,
        branch_rank=layer.branch_rank,
    )


def random_tensors(spec: LayerSpec, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Return random packed tensors of a layer."""
    generator = _generator(device, seed)
    found = {}
    for name, part in spec.tensors().items():
        low, high = {"codes": (0, 256), "levels": (-63, 64)}.get(name, (-127, 128))
        made = torch.randint(low, high, part.shape, generator=generator, device=generator.device)
        if part.dtype.startswith("float"):
            made = (made.abs() + 1) * 1e-4
        found[name] = made.to(device, getattr(torch, part.dtype))
    return found


@dataclass(frozen=True)
class Check:
    """One layer compared with its decoded weight in float64, or with the definition of int8 activations.

    Attributes:
        name: What it is.
        error: Largest error as a share of the largest output.
        bound: What is allowed.
    """

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound; NaN is not."""
        return self.error <= self.bound


def checks(
    device: torch.device, tokens: Sequence[int] = (1, 7, 16, 17, 70), bits: Sequence[int] = BITS
) -> Iterator[Check]:
    """Compare every width, with one plane and with two and a branch: types of x, int8 activations, rows, experts."""
    for width, (planes, rank, group), count in product(bits, ((1, 0, 64), (2, 5, 32)), tokens):
        spec = spec_of(Layer(70, 640, width, planes, group, rank))
        packed = random_tensors(spec, device)
        held, record = packed_ops.constants(spec, packed), _record(spec, packed)
        weight = record.weight(with_low_rank=True).double()
        name = f"{width} bits, planes {planes}, branch rank {rank}, {count} tokens"
        for dtype in packed_ops.TYPES:
            x = _activations(count, spec.in_features, device, dtype)
            y, want = packed_ops.product(x, held, spec), x.cpu().double() @ weight.T
            yield Check(f"{name}, {str(dtype).removeprefix('torch.')}", _error(y, want), _RELATIVE[dtype])
        x = _activations(count, spec.in_features, device, torch.float32)
        y = packed_ops.product(x, held, spec, int8_activations=True)
        yield Check(f"{name}, int8", _error(y, _definition(spec, held, x)), _INT8)
        ids = torch.arange(count) % spec.out_features
        y, want = packed_ops.rows(ids.to(device), held, spec), record.weight().double()[ids]
        yield Check(f"{name}, rows", _error(y, want), _RELATIVE[torch.float32])
        yield from _expert_checks(spec, name, count, device)


def _expert_checks(spec: LayerSpec, name: str, count: int, device: torch.device) -> Iterator[Check]:
    """Compare rows of x times a stack of layers, each row with the layer that its number says."""
    layers = [random_tensors(spec, device, seed) for seed in range(EXPERTS)]
    held = packed_ops.constants(spec, {part: torch.stack([layer[part] for layer in layers]) for part in layers[0]})
    weights = [_record(spec, layer).weight(with_low_rank=True).double() for layer in layers]
    numbers = torch.randint(0, EXPERTS - 1, (count,), generator=torch.Generator().manual_seed(count))
    chosen = numbers.to(device)
    for dtype in packed_ops.TYPES:
        x = _activations(count, spec.in_features, device, dtype)
        y, rows = packed_ops.product(x, held, spec, numbers=chosen), x.cpu().double()
        want = torch.stack([row @ weights[number].T for row, number in zip(rows, numbers.tolist(), strict=True)])
        yield Check(f"{name}, {str(dtype).removeprefix('torch.')}, experts", _error(y, want), _RELATIVE[dtype])
    x = _activations(count, spec.in_features, device, torch.float32)
    y = packed_ops.product(x, held, spec, int8_activations=True, numbers=chosen)
    wanted = torch.stack([_definition(spec, packed_ops.constants(spec, layer), x) for layer in layers])
    yield Check(f"{name}, int8, experts", _error(y, wanted[numbers, torch.arange(count)]), _INT8)


def _error(y: Tensor, want: Tensor) -> float:
    return float((y.cpu().double() - want).abs().max() / want.abs().max())


def _record(spec: LayerSpec, packed: dict[str, Tensor]) -> QuantizedLinear:
    return QuantizedLinear.unpack({name: tensor.cpu() for name, tensor in packed.items()}, spec)


def _definition(spec: LayerSpec, held: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the output of the numpy reference, which defines int8 activations."""
    kind = contract.matmul_kind(low_rank=bool(spec.branch_rank), int8_activations=True)
    operator = contract.PACKED[contract.op_name(kind, spec.bits)]
    tensors = (x, *(held[name] for name in operator.constants()))
    arrays = [moved(tensor, torch.device("cpu")).numpy() for tensor in tensors]
    attributes = {"in_features": spec.in_features, "out_features": spec.out_features, "offset": int(spec.has_offset)}
    return torch.from_numpy(operator.compute(arrays, attributes)[0]).double()


def unequal(
    device: torch.device, turns: int = 500, tokens: Sequence[int] = (1, 7, 16, 40), bits: Sequence[int] = BITS
) -> list[str]:
    """Repeat products of which blocks share the rows; return the names of those whose bits ever differ."""
    found = []
    for width, count, int8 in product(bits, tokens, (False, True)):
        spec = spec_of(Layer(300, 2560, width, 2, GROUP, 0))
        held = packed_ops.constants(spec, random_tensors(spec, device))
        x = _activations(count, spec.in_features, device, torch.float16)
        first = packed_ops.product(x, held, spec, int8_activations=int8)
        differ = sum(
            not torch.equal(packed_ops.product(x, held, spec, int8_activations=int8), first) for _ in range(turns)
        )
        if differ:
            found.append(f"{width} bits, {count} tokens{', int8' if int8 else ''}: {differ} of {turns} turns differ")
    return found


@dataclass(frozen=True)
class Timing:
    """One product, or a copy.

    Attributes:
        what: ``packed``, ``torch`` (fp16 matmul) or ``copy`` (of the bytes of the fp16 weight, device to device).
        rows: N.
        columns: K.
        tokens: M; 0 for a copy.
        seconds: Median over turns.
        bytes_moved: Bytes of the weight that a product reads; what a copy reads and writes.
        bits: Of a code; 16 where nothing is packed.
        planes: Planes beside an offset; 0 where nothing is packed.
        branch_rank: Rank of the error branch.
        group: Weights of a row that share a codebook; 0 where nothing is packed.
        int8: Whether x is rounded to 8 bits inside.
    """

    what: str
    rows: int
    columns: int
    tokens: int
    seconds: float
    bytes_moved: int
    bits: int = _FP16
    planes: int = 0
    branch_rank: int = 0
    group: int = 0
    int8: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the report."""
        return {**asdict(self), "gb_per_s": self.bytes_moved / self.seconds / 1e9}


@dataclass(frozen=True)
class Meter:
    """Times calls.

    Attributes:
        device: Where they compute. On a GPU a turn is one CUDA graph, so that launches cost what they cost in decoding,
            and the device's own clock counts.
        spent: Seconds of each measurement, at least; there are three turns at least.
        cache: Bytes of weights that a turn goes round, so that no cache holds them.
        clock: Returns seconds, for other devices.
    """

    device: torch.device
    spent: float = 0.01
    cache: int = 256 << 20
    clock: Callable[[], float] = time.perf_counter

    def copies(self, size: int) -> int:
        """Return how many weights of ``size`` bytes a turn goes round."""
        return max(2, min(64, -(-self.cache // size)))

    def seconds(self, run: Callable[[Any], object], inputs: Sequence[Any]) -> float:
        """Return the median seconds of a call, over turns that go round the inputs."""
        for each in inputs[:2]:
            run(each)
        turn = (self._graph if self.device.type == "cuda" else self._by_clock)(run, inputs)
        found: list[float] = []
        while len(found) < 3 or sum(found) < self.spent:
            found.append(turn())
        return statistics.median(found) / len(inputs)

    def _by_clock(self, run: Callable[[Any], object], inputs: Sequence[Any]) -> Callable[[], float]:
        def turn() -> float:
            start = self.clock()
            for each in inputs:
                run(each)
            return self.clock() - start

        return turn

    def _graph(self, run: Callable[[Any], object], inputs: Sequence[Any]) -> Callable[[], float]:
        graph: Any = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph):
            for each in inputs:
                run(each)
        event: Any = torch.cuda.Event  # untyped
        start, end = (event(enable_timing=True) for _ in range(2))

        def turn() -> float:
            graph.replay()  # the host launches the timed one meanwhile, for which the device would wait otherwise
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

        return turn


def timings(
    meter: Meter,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    bits: Sequence[int] = BITS,
) -> Iterator[Timing]:
    """Time a copy, PyTorch's fp16 product and every kernel, shape after shape."""
    for rows, columns in shapes:
        yield from _dense_timings(meter, rows, columns, tokens)
        for width, (planes, rank) in product(bits, FORMS):
            yield from _packed_timings(meter, Layer(rows, columns, width, planes, GROUP, rank), tokens)


def _dense_timings(meter: Meter, rows: int, columns: int, tokens: Sequence[int]) -> Iterator[Timing]:
    size, device = 2 * rows * columns, meter.device
    weights = [_activations(rows, columns, device, torch.float16) for _ in range(meter.copies(size))]
    pairs = [(torch.empty_like(weight), weight) for weight in weights]
    yield Timing("copy", rows, columns, 0, meter.seconds(lambda pair: pair[0].copy_(pair[1]), pairs), 2 * size)
    for count in tokens:
        x = _activations(count, columns, device, torch.float16)

        def run(weight: Tensor, x: Tensor = x) -> Tensor:
            return x @ weight.T

        yield Timing("torch", rows, columns, count, meter.seconds(run, weights), size)


def _packed_timings(meter: Meter, layer: Layer, tokens: Sequence[int]) -> Iterator[Timing]:
    spec = spec_of(layer)
    packed = random_tensors(spec, meter.device)
    size = sum(tensor.nbytes for tensor in packed.values())
    one = packed_ops.constants(spec, packed)
    every = [{name: tensor.clone() for name, tensor in one.items()} for _ in range(meter.copies(size))]
    form = {"bits": layer.bits, "planes": layer.planes, "branch_rank": layer.branch_rank, "group": GROUP}
    for count, int8 in product(tokens, (False, True)):
        x = _activations(count, layer.columns, meter.device, torch.float16)

        def run(held: dict[str, Tensor], x: Tensor = x, int8: bool = int8) -> Tensor:
            return packed_ops.product(x, held, spec, int8_activations=int8)

        seconds = meter.seconds(run, every)
        yield Timing("packed", layer.rows, layer.columns, count, seconds, size, int8=int8, **form)


def _activations(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = _generator(device, rows)
    made = torch.randn(rows, columns, generator=generator, device=generator.device).div_(columns**0.5)
    return made.to(device, dtype)


def _generator(device: torch.device, seed: int) -> torch.Generator:
    """Return a generator of the GPU, so that large tensors need not travel; of the CPU for every other device."""
    return torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(seed)
