"""What ``engine.json`` says about an engine folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from rankbook.calibration.schema import mismatch, read_object
from rankbook.calibration.source import ENGINE_MANIFEST, ENGINE_NAME
from rankbook.exporter.properties import Metadata
from rankbook.tools.deploy.profiles import Shapes
from rankbook.tools.errors import UsageError


@dataclass(frozen=True)
class Check:
    """One statement about the engine and whether it holds."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class EngineSource:
    """The ONNX file that an engine was built from.

    Attributes:
        path: Where it was then, or in the folder of the engine.
        sha256: Of the file.
        metadata: Its properties.
    """

    path: str
    sha256: str
    metadata: dict[str, str]


@dataclass(frozen=True)
class EngineReport:
    """What ``engine.json`` holds.

    Attributes:
        source: The ONNX file.
        engine_bytes: Size of the engine file.
        weights_bytes: Weights in the engine by the builder's count.
        stored_bytes: Bytes of the tensors in the ONNX file.
        constant_bytes: Bytes of the engine's constants by element type.
        layers: Engine layers by kind, over all profiles.
        kernels: Kernels that a call starts, by profile (`rankbook.tools.deploy.step`).
        step_bytes: What decoding a token must move: weights, the whole cache, states if there are any, outputs.
        profiles: Smallest, typical and largest shape of each input, by profile.
        checks: What was verified.
        self_contained: Whether the engine holds the plugin library.
        plugin_form: Where the kernels of plugin layers are, for people; empty without such layers.
        commands: The same build in this folder, with trtexec (TensorRT-RTX: tensorrt_rtx) and with polygraphy.
        seconds: Wall time of the child process.
    """

    target: str
    version: str
    source: EngineSource
    capabilities: tuple[str, ...]
    engine_bytes: int
    engine_sha256: str
    weights_bytes: int
    stored_bytes: int
    constant_bytes: dict[str, int]
    activation_bytes: int
    network_layers: int
    plugin_layers: int
    layers: dict[str, int]
    kernels: dict[str, dict[str, int]]
    step_bytes: dict[str, int]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    profiles: dict[str, Shapes]
    checks: tuple[Check, ...]
    self_contained: bool
    plugin_form: str
    commands: dict[str, str]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


@dataclass(frozen=True)
class Manifest:
    """An engine folder that was read; see `EngineReport` for what the facts mean.

    Attributes:
        folder: The folder.
        facts: All that ``engine.json`` holds.
    """

    folder: Path
    facts: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read it and look whether the engine is there as a whole.

        Raises:
            UsageError: It is damaged, or the engine is missing or truncated.
        """
        facts = read_facts(folder)
        for kind, held, where in ((EngineReport, facts, ""), (EngineSource, facts.get("source", {}), "source.")):
            if absent := sorted({item.name for item in fields(kind)} - held.keys()):
                raise UsageError(f"{folder / ENGINE_MANIFEST} lacks {where}{absent[0]}; build the engine again")
        engine = folder / ENGINE_NAME
        if not engine.is_file() or engine.stat().st_size != facts.get("engine_bytes"):
            raise UsageError(
                f"{engine} is missing or does not have the size that {ENGINE_MANIFEST} states; build it again"
            )
        return cls(folder, facts)

    @property
    def engine(self) -> Path:
        """The engine file."""
        return self.folder / ENGINE_NAME

    @property
    def source(self) -> Path:
        """The ONNX file that it was built from, wherever it was then; one within the folder has moved with it."""
        return Path(self.folder, self.facts["source"]["path"])

    @cached_property
    def metadata(self) -> Metadata:
        """What that file said about itself."""
        return Metadata.of(self.facts["source"]["metadata"])

    @property
    def needs_library(self) -> bool:
        """Whether the plugin library must be loaded before the engine."""
        return bool(
            self.facts.get("plugin_layers")
            and not self.facts.get("self_contained")
            and self.facts.get("plugin_form", "").startswith("library")
        )

    def exported(self) -> Path:
        """Return the ONNX file that the engine was built from, found where it was or beside the engine folder.

        Raises:
            UsageError: It is gone, or it is another file now.
        """
        noted = self.source
        # It may have moved together with the engine: within its folder, or beside it.
        candidates = [noted, *(place / noted.parent.name / noted.name for place in (self.folder, self.folder.parent))]
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            raise UsageError(
                f"the file that {self.folder} was built from is not where it was ({noted}); name it before the engine:"
                " rankbook parity ONNX ENGINE"
            )
        self.check(found)
        return found

    def check(self, path: Path) -> None:
        """Check that an ONNX file is the one that the engine was built from.

        Raises:
            UsageError: It is another one.
        """
        from rankbook.calibration.checkpoint.files import sha256_file

        if sha256_file(path) != self.facts["source"]["sha256"]:
            raise UsageError(
                f"{path} is not the file that {self.folder} was built from (SHA-256 differs); build the engine again"
            )


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what ``engine.json`` holds.

    Raises:
        UsageError: It is missing or damaged.
    """
    path, advice = folder / ENGINE_MANIFEST, "build the engine again"
    if not path.is_file():
        raise UsageError(f"{folder} holds an engine without {ENGINE_MANIFEST}; build it with `rankbook build`")
    facts = read_object(path, advice)
    if wrong := mismatch(facts, EngineReport, ENGINE_MANIFEST):
        raise UsageError(f"{path} is damaged: {wrong}; {advice}")
    return facts
