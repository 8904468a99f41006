"""PTX text to instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_STATEMENT = re.compile(
    r"\s*(?:(?P<label>[\w$]+):(?!:)|(?P<open>\{)|(?P<close>\})|(?P<text>[^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)"
)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", re.DOTALL)
_PARAM = re.compile(r"\.param(?:\s+\.align\s+\d+)?\s+\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?")
_LOCAL = re.compile(r"\.local(?:\s+\.align\s+\d+)?\s+\.b8\s+([\w$]+)\[(\d+)\]")
_SHARED = re.compile(r"\.shared(?:\s+\.align\s+\d+)?\s+\.b8\s+([\w$]+)\[(\d*)\]")
_NUMBERED = re.compile(r"(%[a-zA-Z]+)(\d+)$")
WIDTHS = {"pred": 0, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8}
"""Bytes of a register of a type; a predicate has none."""


class PtxError(Exception):
    """What the interpreter cannot run, or what a kernel must not do."""


@dataclass(frozen=True)
class Operand:
    """A register, number, symbol, address or list of registers.

    Attributes:
        kind: ``register``, ``number``, ``symbol``, ``address``, ``vector`` or ``pair`` (result | predicate).
        name: Register or symbol; of an address its base, which may be empty.
        value: The number (bits of a float), or the offset of an address.
        parts: What a vector or pair consists of.
    """

    kind: str
    name: str = ""
    value: int = 0
    parts: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``@!%p1 ld.global.v2.u32 {%r1, %r2}, [%rd1+8];`` has the opcode ``ld`` and three modifiers."""

    line: int
    text: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str = ""
    guard_negated: bool = False

    @property
    def is_control(self) -> bool:
        """Whether it changes where lanes are: branches, the end, barriers of a block."""
        return self.opcode in ("bra", "ret") or (self.opcode == "bar" and self.modifiers[:1] != ("warp",))

    @property
    def takes_warps(self) -> bool:
        """Whether the 32 lanes of a warp execute it together."""
        return self.opcode in ("shfl", "mma") or (self.opcode == "bar" and self.modifiers[:1] == ("warp",))

    def error(self, what: str) -> PtxError:
        """Return an error that names the line."""
        return PtxError(f"line {self.line}: {what}: {self.text}")


@dataclass
class Kernel:
    """One entry: its instructions, where labels point, and the sizes of what it declares, in bytes."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    params: dict[str, tuple[int, int]] = field(default_factory=dict)
    local: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    threads: int = 0

    def width(self, register: str) -> int:
        """Return the bytes of a register (0: predicate)."""
        numbered = _NUMBERED.match(register)
        found = self.registers.get(register, self.registers.get(numbered[1] if numbered else ""))
        if found is None:
            raise PtxError(f"{self.name}: the register {register} is not declared")
        return found


def entries(text: str) -> list[str]:
    """Return the names of the kernels in a module."""
    return [match[1] for match in _ENTRY.finditer(text)]


def parse(text: str, name: str) -> Kernel:
    """Parse one kernel of a module.

    Args:
        text: The module.
        name: A regular expression; the first entry whose name contains it is taken.

    Raises:
        PtxError: There is no such entry, or a statement is not understood.
    """
    text = _COMMENT.sub(lambda match: "\n" * match[0].count("\n"), text)
    for entry in _ENTRY.finditer(text):
        if re.search(name, entry[1]):
            kernel = Kernel(entry[1], shared={m[1]: int(m[2] or 0) for m in _SHARED.finditer(text[: entry.start()])})
            _parse_head(kernel, entry[2], entry[3])
            _parse_body(kernel, text, entry.end())
            return kernel
    raise PtxError(f"no entry like {name!r}; there are {', '.join(entries(text))}")


def _parse_head(kernel: Kernel, params: str, directives: str) -> None:
    at = 0
    for type_, name, count in _PARAM.findall(params):
        size = {"b8": 1, "u8": 1}.get(type_, int(type_[1:]) // 8)
        at = -(-at // max(size, 8 if count else 1)) * max(size, 8 if count else 1)
        kernel.params[name] = (at, size * int(count or 1))
        at += size * int(count or 1)
    found = re.search(r"\.maxntid\s+(\d+)", directives)
    kernel.threads = int(found[1]) if found else 0


def _parse_body(kernel: Kernel, text: str, at: int) -> None:
    scopes: list[dict[str, str]] = [{}]
    line, counted = text.count("\n", 0, at) + 1, at
    while scopes:
        match = _STATEMENT.match(text, at)
        if match is None:
            raise PtxError(f"line {line}: a statement is not understood: {text[at : at + 60]!r}")
        at = match.end()
        line += text.count("\n", counted, match.start(match.lastgroup or 0))
        counted = match.start(match.lastgroup or 0)
        if match["open"]:
            scopes.append({})
        elif match["close"]:
            scopes.pop()
        elif match["label"]:
            kernel.labels[match["label"]] = len(kernel.instructions)
        else:
            _parse_statement(kernel, match["text"].strip(), line, scopes)


def _parse_statement(kernel: Kernel, text: str, line: int, scopes: list[dict[str, str]]) -> None:
    words = text.split()
    if words[0] == ".reg":
        for name in text.split(None, 2)[2].split(","):
            _declare(kernel, words[1][1:], name.strip(), line, scopes)
    elif words[0] == ".local":
        kernel.local.update({name: int(size) for name, size in _LOCAL.findall(text)})
    elif words[0] == ".shared":
        kernel.shared.update({name: int(size or 0) for name, size in _SHARED.findall(text)})
    elif words[0] == ".pragma":
        pass  # hints: unrolling, which bytes of a parameter are used
    elif words[0].startswith("."):
        raise PtxError(f"line {line}: the directive is not known: {text}")
    else:
        kernel.instructions.append(_instruction(text, line, scopes))


def _declare(kernel: Kernel, type_: str, name: str, line: int, scopes: list[dict[str, str]]) -> None:
    if type_ not in WIDTHS:
        raise PtxError(f"line {line}: registers of type {type_} are not known")
    bare = name.split("<")[0]
    if len(scopes) > 1:  # registers of inline assembler are known in its braces only
        scopes[-1][bare] = f"{bare}@{line}"
        bare = scopes[-1][bare]
    kernel.registers[bare] = WIDTHS[type_]


def _instruction(text: str, line: int, scopes: list[dict[str, str]]) -> Instruction:
    guard, negated, rest = "", False, text
    if text.startswith("@"):
        guard, rest = text[1:].split(None, 1)
        guard, negated = guard.lstrip("!"), guard.startswith("!")
    opcode, *operands = rest.split(None, 1)
    names = {key: value for scope in scopes for key, value in scope.items()}
    parts = tuple(_operand(part, line, names) for text_ in operands for part in _split(text_))
    base, *modifiers = opcode.split(".")
    return Instruction(line, text, base, tuple(modifiers), parts, guard, negated)


def _split(text: str) -> list[str]:
    """Split at commas outside braces."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]])+", text)]


def _operand(text: str, line: int, names: dict[str, str]) -> Operand:
    text = names.get(text, text)
    if text.startswith("{"):
        return Operand("vector", parts=tuple(_operand(part, line, names) for part in _split(text[1:-1])))
    if text.startswith("["):
        base, sign, offset = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:(\+)\s*(-?\d+))?\s*\]", text).groups()  # type: ignore[union-attr]
        return Operand("address", base, int(offset) if sign else 0)
    if "|" in text:
        return Operand("pair", parts=tuple(_operand(part, line, names) for part in text.split("|")))
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return Operand("number", value=int(text[2:], 16))
    if re.fullmatch(r"-?(?:0x[0-9a-fA-F]+|\d+)U?", text):
        return Operand("number", value=int(text.rstrip("U"), 0))
    if re.fullmatch(r"%[\w.]+|\w+@\d+|_", text):
        return Operand("register", text)
    if re.fullmatch(r"[\w$]+", text):
        return Operand("symbol", text)
    raise PtxError(f"line {line}: the operand {text!r} is not understood")
