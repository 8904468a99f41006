"""ONNX Runtime GenAI: exported folders, and models of its own builder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.calibration.source import Kind, Source
from rankbook.tools.errors import UsageError
from rankbook.tools.inspect.sizes import packed_size
from rankbook.tools.runtimes.base import LanguageModel, Runtime, Setting

if TYPE_CHECKING:
    from rankbook.tools.runtimes.base import Logits, Tokens

_BUILDER = "`python -m onnxruntime_genai.models.builder -p int4 -e cpu`"


def unavailable() -> str | None:
    """Return why it cannot be used on this machine, or None."""
    return None if find_spec("onnxruntime_genai") else "ONNX Runtime GenAI is missing: pip install onnxruntime-genai"


class GenAiModel(LanguageModel):
    """A folder with a ``genai_config.json``."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        """Open it.

        Raises:
            UsageError: Not such a folder.
        """
        configuration = folder / "genai_config.json"
        if not configuration.is_file():
            raise UsageError(
                f"{folder} has no genai_config.json; export the checkpoint again, which says what GenAI cannot run, or"
                f" make a model of its own with {_BUILDER}"
            )
        import onnxruntime_genai

        self._library: Any = onnxruntime_genai
        self._library.disable_telemetry_events()
        whole = json.loads(configuration.read_text("utf-8"))
        described = whole["model"]
        self._file = folder / described["decoder"]["filename"]
        self._ends, self._search = described.get("eos_token_id"), whole.get("search", {})
        self._capacity = setting.capacity or int(described["context_length"])
        self.name = f"genai {folder}"
        self.kernels = f"onnxruntime-genai {onnxruntime_genai.__version__}"
        options: dict[str, Any] = {"intra_op_num_threads": setting.threads} if setting.threads else {}
        if setting.shared:
            options["session.force_spinning_stop"] = "1"
        config = self._library.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = self._library.Model(config)
        self._generator: Any = None

    @cached_property
    def packed(self) -> tuple[int, int]:
        """Of MatMulNBits, or of operators of this project."""
        from rankbook.exporter.file import ExportedModel

        return packed_size(ExportedModel.examine(self._file))

    @property
    def file_bytes(self) -> int:
        """The graph and its data."""
        return sum(part.stat().st_size for part in self._file.parent.glob(f"{self._file.name}*"))

    @property
    def context(self) -> int | None:
        """The capacity that it was opened with."""
        return self._capacity

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """End tokens, and what it would sample with."""
        return {**self._search, "eos_token_id": self._ends}

    def start(self, tokens: Tokens) -> Logits:
        """Begin with tokens (1, length); the cache has the capacity from the beginning, as GenAI wants it."""
        parameters = self._library.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._capacity, do_sample=False)
        self._generator = self._library.Generator(self._model, parameters)
        return self._append(tokens[0].tolist())

    def step(self, token: int) -> Logits:
        """Continue with one token."""
        return self._append([token])

    def _append(self, tokens: list[int]) -> Logits:
        import numpy as np

        self._generator.append_tokens(np.array(tokens, np.int32))
        last: Logits = self._generator.get_logits()[0, -1]
        return last


def _prepare(source: Source) -> None:
    import onnxruntime_genai  # noqa: F401

    from rankbook.exporter.file import load

    load(source.path)


RUNTIMES = (
    Runtime(
        "genai",
        "onnxruntime-genai",
        "bench --peers",
        unavailable,
        lambda: version("onnxruntime-genai"),
        frozenset({Kind.ONNX}),
        f"an exported folder, or one made by {_BUILDER}",
        lambda source, setting: GenAiModel(Path(source.location), setting),
        _prepare,
        exact=False,
        peer=True,
    ),
)
