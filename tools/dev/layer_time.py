"""How long one layer takes on a GPU, on paper: launches, waves, prologues, the error branch, any number of tokens.

`rankbook.tools.dev.roofline` says what bounds the inner loops. A layer is more than its loop: blocks come in waves,
each wave starts with a table, for which memory does not wait, since codes are prefetched, and with an access to memory;
the error branch is a kernel of its own, and from 17 tokens on blocks that share tiles leave sums for another kernel to
add up. From sm_90 on the kernels behind the first start early: what they do up to where they need the others' results
takes no time of its own. `roofline` prints the tables. **Arithmetic, never measured.** What it takes on trust, beside
what `roofline` does, are the constants of this file, and that blocks of two kernels run side by side wherever their
registers allow it.
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
EARLY = 90
"""Architecture from which kernels start early (programmatic dependent launch)."""
BRANCH_REGISTERS, WIDE_BRANCH = {8: 48, 16: 48}, 128
"""Registers of a thread of `branch_down_mma` by tokens of a block, and blocks from which it takes the more."""


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
        in_turn: Those of them that wait for the end of the one before.
        shares: The most blocks that share a panel, or with more than 16 tokens a tile.
        waves: Waves of blocks of the product.
        memory: Everything read and written once, at the rate of the memory.
        branch: x down^T.
        hidden: What of it passes while the product runs.
        product: The product with the second half of the branch.
        sums: Adding up what blocks left that share columns, with its launch.
    """

    gpu: str
    tokens: int
    launches: int
    in_turn: int
    shares: int
    waves: int
    memory: float
    branch: float
    hidden: float
    product: float
    sums: float

    @property
    def busy(self) -> float:
        """Time of all kernels, without what passes between them (``in_turn`` times `LAUNCH`)."""
        return self.branch - self.hidden + self.product + self.sums

    @property
    def ratio(self) -> float:
        """How many times its memory time the layer takes."""
        return self.busy / self.memory


def panel_shares(panels: int, steps: int, slots: int, taken: int) -> int:
    """Return how many blocks share a panel of few tokens, as `panel_shares` of kernels/cuda/branch.cuh chooses.

    Args:
        panels: Panels of 32 rows.
        steps: Steps of a panel.
        slots: Blocks that the device runs at once.
        taken: Those of them that a kernel before still has.
    """
    costs = {
        shares: math.ceil((panels * shares + taken) / slots) * (2 + math.ceil(math.ceil(steps / WARPS) / shares))
        for shares in range(1, max(1, min(8, 768 // panels)) + 1)
    }
    return min(costs, key=lambda shares: (costs[shares], shares))


@dataclass(frozen=True)
class Split:
    """How blocks of many tokens share tiles, as `best_split` of kernels/cuda/dispatch.cuh chooses.

    Attributes:
        own: Steps of a block.
        blocks: Number of blocks.
        shares: The most that share a tile.
        begins: The most tiles of a block.
        parts: Parts of tiles of all blocks, whose sums are added up by another kernel.
    """

    own: int
    blocks: int
    shares: int
    begins: int
    parts: int

    @staticmethod
    def best(steps: int, tiles: int, slots: int, most: int, tokens: int) -> Split:
        """Choose for tiles of ``steps`` steps on a device that runs ``slots`` blocks at once."""
        cut = [(n, math.ceil(steps / n)) for n in range(2, most + 1)]
        choices = [Split(steps, tiles, 1, 1, 0), *(Split(own, tiles * n, n, 1, tiles * n) for n, own in cut)]
        for waves in range(1, 5):
            own = math.ceil(tiles * steps / (waves * slots))
            blocks = math.ceil(tiles * steps / own)
            if own % steps:
                shares, begins = (steps + own - 2) // own + 1, (own + steps - 2) // steps + 1
                choices.append(Split(own, blocks, shares, begins, blocks + min(blocks, tiles)))
        possible = (each for each in choices if each.shares <= most or not each.parts)
        return min(possible, key=lambda it: it.cost(slots, min(tokens, TILE_TOKENS)))

    def cost(self, slots: int, live: int) -> int:
        """Return the time in steps; ``live``: tokens of a tile."""
        toll = 1 + math.ceil(3 * live * self.parts / (TILE_TOKENS * slots)) if self.parts else 0
        return math.ceil(self.blocks / slots) * (self.own + 2 * self.begins) + toll


def registers(path: Path, architecture: int) -> dict[str, int]:
    """Return the registers of a thread by mangled name.

    Raises:
        MissingError: cuobjdump is not installed.
    """
    command = [str(sass.tool("cuobjdump")), "--dump-resource-usage", "-arch", f"sm_{architecture}", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(count) for name, count in re.findall(r"Function (\S+):\s+REG:(\d+)", text)}


def _resident(of_a_thread: int, taken: int = 0) -> int:
    """Blocks of 256 threads that have room for their registers on a multiprocessor, ``taken`` of which are in use."""
    return (65536 - taken) // (256 * 8 * math.ceil(of_a_thread / 8))


def _clocks(gpu: Gpu, cost: sass.LoopCost, layer: Layer, *, int8: bool, live: float = 1.0) -> float:
    """Clocks of a multiprocessor for 32 weights, by its busiest pipe; ``live``: share of a tile's tokens in use.

    Products of tokens that do not exist are left out, and the reads of x for them, 16 bytes a lane (`prefill_mma`).
    """
    steps = max(1, layer.group // step_columns(layer.bits))
    counts = cost.per_weight(steps)
    reads = sum(sum(_reads_x(i) for i in code) * share for code, share in cost.shares(steps)) / cost.weights
    idle = 1 - live
    times = {pipe: counts[pipe] * 32 / lanes for pipe, lanes in pipe_rates(gpu).items()}
    times["issue"] = (counts["total"] - idle * (counts["tensor"] + reads)) * 32 / 128
    rows = sum(wavefronts(code) * share for code, share in cost.shares(steps)) / cost.weights
    times["shared"] = rows - idle * 4 * reads
    times["tensor"] = counts["tensor"] * (gpu.imma if int8 else gpu.mma) * live
    return max(times.values())


def _reads_x(instruction: sass.Instruction) -> bool:
    return instruction.pipe == "shared" and ".128" in instruction.opcode


@dataclass(frozen=True)
class _Branch:
    """x down^T: its blocks, ranks and tokens of one, how many share the columns, and whether tensor cores do it."""

    blocks: int
    ranks: int
    tokens: int
    shares: int
    mma: bool

    @staticmethod
    def of(gpu: Gpu, layer: Layer, tokens: int) -> _Branch:
        """Choose as `down` of kernels/cuda/products.cuh and `branch_shares` of branch.cuh."""
        shares = 1
        if tokens <= 64 and (tokens > 16 or gpu.code < EARLY):
            shares = max(1, min(4, layer.columns // (1024 if tokens > 16 else 2048)))

        def blocks(ranks: int, at_once: int) -> int:
            return math.ceil(layer.branch_rank / ranks) * math.ceil(tokens / at_once)

        if tokens > 16 and (gpu.code >= EARLY or blocks(4, 8) > WIDE_BRANCH):
            at_once = 16 if blocks(16, 8) > WIDE_BRANCH else 8
            return _Branch(blocks(16, at_once) * shares, 16, at_once, shares, True)
        return _Branch(blocks(4, 8) * shares, 4, min(8, tokens), shares, False)

    def time(self, gpu: Gpu, columns: int) -> float:
        """Microseconds: x and the factor through the second-level cache, conversions, one access and the sums."""
        if not self.blocks:
            return 0.0
        clock, columns = gpu.clock * 1e3, columns // self.shares  # per microsecond
        # Of a lane for one column: conversions of codes, and multiply-adds where no tensor core does them.
        work = (2.5 * self.ranks if self.mma else 1.5 * self.ranks * self.tokens) * columns * self.blocks
        reads = self.blocks * columns * (self.ranks + 2 * self.tokens)
        busy = min(self.blocks, gpu.multiprocessors)
        return max(work / (busy * 128 * clock), reads / (busy * L2_BYTES * clock)) + 2 * LATENCY


def _decode(gpu: Gpu, cost: sass.LoopCost, layer: Layer, tokens: int, of_a_thread: int, *, int8: bool) -> LayerTime:
    panels, slots = math.ceil(layer.rows / PANEL), gpu.multiprocessors * _resident(of_a_thread)
    steps = math.ceil(layer.columns / step_columns(layer.bits))
    early, has_branch = gpu.code >= EARLY, bool(layer.branch_rank)
    below = _Branch.of(gpu, layer, tokens)
    taken = below.blocks if early and not int8 else 0
    shares = panel_shares(panels, steps, slots, taken)
    waves = math.ceil((panels * shares + taken) / slots)
    filled = panels * shares / (waves * slots)
    clock = gpu.clock * 1e3
    pipes = layer.rows * layer.columns / 32 * _clocks(gpu, cost, layer, int8=int8) / (gpu.multiprocessors * clock)
    inputs = panels * tokens * layer.columns * (1 if int8 else 2) / (L2_BYTES * gpu.multiprocessors * clock)
    memory = layer.memory(tokens) / gpu.bandwidth / 1e3
    table = waves * TABLE_CLOCKS / clock if layer.bits in (4, 8) else 0.1
    product = max(pipes / filled + table, inputs + table, memory / min(1.0, filled / SATURATING)) + LATENCY
    branch = below.time(gpu, layer.columns)
    launches = 1 + has_branch + (int8 or (shares > 1 and not has_branch))
    in_turn = 1 if early and (has_branch or int8) else launches
    hidden = min(branch, product) if early and not int8 else 0.0
    return LayerTime(gpu.name, tokens, launches, in_turn, shares, waves, memory, branch, hidden, product, 0.0)


def _prefill(gpu: Gpu, cost: sass.LoopCost, layer: Layer, tokens: int, of_a_thread: int, *, share: bool) -> LayerTime:
    across, tiles = math.ceil(layer.rows / TILE_ROWS), math.ceil(tokens / TILE_TOKENS)
    slots, steps = gpu.multiprocessors * _resident(of_a_thread), math.ceil(layer.columns / step_columns(layer.bits))
    across *= tiles
    most = max(1, min(32, 512 // across)) if share else 1
    split = Split.best(steps, across, slots, most, tokens) if share else Split(steps, across, 1, 1, 0)
    waves = math.ceil(split.blocks / slots)
    filled = across * steps / (waves * slots * split.own)
    clock = gpu.clock * 1e3
    lives = [min(TILE_TOKENS, 16 * math.ceil((tokens - first) / 16)) for first in range(0, tokens, TILE_TOKENS)]
    clocks = sum(_clocks(gpu, cost, layer, int8=False, live=live / TILE_TOKENS) for live in lives)
    pipes = layer.rows * layer.columns / 32 * clocks / (gpu.multiprocessors * clock)
    # The second half of the branch: three products of 16 ranks where the main loop has one of 16 columns. Blocks that
    # share a tile share the ranks, sixteen at a time.
    own_ranks = split.begins * 16 * math.ceil(math.ceil(layer.branch_rank / 16) / split.shares)
    pipes *= 1 + 3 * own_ranks / (split.own * step_columns(layer.bits))
    memory = layer.memory(tokens) / gpu.bandwidth / 1e3
    table = waves * TABLE_CLOCKS / clock if layer.bits in (4, 8) else 0.1
    again = (
        waves * (split.begins - 1) * LATENCY
    )  # a block that begins another tile waits for its first codes and activations
    product = max(pipes / filled + table + again, memory / min(1.0, filled / SATURATING)) + LATENCY
    sums = 0.0
    if split.parts:
        each = 2 * 4 * TILE_ROWS * min(TILE_TOKENS, tokens)
        sums = split.parts * each / (L2_BYTES * gpu.multiprocessors * clock) + LATENCY
    below = _Branch.of(gpu, layer, tokens)
    branch = below.time(gpu, layer.columns)
    # Blocks of the branch run beside those of the product if a multiprocessor has room for one of each.
    early = gpu.code >= EARLY
    room = below.mma and _resident(BRANCH_REGISTERS[below.tokens], 256 * 8 * math.ceil(of_a_thread / 8)) > 0
    beside = early and room and below.blocks <= gpu.multiprocessors
    launches = 1 + bool(layer.branch_rank) + (split.parts > 0)
    in_turn, hidden = 1 if early else launches, min(branch, product) if beside else 0.0
    return LayerTime(gpu.name, tokens, launches, in_turn, split.shares, waves, memory, branch, hidden, product, sums)


def _experts(gpu: Gpu, cost: sass.LoopCost, layer: Layer, chosen: int, of_a_thread: int) -> LayerTime:
    """One token and its experts: a block per panel and expert, which reads its number before it reads codes."""
    blocks, slots = chosen * math.ceil(layer.rows / PANEL), gpu.multiprocessors * _resident(of_a_thread)
    waves = math.ceil(blocks / slots)
    filled = blocks / (waves * slots)
    clock = gpu.clock * 1e3
    pipes = chosen * layer.rows * layer.columns / 32 * _clocks(gpu, cost, layer, int8=False)
    memory = chosen * layer.memory(1) / gpu.bandwidth / 1e3
    table = waves * TABLE_CLOCKS / clock if layer.bits in (4, 8) else 0.1
    pipes = pipes / (gpu.multiprocessors * clock) / filled
    product = max(pipes + table, memory / min(1.0, filled / SATURATING)) + 2 * LATENCY
    branch = _Branch.of(gpu, layer, 1).time(gpu, layer.columns) + LATENCY if layer.branch_rank else 0.0
    launches = 1 + bool(layer.branch_rank)
    return LayerTime(gpu.name, 1, launches, launches, 1, waves, memory, branch, 0.0, product, 0.0)


@dataclass(frozen=True)
class Times:
    """Layer times of one GPU.

    Attributes:
        gpu: The GPU.
        costs: Loops of the kernels.
        registers: Of a thread, by kernel.
    """

    gpu: Gpu
    costs: dict[Key, sass.LoopCost]
    registers: dict[Key, int]

    def of(self, layer: Layer, tokens: int, *, int8: bool = False, share: bool = True) -> LayerTime:
        """Return the time of a layer; ``share=False``: as if blocks of many tokens did not share columns.

        Activations rounded to 8 bits have kernels of their own for up to 16 tokens.
        """
        if tokens > 16:
            key: Key = ("prefill", layer.bits, layer.planes, TILE_TOKENS, 0)
            return _prefill(self.gpu, self.costs[key], layer, tokens, self.registers[key], share=share)
        kind = int8_kernel(layer.bits, layer.group, tokens) if int8 else (8 * math.ceil(tokens / 8), 0)
        key = ("int8" if int8 else "fp16", layer.bits, layer.planes, *kind)
        return _decode(self.gpu, self.costs[key], layer, tokens, self.registers[key], int8=int8)

    def of_experts(self, layer: Layer, chosen: int) -> LayerTime:
        """Return the time of the matrix of each of the experts that were chosen for one token."""
        key: Key = ("experts", layer.bits, layer.planes, 8, 0)
        return _experts(self.gpu, self.costs[key], layer, chosen, self.registers[key])


def times(path: Path) -> list[Times]:
    """Return the layer times of every GPU that the library holds code for.

    Raises:
        MissingError: cuobjdump is not installed.
    """
    found = []
    for architecture in sorted({gpu.code for gpu in GPUS}):
        costs, counts = compiled(path, architecture)
        found += [Times(gpu, costs, counts) for gpu in GPUS if gpu.code == architecture and costs]
    return found


def compiled(path: Path, architecture: int) -> tuple[dict[Key, sass.LoopCost], dict[Key, int]]:
    """Return loops and registers (see `Times`) of one architecture in a library, empty if it holds none of it.

    Raises:
        MissingError: cuobjdump is not installed.
    """
    names = registers(path, architecture).items()
    return roofline.costs(path, architecture), {
        key: count for name, count in names if "6BFloat" not in name and (key := roofline.key_of(name))
    }


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
