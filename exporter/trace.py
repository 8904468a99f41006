"""Traces a skeleton into an ONNX graph whose cache is inputs and outputs."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from rankbook.calibration.model.adapter import adapter_of
from rankbook.exporter import attention, bounds, embedded, recurrence, refusal, static
from rankbook.exporter import cache_names as names
from rankbook.exporter.cache import Part, parts_of, tensors_of, traced_cache
from rankbook.exporter.functions import OPSET
from rankbook.exporter.options import BEST, INPUTS, NO_TOKEN, ExportOptions
from rankbook.exporter.repeat import Plan, UnlikeError
from rankbook.exporter.skeleton import Skeleton

_BATCH, _SEQUENCE, _PAST = 2, 3, 5
"""Sizes of the example; none is 0 or 1, which torch.export would take for constants."""
_ROWS = {0: "batch", 1: "sequence"}
"""Dynamic axes of tokens and of what there is one of for each."""
_FAR = 1 << 17
"""Positions for which a graph has to be right where the model sets no limit."""
DEFAULT_CONTEXT = 1024
"""Slots of a cache of a fixed length where neither the user nor the model wants another number."""


class _CausalLM(nn.Module):
    """The model as a function of plain tensors, with a cache that grows."""

    def __init__(self, model: Any, options: ExportOptions, parts: Sequence[Part]) -> None:
        super().__init__()
        self.model, self.options, self.adapter, self.parts = model, options, adapter_of(model), parts

    def forward(
        self, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Any, ...]:
        """Return what `_run` does; rows of a batch may be padded on either side, with states only at the left."""
        cache = traced_cache(self.adapter, self.parts, past)
        length = tokens.shape[1]
        # 1 where a token is real, and 0 where it is padding.
        real = attention_mask[:, attention_mask.shape[1] - length :]
        last = (real * torch.arange(length)).argmax(1)
        held = [tensor.shape[2] for part, tensor in zip(self.parts, past, strict=True) if part.grows]
        # Models without attention (Mamba) have no use for the mask of earlier tokens.
        mask = _mask_of_keys(attention_mask, length, held[0]) if held else real
        return self._run(tokens, mask, position_ids, cache, last)

    def _run(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any, last: Tensor) -> tuple[Any, ...]:
        """Return float32 logits (batch, 1 or sequence, vocabulary) and the parts of the cache.

        ``tokens`` are numbers (batch, sequence) or embedded ones (batch, sequence, hidden); ``last`` (batch,) is the
        place of the last real one in each row, whose logits are those of ``--logits last``. Behind the logits comes
        what ``--sample`` asks for (`chosen`).
        """
        head, hook = self.adapter.embeddings().head, None
        if head is not None and self.options.logits == "last":
            # Before the output layer, so that it computes one position, and what follows it in the model stays.
            hook = head[1].register_forward_pre_hook(lambda _, given: (_at(given[0], last),))
        given = {INPUTS[self.options.inputs]: tokens, self.adapter.cache_argument: cache}
        try:
            with recurrence.traceable(self.model, cache):
                output = self.model(**given, attention_mask=mask, position_ids=positions, use_cache=True)
        finally:
            if hook is not None:
                hook.remove()
        logits = output.logits.float()
        return logits, *chosen(logits, self.options.sample), tensors_of(cache, self.parts)


class _StaticLM(_CausalLM):
    """The same with a cache of a fixed length (`rankbook.exporter.static`)."""

    def forward(self, tokens: Tensor, write_indices: Tensor, lengths: Tensor, past: list[Tensor]) -> tuple[Any, ...]:
        """Return what `_run` does for rows of ``lengths`` (batch,) real tokens behind ``write_indices`` (batch,)."""
        batch, length = tokens.shape[:2]
        positions = write_indices[:, None] + torch.arange(length)
        held = [tensor.shape[2] for part, tensor in zip(self.parts, past, strict=True) if part.grows]
        # For models that count positions in it. Attention has no need of it, see `rankbook.exporter.attention.mask`.
        mask = torch.ones(batch, held[0] if held else length, dtype=torch.int64)
        cache = traced_cache(self.adapter, self.parts, past)
        static.fix_cache(cache, write_indices, lengths, length)
        return self._run(tokens, mask, positions, cache, (lengths - 1).clamp_min(0))


def chosen(logits: Tensor, sample: str) -> tuple[Tensor, ...]:
    """Return what ``--sample`` gives out of logits (batch, 1, vocabulary).

    That is the best token of each row (batch, 1), or the logits and tokens of the best ones (batch, 1, `BEST`). Where a
    logit of a row is NaN or infinite, the token is `NO_TOKEN` and the best logits are NaN. Minus infinity only hides a
    token, unless all are hidden.
    """
    if sample == "none":
        return ()
    best, tokens = logits.topk(1 if sample == "greedy" else min(BEST, logits.shape[-1]))
    # What a search for the largest makes of NaN depends on the runtime; a sum with one is NaN.
    usable = (logits.sum(-1, keepdim=True) < math.inf) & (best[..., :1] > -math.inf)
    if sample == "greedy":
        return (torch.where(usable, tokens, NO_TOKEN)[..., 0],)
    return torch.where(usable, best, math.nan), tokens


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


_CHOSEN = {"none": (), "greedy": ("next_token",), "top-k": ("top_logits", "top_tokens")}
"""Names of the outputs of ``--sample``."""


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
        ValueError: Embedded tokens are asked of a model that gives images positions of their own or needs the numbers
            of tokens, or a cache of a fixed length of one whose attention is its own code.
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
    if fixed and config._attn_implementation == attention.ADDITIVE and not adapter.sees_by_mask:
        raise ValueError(
            f"a model of type {config.model_type!r} computes attention in code of its own, which may take the end of"
            " the cache for the end of the text; export with --graph standard"
        )
    with _quiet():
        parts = parts_of(skeleton)
        if options.inputs == "embeds":
            embedded.require(skeleton)
    if (plan := Plan.of(skeleton)) is not None:
        with contextlib.suppress(UnlikeError, refusal.NotExportableError):
            with plan.shortened(skeleton.model):
                model = _traced(skeleton, options, [part for part in parts if part.layer < plan.traced])
            plan.complete(model, skeleton)
            return model
    return _traced(skeleton, options, parts)


def _traced(skeleton: Skeleton, options: ExportOptions, parts: Sequence[Part]) -> ir.Model:
    """Return the graph of the blocks that the model has."""
    config = skeleton.model.config
    fixed = options.graph == "static"
    example = _static(skeleton, options, parts) if fixed else _growing(skeleton, options, parts)
    past = [part.example(_BATCH, max_context(skeleton, options) if fixed else _PAST) for part in parts]
    axes = [example.cache if part.grows else {0: "batch"} for part in parts]
    before, behind = ([name(part.name, part.layer) for part in parts] for name in (names.past, names.present))
    tokens = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64)
    if options.inputs == "embeds":
        width = adapter_of(skeleton.model).hidden_size
        tokens = torch.zeros(_BATCH, _SEQUENCE, width, dtype=skeleton.dtype)
    best = _CHOSEN[options.sample]
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                example.module.eval(),
                (tokens, *example.values.values(), past),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=(_ROWS, *example.sizes, axes),
                input_names=[INPUTS[options.inputs], *example.values, *before],
                output_names=["logits", *best, *behind],
                verbose=False,
            )
        except (torch.onnx.errors.OnnxExporterError, *refusal.TRACE_ERRORS) as error:
            raise refusal.traced(config, error) from error
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program; check that onnxscript is installed")
    limit = max_context(skeleton, options) if fixed else adapter_of(skeleton.model).context() or _FAR
    if condition := bounds.broken(program.exported_program, (_ROWS, *example.sizes, *axes), _longest(limit, fixed)):
        raise refusal.NotExportableError(
            config,
            f"its code asks for sizes, so that the graph holds while {condition}, and texts have up to {limit} tokens",
        )
    model = program.model
    for value in list(model.graph.initializers.values()):
        value.name = str(value.name).removeprefix("model.")
    return model


def _longest(limit: int, fixed: bool) -> list[dict[str, int]]:
    """Return sizes of texts of ``limit`` tokens: most of them at once, and a few of them behind the others.

    No size is smaller than that of the example. torch notes of it that it is not 1, though the graph holds there too.
    """
    pasts = [0] if fixed else [_PAST, max(_PAST, limit - _SEQUENCE)]
    texts = [(past, max(_SEQUENCE, limit - past)) for past in pasts]
    return [
        {"batch": _BATCH, "sequence": new, "past_sequence": past, "total_sequence": past + new} for past, new in texts
    ]


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


def _growing(skeleton: Skeleton, options: ExportOptions, parts: Sequence[Part]) -> _Example:
    values = {
        "attention_mask": torch.ones(_BATCH, _PAST + _SEQUENCE, dtype=torch.int64),
        "position_ids": torch.arange(_PAST, _PAST + _SEQUENCE).expand(_BATCH, -1).contiguous(),
    }
    sizes = ({0: "batch", 1: "total_sequence"}, _ROWS)
    return _Example(_CausalLM(skeleton.model, options, parts), values, sizes, {0: "batch", 2: "past_sequence"})


def _static(skeleton: Skeleton, options: ExportOptions, parts: Sequence[Part]) -> _Example:
    row = {0: "batch"}
    values = {"write_indices": torch.full((_BATCH,), _PAST), "lengths": torch.full((_BATCH,), _SEQUENCE)}
    return _Example(_StaticLM(skeleton.model, options, parts), values, (row, row), row)


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
