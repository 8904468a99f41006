"""How long one layer takes on a GPU, on paper: launches, waves, prologues, the error branch, any number of tokens.

`rankbook.tools.dev.roofline` says what bounds the inner loops. A layer is more than its loop: blocks come in waves,
each wave starts with a table and an access to memory, the error branch is a kernel before the product, and from 17
tokens on blocks that share columns leave sums for another kernel to add up. **Arithmetic, never measured.** What it
takes on trust, beside what `roofline` does, are the constants of this file.
"""

from __future__ import annotations

import math
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rankbook.tools.dev import roofline, sass
from rankbook.tools.dev.roofline import GPUS, Gpu, Key, int8_kernel, pipe_rates, step_columns, wavefronts

LAUNCH = 1.0
"""Microseconds from the end of a kernel to the first instruction of the next one, in a CUDA graph."""
LATENCY = 0.6
"""Microseconds of an access to memory."""
TABLE_CLOCKS = 750
"""Clocks to make the table of levels (4 and 8 bits): 32 KB at 128 bytes a clock, and reading the levels."""
L2_BYTES = 32
"""Bytes of the second-level cache per clock and multiprocessor."""
SATURATING = 0.7
"""Share of the multiprocessors that must read for memory to be at its full rate."""
PANEL, WARPS, TILE_ROWS, TILE_TOKENS = 32, 8, 256, 64


@dataclass(frozen=True)
class Layer:
    """A packed layer: rows (N), columns (K), bits, planes beside an offset, columns of a group, rank of the branch."""

    rows: int
    columns: int
    bits: int = 4
    planes: int = 1
    group: int = 64
    branch_rank: int = 32

    def memory(self, tokens: int) -> float:
        """Return the bytes that it must read and write: codes, a byte per parameter, int8 factors, x and y."""
        weight = self.rows * self.columns * (self.bits / 8 + (self.planes + 1) / self.group)
        return weight + (self.rows + self.columns) * (self.branch_rank + 2 * tokens)


@dataclass(frozen=True)
class LayerTime:
    """Microseconds of a layer on one GPU.

    Attributes:
        gpu: Its name.
        tokens: Tokens at once.
        launches: Kernels and memsets.
        shares: Blocks that share a panel, or with more than 16 tokens the columns of a tile.
        waves: Waves of blocks of the product.
        memory: Everything read and written once, at the rate of the memory.
        branch: x down^T.
        product: The product with the second half of the branch.
        sums: Adding up what blocks left that share columns, with its launch.
    """

    gpu: str
    tokens: int
    launches: int
    shares: int
    waves: int
    memory: float
    branch: float
    product: float
    sums: float

    @property
    def busy(self) -> float:
        """Time of all kernels, without what passes between them (``launches`` times `LAUNCH`)."""
        return self.branch + self.product + self.sums

    @property
    def ratio(self) -> float:
        """How many times its memory time the layer takes."""
        return self.busy / self.memory


def best_shares(blocks: int, steps: int, most: int, slots: int, prologue: int, toll: int) -> int:
    """Return how many blocks share the work of one, as `best_shares` of kernels/cuda/branch.cuh chooses."""
    costs = {
        shares: math.ceil(blocks * shares / slots) * (prologue + math.ceil(steps / shares))
        + (toll if shares > 1 else 0)
        for shares in range(1, most + 1)
    }
    return min(costs, key=lambda shares: (costs[shares], shares))


def resident_blocks(path: Path, architecture: int) -> dict[str, int]:
    """Return by mangled name how many blocks of 256 threads have room for their registers on a multiprocessor.

    Raises:
        MissingError: cuobjdump is not installed.
    """
    command = [str(sass.tool("cuobjdump")), "--dump-resource-usage", "-arch", f"sm_{architecture}", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+)", text)
    return {name: max(1, 65536 // (256 * 8 * math.ceil(int(registers) / 8))) for name, registers in found}


def _clocks(gpu: Gpu, cost: sass.LoopCost, layer: Layer, *, int8: bool, live: float = 1.0) -> float:
    """Clocks of a multiprocessor for 32 weights, by its busiest pipe; ``live``: share of a tile's tokens in use."""
    steps = max(1, layer.group // step_columns(layer.bits))
    counts = cost.per_weight(steps)
    times = {pipe: counts[pipe] * 32 / lanes for pipe, lanes in pipe_rates(gpu).items()}
    times["issue"] = counts["total"] * 32 / 128
    rows = sum(wavefronts(code) * share for code, share in cost.shares(steps))
    times["shared"] = rows / cost.weights * live
    times["tensor"] = counts["tensor"] * (gpu.imma if int8 else gpu.mma) * live
    return max(times.values())


def _branch(gpu: Gpu, layer: Layer, tokens: int) -> float:
    """Blocks of 4 ranks and 8 tokens: multiply-adds, x through the second-level cache, one access and the sums."""
    blocks = math.ceil(layer.branch_rank / 4) * math.ceil(tokens / 8)
    clock = gpu.clock * 1e3  # per microsecond
    work = 1.5 * layer.columns * 32 * min(8, tokens) / 8 * blocks  # multiply-adds, and conversions of x and codes
    reads = blocks * layer.columns * (4 + 2 * min(8, tokens))
    busy = min(blocks, gpu.multiprocessors)
    return max(work / (busy * 128 * clock), reads / (busy * L2_BYTES * clock)) + 2 * LATENCY


def _decode(gpu: Gpu, cost: sass.LoopCost, layer: Layer, tokens: int, resident: int, *, int8: bool) -> LayerTime:
    panels, slots = math.ceil(layer.rows / PANEL), gpu.multiprocessors * resident
    steps = math.ceil(layer.columns / step_columns(layer.bits))
    shares = best_shares(panels, math.ceil(steps / WARPS), max(1, min(8, 768 // panels)), slots, 2, 0)
    waves = math.ceil(panels * shares / slots)
    filled = panels * shares / (waves * slots)
    clock = gpu.clock * 1e3
    pipes = layer.rows * layer.columns / 32 * _clocks(gpu, cost, layer, int8=int8) / (gpu.multiprocessors * clock)
    inputs = panels * tokens * layer.columns * (1 if int8 else 2) / (L2_BYTES * gpu.multiprocessors * clock)
    memory = layer.memory(tokens) / gpu.bandwidth / 1e3
    table = TABLE_CLOCKS / clock if layer.bits in (4, 8) else 0.1
    product = max(pipes / filled, inputs, memory / min(1.0, filled / SATURATING)) + LATENCY + waves * table
    branch = _branch(gpu, layer, tokens) if layer.branch_rank else 0.0
    launches = 1 + bool(layer.branch_rank) + (int8 or (shares > 1 and not layer.branch_rank))
    return LayerTime(gpu.name, tokens, launches, shares, waves, memory, branch, product, 0.0)


def _prefill(gpu: Gpu, cost: sass.LoopCost, layer: Layer, tokens: int, resident: int, *, share: bool) -> LayerTime:
    across, tiles = math.ceil(layer.rows / TILE_ROWS), math.ceil(tokens / TILE_TOKENS)
    slots, steps = gpu.multiprocessors * resident, math.ceil(layer.columns / step_columns(layer.bits))
    most = max(1, min(8, 384 // (across * tiles))) if share else 1
    shares = best_shares(across * tiles, steps, most, slots, 2, 6)
    waves = math.ceil(across * tiles * shares / slots)
    filled = across * tiles * shares / (waves * slots)
    clock = gpu.clock * 1e3
    lives = [min(TILE_TOKENS, 16 * math.ceil((tokens - first) / 16)) for first in range(0, tokens, TILE_TOKENS)]
    clocks = sum(_clocks(gpu, cost, layer, int8=False, live=live / TILE_TOKENS) for live in lives)
    pipes = layer.rows * layer.columns / 32 * clocks / (gpu.multiprocessors * clock)
    # The second half of the branch: three products of 16 ranks where the main loop has one of 16 columns.
    pipes *= 1 + 3 * layer.branch_rank / layer.columns
    memory = layer.memory(tokens) / gpu.bandwidth / 1e3
    table = TABLE_CLOCKS / clock if layer.bits in (4, 8) else 0.1
    product = max(pipes / filled, memory / min(1.0, filled / SATURATING)) + LATENCY + waves * table
    sums = 0.0
    if shares > 1:
        traffic = 2 * 4 * shares * tokens * layer.rows / (L2_BYTES * gpu.multiprocessors * clock)
        sums = traffic + LATENCY
    branch = _branch(gpu, layer, tokens) if layer.branch_rank else 0.0
    launches = 1 + bool(layer.branch_rank) + (shares > 1)
    return LayerTime(gpu.name, tokens, launches, shares, waves, memory, branch, product, sums)


def _experts(gpu: Gpu, cost: sass.LoopCost, layer: Layer, chosen: int, resident: int) -> LayerTime:
    """One token and its experts: a block per panel and expert, which reads its number before it reads codes."""
    blocks, slots = chosen * math.ceil(layer.rows / PANEL), gpu.multiprocessors * resident
    waves = math.ceil(blocks / slots)
    filled = blocks / (waves * slots)
    clock = gpu.clock * 1e3
    pipes = chosen * layer.rows * layer.columns / 32 * _clocks(gpu, cost, layer, int8=False)
    memory = chosen * layer.memory(1) / gpu.bandwidth / 1e3
    table = TABLE_CLOCKS / clock if layer.bits in (4, 8) else 0.1
    busy = max(pipes / (gpu.multiprocessors * clock) / filled, memory / min(1.0, filled / SATURATING))
    branch = _branch(gpu, layer, 1) + LATENCY if layer.branch_rank else 0.0
    product = busy + 2 * LATENCY + waves * table
    return LayerTime(gpu.name, 1, 1 + bool(layer.branch_rank), 1, waves, memory, branch, product, 0.0)


@dataclass(frozen=True)
class Times:
    """Layer times of one GPU.

    Attributes:
        gpu: The GPU.
        costs: Loops of the kernels.
        resident: Blocks of a multiprocessor, by kernel.
    """

    gpu: Gpu
    costs: dict[Key, sass.LoopCost]
    resident: dict[Key, int]

    def of(self, layer: Layer, tokens: int, *, int8: bool = False, share: bool = True) -> LayerTime:
        """Return the time of a layer; ``share=False``: as if blocks of many tokens did not share columns.

        Activations rounded to 8 bits have kernels of their own for up to 16 tokens.
        """
        if tokens > 16:
            key: Key = ("prefill", layer.bits, layer.planes, TILE_TOKENS, 0)
            return _prefill(self.gpu, self.costs[key], layer, tokens, self.resident[key], share=share)
        kind = int8_kernel(layer.bits, layer.group, tokens) if int8 else (8 * math.ceil(tokens / 8), 0)
        key = ("int8" if int8 else "fp16", layer.bits, layer.planes, *kind)
        return _decode(self.gpu, self.costs[key], layer, tokens, self.resident[key], int8=int8)

    def of_experts(self, layer: Layer, chosen: int) -> LayerTime:
        """Return the time of the matrix of each of the experts that were chosen for one token."""
        key: Key = ("experts", layer.bits, layer.planes, 8, 0)
        return _experts(self.gpu, self.costs[key], layer, chosen, self.resident[key])


def times(path: Path) -> list[Times]:
    """Return the layer times of every GPU that the library holds code for.

    Raises:
        MissingError: cuobjdump is not installed.
    """
    found = []
    for architecture in sorted({gpu.code for gpu in GPUS}):
        costs, resident = compiled(path, architecture)
        found += [Times(gpu, costs, resident) for gpu in GPUS if gpu.code == architecture and costs]
    return found


def compiled(path: Path, architecture: int) -> tuple[dict[Key, sass.LoopCost], dict[Key, int]]:
    """Return loops and resident blocks (see `Times`) of one architecture in a library, empty if it holds none of it.

    Raises:
        MissingError: cuobjdump is not installed.
    """
    costs = roofline.costs_of(sass.functions(path, architecture, roofline.KERNELS))
    names = resident_blocks(path, architecture).items()
    return costs, {key: blocks for name, blocks in names if "6BFloat" not in name and (key := roofline.key_of(name))}


LAYERS = tuple(Layer(*sizes) for sizes in ((1024, 4096), (4096, 4096), (11008, 4096), (4096, 14336), (28672, 8192)))
TOKENS = (1, 16, 17, 32, 64, 128, 256, 1024)
EXPERTS = tuple(
    (Layer(rows, columns, branch_rank=0), chosen)
    for rows, columns, chosen in ((1536, 2048, 8), (2048, 768, 8), (28672, 4096, 2), (4096, 14336, 2))
)
"""Matrices of an expert, and how many are chosen for a token: Qwen3-30B-A3B, and Mixtral 8x7B."""


def tables(path: Path) -> str:
    """Return a Markdown table for each layer: microseconds and how many times that is the memory time, by tokens."""
    every = times(path)
    parts = []
    for layer in LAYERS:
        about = f"{layer.bits} bits, {layer.planes} plane, group {layer.group}, branch of rank {layer.branch_rank}"
        parts.append(
            f"{layer.rows} x {layer.columns}, {about}: microseconds without launches (times the memory time)\n"
        )
        parts.append("| tokens | " + " | ".join(each.gpu.name for each in every) + " |")
        parts.append("|---" * (len(every) + 1) + "|")
        for tokens in TOKENS:
            cells = (each.of(layer, tokens) for each in every)
            parts.append(f"| {tokens} | " + " | ".join(f"{t.busy:.1f} ({t.ratio:.1f})" for t in cells) + " |")
        parts.append("")
    parts.append("Experts of one token, 4 bits, 1 plane, group 64: microseconds (times the memory time)\n")
    parts.append("| matrix | " + " | ".join(each.gpu.name for each in every) + " |")
    parts.append("|---" * (len(every) + 1) + "|")
    for layer, chosen in EXPERTS:
        cells = (each.of_experts(layer, chosen) for each in every)
        about = f"{chosen} of {layer.rows} x {layer.columns}"
        parts.append(f"| {about} | " + " | ".join(f"{t.busy:.1f} ({t.ratio:.1f})" for t in cells) + " |")
    return "\n".join([*parts, ""])
