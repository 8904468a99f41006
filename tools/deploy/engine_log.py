"""Reads the builder's verbose log, the only description of an engine on a machine without a GPU."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
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
_TENSOR = re.compile(
    r"\{ Name: (?P<name>(?:(?!\{ Name: )[^,])+), Dimensions: \[(?P<shape>[-\d,]*)\]"
    r"(?:(?!\{ Name: ).)*?Datatype: (?P<dtype>\w+)"
)
"""No attempt goes beyond the next beginning, so that the time is linear in the line, whatever stands in it."""
_GRAPH = re.compile(r"_myl(\d+)_\d+$")
_PROFILE = re.compile(r" \[profile (\d+)\]")
_UPDATE = re.compile(r"^(?:\w+ )?KVCACHE_UPDATE (\S+)")
_NO_KERNELS = {"signal", "wait", "shape_call"}
"""Kinds of engine layers that start nothing on the GPU: they order streams, or compute sizes on the host."""
_IO = re.compile(r"Name: (?P<name>(?:(?!Name: )[^,])+), IOMode: (?P<mode>Input|Output), DataType: (?P<dtype>\w+)")


@dataclass(frozen=True)
class Kernel:
    """One launch on the GPU.

    Attributes:
        name: What the builder calls it: a layer's name, or a list of the operations that it holds.
        graph: Number of the builder's own graph that it is part of; each optimization profile has one.
        inputs: Elements of what it reads by name, axes of unknown size counted as 1; constants are left out.
        outputs: The same of what it writes.
    """

    name: str
    graph: int
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]

    @property
    def attention(self) -> str:
        """Kind of fused attention that it is, ``gemv`` or ``gemm``; empty if it is none."""
        found = re.match(r"_(gemv|gemm)_mha", self.name)
        return found[1] if found else ""


@dataclass
class EngineLog:
    """What the log says about the engine.

    Attributes:
        weights_bytes: The builder's "Total Weights Memory".
        activation_bytes: The largest "Total Activation Memory" of any profile.
        layers: Number of engine layers by kind, summed over profiles.
        kernels: Every launch, in order, of one compute capability.
        profiles: Optimization profiles by the number of the graph, where a line names it: the first one is not named.
        updates: Names of the layers that write into a cache in place.
        constants: Bytes of each constant by name and element type, repeats (one per profile) counted once.
        inputs: Names of the engine's inputs.
        outputs: Names of the engine's outputs.
    """

    weights_bytes: int = 0
    activation_bytes: int = 0
    layers: Counter[str] = field(default_factory=Counter)
    kernels: list[Kernel] = field(default_factory=list)
    profiles: dict[int, int] = field(default_factory=dict)
    updates: set[str] = field(default_factory=set)
    constants: dict[tuple[str, str], int] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def launches(self, profile: int) -> list[Kernel]:
        """Return the kernels of one call with an optimization profile."""
        return [kernel for kernel in self.kernels if self.profiles.get(kernel.graph, 0) == profile]

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
        if parts := _parts(line):
            for tensor in _TENSOR.finditer(parts["constants"]):
                _add_constant(tensor, log)
            if layer["kind"] not in _NO_KERNELS:
                _add_kernel(line, layer["name"], parts, log)
    elif update := _UPDATE.match(line):
        log.updates.add(update[1])
    elif port := _IO.search(line):
        names = log.inputs if port["mode"] == "Input" else log.outputs
        if port["name"] not in names:
            names.append(port["name"])


def _parts(line: str) -> dict[str, str]:
    """Return what a layer's line says of its inputs, constants and outputs; nothing where one of them is missing."""
    ends = {"inputs": "], Constants: [", "constants": "], Outputs: [", "outputs": "}]"}
    _, _, rest = line.partition("Inputs: [")
    found = {}
    for name, end in ends.items():
        found[name], there, rest = rest.partition(end)
        if not there:
            return {}
    return found | {"outputs": found["outputs"] + "}"}


def _add_kernel(line: str, name: str, parts: Mapping[str, str], log: EngineLog) -> None:
    found = _GRAPH.search(name)
    graph = int(found[1]) if found else 0
    if profile := _PROFILE.search(line):
        log.profiles[graph] = int(profile[1])
    reads, writes = (
        {_PROFILE.sub("", item["name"]): _elements(item) for item in _TENSOR.finditer(parts[part])}
        for part in ("inputs", "outputs")
    )
    log.kernels.append(Kernel(name, graph, reads, writes))


def _elements(tensor: re.Match[str]) -> int:
    return math.prod(max(1, int(size)) for size in tensor["shape"].split(",") if size)


def _add_constant(tensor: re.Match[str], log: EngineLog) -> None:
    bits = _ELEMENT_BITS.get(tensor["dtype"], 32)
    name = re.sub(r"_myl\d+(_\d+)?$", "", tensor["name"])
    log.constants[name, tensor["dtype"]] = _elements(tensor) * bits // 8
