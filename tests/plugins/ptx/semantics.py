"""What instructions do. Each becomes a function of the lanes' state and a mask of the lanes that execute it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.plugins.ptx import arithmetic
from tests.plugins.ptx.arithmetic import DTYPES, Array
from tests.plugins.ptx.copies import COPY_BYTES, read_source
from tests.plugins.ptx.machine import WARP, State, Step
from tests.plugins.ptx.parser import Instruction, Kernel, Operand, PtxError

Reader = Callable[[State], Array]
Writer = Callable[[State, Array, Array], None]
FENCES = ("membar", "fence")
CACHE_HINTS = {"nc", "cg", "ca", "cs", "volatile", "relaxed", "gpu", "L1::no_allocate", "L2::128B"}


def compile_kernel(kernel: Kernel) -> list[Step | None]:
    """Turn every instruction into a function; control flow (None) is the machine's.

    Raises:
        PtxError: An instruction is not known; the message holds its line.
    """
    return [None if i.is_control else _Compiler(kernel, i).step() for i in kernel.instructions]


class _Compiler:
    """Makes the function of one instruction."""

    def __init__(self, kernel: Kernel, instruction: Instruction) -> None:
        self.kernel, self.it = kernel, instruction

    def step(self) -> Step:
        special = {
            "ld": self._load,
            "st": self._store,
            "mov": self._move,
            "cvt": self._convert,
            "cvta": self._to_space,
            "setp": self._compare,
            "selp": self._select,
            "shfl": self._shuffle,
            "mma": self._multiply_matrices,
            "atom": self._atomic,
            "cp": self._copy,
            "prefetch": self._prefetch,
            "bar": self._meet,
        }
        if self.it.opcode in FENCES:
            return lambda state, mask: None  # the interpreter's memory is always in order
        if self.it.opcode == "griddepcontrol":  # kernels run one after another
            if self.it.modifiers not in (("launch_dependents",), ("wait",)):
                raise self.it.error("unknown form")
            return self._guarded(lambda state, mask: None)
        make = special.get(self.it.opcode, self._compute)
        return self._guarded(make())

    def _guarded(self, step: Step) -> Step:
        guard, negated = self.it.guard, self.it.guard_negated
        if not guard:
            return step

        def guarded(state: State, mask: Array) -> None:
            predicate = state.registers[guard]
            taken = mask & (~predicate if negated else predicate)
            if taken.any():
                step(state, taken)

        return guarded

    # ---- operands

    def read(self, operand: Operand, type_: str) -> Reader:
        """Return the reader of an operand as a type; a register may be wider than the type, not narrower."""
        if type_ == "pred":
            if operand.kind == "number":
                truth = np.array([operand.value != 0])
                return lambda state: truth
            return lambda state: state.registers[operand.name]
        dtype = np.dtype(DTYPES[type_])
        if operand.kind == "number":
            bits = np.array([operand.value & (1 << 8 * dtype.itemsize) - 1], f"u{dtype.itemsize}")
            constant = bits.view(dtype)
            return lambda state: constant
        if operand.kind == "symbol":
            return lambda state: np.array([state.address(operand.name)], dtype)
        name = operand.name
        if operand.kind != "register":
            raise self.it.error(f"an operand of kind {operand.kind} does not fit here")
        if "." in name:
            return lambda state: state.special[name].astype(dtype, copy=False)
        width = self.kernel.width(name)
        if width == dtype.itemsize:
            return lambda state: state.registers[name].view(dtype)
        if width < dtype.itemsize:
            raise self.it.error(f"the register {name} is narrower than {type_}")
        return lambda state: state.registers[name].astype(f"u{dtype.itemsize}").view(dtype)

    def write(self, operand: Operand) -> Writer:
        """Return the writer of a register: values narrower than it are extended by their sign, or by zeros."""
        name = operand.name
        if name == "_":
            return lambda state, values, mask: None
        width = self.kernel.width(name)
        target = np.dtype(bool) if width == 0 else np.dtype(f"u{width}")

        def write(state: State, values: Array, mask: Array) -> None:
            if values.dtype.itemsize < target.itemsize:
                values = values.astype(f"{'i' if values.dtype.kind == 'i' else 'u'}{target.itemsize}")
            bits = values.view(target)
            state.registers[name] = np.where(mask, bits, state.registers[name])

        return write

    def _address(self, operand: Operand, space: str) -> Reader:
        offset = operand.value
        if operand.name.startswith("%"):
            width = self.kernel.width(operand.name)
            base = self.read(Operand("register", operand.name), f"u{8 * width}")
            return lambda state: base(state).astype(np.int64) + offset

        def symbol(state: State) -> Array:
            found = state.address(operand.name)
            if found is None:
                raise PtxError(f"{space} memory has no {operand.name}")
            return np.full(state.lanes, found + offset, np.int64)

        return symbol

    # ---- memory

    def _memory_form(self, generic: str = "") -> tuple[str, str, int]:
        """Return space, type and number of elements of ld, st; ``generic`` is the space of one that names none."""
        *rest, type_ = self.it.modifiers
        space = next((m for m in rest if m in ("global", "shared", "local", "param")), generic)
        count = next((int(m[1:]) for m in rest if m in ("v2", "v4")), 1)
        unknown = set(rest) - CACHE_HINTS - {space, f"v{count}"}
        if not space or unknown or type_ not in DTYPES:
            raise self.it.error(f"unknown form {sorted(map(str, unknown))}")
        return space, type_, count

    def _load(self) -> Step:
        # A generic address of global memory is the same number; of another space it is out of range here.
        space, type_, count = self._memory_form("global")
        target, source = self.it.operands
        writers = [self.write(part) for part in (target.parts or (target,))]
        address = self._address(source, space)

        def load(state: State, mask: Array) -> None:
            found = state.spaces[space].load(address(state)[mask], state.row(space, mask), DTYPES[type_], count)
            for write, values in zip(writers, found, strict=True):
                spread = np.zeros(state.lanes, values.dtype)
                spread[mask] = values
                write(state, spread, mask)

        return load

    def _store(self) -> Step:
        space, type_, _ = self._memory_form("global")
        target, source = self.it.operands
        readers = [self.read(part, type_) for part in (source.parts or (source,))]
        address = self._address(target, space)

        def store(state: State, mask: Array) -> None:
            values = [np.broadcast_to(read(state), state.lanes)[mask] for read in readers]
            state.spaces[space].store(address(state)[mask], state.row(space, mask), values)

        return store

    def _atomic(self) -> Step:
        if self.it.modifiers != ("global", "add", "u32"):
            raise self.it.error("unknown form")
        target, source, added = self.it.operands
        write, address, amount = self.write(target), self._address(source, "global"), self.read(added, "u32")

        def atomic(state: State, mask: Array) -> None:
            old = np.zeros(state.lanes, np.uint32)
            addresses, amounts = address(state), np.broadcast_to(amount(state), state.lanes)
            for lane in np.flatnonzero(mask):  # one after the other
                one = addresses[lane : lane + 1]
                old[lane] = state.spaces["global"].load(one, 0, np.uint32, 1)[0][0]
                state.spaces["global"].store(one, 0, [old[lane : lane + 1] + amounts[lane : lane + 1]])
            write(state, old, mask)

        return atomic

    def _prefetch(self) -> Step:
        """Ask the cache for a line, or for ``size`` bytes: nothing moves, but they must be there."""
        bulk = self.it.opcode == "cp"
        if not bulk and self.it.modifiers != ("global", "L2"):
            raise self.it.error("unknown form")
        from_ = self._address(self.it.operands[0], "global")
        size = self.read(self.it.operands[1], "u32") if bulk else None

        def prefetch(state: State, mask: Array) -> None:
            at, row = from_(state)[mask], state.row("global", mask)
            if size is not None:
                count = np.broadcast_to(size(state), state.lanes)[mask]
                if (count % 16).any():
                    raise PtxError(f"a prefetch of {count.max()} bytes, which are no pieces of 16")
                at = np.concatenate([at, at + count - 16])
            state.spaces["global"].load(at, row, np.dtype("u4"), 4)

        return prefetch

    def _copy(self) -> Step:
        if self.it.modifiers == ("async", "bulk", "prefetch", "L2", "global"):
            return self._prefetch()
        if self.it.modifiers == ("async", "commit_group"):
            return lambda state, mask: state.copies.commit(mask)
        if self.it.modifiers == ("async", "wait_group"):
            pending = self.it.operands[0].value
            return lambda state, mask: state.copies.wait(mask, pending)
        form = ("async", "cg", "shared", "global")
        if self.it.modifiers[:4] != form or set(self.it.modifiers[4:]) - CACHE_HINTS or len(self.it.operands) != 4:
            raise self.it.error("unknown form")
        target, source, size, used = self.it.operands
        if size.value != COPY_BYTES:
            raise self.it.error(f"only copies of {COPY_BYTES} bytes are known")
        to, from_, count = self._address(target, "shared"), self._address(source, "global"), self.read(used, "u32")

        def copy(state: State, mask: Array) -> None:
            counts = np.broadcast_to(count(state), state.lanes)[mask]
            values = read_source(state.spaces["global"], from_(state)[mask], counts)
            state.copies.start(mask, to(state)[mask], state.row("shared", mask), values)

        return copy

    # ---- registers

    def _move(self) -> Step:
        (type_,) = self.it.modifiers
        target, source = self.it.operands
        if source.kind == "vector":
            half = f"u{int(type_[1:]) // len(source.parts)}"
            readers = [self.read(part, half) for part in source.parts]
            write = self.write(target)

            def pack(state: State, mask: Array) -> None:
                columns = [np.broadcast_to(read(state), state.lanes) for read in readers]
                write(state, np.stack(columns, 1).view(DTYPES[type_])[:, 0], mask)

            return pack
        read = self.read(source, type_)
        if target.kind == "vector":
            half = f"u{int(type_[1:]) // len(target.parts)}"
            writers = [self.write(part) for part in target.parts]

            def unpack(state: State, mask: Array) -> None:
                columns = (
                    np.array(np.broadcast_to(read(state), state.lanes)).view(DTYPES[half]).reshape(-1, len(writers))
                )
                for i, write_ in enumerate(writers):
                    write_(state, np.ascontiguousarray(columns[:, i]), mask)

            return unpack
        write = self.write(target)
        return lambda state, mask: write(state, read(state), mask)

    def _to_space(self) -> Step:
        if self.it.modifiers != ("to", "global", "u64"):
            raise self.it.error("only generic addresses of global memory are known")
        read, write = self.read(self.it.operands[1], "u64"), self.write(self.it.operands[0])
        return lambda state, mask: write(state, read(state), mask)

    def _convert(self) -> Step:
        convert = arithmetic.conversion(self.it)
        write = self.write(self.it.operands[0])
        readers = [self.read(operand, self.it.modifiers[-1]) for operand in self.it.operands[1:]]
        return lambda state, mask: write(state, convert(*(read(state) for read in readers)), mask)

    def _compare(self) -> Step:
        relation, type_ = self.it.modifiers
        compare = arithmetic.comparison(relation, type_)
        if compare is None:
            raise self.it.error("unknown comparison")
        left, right = (self.read(operand, type_) for operand in self.it.operands[1:])
        write = self.write(self.it.operands[0])
        return lambda state, mask: write(state, compare(left(state), right(state)), mask)

    def _select(self) -> Step:
        (type_,) = self.it.modifiers
        first, second = (self.read(operand, type_) for operand in self.it.operands[1:3])
        predicate, write = self.read(self.it.operands[3], "pred"), self.write(self.it.operands[0])
        return lambda state, mask: write(state, np.where(predicate(state), first(state), second(state)), mask)

    def _compute(self) -> Step:
        function, types = arithmetic.function(self.it)
        readers = [self.read(operand, type_) for operand, type_ in zip(self.it.operands[1:], types, strict=True)]
        write = self.write(self.it.operands[0])

        def compute(state: State, mask: Array) -> None:
            write(state, function(*(read(state) for read in readers)), mask)

        return compute

    # ---- warps

    def _meet(self) -> Step:
        if self.it.modifiers != ("warp", "sync") or self.it.operands[0].value & 0xFFFFFFFF != 0xFFFFFFFF:
            raise self.it.error("only barriers of whole warps and of blocks are known")
        return lambda state, mask: None  # the machine brings the lanes together

    def _shuffle(self) -> Step:
        target, source, lane_mask, clamp, members = self.it.operands
        if self.it.modifiers != ("sync", "bfly", "b32"):
            raise self.it.error("unknown form")
        read, distance = self.read(source, "b32"), self.read(lane_mask, "b32")
        bounds, who = self.read(clamp, "b32"), self.read(members, "b32")
        write = self.write(target.parts[0] if target.parts else target)
        meet = self.write(target.parts[1]) if target.parts else None

        def shuffle(state: State, mask: Array) -> None:
            if (mask & ((bounds(state) != WARP - 1) | (who(state) != 0xFFFFFFFF))).any():
                raise PtxError("only shuffles of whole warps are known")
            values = np.broadcast_to(read(state), state.lanes)
            write(
                state, values[np.arange(state.lanes) ^ (distance(state) & np.uint32(WARP - 1)).astype(np.int64)], mask
            )
            if meet is not None:
                meet(state, np.ones(state.lanes, bool), mask)

        return shuffle

    def _multiply_matrices(self) -> Step:
        if self.it.modifiers[:2] != ("sync", "aligned") or self.it.modifiers[2:] not in arithmetic.MMA_FORMS:
            raise self.it.error("unknown form")
        target, *sources = self.it.operands
        types = ("u32", "u32", self.it.modifiers[-1])
        a, b, c = ([self.read(p, t) for p in s.parts] for s, t in zip(sources, types, strict=True))
        writers = [self.write(part) for part in target.parts]
        widen = arithmetic.MMA_FORMS[self.it.modifiers[2:]]

        def multiply(state: State, mask: Array) -> None:
            left, right, sums = ([np.broadcast_to(read(state), state.lanes) for read in x] for x in (a, b, c))
            for write, values in zip(writers, arithmetic.multiply_fragments(left, right, sums, widen), strict=True):
                write(state, values, mask)

        return multiply
