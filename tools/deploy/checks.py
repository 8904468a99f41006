"""What is verified about an engine: names, shapes, packed weights, plugin layers, and the cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rankbook.exporter import cache_names
from rankbook.exporter.dialects import DENSE
from rankbook.tools.deploy import engine_log, step
from rankbook.tools.deploy.manifest import Check
from rankbook.tools.deploy.options import BuildOptions
from rankbook.tools.deploy.profiles import Shapes
from rankbook.tools.errors import MissingError, UsageError

if TYPE_CHECKING:
    from rankbook.exporter.file import ExportedModel, Node

WEIGHTS_SLACK = 1.05
"""Engine weights may exceed the file's stored tensors by this factor (alignment), ..."""
WEIGHTS_SLACK_BYTES = 1 << 20
"""... and by this (lookup tables of the bodies, shape constants)."""

_LOG_TYPES = {"int8": ("Int8", "Int32"), "int4": ("Int4",)}
"""Element types of codes in the builder's log by their names; those of experts without a plugin are words."""


def verify(
    model: ExportedModel, profiles: dict[str, Shapes], result: dict[str, Any], log: engine_log.EngineLog
) -> tuple[Check, ...]:
    """Compare the engine with the file: names, profiles, and that packed weights stayed packed."""
    names = [item["name"] for item in result["inputs"]], [item["name"] for item in result["outputs"]]
    codes, held = model.code_bytes, log.constant_bytes()
    packed = (bool(codes) or model.metadata.dialect == DENSE) and all(
        sum(held.get(kind, 0) for kind in _LOG_TYPES.get(dtype, (dtype,))) >= size for dtype, size in codes.items()
    )
    bound = int(model.stored_bytes * WEIGHTS_SLACK) + WEIGHTS_SLACK_BYTES
    return (
        Check("inputs", sorted(names[0]) == sorted(model.inputs), f"{len(names[0])} of {len(model.inputs)}"),
        Check("outputs", sorted(names[1]) == sorted(model.outputs), f"{len(names[1])} of {len(model.outputs)}"),
        Check(
            "engine inputs",
            set(log.inputs) <= set(model.inputs) and bool(log.inputs),
            f"{len(log.inputs)} named in the log",
        ),
        Check("engine outputs", sorted(log.outputs) == sorted(model.outputs), f"{len(log.outputs)} named in the log"),
        Check("profiles", result["profiles"] == len(profiles), f"{result['profiles']} of {len(profiles)}"),
        Check("codes stayed packed", packed, f"bytes of constants {held}; of the file's codes {codes}"),
        Check("weights", 0 < log.weights_bytes <= bound, f"{log.weights_bytes} bytes, at most {bound} allowed"),
        Check("engine layers", sum(log.layers.values()) > 0, f"{sum(log.layers.values())} layers"),
    )


def has_plugin(node: Node) -> bool:
    """Say whether the plugin library knows the operator of a node; of others the parser takes the body."""
    return node.operator is not None and node.operator.has_plugin and node.names_plugin


def verify_plugins(model: ExportedModel, options: BuildOptions, result: dict[str, Any]) -> Check:
    """Compare the plugin layers with the nodes that there are plugins for; none where the bodies are built."""
    wanted = sum(has_plugin(node) for node in model.packed) if options.plugin_library() else 0
    if options.aot:
        from rankbook.plugins import aot

        wanted = sum(node.op_type in aot.names() for node in model.packed)
    return Check("plugin layers", result["plugin_layers"] == wanted, f"{result['plugin_layers']} of {wanted}")


PARSED_SINCE: Mapping[str, tuple[int, int]] = {
    "Attention": (10, 14),
    "RotaryEmbedding": (10, 15),
    "TensorScatter": (10, 15),
}
"""Versions of TensorRT since which its parser takes an operator (release notes of 10.14 and 10.15.1, NVIDIA)."""


def check_parser(model: ExportedModel, version: str | None) -> None:
    """Refuse a file that the parser of a version of TensorRT does not take; None where it is not known.

    Raises:
        MissingError: It is too old.
    """
    known = [int(part) for part in (version or "").split(".")[:2] if part.isdecimal()]
    used = {node.op_type for node in model.proto.graph.node if not node.domain} & set(PARSED_SINCE)
    new = sorted(name for name in used if known and tuple(known) < PARSED_SINCE[name])
    if new:
        wanted = ".".join(map(str, max(PARSED_SINCE[name] for name in new)))
        raise MissingError(
            f"TensorRT {version} is installed, whose parser does not know {' and '.join(new)} of {model.path}; install"
            f" {wanted} or a later one: pip install 'tensorrt>={wanted}'"
        )


def check_cache(model: ExportedModel) -> None:
    """Refuse a cache that TensorRT cannot write in place.

    Raises:
        UsageError: It is of a fixed length and holds codes.
    """
    if model.metadata.max_context and model.metadata.kv != "float":
        raise UsageError(
            f"TensorRT writes caches of floating-point numbers in place, and that of {model.path} is"
            f" {model.metadata.kv}; export with --kv float, or with --graph standard"
        )


def verify_cache(
    model: ExportedModel, kernels: Mapping[str, Mapping[str, int]], log: engine_log.EngineLog
) -> tuple[Check, ...]:
    """Check what must hold for a cache of a fixed length; nothing where it grows, and is joined in every step.

    Args:
        model: The file.
        kernels: Of a call by profile, see `rankbook.tools.deploy.step.kernels`.
        log: The builder's log.
    """
    if not model.metadata.max_context:
        return ()
    caches = sum(name.startswith(cache_names.PAST) for name in model.inputs)
    layers = sum(node.op_type == "Attention" and not node.domain for node in model.proto.graph.node)
    fused = {name: sum(kinds.get(kind, 0) for kind in step.ATTENTION) for name, kinds in kernels.items()}
    attended = sum(name.endswith((".key", ".value")) for name in model.inputs)
    copies, spelled_out = kernels["decode"][step.COPIES], 2 * layers < attended
    computed = not spelled_out and _computes_keys(model)
    shown = ", ".join(f"{count} in {name}" for name, count in fused.items())
    why = "; attention is spelled out, see exporter/README.md" if spelled_out else ""
    if computed:
        why = "; keys and values are computed from the cache in each step (latent attention)"
    # The builder recognizes some attention that is spelled out, too.
    whole = all(layers <= count <= (attended // 2 if spelled_out else layers) for count in fused.values())
    return (
        Check("cache updates in place", len(log.updates) == caches, f"{len(log.updates)} of {caches}"),
        Check("fused attention", whole, f"{shown}, of {layers} nodes{why}"),
        Check("no copy of a cache in a step", spelled_out or computed or not copies, f"{copies} kernels copy one{why}"),
    )


def _computes_keys(model: ExportedModel) -> bool:
    """Return whether an attention reads something else than what caches hold."""
    nodes = model.proto.graph.node
    held = {name for node in nodes if node.op_type == "TensorScatter" for name in node.output}
    return any(not {*node.input[1:3]} <= held for node in nodes if node.op_type == "Attention" and not node.domain)
