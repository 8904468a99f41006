"""Reads the builder's verbose log, the only description of an engine on a machine without a GPU."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

_ELEMENT_BITS = {
    "Float": 32,
    "Half": 16,
    "BFloat16": 16,
    "Int8": 8,
    "UInt8": 8,
    "Int32": 32,
    "Int64": 64,
    "Int4": 4,
    "Bool": 8,
}
_MEMORY = re.compile(r"Total (Weights|Activation) Memory: (\d+) bytes")
_LAYER = re.compile(r"^(?:\w+ )?Name: (?P<name>[^,]+), LayerType: (?P<kind>\w+)", re.MULTILINE)
_CONSTANTS = re.compile(r"Constants: \[(?P<body>.*?)\], Outputs: \[")
_TENSOR = re.compile(r"\{ Name: (?P<name>[^,]+), Dimensions: \[(?P<shape>[\d,]*)\].*?Datatype: (?P<dtype>\w+)")
_IO = re.compile(r"Name: (?P<name>[^,]+), IOMode: (?P<mode>Input|Output), DataType: (?P<dtype>\w+)")


@dataclass
class EngineLog:
    """What the log says about the engine.

    Attributes:
        weights_bytes: The builder's "Total Weights Memory".
        activation_bytes: The largest "Total Activation Memory" of any profile.
        layers: Number of engine layers by kind, summed over profiles.
        constants: Bytes of each constant by name and element type, repeats (one per profile) counted once.
        inputs: Names of the engine's inputs.
        outputs: Names of the engine's outputs.
    """

    weights_bytes: int = 0
    activation_bytes: int = 0
    layers: Counter[str] = field(default_factory=Counter)
    constants: dict[tuple[str, str], int] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def constant_bytes(self) -> dict[str, int]:
        """Return the bytes of constants by element type."""
        total: Counter[str] = Counter()
        for (_, dtype), size in self.constants.items():
            total[dtype] += size
        return dict(total)


def read(path: Path) -> EngineLog:
    """Read a log line by line; it can have hundreds of megabytes."""
    log = EngineLog()
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            _read_line(line, log)
    return log


def _read_line(line: str, log: EngineLog) -> None:
    if memory := _MEMORY.search(line):
        size = int(memory[2])
        if memory[1] == "Weights":
            log.weights_bytes = max(log.weights_bytes, size)
        else:
            log.activation_bytes = max(log.activation_bytes, size)
    elif layer := _LAYER.match(line):
        log.layers[layer["kind"]] += 1
        if constants := _CONSTANTS.search(line):
            for tensor in _TENSOR.finditer(constants["body"]):
                _add_constant(tensor, log)
    elif port := _IO.search(line):
        names = log.inputs if port["mode"] == "Input" else log.outputs
        if port["name"] not in names:
            names.append(port["name"])


def _add_constant(tensor: re.Match[str], log: EngineLog) -> None:
    shape = [int(size) for size in tensor["shape"].split(",") if size]
    bits = _ELEMENT_BITS.get(tensor["dtype"], 32)
    name = re.sub(r"_myl\d+(_\d+)?$", "", tensor["name"])
    log.constants[name, tensor["dtype"]] = math.prod(shape) * bits // 8
