"""ONNX Runtime GenAI: models of its own builder, with its own generation loop."""

from __future__ import annotations

import json
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.tools.bench.contender import Contender, Setting
from rankbook.tools.bench.exported import foreign_size
from rankbook.tools.errors import UsageError
from rankbook.tools.inspect.onnx_file import load_graph

if TYPE_CHECKING:
    from rankbook.tools.runtimes.base import Tokens


def unavailable() -> str | None:
    """Return why it cannot be used here, or None."""
    return None if find_spec("onnxruntime_genai") else "ONNX Runtime GenAI is missing: pip install onnxruntime-genai"


class Model(Contender):
    """A folder of its model builder. Tokens are chosen inside: `step` goes on with the one that it gave last."""

    def __init__(self, path: Path, setting: Setting) -> None:
        """Open it.

        Raises:
            UsageError: Not such a folder.
        """
        import onnxruntime_genai

        configuration = path / "genai_config.json"
        if not configuration.is_file():
            raise UsageError(f"{path} has no genai_config.json; make it with onnxruntime_genai.models.builder")
        self._library: Any = onnxruntime_genai
        self._library.disable_telemetry_events()
        self._file = path / json.loads(configuration.read_text("utf-8"))["model"]["decoder"]["filename"]
        self.kernels = f"onnxruntime-genai {onnxruntime_genai.__version__}"
        self.file_bytes = sum(part.stat().st_size for part in path.glob(f"{self._file.name}*"))
        self._capacity = setting.capacity
        options: dict[str, Any] = {"intra_op_num_threads": setting.threads} if setting.threads else {}
        if setting.shared:
            options["session.force_spinning_stop"] = "1"
        config = self._library.Config(str(path))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = self._library.Model(config)
        self._generator: Any = None

    @cached_property
    def packed(self) -> tuple[int, int]:
        """Of MatMulNBits."""
        return foreign_size(load_graph(self._file))

    def start(self, tokens: Tokens) -> int:
        """Begin with tokens (1, length); the cache has the capacity from the beginning, as GenAI wants it."""
        parameters = self._library.GeneratorParams(self._model)
        # A minimum keeps it from ending: what the model says does not matter here.
        parameters.set_search_options(max_length=self._capacity, min_length=self._capacity, do_sample=False)
        self._generator = self._library.Generator(self._model, parameters)
        self._generator.append_tokens(tokens[0].astype("int32"))
        self._generator.generate_next_token()  # chooses from the scores of the prompt; from now on each call computes
        return int(self._generator.get_next_tokens()[0])

    def step(self, token: int) -> int:  # noqa: ARG002
        """Continue with its own last token."""
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])
