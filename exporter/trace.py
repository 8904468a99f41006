"""Traces a skeleton into an ONNX graph with KV cache inputs and outputs."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from rankbook.calibration.model.adapter import adapter_of
from rankbook.exporter import attention, refusal, static
from rankbook.exporter.functions import OPSET
from rankbook.exporter.options import INPUTS, ExportOptions
from rankbook.exporter.repeat import Plan, UnlikeError
from rankbook.exporter.skeleton import Skeleton

_BATCH, _SEQUENCE, _PAST = 2, 3, 5
"""Sizes of the example; none is 0 or 1, which torch.export would take for constants."""
_ROWS = {0: "batch", 1: "sequence"}
"""Dynamic axes of tokens and of what there is one of for each."""
DEFAULT_CONTEXT = 1024
"""Slots of a cache of a fixed length where neither the user nor the model wants another number."""

Past = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, (batch, heads, positions, size) each."""


class _CausalLM(nn.Module):
    """The model as a function of plain tensors, with a cache that grows.

    Every layer keeps all positions, also one with a sliding window: its mask hides the older ones, and the cache of all
    layers has one length.
    """

    def __init__(self, model: Any, options: ExportOptions) -> None:
        super().__init__()
        self.model, self.options, self.adapter = model, options, adapter_of(model)

    def forward(self, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past) -> tuple[Any, ...]:
        """Return what `_run` does; rows of a batch may be padded on either side."""
        cache = self.adapter.new_cache()
        for index, (key, value) in enumerate(past):
            cache.update(key, value, index)
        length, held = tokens.shape[1], past[0][0].shape[2]
        # 1 where a token is real, and 0 where it is padding.
        real = attention_mask[:, attention_mask.shape[1] - length :]
        last = (real * torch.arange(length)).argmax(1)
        mask = _mask_of_keys(attention_mask, length, held)
        return self._run(tokens, mask, position_ids, cache, last)

    def _run(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any, last: Tensor) -> tuple[Any, ...]:
        """Return float32 logits (batch, 1 or sequence, vocabulary) and the keys and values of each layer.

        ``tokens`` are numbers (batch, sequence) or embedded ones (batch, sequence, hidden); ``last`` (batch,) is the
        place of the last real one in each row, whose logits are those of ``--logits last``. With ``--sample greedy``
        the best token of each row (batch, 1) comes behind the logits.
        """
        head, hook = self.adapter.embeddings().head, None
        if head is not None and self.options.logits == "last":
            # Before the output layer, so that it computes one position, and what follows it in the model stays.
            hook = head[1].register_forward_pre_hook(lambda _, given: (_at(given[0], last),))
        try:
            output = self.model(
                **{INPUTS[self.options.inputs]: tokens},
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        finally:
            if hook is not None:
                hook.remove()
        logits = output.logits.float()
        best = (logits.argmax(-1),) if self.options.sample == "greedy" else ()
        return logits, *best, [(layer.keys, layer.values) for layer in output.past_key_values.layers]


class _StaticLM(_CausalLM):
    """The same with a cache of a fixed length (`rankbook.exporter.static`)."""

    def forward(self, tokens: Tensor, write_indices: Tensor, lengths: Tensor, past: Past) -> tuple[Any, ...]:
        """Return what `_run` does for rows of ``lengths`` (batch,) real tokens behind ``write_indices`` (batch,)."""
        positions = write_indices[:, None] + torch.arange(tokens.shape[1])
        # For models that count positions in it. Attention has no need of it, see `rankbook.exporter.attention.mask`.
        mask = torch.ones(tokens.shape[0], past[0][0].shape[2], dtype=torch.int64)
        cache = static.fixed_cache(past, write_indices)
        return self._run(tokens, mask, positions, cache, (lengths - 1).clamp_min(0))


def _mask_of_keys(mask: Tensor, length: int, held: int) -> Tensor:
    """Return the mask of the ``held`` keys of the past and those of ``length`` tokens, (batch, held + length).

    It is the given one, (batch, total), where that is as long. A shorter one hides the end of the past, as in ``--graph
    ort``, whose past may be a buffer with room behind it; one of a single element would fit any number of keys. A mask
    shorter than the tokens is looked up beyond its end, which runtimes refuse.
    """
    total, key = mask.shape[1], torch.arange(held + length)
    seen = (key >= held) | (key < total - length)
    place = torch.where(key >= held, key - held + total - length, key) * seen
    return mask.index_select(1, torch.where(place < 0, total, place)) * seen


def _at(hidden: Tensor, last: Tensor) -> Tensor:
    """Return one position ``last`` (batch,) of each row, (batch, 1, hidden), of (batch, sequence, hidden)."""
    return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2]))


@dataclass(frozen=True)
class _Example:
    """What is traced, and with what.

    Attributes:
        module: The model.
        values: Examples of the inputs behind the tokens and before the cache, by name.
        sizes: Names of the dynamic axes of each of them.
        cache: Names of the dynamic axes of keys and values.
    """

    module: nn.Module
    values: dict[str, Tensor]
    sizes: tuple[dict[int, str], ...]
    cache: dict[int, str]


def trace(skeleton: Skeleton, options: ExportOptions) -> ir.Model:
    """Return the graph of a skeleton; its large weights are still missing.

    Raises:
        ValueError: Embedded tokens are asked of a model that gives images positions of their own, or a cache of a fixed
            length of one whose attention is its own code.
        NotExportableError: torch cannot trace the model; the message says where.
    """
    config, adapter = skeleton.model.config, adapter_of(skeleton.model)
    if adapter.embeddings().head is None:
        raise refusal.NotExportableError(config, "it has no output layer")
    if options.inputs == "embeds" and adapter.positions_have_parts():
        raise ValueError(
            "positions of images have three parts in this model, and one in the file; export with --inputs ids"
        )
    fixed = options.graph == "static"
    if fixed and config._attn_implementation == attention.ADDITIVE:
        raise ValueError(
            f"a model of type {config.model_type!r} computes attention in code of its own, which may take the end of"
            " the cache for the end of the text; export with --graph standard"
        )
    past = _past(skeleton, max_context(skeleton, options) if fixed else _PAST)
    if (plan := Plan.of(skeleton)) is not None:
        with contextlib.suppress(UnlikeError, refusal.NotExportableError):
            with plan.shortened(skeleton.model):
                model = _traced(skeleton, options, past[: plan.traced])
            plan.complete(model, skeleton)
            return model
    return _traced(skeleton, options, past)


def _traced(skeleton: Skeleton, options: ExportOptions, past: Past) -> ir.Model:
    """Return the graph of the blocks that the model has."""
    config, layers = skeleton.model.config, len(past)
    example = _static(skeleton, options) if options.graph == "static" else _growing(skeleton, options)
    tokens = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64)
    if options.inputs == "embeds":
        width = adapter_of(skeleton.model).hidden_size
        tokens = torch.zeros(_BATCH, _SEQUENCE, width, dtype=skeleton.dtype)
    best = ["next_token"] if options.sample == "greedy" else []
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                example.module.eval(),
                (tokens, *example.values.values(), past),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=(_ROWS, *example.sizes, [(example.cache, example.cache)] * layers),
                input_names=[INPUTS[options.inputs], *example.values, *_cache_names("past_key_values", layers)],
                output_names=["logits", *best, *_cache_names("present", layers)],
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


def max_context(skeleton: Skeleton, options: ExportOptions) -> int:
    """Return the slots of the cache of ``--graph static``.

    Raises:
        ValueError: More are asked for than the model has positions.
    """
    limit = adapter_of(skeleton.model).context()
    wanted = options.max_context or min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    if limit and wanted > limit:
        raise ValueError(f"max_context is {wanted} and the model is right up to {limit} positions; give at most that")
    return wanted


def _growing(skeleton: Skeleton, options: ExportOptions) -> _Example:
    values = {
        "attention_mask": torch.ones(_BATCH, _PAST + _SEQUENCE, dtype=torch.int64),
        "position_ids": torch.arange(_PAST, _PAST + _SEQUENCE).expand(_BATCH, -1).contiguous(),
    }
    sizes = ({0: "batch", 1: "total_sequence"}, _ROWS)
    return _Example(_CausalLM(skeleton.model, options), values, sizes, {0: "batch", 2: "past_sequence"})


def _static(skeleton: Skeleton, options: ExportOptions) -> _Example:
    row = {0: "batch"}
    values = {"write_indices": torch.full((_BATCH,), _PAST), "lengths": torch.full((_BATCH,), _SEQUENCE)}
    return _Example(_StaticLM(skeleton.model, options), values, (row, row), row)


def _past(skeleton: Skeleton, length: int) -> Past:
    """Return an example of the keys and values of each layer, ``length`` positions in the shapes of the model.

    Raises:
        NotExportableError: Something else is kept.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, adapter = skeleton.model, adapter_of(skeleton.model)
    cache = adapter.new_cache()
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
        shapes = [tuple((_BATCH, part.shape[1], length, part.shape[3]) for part in pair) for pair in kept]
    except refusal.TRACE_ERRORS as error:
        raise refusal.traced(model.config, error) from error
    if len(shapes) != adapter.layers:
        raise refusal.NotExportableError(model.config, f"{len(shapes)} of its layers keep keys and values")
    # Nobody reads the elements, and what nobody writes takes no memory.
    return [(torch.empty(key, dtype=skeleton.dtype), torch.empty(value, dtype=skeleton.dtype)) for key, value in shapes]


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
