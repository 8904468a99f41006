"""Reads the machine code (SASS) of the CUDA kernels: what one weight costs in the loop that ships.

Needs ``cuobjdump`` of the CUDA toolkit, or of the wheel that ``make native-cuda`` puts into ``build/cuda-tools``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rankbook.tools.errors import MissingError

PIPES = {
    "alu": "LOP3 PRMT SHF IADD3 IADD ISETP SEL LEA MOV FSETP FSEL VIADD IMNMX VIMNMX PLOP3 SGXT BMSK I2FP F2FP FMNMX"
    " LOP IABS VOTE P2R R2P ISCADD VIADDMNMX",
    "fma": "IMAD FFMA FMUL FADD",
    "half": "HFMA2 HADD2 HMUL2 HMNMX2",
    "xu": "I2F F2I F2F MUFU FRND POPC FLO",
    "shared": "LDS STS LDSM SHFL",
    "global": "LDG STG LD ST LDGSTS ATOMG RED",
    "tensor": "HMMA IMMA",
}
"""Instructions by the pipe that executes them; everything else (branches, uniform registers) is ``other``."""
_PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}
_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;")
_ARCHITECTURE = re.compile(r"^\s*code for sm_(\d+)")
_TARGET = re.compile(r"(?:^|[\s,(])0x([0-9a-f]+)\)?$")
_SLOW = re.compile(r"LDG\.E\.(U16|S8)")
"""Scalar loads occur where parameters are fp16 or a single number: forms that are not the common one."""


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        address: Byte offset in its function.
        predicate: Condition register, or ``""``.
        opcode: With its suffixes, e.g. ``LDG.E.128.CONSTANT``.
        operands: The rest of the line.
    """

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def pipe(self) -> str:
        """The pipe that executes it."""
        return _PIPE_OF.get(self.opcode.split(".")[0], "other")

    @property
    def target(self) -> int | None:
        """Where a branch goes, or None."""
        if self.opcode.split(".")[0] != "BRA":
            return None
        found = _TARGET.search(self.operands)
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class LoopCost:
    """What the main loop of a decode kernel executes.

    Attributes:
        weights: Weights that one lane decodes in one step.
        step: Instructions of every step.
        group: Instructions once per group of weights (or per step where a step has several groups).
    """

    weights: int
    step: tuple[Instruction, ...]
    group: tuple[Instruction, ...]

    def shares(self, steps_per_group: int) -> tuple[tuple[tuple[Instruction, ...], float], ...]:
        """Return instructions with how often a step executes them."""
        return (self.step, 1.0), (self.group, 1.0 / steps_per_group)

    def per_weight(self, steps_per_group: int) -> dict[str, float]:
        """Return instructions per weight by pipe, with ``total``."""
        counts: Counter[str] = Counter()
        for instructions, share in self.shares(steps_per_group):
            for instruction in instructions:
                counts[instruction.pipe] += share  # type: ignore[assignment]
        result = {pipe: counts[pipe] / self.weights for pipe in (*PIPES, "other")}
        return {**result, "total": sum(result.values())}

    def count(self, prefix: str) -> int:
        """Return how many instructions of a step start with a prefix."""
        return sum(instruction.opcode.startswith(prefix) for instruction in self.step)


@dataclass(frozen=True)
class TurnCost(LoopCost):
    """The same for kernels that convert sums once in a turn of one step or two.

    Attributes:
        step: Instructions of a turn of one step.
        group: What a second step adds.
    """

    def shares(self, steps_per_group: int) -> tuple[tuple[tuple[Instruction, ...], float], ...]:
        """Return instructions with how often a step executes them."""
        if steps_per_group == 1 or not self.group:
            return ((self.step, 1.0),)
        return (self.step, 0.5), (self.group, 0.5)


def tool(name: str) -> Path:
    """Return the path of a CUDA binary tool.

    Raises:
        MissingError: It is not installed.
    """
    beside = Path(__file__).resolve().parents[2] / "build" / "cuda-tools" / "nvidia" / "cu13" / "bin" / name
    usual = Path("/usr/local/cuda/bin") / name
    found = shutil.which(name)
    for path in (Path(found) if found else None, usual, beside):
        if path is not None and path.is_file():
            return path
    raise MissingError(f"{name} is not installed: run `make native-cuda` in the checkout, or install the CUDA toolkit")


def functions(library: Path, architecture: int, names: str = "") -> dict[str, list[Instruction]]:
    """Return the code of the kernels of one architecture in a library or cubin, by mangled name.

    Args:
        library: The file.
        architecture: E.g. 80.
        names: Regular expression; kernels whose names it does not match are left out.

    Raises:
        MissingError: cuobjdump is not installed.
    """
    command = [str(tool("cuobjdump")), "-sass", "-arch", f"sm_{architecture}", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # 150 MB of text, read as it comes
        found = _parse(process.stdout or (), architecture, names)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return found


def _parse(lines: Iterable[str], architecture: int, names: str) -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    wanted = False
    for line in lines:
        if "/*" not in line:
            if arch := _ARCHITECTURE.match(line):
                wanted = int(arch[1]) == architecture
            elif name := _FUNCTION.match(line):
                current = found.setdefault(name[1], []) if wanted and re.search(names, name[1]) else None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            address, predicate, opcode, operands = match.groups()
            current.append(Instruction(int(address, 16), predicate or "", opcode, operands))
    return found


def main_loop(code: list[Instruction], tokens: int) -> LoopCost:
    """Return the loop that decodes weights and feeds them to the tensor cores.

    Counted is the longest way through it that avoids the slow forms, so branches are overestimated rather than missed.

    Args:
        code: The function.
        tokens: Tokens of the kernel, a multiple of 8; each 8 tokens take one mma per 8 weights of a lane.

    Raises:
        ValueError: There is no such loop.
    """
    spans = sorted(_loops(code), key=lambda span: span[1] - span[0])
    with_mma = [span for span in spans if any(i.pipe == "tensor" for i in code[span[0] : span[1] + 1])]
    if not with_mma:
        raise ValueError("the function has no loop with tensor-core instructions")
    # Not a loop around others, such as that of tiles, and not the loop of the error branch at the end, of which one
    # pass has fewer products than a step.
    innermost = [s for s in with_mma if not any(s[0] < other[0] and other[1] <= s[1] for other in with_mma)]
    passes = [_longest(code, span, None, _slow_blocks(code, span)) for span in innermost]
    products = [sum(i.pipe == "tensor" for i in found) for found in passes]
    inner, step = innermost[products.index(max(products))], passes[products.index(max(products))]
    outer = next((s for s in with_mma if s[0] <= inner[0] and s[1] >= inner[1] and s != inner), None)
    group = _longest(code, outer, inner, _slow_blocks(code, outer)) if outer else ()
    weights = 8 * sum(i.pipe == "tensor" for i in step) // (tokens // 8)
    return LoopCost(weights, step, group)


def turn_loop(code: list[Instruction], weights: int) -> TurnCost:
    """Return the loop of a kernel for rounded activations, the second step of a turn apart.

    Args:
        code: The function.
        weights: Weights that one lane decodes in one step.

    Raises:
        ValueError: There is no loop with tensor-core instructions.
    """
    tensor = [i for i, instruction in enumerate(code) if instruction.pipe == "tensor"]
    spans = [s for s in _loops(code) if tensor and s[0] <= tensor[0] and tensor[-1] <= s[1]]
    if not spans:
        raise ValueError("the function has no loop with tensor-core instructions")
    span = min(spans, key=lambda s: s[1] - s[0])
    both, one = _longest(code, span, None, set()), _longest(code, span, None, set(), fewest_products=True)
    known = {instruction.address for instruction in one}
    return TurnCost(weights, one, tuple(i for i in both if i.address not in known))


def _loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """First and last index of every loop: a branch to an earlier address."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    heads: dict[int, int] = {}
    for i, instruction in enumerate(code):
        target = instruction.target
        if target is not None and target in index and index[target] < i:
            heads[index[target]] = max(i, heads.get(index[target], 0))
    return list(heads.items())


def _longest(
    code: list[Instruction],
    span: tuple[int, int],
    hole: tuple[int, int] | None,
    slow: set[int],
    *,
    fewest_products: bool = False,
) -> tuple[Instruction, ...]:
    """Longest way from the first to the last instruction of a loop that avoids the slow forms.

    A hole (the inner loop) is passed for nothing. With ``fewest_products``, the longest among those with the fewest
    tensor-core instructions.
    """
    first, last = span
    index = {instruction.address: i for i, instruction in enumerate(code)}
    best: dict[int, tuple[tuple[int, int], int]] = {first: ((0, 0), -1)}  # instruction: cost up to it, the one before
    for i in range(first, last + 1):
        if i not in best or i in slow:
            continue
        inside = hole is not None and hole[0] <= i <= hole[1]
        products, length = best[i][0]
        cost = (products - int(fewest_products and code[i].pipe == "tensor"), length + int(not inside))
        for successor in _successors(code, i, index):
            if i < successor <= last and (successor not in best or best[successor][0] < cost):
                best[successor] = (cost, i)
    path, at = [], last
    if last not in best:
        raise ValueError("no way through the loop avoids the slow forms")
    while at != -1:
        if hole is None or not hole[0] <= at <= hole[1]:
            path.append(code[at])
        at = best[at][1]
    return tuple(reversed(path))


def _successors(code: list[Instruction], i: int, index: dict[int, int]) -> list[int]:
    target = code[i].target
    found = [] if target is None or target not in index else [index[target]]
    conditional = code[i].predicate not in ("", "PT") or ("P" in code[i].operands.split("0x")[0])
    leaves = code[i].opcode.split(".")[0] in ("EXIT", "RET") and not code[i].predicate
    if not leaves and (target is None or conditional):
        found.append(i + 1)
    return found


def _slow_blocks(code: list[Instruction], span: tuple[int, int]) -> set[int]:
    """Instructions of the basic blocks that belong to slow forms, unless the block also feeds the tensor cores."""
    targets = {instruction.target for instruction in code}
    blocks: list[list[int]] = [[]]
    for i in range(span[0], span[1] + 1):
        if code[i].address in targets:
            blocks.append([])
        blocks[-1].append(i)
        if code[i].target is not None:
            blocks.append([])
    slow: set[int] = set()
    for block in blocks:
        plain = any(code[i].pipe == "tensor" for i in block)
        if not plain and any(_SLOW.match(code[i].opcode) for i in block):
            slow.update(block)
    return slow
