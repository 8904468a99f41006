"""What an exported file says about itself, as its metadata properties: written and read by way of `Metadata` alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

PREFIX = "rankbook."
"""Begins the keys."""
DATA_SHA256 = f"{PREFIX}data_sha256"
"""The key that is added when the data file is complete."""

Entries = Mapping[str, Any]


@dataclass(frozen=True)
class Metadata:
    """What the exporter writes about a file; a field is the property of its name behind `PREFIX`, unless it is empty.

    Attributes:
        format: Version of the operators.
        method: Methods of the layers.
        bits: Their widths.
        checkpoint_sha256: Hashes of the checkpoint's weights by file.
        versions: Of the packages that wrote the file, by name.
        layers: Description of each packed layer by name.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        logits: ``last`` or ``all``.
        dialect: In which operators the packed layers are written.
        graph: Operators of everything but packed layers.
        standard_attention: Why layers of ``graph`` ort keep the standard attention, by number; the cache of a file with
            such layers grows by new tensors, and not in place.
        kv: Type of the cache.
        inputs: ``ids``, or embedded tokens.
        activations: What products compute with.
        context: Positions up to which the file is right, past ones included; empty without a limit.
        max_context: Positions of a cache of a fixed length (``graph`` static); empty for one that grows.
        sample: ``greedy`` where the best token is an output, ``top-k`` where the best ones are.
        data_sha256: Hash of the data file; empty where an older version wrote the file.
        properties: All properties as they are in a file that was read.
    """

    format: str = ""
    method: str = ""
    bits: str = ""
    checkpoint_sha256: Entries = field(default_factory=dict)
    versions: Entries = field(default_factory=dict)
    layers: Mapping[str, Entries] = field(default_factory=dict)
    dtype: str = "fp32"
    logits: str = "all"
    dialect: str = "rankbook"
    graph: str = "standard"
    standard_attention: Entries = field(default_factory=dict)
    kv: str = "float"
    inputs: str = "ids"
    activations: str = "none"
    context: str = ""
    max_context: str = ""
    sample: str = "none"
    data_sha256: str = ""
    properties: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, properties: Mapping[str, str]) -> Metadata:
        """Read properties; a damaged description counts as none, and `rankbook.exporter.conform` names it."""
        read = {item.name: str if item.type == "str" else _entries for item in _written()}
        texts = {key.removeprefix(PREFIX): text for key, text in properties.items() if key.startswith(PREFIX)}
        known: dict[str, Any] = {name: read[name](text) for name, text in texts.items() if name in read}
        if not all(isinstance(entry, dict) for entry in known.get("layers", {}).values()):
            del known["layers"]
        return cls(**known, properties=properties)

    @property
    def in_place(self) -> bool:
        """Whether new keys and values may be written behind the old ones, in buffers longer than the past."""
        return self.graph == "static" or (self.graph == "ort" and not self.standard_attention)

    def texts(self) -> dict[str, str]:
        """Return the properties to be written."""
        values = {item.name: getattr(self, item.name) for item in _written()}
        return {
            f"{PREFIX}{name}": value if isinstance(value, str) else _json(value)
            for name, value in values.items()
            if value
        }


def _written() -> list[Any]:
    return [item for item in fields(Metadata) if item.name != "properties"]


def _json(entries: Entries) -> str:
    return json.dumps(entries, sort_keys=True, separators=(",", ":"))


def _entries(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
