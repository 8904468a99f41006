"""Command lines of other tools that build the engine that `rankbook build` builds, for a shell in its folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rankbook.tools.deploy import polygraphy_network
from rankbook.tools.deploy.profiles import Shapes

NETWORK = "polygraphy_network.py"
"""Copy of `rankbook.tools.deploy.polygraphy_network` in the engine folder."""


@dataclass(frozen=True)
class Build:
    """What to build.

    Attributes:
        graph: The ONNX file, as it is named in the folder of the engine.
        engine: Where the engine goes.
        target: ``rtx`` or ``trt``.
        capabilities: Compute capabilities, rtx only, e.g. ``SM86``.
        profiles: Smallest, typical and largest shape of each input, by profile.
        plugins: The plugin library, or None.
        self_contained: Store the library in the engine.
    """

    graph: Path
    engine: str
    target: str
    capabilities: tuple[str, ...]
    profiles: dict[str, Shapes]
    plugins: Path | None
    self_contained: bool


def trtexec(build: Build) -> str:
    """Return the command for ``trtexec``, which is ``tensorrt_rtx`` in TensorRT-RTX."""
    parts = ["tensorrt_rtx" if build.target == "rtx" else "trtexec", f"--onnx={build.graph}"]
    parts.append(f"--saveEngine={build.engine}")
    if build.target == "rtx":
        parts.append(f"--computeCapabilities={','.join(name.removeprefix('SM') for name in build.capabilities)}")
    else:
        parts.append("--timingCacheFile=timing.cache")
    library = ""
    if build.plugins is not None:
        # One flag stores the library and loads it, the other only loads it.
        library = f"--{'setPluginsToSerialize' if build.self_contained else 'dynamicPlugins'}={_library(build.plugins)}"
    for index, shapes in enumerate(build.profiles.values()):
        parts.append(f"--profile={index}")
        for bound, flag in enumerate(("minShapes", "optShapes", "maxShapes")):
            sizes = [f"{name}:{'x'.join(map(str, bounds[bound]))}" for name, bounds in shapes.items()]
            parts.append(f"--{flag}={','.join(sizes)}")
    return " ".join(filter(None, [shlex.join(parts), library]))


def _library(path: Path) -> str:
    """Return the plugin library as a word of a shell: what the variable says, or where it lay at the build."""
    escaped = re.sub(r'(["\\$`}])', r"\\\1", str(path))
    return f'"${{{polygraphy_network.LIBRARY_VARIABLE}:-{escaped}}}"'


def polygraphy(build: Build) -> str:
    """Return the command for ``polygraphy convert``.

    Its ``--plugins`` opens a library but does not register what it holds, so with plugins polygraphy runs a script
    that does. An engine that holds the library cannot be made this way.
    """
    parts = ["polygraphy", "convert", str(build.graph), "--convert-to", "trt", "-o", build.engine]
    settings = ["POLYGRAPHY_USE_TENSORRT_RTX=1"] if build.target == "rtx" else []
    if build.plugins is not None:
        parts[2:5] = [NETWORK, "--model-type", "trt-network-script", "--convert-to", "trt"]
        settings.append(f"{polygraphy_network.MODEL_VARIABLE}={shlex.quote(str(build.graph))}")
        settings.append(f"{polygraphy_network.LIBRARY_VARIABLE}={_library(build.plugins)}")
    for shapes in build.profiles.values():
        for index, flag in enumerate(("--trt-min-shapes", "--trt-opt-shapes", "--trt-max-shapes")):
            parts.append(flag)
            parts += [f"{name}:[{','.join(map(str, bounds[index]))}]" for name, bounds in shapes.items()]
    return " ".join([*settings, shlex.join(parts)])


def script(commands: Mapping[str, str]) -> str:
    """Return a shell script of commands by the names of their tools."""
    lines = ["#!/bin/sh", "# The engine of this folder, built without rankbook; run one of them.", ""]
    lines += [f"# {polygraphy_network.LIBRARY_VARIABLE} names the plugin library where it has moved.", ""]
    lines += ['cd "$(dirname "$0")" || exit', ""]
    for name, command in commands.items():
        lines += [f"# {name}", command, ""]
    return "\n".join(lines)
