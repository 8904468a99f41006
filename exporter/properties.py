"""What an exported file says about itself, as its metadata properties."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

PREFIX = "rankbook."
"""Begins the keys."""


@dataclass(frozen=True)
class Metadata:
    """What the exporter wrote about a file; a field is the property of its name behind `PREFIX`.

    Attributes:
        dialect: In which operators the packed layers are written.
        method: Methods of the layers.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        logits: ``last`` or ``all``.
        graph: Operators of everything but packed layers.
        kv: Type of the cache.
        inputs: ``ids``, or embedded tokens.
        activations: What products compute with.
        context: Positions up to which the file is right, past ones included; empty without a limit.
        data_sha256: Hash of the data file; empty where an older version wrote the file.
        layers: Description of each packed layer by name.
        properties: All properties as they are.
    """

    dialect: str = "rankbook"
    method: str = ""
    dtype: str = "fp32"
    logits: str = "all"
    graph: str = "standard"
    kv: str = "float"
    inputs: str = "ids"
    activations: str = "none"
    context: str = ""
    data_sha256: str = ""
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    properties: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, properties: Mapping[str, str]) -> Metadata:
        """Read properties; a description of layers that is damaged counts as none.

        `rankbook.exporter.conform` names it.
        """
        known = {item.name for item in fields(cls) if item.type == "str"}
        texts = {key.removeprefix(PREFIX): value for key, value in properties.items() if key.startswith(PREFIX)}
        texts = {name: value for name, value in texts.items() if name in known}
        return cls(**texts, layers=noted_layers(properties) or {}, properties=properties)


def noted_layers(properties: Mapping[str, str]) -> dict[str, dict[str, Any]] | None:
    """Return the description of each packed layer by name, or None where it is missing or damaged."""
    try:
        layers = json.loads(properties.get(f"{PREFIX}layers", ""))
    except (ValueError, RecursionError):
        return None
    right = isinstance(layers, dict) and all(isinstance(entry, dict) for entry in layers.values())
    return layers if right else None
