"""What ``engine.json`` says about an engine folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rankbook.calibration.source import ENGINE_MANIFEST, ENGINE_NAME
from rankbook.exporter.properties import Metadata
from rankbook.tools.errors import UsageError


@dataclass(frozen=True)
class Manifest:
    """An engine folder that was read; see `rankbook.tools.deploy.engine.EngineReport` for what the facts mean.

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
        """The ONNX file that it was built from, wherever it was then."""
        return Path(self.facts["source"]["path"])

    @cached_property
    def metadata(self) -> Metadata:
        """What that file said about itself."""
        return Metadata.of(self.facts["source"].get("metadata", {}))

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
    path = folder / ENGINE_MANIFEST
    try:
        facts: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{folder} holds an engine without {ENGINE_MANIFEST}; build it with `rankbook build`"
        ) from None
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}); build the engine again") from None
    if not isinstance(facts, dict):
        raise UsageError(f"{path} holds no JSON object; build the engine again")
    return facts
