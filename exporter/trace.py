"""Traces a skeleton into an ONNX graph with KV cache inputs and outputs."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from rankbook.calibration.model.adapter import adapter_of
from rankbook.exporter import refusal
from rankbook.exporter.functions import OPSET
from rankbook.exporter.options import INPUTS, LOGITS
from rankbook.exporter.skeleton import Skeleton

_BATCH, _SEQUENCE, _PAST = 2, 3, 5
"""Sizes of the example; none is 0 or 1, which torch.export would take for constants."""


class _CausalLM(nn.Module):
    """The model as a function of plain tensors."""

    def __init__(self, model: Any, logits: str, inputs: str) -> None:
        super().__init__()
        self.model = model
        self.last = logits == "last"
        self.inputs = INPUTS[inputs]

    def forward(
        self, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return float32 logits (batch, 1 or sequence, vocabulary) and the keys and values of each layer.

        ``tokens`` are numbers (batch, sequence) or embedded ones (batch, sequence, hidden). The last logits of a row
        are those of its last real position: rows of a batch may be padded on either side.

        Every layer keeps all positions, also one with a sliding window: its mask hides the older ones, and the cache of
        all layers has one length.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (key, value) in enumerate(past):
            cache.update(key, value, index)
        head = self.model.get_output_embeddings()
        real = attention_mask[:, attention_mask.shape[1] - tokens.shape[1] :]
        # Before the output layer, so that it computes one position, and what follows it in the model stays.
        hook = head.register_forward_pre_hook(lambda _, given: (_last(given[0], real),)) if self.last else None
        try:
            output = self.model(
                **{self.inputs: tokens},
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
        finally:
            if hook is not None:
                hook.remove()
        return output.logits.float(), [(layer.keys, layer.values) for layer in output.past_key_values.layers]


def _last(hidden: Tensor, real: Tensor) -> Tensor:
    """Return the last real position of each row, (batch, 1, hidden), of hidden states (batch, sequence, hidden).

    ``real`` (batch, sequence) is 1 where a position is a token and 0 where it is padding.
    """
    last = (real * torch.arange(hidden.shape[1])).argmax(1)
    return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2]))


def trace(skeleton: Skeleton, logits: str, inputs: str = "ids") -> ir.Model:
    """Return the graph of a skeleton; its large weights are still missing.

    Raises:
        ValueError: ``logits`` or ``inputs`` is unknown.
        NotExportableError: torch cannot trace the model; the message says where.
    """
    if logits not in LOGITS:
        raise ValueError(f"logits {logits!r} is unknown; choose one of {LOGITS}")
    if inputs not in INPUTS:
        raise ValueError(f"inputs {inputs!r} is unknown; choose one of {tuple(INPUTS)}")
    config = skeleton.model.config
    if inputs == "embeds" and "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        raise ValueError(
            "positions of images have three parts in this model, and one in the file; export with --inputs ids"
        )
    past = _past(skeleton)
    layers = len(past)
    tokens = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64)
    if inputs == "embeds":
        tokens = torch.zeros(_BATCH, _SEQUENCE, config.hidden_size, dtype=skeleton.dtype)
    attention_mask = torch.ones(_BATCH, _PAST + _SEQUENCE, dtype=torch.int64)
    positions = torch.arange(_PAST, _PAST + _SEQUENCE).expand(_BATCH, -1).contiguous()
    rows = {0: "batch", 1: "sequence"}
    cache_dims = {0: "batch", 2: "past_sequence"}
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                _CausalLM(skeleton.model, logits, inputs).eval(),
                (tokens, attention_mask, positions, past),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=(rows, {0: "batch", 1: "total_sequence"}, rows, [(cache_dims, cache_dims)] * layers),
                input_names=[
                    INPUTS[inputs],
                    "attention_mask",
                    "position_ids",
                    *_cache_names("past_key_values", layers),
                ],
                output_names=["logits", *_cache_names("present", layers)],
                verbose=False,
            )
        except (torch.onnx.errors.OnnxExporterError, *refusal.TRACE_ERRORS) as error:
            raise refusal.traced(config, error) from error
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program; check that onnxscript is installed")
    model = program.model
    for value in list(model.graph.initializers.values()):
        value.name = str(value.name).removeprefix("model.")
    return model


def _past(skeleton: Skeleton) -> list[tuple[Tensor, Tensor]]:
    """Return an example of the keys and values of each layer, in the shapes that the model gives them.

    Raises:
        NotExportableError: Something else is kept.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import DynamicCache

    model = skeleton.model
    cache: Any = DynamicCache()
    try:
        with _quiet(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            tokens = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64)
            positions = torch.arange(_SEQUENCE).expand(_BATCH, -1)
            model(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        kept = [(layer.keys, layer.values) for layer in cache.layers]
        shapes = [tuple((_BATCH, part.shape[1], _PAST, part.shape[3]) for part in pair) for pair in kept]
    except refusal.TRACE_ERRORS as error:
        raise refusal.traced(model.config, error) from error
    if len(shapes) != adapter_of(model).layers:
        raise refusal.NotExportableError(model.config, f"{len(shapes)} of its layers keep keys and values")
    return [(torch.zeros(key, dtype=skeleton.dtype), torch.zeros(value, dtype=skeleton.dtype)) for key, value in shapes]


def _cache_names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{index}.{part}" for index in range(layers) for part in ("key", "value")]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch says about optional packages and deprecated internals, and before it raises."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch._subclasses.fake_tensor")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
