"""What a Ray cluster costs for each task and byte, measured here, and what that means for large models, computed.

    python -m rankbook.tools.dev.cluster_cost [--workers 2] [--gpu-tflops 300] [--network-gbps 100]

Measured on workers of this machine: how long a task takes that does nothing, how many of them start in a second, and
how fast tensors get into the object store, to a worker, and back. Everything else is arithmetic: what a block computes
(products of 16-bit numbers at ``--gpu-tflops``, closed forms in float32 at ``--gpu-tflops-float32``) and what travels
(at the measured speed, or that of the network where it is slower). No GPU takes part.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Costs:
    """What was measured, and what is assumed.

    Attributes:
        task: Seconds from the call of a task that does nothing to its result.
        start: Seconds of the process that starts the run for each task, where many are sent at once.
        put: Bytes a second into the object store.
        get: Bytes a second from the store to a worker that reads them all.
        back: Bytes a second of a worker's result, to where it is read.
        network: Bytes a second between machines.
        half: Operations a second of a GPU in 16 bits.
        single: The same in float32.
    """

    task: float
    start: float
    put: float
    get: float
    back: float
    network: float
    half: float
    single: float

    def out(self, size: float) -> float:
        """Return the seconds that the starting process needs to hand out so many bytes."""
        return size / min(self.put, self.network)

    def into(self, size: float) -> float:
        """Return the seconds until a worker has read so many bytes, which several do at the same time."""
        return size / min(self.get, self.network)

    def home(self, size: float) -> float:
        """Return the seconds until the starting process has so many bytes of results."""
        return size / min(self.back, self.network)


@dataclass(frozen=True)
class Matrices:
    """Matrices of a block that are alike.

    Attributes:
        count: How many.
        rows: N.
        columns: K.
        inputs: How many different inputs they have, each with a Gram matrix.
        share: Share of the tokens that each input sees: less than 1 for an expert.
    """

    count: int
    rows: int
    columns: int
    inputs: int = 1
    share: float = 1.0

    @property
    def weights(self) -> int:
        """All their elements."""
        return self.count * self.rows * self.columns


@dataclass(frozen=True)
class Block:
    """A kind of block.

    Attributes:
        count: How many of them a model has.
        hidden: Size of the hidden state.
        matrices: Of one.
    """

    count: int
    hidden: int
    matrices: tuple[Matrices, ...]

    @property
    def weights(self) -> int:
        """Elements of one."""
        return sum(one.weights for one in self.matrices)


def _attention(hidden: int, cached: int) -> tuple[Matrices, ...]:
    return Matrices(2, hidden, hidden, 2), Matrices(2, cached, hidden, 0)


def _gated(hidden: int, inner: int, experts: int = 1) -> tuple[Matrices, ...]:
    """Return a gated feed-forward layer, or that of experts, of which a token sees one."""
    return (
        Matrices(2 * experts, inner, hidden, experts, 1 / experts),
        Matrices(experts, hidden, inner, experts, 1 / experts),
    )


SHAPES = {
    "70B": (Block(80, 8192, (*_attention(8192, 1024), *_gated(8192, 28672))),),
    "400B mixture": (
        Block(24, 5120, (*_attention(5120, 1024), *_gated(5120, 8192, 128), *_gated(5120, 8192))),
        Block(24, 5120, (*_attention(5120, 1024), *_gated(5120, 16384))),
    ),
}
"""Blocks of Llama 3 70B and of Llama 4 Maverick (128 experts and a shared one in every second block)."""
TOKENS, STEPS, BATCH = 64 * 512, 100, 8 * 512
"""Calibration tokens, training steps of a block, and the tokens of a step: the defaults."""
GPUS = (1, 8, 64, 1000)


@dataclass(frozen=True)
class Work:
    """Seconds of one block on one GPU, and bytes that travel for it.

    Attributes:
        pass_: The calibration text runs through it once.
        gram: All Gram matrices.
        closed: All closed forms.
        largest: The longest closed form of one layer.
        training: All steps.
        layers: How many layers it has.
        weight_bytes: In 16 bits.
        gram_bytes: In float32.
        stream_bytes: The calibration text between two blocks, in 16 bits.
        packed_bytes: The result, at 4 bits with its parameters.
    """

    pass_: float
    gram: float
    closed: float
    largest: float
    training: float
    layers: int
    weight_bytes: float
    gram_bytes: float
    stream_bytes: float
    packed_bytes: float


def work(block: Block, costs: Costs) -> Work:
    """Return what a block needs.

    A pass multiplies each token with the weights that it sees (2 operations a weight); a Gram matrix takes
    ``2 K**2`` a token. A closed form with error feedback takes ``K**3`` for the factor of the Gram matrix and
    ``4 N K**2`` for feedback and refits; a training step three passes.
    """
    seen = sum(one.weights * one.share for one in block.matrices)
    gram = sum(2 * one.columns**2 * TOKENS * one.share * one.inputs for one in block.matrices)

    def solve(one: Matrices) -> float:
        return (one.columns**3 + 4 * one.rows * one.columns**2) / costs.single

    return Work(
        pass_=2 * seen * TOKENS / costs.half,
        gram=gram / costs.half,
        closed=sum(one.count * solve(one) for one in block.matrices),
        largest=max(map(solve, block.matrices)),
        training=6 * seen * BATCH * STEPS / costs.half,
        layers=sum(one.count for one in block.matrices),
        weight_bytes=2 * block.weights,
        gram_bytes=sum(4 * one.columns**2 * one.inputs for one in block.matrices),
        stream_bytes=2 * TOKENS * block.hidden,
        packed_bytes=block.weights * 4.5 / 8,
    )


def layers_apart(model: Sequence[Block], costs: Costs, gpus: int, *, trains: bool) -> float:
    """Return the seconds of a run whose layers are solved by workers, block after block.

    The starting process, which has a GPU as well, computes passes, Gram matrices and training, and hands out weights
    and Gram matrices.
    """
    total = 0.0
    for block in model:
        one = work(block, costs)
        spent = (2 + trains) * one.pass_ + one.gram + trains * one.training
        solved = max(one.closed / gpus, one.largest)
        if gpus > 1:
            handed = costs.out(one.weight_bytes + one.gram_bytes) + one.layers * costs.start
            solved = max(handed, solved) + costs.task + costs.home(one.packed_bytes)
        total += block.count * (spent + solved)
    return total


def blocks_apart(model: Sequence[Block], costs: Costs, gpus: int, *, trains: bool, files: bool = False) -> float:
    """Return the seconds of a run whose blocks are solved by workers (``--order parallel``).

    The starting process runs the text through the original model and hands out streams and, unless workers read them
    from ``files``, weights; a block is one task, so that no more GPUs are used than there are blocks.
    """
    ahead = solving = longest = 0.0
    for block in model:
        one = work(block, costs)
        own = one.gram + one.closed + one.pass_ + trains * one.training
        handed = 0.0
        if gpus > 1:
            own += costs.into(one.weight_bytes + 2 * one.stream_bytes) + costs.home(one.packed_bytes) + costs.task
            handed = costs.out(one.stream_bytes + (0 if files else one.weight_bytes)) + costs.start
        ahead += block.count * (one.pass_ + handed)
        solving += block.count * own
        longest = max(longest, own)
    return ahead + solving if gpus == 1 else max(ahead + longest, solving / gpus)


def table(costs: Costs) -> str:
    """Return the table of minutes, in Markdown."""
    ways: tuple[tuple[str, Callable[..., float]], ...] = (
        ("layers on workers", layers_apart),
        ("`--order parallel`", blocks_apart),
        ("the same, `--cluster-weights path`", functools.partial(blocks_apart, files=True)),
    )
    heads = ["1 GPU", *(f"{count:,} GPUs" for count in GPUS[1:])]
    lines = [f"| minutes, computed | {' | '.join(heads)} |", "|---" * (1 + len(GPUS)) + "|"]
    for name, model in SHAPES.items():
        for (what, way), trains in itertools.product(ways, (False, True)):
            minutes = (way(model, costs, count, trains=trains) / 60 for count in GPUS)
            how = f"{STEPS} training steps" if trains else "closed form"
            lines.append(f"| {name}, {what}, {how} | {' | '.join(f'{one:.1f}' for one in minutes)} |")
    return "\n".join(lines)


def _nothing(*_: Any) -> None:
    pass


def _read(values: Any) -> float:
    return float(values[::16].sum())


def _made(count: int) -> Any:
    import torch

    return torch.ones(count)


def _median(call: Callable[[], Any], times: int = 7) -> float:
    spans = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        spans.append(time.perf_counter() - start)
    return statistics.median(spans)


def measured(workers: int, megabytes: int) -> dict[str, float]:
    """Return `task`, `start`, `put`, `get` and `back` of `Costs`, measured on workers of this machine."""
    import ray
    import torch

    from rankbook.calibration.driver.cluster import connected
    from rankbook.calibration.driver.options import QuantizeOptions

    count = megabytes * 1_000_000 // 4
    values = torch.rand(count)
    with connected(QuantizeOptions(cluster=f"local:{workers}", device="cpu")):
        nothing, read, made = map(ray.remote, (_nothing, _read, _made))
        ray.get([nothing.remote() for _ in range(100)])
        task = _median(lambda: ray.get(nothing.remote()), 101)
        many = 1000
        start = _median(lambda: ray.get([nothing.remote() for _ in range(many)]), 3) / many
        put = _median(lambda: ray.put(values))
        sent = ray.put(values)
        get = _median(lambda: ray.get(read.remote(sent))) - task
        back = _median(lambda: ray.get(made.remote(count)).sum()) - task
    size = float(values.nbytes)
    return {"task": task, "start": start, "put": size / put, "get": size / get, "back": size / back}


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and print what was measured and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=256, help="of the tensor that travels")
    parser.add_argument("--gpu-tflops", type=float, default=300.0, help="of a GPU in 16 bits")
    parser.add_argument("--gpu-tflops-float32", type=float, default=30.0, help="the same in float32")
    parser.add_argument("--network-gbps", type=float, default=100.0, help="gigabits a second between machines")
    given = parser.parse_args(words)
    found = measured(given.workers, given.megabytes)
    costs = Costs(
        **found,
        network=given.network_gbps / 8 * 1e9,
        half=given.gpu_tflops * 1e12,
        single=given.gpu_tflops_float32 * 1e12,
    )
    print(f"a task: {1e3 * costs.task:.2f} ms; many at once: {1e3 * costs.start:.2f} ms each")
    travels = {"into the object store": costs.put, "to a worker": costs.get, "back": costs.back}
    print("; ".join(f"{name}: {speed / 1e9:.2f} GB/s" for name, speed in travels.items()))
    print(table(costs))


if __name__ == "__main__":
    main()
