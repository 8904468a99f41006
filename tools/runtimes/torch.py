"""PyTorch: a Hugging Face model, a GGUF file or a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.calibration.device import AUTO, resolve
from rankbook.calibration.source import LOADABLE, Source
from rankbook.tools.runtimes.base import LanguageModel, Runtime, check_tokens

if TYPE_CHECKING:
    from rankbook.tools.runtimes.base import Logits, Tokens


def unavailable() -> str | None:
    """Return why PyTorch cannot be used on this machine, or None."""
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    return f"{' and '.join(missing)} not installed: pip install rankbook" if missing else None


class TorchModel(LanguageModel):
    """A causal language model in PyTorch, evaluated in float32.

    Attributes:
        device: Where it computes.
    """

    def __init__(self, source: str | Path, *, threads: int | None = None, device: str = AUTO) -> None:
        """Load a model; packed layers keep their decoded weights, so that a step costs what it costs densely.

        Under a limit of memory (`rankbook.calibration.memory.limited`) weights stay in their files: each call decodes
        or widens one block after the other.

        Raises:
            ValueError: There is no model, or it cannot be read.
            DeviceError: The device is not there.
        """
        import torch

        from rankbook.calibration.memory import limit
        from rankbook.calibration.model.by_block import by_block
        from rankbook.calibration.model.loading import load_model
        from rankbook.calibration.model.packed_modules import materialize_all

        self.device = resolve(device)

        if threads:
            torch.set_num_threads(threads)
        if limit() is None:
            self.model, self.tokenizer = load_model(source, torch.float32)
            self.model.to(self.device)
            materialize_all(self.model)
        else:
            self.model, self.tokenizer = load_model(source)
            self._by_block = ExitStack()
            self._by_block.enter_context(by_block(self.model, self.device))
        self.name = f"torch {source}"
        self._source = Path(source)
        self._text: Any = None

    @property
    def file_bytes(self) -> int:
        """The files of weights; 0 for a model of the hub."""
        if self._source.is_file():
            return self._source.stat().st_size
        files = [file for kind in ("*.safetensors", "*.gguf") for file in self._source.glob(kind)]
        return sum(file.stat().st_size for file in files)

    @property
    def context(self) -> int | None:
        """See `rankbook.calibration.model.adapter.ModelAdapter.longest_text`."""
        from rankbook.calibration.model.adapter import adapter_of

        return adapter_of(self.model).longest_text()

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """What transformers made of the folder's file, or of its config.json."""
        settings = self.model.generation_config
        return settings.to_dict() if settings is not None else {}

    def override(self, kind: str | None, kv_bits: int | None) -> None:
        """Replace the settings of activations and cache."""
        from rankbook.calibration.activations.settings import override

        override(self.model, kind=kind, kv_bits=kv_bits)

    def scores(self, tokens: Tokens) -> Logits:
        """Score tokens (batch, length) without a cache: float32 (batch, length, vocabulary)."""
        import torch

        with torch.inference_mode():
            output = self.model(input_ids=self._placed(tokens), use_cache=False)
        scores: Logits = output.logits.float().cpu().numpy()
        return scores

    def start(self, tokens: Tokens) -> Logits:
        """Begin a generation with tokens (1, length): fill the cache, return the last logits (vocabulary,)."""
        from rankbook.calibration.model.continuation import Continuation

        self._text = Continuation(self.model)
        return self._advance(tokens)

    def step(self, token: int) -> Logits:
        """Continue with one token, return the next logits (vocabulary,)."""
        import numpy as np

        return self._advance(np.array([[token]], np.int64))

    def generated(self, tokens: Tokens, count: int) -> list[int]:
        """Continue with ``generate`` of transformers; nothing of the model's generation settings takes part."""
        import torch
        from transformers import GenerationConfig

        settings: Any = GenerationConfig  # its signature is untyped
        settings = settings(do_sample=False, max_new_tokens=count, pad_token_id=0, use_cache=True)
        given, self.model.generation_config = self.model.generation_config, settings
        try:
            with torch.inference_mode():
                ids = self._placed(tokens)
                text = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
        finally:
            self.model.generation_config = given
        return [int(token) for token in text[0, tokens.shape[1] :]]

    def _advance(self, tokens: Tokens) -> Logits:
        import torch

        with torch.inference_mode():
            last: Logits = self._text.extend(self._placed(tokens))[0].cpu().numpy()
        return last

    def _placed(self, tokens: Tokens) -> Any:
        """Return tokens on the device; one that does not exist makes a GPU fail in all later calls of the process."""
        import torch

        check_tokens(self.name, tokens, self._vocabulary)
        return torch.from_numpy(tokens).to(self.model.device)

    @cached_property
    def _vocabulary(self) -> int:
        from rankbook.calibration.model.adapter import adapter_of

        return adapter_of(self.model).vocabulary


def _prepare(_: Source) -> None:
    import transformers  # noqa: F401

    import rankbook.calibration.model.loading  # noqa: F401


RUNTIMES = (
    Runtime(
        "torch",
        "PyTorch",
        "eval, generate and parity's reference, from the decoded weights",
        unavailable,
        lambda: version("torch"),
        LOADABLE,
        open=lambda source, setting: TorchModel(
            source.path if source.gguf else source.location, threads=setting.threads, device=setting.device
        ),
        prepare=_prepare,
        automatic=True,
        devices=True,
    ),
)
