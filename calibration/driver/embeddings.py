"""Quantizing the embedding and the output layer in 8 or 4 bits, tied or not.

8 bits are rounded to nearest. 4 bits are too few for that (calibration/README.md has numbers): they are fitted. What
enters the output layer says which errors matter there; the rows of an embedding are outputs themselves, so that all of
their errors do.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from rankbook.calibration.device import moved
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.fitting.grids import Grid, round_nearest, round_with_feedback
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.methods import METHODS
from rankbook.calibration.model.adapter import Embeddings, ModelAdapter
from rankbook.calibration.model.packed_modules import (
    CodebookEmbedding,
    CodebookLinear,
    TiedCodebookLinear,
    replace_module,
)
from rankbook.calibration.model.patterns import matches
from rankbook.calibration.model.placement import CPU
from rankbook.calibration.record.quantized_linear import GroupParams, QuantizedLinear
from rankbook.plugins import layout
from rankbook.plugins.layer_spec import LayerSpec

_FITTED_BITS = 4
_ROWS_AT_ONCE = 256 * layout.PANEL
"""Rows brought to float32 at once; whole panels, so that the result is that of one call."""


def check_embeddings(adapter: ModelAdapter, found: Embeddings, options: QuantizeOptions) -> None:
    """Check that the options fit the model's embedding and output layer.

    Raises:
        ValueError: Two widths for one tied weight, or a kind of layer that cannot be packed.
    """
    wide = (options.quantize_embeddings, options.quantize_lm_head)
    if found.tied and all(wide) and wide[0] != wide[1]:
        raise ValueError(
            f"embedding and output layer are one tied weight, so {wide[0]} and {wide[1]} bits cannot both be had;"
            " give the same number, or only one of the two"
        )
    for one, bits in ((found.head, options.quantize_lm_head), (found.embedding, options.quantize_embeddings)):
        if one is not None and bits and matches(one[0], options.skip):
            flag = "--quantize-lm-head" if one is found.head else "--quantize-embeddings"
            raise ValueError(f"skip names {one[0]!r}, which {flag} {bits} asks to quantize; give one of the two")
    if _wants_embedding(found, options):
        adapter.embedding_scale(found.embedding[1])
    if options.quantize_lm_head and (found.head is None or type(found.head[1]) is not nn.Linear):
        raise ValueError("the model has no plain output layer to quantize; leave out --quantize-lm-head")
    if _wants_embedding(found, options) and found.tied and getattr(found.head[1], "bias", None) is not None:  # type: ignore[index]
        raise ValueError(
            "a tied output layer with a bias cannot be quantized; leave out the embedding and lm_head options"
        )


def wants_statistics(found: Embeddings, options: QuantizeOptions) -> bool:
    """Return whether `quantize_embedding` or `quantize_head` can use what enters the output layer."""
    wide = (options.quantize_lm_head, options.quantize_embeddings if found.tied else 0)
    return found.head is not None and max(wide) == _FITTED_BITS


def quantize_embedding(
    adapter: ModelAdapter, found: Embeddings, options: QuantizeOptions, inputs: LayerStatistics | None = None
) -> dict[str, LayerSpec]:
    """Replace the embedding (and with it a tied output layer) by packed modules; return their specs by name.

    ``inputs`` are the statistics of what enters the output layer; they are used where both share one weight.
    """
    if not _wants_embedding(found, options):
        return {}
    name, module = found.embedding
    bits = options.quantize_embeddings or options.quantize_lm_head
    weight: Tensor = module.weight  # type: ignore[assignment]
    record = quantize_rows(name, weight, None, bits, options, _of_both(inputs) if found.tied and inputs else None)
    spec = record.spec("embedding", scale=adapter.embedding_scale(module))
    packed = CodebookEmbedding(spec, record.pack(), weight.dtype)
    replace_module(adapter.model, name, packed)
    if not found.tied or found.head is None:
        return {name: spec}
    replace_module(adapter.model, found.head[0], TiedCodebookLinear(packed))
    return {name: spec, found.head[0]: record.spec(shared_with=name)}


def quantize_head(
    adapter: ModelAdapter, found: Embeddings, options: QuantizeOptions, inputs: LayerStatistics | None = None
) -> dict[str, LayerSpec]:
    """Replace an untied output layer by a packed module; return its spec by name."""
    if not options.quantize_lm_head or found.tied or found.head is None:
        return {}
    name, module = found.head
    weight: Tensor = module.weight  # type: ignore[assignment]
    record = quantize_rows(name, weight, module.bias, options.quantize_lm_head, options, inputs)  # type: ignore[arg-type]
    replace_module(adapter.model, name, CodebookLinear.from_record(record, weight.dtype))
    return {name: record.spec()}


def quantize_rows(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    bits: int,
    options: QuantizeOptions,
    inputs: LayerStatistics | None = None,
) -> QuantizedLinear:
    """Quantize a large matrix (N, K), some rows at a time; without ``inputs`` all inputs count the same.

    Raises:
        ValueError: The group size does not divide K, or the weight holds NaN or infinity.
    """
    method, group = METHODS[options.method], options.group(weight.shape[1])
    if options.group_size == "auto":  # not the preference of another format
        group = QuantizeOptions(method="rtn").group(weight.shape[1])
    device = options.placement().device
    statistics = LayerStatistics.empty(weight.shape[1], device) if inputs is None else moved(inputs, device)

    def problem(rows: Tensor) -> LayerProblem:
        return LayerProblem(name, rows.detach().to(device, torch.float32), None, statistics)

    pieces, config = torch.split(weight, _ROWS_AT_ONCE), options.method_config()
    grid = Grid(bits, group, param_bits=getattr(config, "param_bits", 8))
    if bits == _FITTED_BITS and method.rows is not None:
        config = replace(config, bits=bits, group_size=group)
        if len(pieces) == 1:
            parts = [method.quantize(problem(weight), config)]
        else:  # an even choice of rows finds what all share
            quantize = method.rows(problem(weight[:: len(pieces)]), config)
            parts = [quantize(problem(rows)) for rows in pieces]
    elif bits == _FITTED_BITS:
        parts = [round_with_feedback(problem(rows), grid, "gptq") for rows in pieces]
    else:
        parts = [round_nearest(problem(rows), grid, "rtn") for rows in pieces]
    return _stack([moved(part, CPU) for part in parts], None if bias is None else bias.detach().float())


def _of_both(inputs: LayerStatistics) -> LayerStatistics:
    """Return statistics for a weight of embedding and output layer: all inputs count, and these as much again."""
    mean = inputs.gram.diagonal().mean()
    return replace(inputs, gram=inputs.gram + mean * torch.eye(len(inputs.gram), device=inputs.gram.device))


def _stack(parts: list[QuantizedLinear], bias: Tensor | None) -> QuantizedLinear:
    top = parts[0]
    if any(not torch.equal(part.levels, top.levels) for part in parts):
        raise ValueError(f"{top.method} gave different levels for different rows; they need one fixed set of levels")
    codes, params = torch.cat([part.codes for part in parts]), GroupParams.joined([part.params for part in parts], 0)
    return replace(top, codes=codes, params=params, bias=bias, low_rank=None)


def _wants_embedding(found: Embeddings, options: QuantizeOptions) -> bool:
    return bool(options.quantize_embeddings or (found.tied and options.quantize_lm_head))
