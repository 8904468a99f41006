"""Executes a kernel: all lanes of all blocks at once as numpy arrays, those at the lowest instruction first.

Taking the lowest instruction lets lanes that parted meet again behind loops and branches. Instructions that a warp
executes together (shuffles, tensor-core products) wait for its 32 lanes, barriers for the lanes of a block; what would
wait for ever, or for lanes that have left, raises. One order out of all that a GPU may choose is tried: races between
instructions are not found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.plugins.ptx.copies import Copies
from tests.plugins.ptx.memory import Device, Space
from tests.plugins.ptx.parser import Instruction, Kernel, PtxError

Array = np.ndarray[Any, Any]
WARP = 32
SHARED_BASE = 1024  # recent GPUs keep the first KB of shared memory for themselves
LOCAL_BASE = 64
PARAM_BASE = 0x200
EXITED = np.iinfo(np.int64).max
MOST_STEPS = 200_000
"""Straight pieces of code that one launch may run; more is taken for an endless loop."""


class Registers(dict[str, Array]):
    """Bits per register and lane; bool for predicates. What was never written holds a pattern that is no zero."""

    def __init__(self, kernel: Kernel, lanes: int) -> None:
        super().__init__()
        self._kernel, self._lanes = kernel, lanes

    def __missing__(self, name: str) -> Array:
        width = self._kernel.width(name)
        self[name] = np.full(self._lanes * max(width, 1), 0xA5, np.uint8).view(f"u{width}" if width else bool)
        return self[name]


class State:
    """What a launch has in registers and memory.

    Attributes:
        lanes: Number of lanes, all blocks together.
        registers: What they have computed.
        spaces: Memory by state space.
        copies: What is on its way to shared memory.
        rows: Per space, which of its memories a lane sees.
        special: The read-only registers.
    """

    def __init__(
        self, kernel: Kernel, device: Device, grid: tuple[int, int, int], threads: int, shared: int, arguments: bytes
    ) -> None:
        self.kernel = kernel
        blocks = grid[0] * grid[1] * grid[2]
        self.lanes = blocks * threads
        self.threads = threads
        self.registers = Registers(kernel, self.lanes)
        lane = np.arange(self.lanes)
        block = lane // threads
        size = max((at + bytes_ for at, bytes_ in kernel.params.values()), default=0)
        if len(arguments) != size:
            raise PtxError(f"{kernel.name} takes {size} bytes of arguments, not {len(arguments)}")
        param = Space("parameter", size, base=PARAM_BASE)
        param.bytes[:size] = np.frombuffer(arguments, np.uint8)
        self.spaces = {
            "global": device,
            "param": param,
            "shared": Space("shared", sum(kernel.shared.values()) + shared, blocks, SHARED_BASE),
            "local": Space("local", sum(kernel.local.values()), self.lanes, LOCAL_BASE),
        }
        self.copies = Copies(self.spaces["shared"], self.lanes)
        self.rows: dict[str, Array | int] = {"global": 0, "param": 0, "shared": block, "local": lane}
        numbers = {"tid.x": lane % threads, "laneid": lane % WARP, "ctaid.x": block % grid[0]}
        numbers |= {"ctaid.y": block // grid[0] % grid[1], "ctaid.z": block // (grid[0] * grid[1])}
        constants = {"ntid.x": threads, "nctaid.x": grid[0], "nctaid.y": grid[1], "nctaid.z": grid[2]}
        self.special = {f"%{name}": values.astype(np.uint32) for name, values in numbers.items()}
        self.special |= {f"%{name}": np.full(self.lanes, value, np.uint32) for name, value in constants.items()}

    def address(self, symbol: str) -> int | None:
        """Return the address of a parameter or variable in its own space, or None if there is none of that name."""
        if symbol in self.kernel.params:
            return PARAM_BASE + self.kernel.params[symbol][0]
        for names, base in ((self.kernel.local, LOCAL_BASE), (self.kernel.shared, SHARED_BASE)):
            if symbol in names:
                before = list(names).index(symbol)
                return base + sum(list(names.values())[:before])
        return None

    def row(self, space: str, mask: Array) -> Array | int:
        """Return which memory of a space every lane of the mask sees."""
        rows = self.rows[space]
        return rows if isinstance(rows, int) else rows[mask]


Step = Callable[[State, Array], None]


class Schedule:
    """Where every lane is, and who may go on."""

    def __init__(self, state: State) -> None:
        self.pc = np.zeros(state.lanes, np.int64)
        self.waiting = np.zeros(state.lanes, bool)  # at a barrier
        self._threads = state.threads

    def next(self, meeting: Callable[[int], bool]) -> tuple[int, Array] | None:
        """Return the next instruction and its lanes; None if all lanes have left.

        Args:
            meeting: Whether an instruction takes whole warps.
        """
        ready = ~self.waiting & (self.pc != EXITED)
        while ready.any():
            pc = int(self.pc[ready].min())
            mask: Array = ready & (self.pc == pc)
            if not meeting(pc):
                return pc, mask
            whole = np.repeat(mask.reshape(-1, WARP).all(1), WARP)
            if whole.any():
                return pc, whole
            ready &= ~mask  # the others of the warp have to come first
        if (self.pc == EXITED).all():
            return None
        self._release()
        return self.next(meeting)

    def _release(self) -> None:
        waits, pc = self.waiting.reshape(-1, self._threads), self.pc.reshape(-1, self._threads)
        complete = waits.all(1)
        if not complete.any():
            where = sorted(set(self.pc[self.pc != EXITED].tolist()))
            raise PtxError(f"lanes wait for others that do not come, at the instructions {where}")
        for block in np.flatnonzero(complete):
            if len(set(pc[block].tolist())) > 1:
                raise PtxError("lanes of a block wait at different barriers")
        pc[complete] += 1
        waits[complete] = False


def run(
    kernel: Kernel,
    steps: list[Step | None],
    device: Device,
    arguments: bytes,
    *,
    grid: tuple[int, int] | tuple[int, int, int],
    shared: int,
    threads: int = 0,
) -> None:
    """Launch a kernel and run it to its end.

    Args:
        kernel: The parsed kernel.
        steps: What `semantics.compile_kernel` made of it.
        device: Global memory.
        arguments: The bytes of its parameters.
        grid: Blocks in x, y and z.
        shared: Bytes of dynamic shared memory.
        threads: Threads of a block; 0: what the kernel declares, if it declares any.

    Raises:
        PtxError: The kernel does what it must not.
    """
    state = State(kernel, device, (*grid, 1)[:3], threads or kernel.threads, shared, arguments)
    if not state.threads or state.threads % WARP or (kernel.threads and state.threads > kernel.threads):
        raise PtxError(f"{state.threads} threads are not whole warps or more than the {kernel.threads} of the kernel")
    schedule = Schedule(state)
    leaders = set(kernel.labels.values())
    meets = [instruction.takes_warps for instruction in kernel.instructions]
    with np.errstate(all="ignore"):
        for _ in range(MOST_STEPS):
            found = schedule.next(lambda pc: pc < len(meets) and meets[pc])
            if found is None:
                return
            _run_piece(state, schedule, steps, leaders, *found)
    raise PtxError(f"{kernel.name} does not end")


def _run_piece(
    state: State, schedule: Schedule, steps: list[Step | None], leaders: set[int], pc: int, mask: Array
) -> None:
    """Run the lanes of a mask to the next place where lanes part, meet or wait."""
    start, everyone = pc, bool(mask.all())
    instructions = state.kernel.instructions
    while True:
        if pc >= len(instructions):
            raise PtxError(f"{state.kernel.name} runs past its end")
        instruction = instructions[pc]
        if not everyone and pc != start and (pc in leaders or instruction.takes_warps):
            schedule.pc[mask] = pc
            return
        if instruction.is_control:
            _control(state, schedule, instruction, pc, mask)
            return
        step = steps[pc]
        if step is None:
            raise instruction.error("the instruction has no meaning here")
        try:
            step(state, mask)
        except PtxError as error:
            raise instruction.error(f"{state.kernel.name}, {error}") from None
        pc += 1


def _control(state: State, schedule: Schedule, instruction: Instruction, pc: int, mask: Array) -> None:
    taken = mask
    if instruction.guard:
        predicate = state.registers[instruction.guard]
        taken = mask & (~predicate if instruction.guard_negated else predicate)
    schedule.pc[mask] = pc + 1
    if instruction.opcode == "bar":
        if instruction.guard:
            raise instruction.error("a barrier for some lanes only")
        schedule.pc[mask] = pc
        schedule.waiting |= mask
    elif instruction.opcode == "ret":
        schedule.pc[taken] = EXITED
    else:
        schedule.pc[taken] = state.kernel.labels[instruction.operands[0].name]
