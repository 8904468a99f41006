"""Names of the tensors that a file keeps between two calls, as inputs and as outputs."""

from __future__ import annotations

PAST, PRESENT = "past_key_values.", "present."
"""Begin the names of keys and values: ``past_key_values.0.key`` and ``present.0.key``."""
INDEX = "index"
"""Keys of an indexer, which chooses what attention sees, (batch, 1, positions, size)."""
GROWING = ("key", "value", INDEX)
"""Parts of a layer's cache with an axis of positions."""
STATES = ("conv", "state")
"""Parts of one size: the last inputs of a convolution, and the state of a recurrence.

``past_conv.0`` becomes ``present_conv.0``. Both are zero where a text begins.
"""


def past(part: str, layer: int) -> str:
    """Return the name of the input that is a part of a layer's cache."""
    return f"past_{part}.{layer}" if part in STATES else f"{PAST}{layer}.{part}"


def present(part: str, layer: int) -> str:
    """Return the name of the output that is a part of a layer's cache."""
    return f"present_{part}.{layer}" if part in STATES else f"{PRESENT}{layer}.{part}"


def is_past(name: str) -> bool:
    """Return whether an input is a part of the cache."""
    return name.startswith((PAST, *(f"past_{part}." for part in STATES)))


def is_present(name: str) -> bool:
    """Return whether an output is a part of the cache."""
    return name.startswith((PRESENT, *(f"present_{part}." for part in STATES)))


def is_state(name: str) -> bool:
    """Return whether an input or an output is a part of the cache without an axis of positions."""
    return name.startswith(tuple(f"{when}_{part}." for when in ("past", "present") for part in STATES))


def past_of(name: str) -> str:
    """Return the name of the input that an output of the last call becomes."""
    return name.replace("present", "past", 1) if is_state(name) else name.replace(PRESENT, PAST, 1)


def part_of(name: str) -> str:
    """Return which part of a layer's cache a name is."""
    first, _, *rest = name.split(".")
    return rest[0] if rest else first.split("_")[1]


def layer_of(name: str) -> int:
    """Return the layer of a part of the cache."""
    return int(name.split(".")[1])


def of_layer(name: str, layer: int) -> str:
    """Return the name of the same part of another layer."""
    first, _, *rest = name.split(".")
    return ".".join([first, str(layer), *rest])
