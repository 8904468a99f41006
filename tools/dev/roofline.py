"""Predicts how fast the CUDA kernels would be, from their machine code: ``python -m rankbook.tools.dev.roofline``.

**A prediction, never a measurement**: no GPU took part. Instructions per weight are counted in the compiled kernels
(`rankbook.tools.dev.sass`); rates of the pipes come from the CUDA programming guide and vendor data sheets, the
tensor-core rates of mma.sync from public micro-benchmarks. Not modelled: launch and memory latency (which rule layers
below about 2048 x 2048), occupancy, dependencies between instructions, caches.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from rankbook.plugins import library
from rankbook.tools.dev import sass
from rankbook.tools.errors import CommandError

TOKENS = (1, 2, 4, 8, 16)
NOTE = "a prediction from compiled code and data sheets; these kernels have never run on a GPU"
_DECODE = re.compile(r"decode_mmaILi(\d)ELi(\d)ELi(\d)ENS0_4HalfE")
_EXPERTS = re.compile(r"experts_mmaILi(\d)ELi(\d)ENS0_4HalfE")
_PREFILL = re.compile(r"prefill_mmaILi(\d)ELi(\d)ENS0_4HalfE")
_PREFILL_TOKENS = 64
_DECODE_INT8 = re.compile(r"decode_int8ILi(\d)ELi(\d)ELi(\d+)ELi(\d)E")
_ISSUE = 128  # lanes that start an instruction per clock and multiprocessor: four schedulers, 32 lanes each


@dataclass(frozen=True)
class Gpu:
    """A GPU on paper.

    Attributes:
        name: Name.
        code: Architecture whose machine code it runs: the newest of those built that it accepts.
        bandwidth: Memory bandwidth in GB/s.
        multiprocessors: Their number.
        clock: Boost clock in GHz.
        mma: Clocks of a multiprocessor per mma.m16n8k16 (fp16, sums in fp32).
        imma: Clocks of a multiprocessor per mma.m16n8k32 (int8).
        half: Lanes that do an fp16x2 operation per clock and multiprocessor.
        driver: Regular expression that the end of the driver's name for it matches; empty: nothing is known.
    """

    name: str
    code: int
    bandwidth: float
    multiprocessors: int
    clock: float
    mma: float
    imma: float
    half: int
    driver: str = ""


GPUS = (
    Gpu("A100-80GB", 80, 2039, 108, 1.41, 2.0, 2.0, 128, r"A100-\w+-80GB"),
    Gpu("H100-SXM", 90, 3352, 132, 1.755, 1.6, 1.6, 128, r"H100 80GB HBM3"),
    Gpu("GH200-96GB", 90, 4000, 132, 1.755, 1.6, 1.6, 128, r"GH200 480GB"),
    Gpu("H200-SXM", 90, 4800, 132, 1.755, 1.6, 1.6, 128, r"H200"),
    Gpu("L4", 80, 300, 58, 2.04, 4.0, 4.0, 64, r"L4"),
    Gpu("RTX 4090", 80, 1008, 128, 2.52, 8.0, 4.0, 64, r"RTX 4090"),
    Gpu("RTX 5090", 120, 1792, 170, 2.41, 8.0, 4.0, 64, r"RTX 5090"),
    Gpu("Orin-64GB", 80, 204.8, 16, 1.3, 2.0, 2.0, 64, r"Orin"),
)


def known(name: str) -> Gpu | None:
    """Return the GPU that a driver's name means, e.g. ``NVIDIA H200``, or None: others of its kind differ."""
    return next((gpu for gpu in GPUS if gpu.driver and re.search(rf"(?:^| ){gpu.driver}$", name)), None)


@dataclass(frozen=True)
class Decode:
    """Prediction for the product with few tokens.

    Attributes:
        gpu: Name of the GPU.
        activations: ``fp16``, or ``int8`` for rounded ones.
        bits: Bits per code.
        planes: Planes of coefficients; there is an offset in addition.
        group: Weights per group.
        tokens: Tokens at once.
        bytes_per_weight: Codes and parameters.
        instructions: Per weight and pipe, with ``total``.
        loads: Busy share of every pipe and of the schedulers (``issue``) at full memory speed.
        limiter: ``memory``, or the pipe that is too slow for it.
        bandwidth_fraction: Predicted share of the memory bandwidth.
    """

    gpu: str
    activations: str
    bits: int
    planes: int
    group: int
    tokens: int
    bytes_per_weight: float
    instructions: dict[str, float]
    loads: dict[str, float]
    limiter: str
    bandwidth_fraction: float


@dataclass(frozen=True)
class Prefill:
    """Prediction for the product with many tokens, in blocks of 64 tokens and 256 rows.

    Attributes:
        gpu: Name of the GPU.
        bits: Bits per code.
        planes: Planes of coefficients; there is an offset in addition.
        group: Weights per group.
        loads: Clocks of every pipe, as a share of those of the tensor cores.
        limiter: The busiest pipe.
        fraction: Predicted share of the tensor-core rate while all multiprocessors have blocks.
    """

    gpu: str
    bits: int
    planes: int
    group: int
    loads: dict[str, float]
    limiter: str
    fraction: float


def wavefronts(instructions: tuple[sass.Instruction, ...]) -> int:
    """Return how many 128-byte rows of shared memory a warp reads or writes, without bank conflicts."""
    return sum(
        4 if ".128" in i.opcode or ".M88.4" in i.opcode else 2 if ".64" in i.opcode or ".M88.2" in i.opcode else 1
        for i in instructions
        if i.pipe == "shared"
    )


def pipe_rates(gpu: Gpu) -> dict[str, float]:
    """Return lanes per clock and multiprocessor by pipe; float and integer multiply-adds share the slower rate."""
    return {"alu": 64, "fma": 64, "half": gpu.half, "xu": 16, "global": 32, "other": 64}


def step_columns(bits: int) -> int:
    """Return the columns of a step of a warp, which is where parameters are read at the latest."""
    return 128 if bits == 3 else 64


def decode(
    gpu: Gpu, cost: sass.LoopCost, bits: int, planes: int, group: int, tokens: int, activations: str = "fp16"
) -> Decode:
    """Predict one kernel on one GPU."""
    steps = max(1, group // step_columns(bits))
    instructions = cost.per_weight(steps)
    size = bits / 8 + (planes + 1) / group  # a byte per parameter
    # Weights per clock and multiprocessor at full memory speed.
    rate = gpu.bandwidth / (size * gpu.multiprocessors * gpu.clock)
    loads = {pipe: rate * instructions[pipe] / lanes for pipe, lanes in pipe_rates(gpu).items()}
    rows = sum(wavefronts(code) * share for code, share in cost.shares(steps))
    loads["shared"] = rate * rows / cost.weights / 32
    loads["tensor"] = rate * instructions["tensor"] / 32 * (gpu.imma if activations == "int8" else gpu.mma)
    loads["issue"] = rate * instructions["total"] / _ISSUE
    busiest = max(loads, key=lambda pipe: loads[pipe])
    limiter = busiest if loads[busiest] > 1 else "memory"
    fraction = min(1.0, 1 / loads[busiest])
    return Decode(gpu.name, activations, bits, planes, group, tokens, size, instructions, loads, limiter, fraction)


def int8_kernel(bits: int, group: int, tokens: int) -> tuple[int, int]:
    """Return the number of tokens and of groups per step for which the kernel of rounded activations is made."""
    return 1 if tokens == 1 else 8 * ((tokens + 7) // 8), 1 if group % step_columns(bits) == 0 else 2


def prefill(gpu: Gpu, cost: sass.LoopCost, bits: int, planes: int, group: int) -> Prefill:
    """Predict the product of many tokens on one GPU."""
    steps = max(1, group // step_columns(bits))
    counts = cost.per_weight(steps)
    mma = counts["tensor"] * gpu.mma
    times = {pipe: counts[pipe] * 32 / lanes for pipe, lanes in pipe_rates(gpu).items()}
    times["issue"] = counts["total"] * 32 / _ISSUE
    rows = sum((wavefronts(code) + 4 * _copies(code)) * share for code, share in cost.shares(steps))
    times["shared"] = rows / cost.weights
    loads = {"tensor": 1.0, **{pipe: time / mma for pipe, time in times.items()}}
    slowest = max(loads, key=lambda pipe: loads[pipe])
    return Prefill(gpu.name, bits, planes, group, loads, slowest, 1 / loads[slowest])


def _copies(instructions: tuple[sass.Instruction, ...]) -> int:
    """Asynchronous copies of 16 bytes a lane, which write shared memory as well."""
    return sum(i.opcode.startswith("LDGSTS") for i in instructions)


Key = tuple[str, int, int, int, int]
"""A kernel: ``fp16``, ``int8``, ``prefill`` or ``experts``, bits, planes, tokens, groups per step."""


def key_of(name: str) -> Key | None:
    """Return which kernel of fp16 or int8 activations a mangled name means, or None."""
    if match := _DECODE.search(name):
        bits, planes, tiles = map(int, match.groups())
        return "fp16", bits, planes, 8 * tiles, 0
    if match := _EXPERTS.search(name):
        bits, planes = map(int, match.groups())
        return "experts", bits, planes, 8, 0
    if match := _PREFILL.search(name):
        bits, planes = map(int, match.groups())
        return "prefill", bits, planes, _PREFILL_TOKENS, 0
    if match := _DECODE_INT8.search(name):
        bits, planes, tokens, parts = map(int, match.groups())
        return "int8", bits, planes, tokens, parts
    return None


def costs_of(code: dict[str, list[sass.Instruction]]) -> dict[Key, sass.LoopCost]:
    """Return the cost of the loop of every kernel."""
    costs: dict[Key, sass.LoopCost] = {}
    for name, instructions in code.items():
        key = key_of(name)
        if key is not None and key[0] == "int8":
            costs[key] = sass.turn_loop(instructions, step_columns(key[1]))
        elif key is not None:
            costs[key] = sass.main_loop(instructions, key[3])
    return costs


KERNELS = r"decode_mma.*4HalfE|decode_int8|prefill_mma.*4HalfE|experts_mma.*4HalfE"


@functools.cache
def costs(path: Path, architecture: int) -> dict[Key, sass.LoopCost]:
    """Return `costs_of` a library's kernels for one architecture, empty if it holds none: read once in a process.

    Raises:
        MissingError: cuobjdump is not installed.
    """
    return costs_of(sass.functions(path, architecture, KERNELS))


def predict(path: Path, groups: tuple[int, ...] = (64, 128)) -> tuple[list[Decode], list[Prefill]]:
    """Predict every kernel of the library on every GPU that it holds code for.

    Raises:
        MissingError: cuobjdump is not installed.
    """
    decodes, prefills = [], []
    for architecture in sorted({gpu.code for gpu in GPUS}):
        found = costs(path, architecture)
        for gpu in (gpu for gpu in GPUS if gpu.code == architecture):
            for bits, planes, group, tokens in product((2, 3, 4), (1, 2), groups, TOKENS):
                keys = {"fp16": (8 * ((tokens + 7) // 8), 0), "int8": int8_kernel(bits, group, tokens)}
                decodes += [
                    decode(gpu, cost, bits, planes, group, tokens, activations)
                    for activations, key in keys.items()
                    if (cost := found.get((activations, bits, planes, *key))) is not None
                ]
            for (kind, bits, planes, _, _), cost in sorted(found.items()):
                if kind == "prefill" and bits < 8:
                    prefills += [prefill(gpu, cost, bits, planes, group) for group in groups]
    return decodes, prefills


def table(decodes: list[Decode], tokens: int) -> str:
    """Return a Markdown table: a row per form, a column per GPU, predicted share of the bandwidth and limiter."""
    names = [gpu.name for gpu in GPUS if any(item.gpu == gpu.name for item in decodes)]
    lines = [f"| x, bits, planes, group (M = {tokens}) | B/weight | SASS/weight | " + " | ".join(names) + " |"]
    lines.append("|---" * (len(names) + 3) + "|")
    forms = sorted({(d.activations, d.bits, d.planes, d.group) for d in decodes if d.tokens == tokens})
    for form in forms:
        found = [d for d in decodes if (d.activations, d.bits, d.planes, d.group) == form and d.tokens == tokens]
        row = {d.gpu: d for d in found}
        counts = [d.instructions["total"] for d in found]
        cells = [", ".join(map(str, form)), f"{found[0].bytes_per_weight:.3f}", _range(counts)]
        lines.append("| " + " | ".join([*cells, *(_cell(row[name]) for name in names)]) + " |")
    return "\n".join(lines)


def prefill_table(prefills: list[Prefill]) -> str:
    """Return a Markdown table: a row per form, a column per GPU, predicted share of the tensor-core rate."""
    names = [gpu.name for gpu in GPUS if any(item.gpu == gpu.name for item in prefills)]
    lines = ["| bits, planes, group | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for form in sorted({(item.bits, item.planes, item.group) for item in prefills}):
        found = {p.gpu: p for p in prefills if (p.bits, p.planes, p.group) == form}
        cells = [f"{100 * found[name].fraction:.0f} % ({found[name].limiter})" for name in names]
        lines.append("| " + " | ".join([", ".join(map(str, form)), *cells]) + " |")
    return "\n".join(lines)


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def _cell(item: Decode) -> str:
    busiest = max(item.loads, key=lambda pipe: item.loads[pipe])
    if item.limiter == "memory":
        return f"memory ({busiest} {100 * item.loads[busiest]:.0f} %)"
    return f"**{100 * item.bandwidth_fraction:.0f} %** ({item.limiter})"


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m rankbook.tools.dev.roofline", description=f"Roofline: {NOTE}.")
    parser.add_argument("--library", type=Path, help="librankbook_trt.so, or a cubin (default: the built library)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    parser.add_argument("--group", type=int, nargs="+", default=[64, 128], metavar="N", help="group sizes")
    options = parser.parse_args(arguments)
    try:
        path = options.library or library.library("trt")
        decodes, prefills = predict(path, tuple(options.group))
    except (FileNotFoundError, CommandError) as error:
        print(error, file=sys.stderr)
        return 3
    if not decodes:
        print(f"{path} holds no decode kernels for sm_80, sm_90 or sm_120", file=sys.stderr)
        return 1
    if options.json:
        content = {"note": NOTE, "decode": list(map(asdict, decodes)), "prefill": list(map(asdict, prefills))}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"Predicted, not measured: {NOTE}.")
    print("Share of the memory bandwidth; in parentheses the busiest pipe and its load at full memory speed.\n")
    print("\n\n".join(table(decodes, tokens) for tokens in (1, 8, 16)))
    print("\nMany tokens: share of the tensor-core rate while all multiprocessors have blocks, and the busiest pipe.\n")
    print(prefill_table(prefills))
    from rankbook.tools.dev import layer_time

    print(f"\n{layer_time.tables(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
