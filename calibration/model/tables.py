"""Quantizing the embedding and the output layer in 8 or 4 bits, tied or not.

8 bits are rounded to nearest. 4 bits are too few for that (calibration/README.md has numbers): they are fitted. What
enters the output layer says which errors matter there; the rows of an embedding are outputs themselves, so that all of
their errors do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.methods import METHODS, lcq
from rankbook.calibration.model.options import QuantizeOptions
from rankbook.calibration.model.packed_modules import (
    CodebookEmbedding,
    CodebookLinear,
    TiedCodebookLinear,
    replace_module,
)
from rankbook.calibration.model.patterns import matches
from rankbook.calibration.record.quantized_linear import GroupParams, QuantizedLinear
from rankbook.plugins import layout
from rankbook.plugins.layer_spec import LayerSpec

_FITTED_BITS = 4
_ROWS_AT_ONCE = 256 * layout.PANEL
"""Rows brought to float32 at once; whole panels, so that the result is that of one call."""


@dataclass(frozen=True)
class Tables:
    """The embedding and output layer of a model.

    Attributes:
        embedding: Name and module.
        head: Name and module, or None where the model has none of its own.
        tied: Whether both share one weight.
    """

    embedding: tuple[str, nn.Module]
    head: tuple[str, nn.Module] | None
    tied: bool


def find_tables(model: Any) -> Tables:
    """Return the embedding and the output layer of a causal language model."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = None if head is None else (names[id(head)], head)
    tied = head is not None and getattr(head, "weight", None) is embedding.weight
    return Tables((names[id(embedding)], embedding), found, tied)


def check_tables(tables: Tables, options: QuantizeOptions) -> None:
    """Check that the options fit the model's tables.

    Raises:
        ValueError: Two widths for one tied weight, or a kind of layer that cannot be packed.
    """
    wide = (options.quantize_embeddings, options.quantize_lm_head)
    if tables.tied and all(wide) and wide[0] != wide[1]:
        raise ValueError(
            f"embedding and output layer are one tied weight, so {wide[0]} and {wide[1]} bits cannot both be had;"
            " give the same number, or only one of the two"
        )
    for found, bits in ((tables.head, options.quantize_lm_head), (tables.embedding, options.quantize_embeddings)):
        if found is not None and bits and matches(found[0], options.skip):
            flag = "--quantize-lm-head" if found is tables.head else "--quantize-embeddings"
            raise ValueError(f"skip names {found[0]!r}, which {flag} {bits} asks to quantize; give one of the two")
    if _wants_embedding(tables, options):
        _embedding_scale(tables.embedding[1])
    if options.quantize_lm_head and (tables.head is None or type(tables.head[1]) is not nn.Linear):
        raise ValueError("the model has no plain output layer to quantize; leave out --quantize-lm-head")
    if _wants_embedding(tables, options) and tables.tied and getattr(tables.head[1], "bias", None) is not None:  # type: ignore[index]
        raise ValueError(
            "a tied output layer with a bias cannot be quantized; leave out the embedding and lm_head options"
        )


def wants_statistics(tables: Tables, options: QuantizeOptions) -> bool:
    """Return whether `quantize_embedding` or `quantize_head` can use what enters the output layer."""
    wide = (options.quantize_lm_head, options.quantize_embeddings if tables.tied else 0)
    return tables.head is not None and max(wide) == _FITTED_BITS


def quantize_embedding(
    model: Any, tables: Tables, options: QuantizeOptions, inputs: LayerStatistics | None = None
) -> dict[str, LayerSpec]:
    """Replace the embedding (and with it a tied output layer) by packed modules; return their specs by name.

    ``inputs`` are the statistics of what enters the output layer; they are used where both share one table.
    """
    if not _wants_embedding(tables, options):
        return {}
    name, module = tables.embedding
    bits = options.quantize_embeddings or options.quantize_lm_head
    weight: Tensor = module.weight  # type: ignore[assignment]
    record = quantize_table(name, weight, None, bits, options, _of_both(inputs) if tables.tied and inputs else None)
    spec = record.spec("embedding", scale=_embedding_scale(module))
    packed = CodebookEmbedding(spec, record.pack(), weight.dtype)
    replace_module(model, name, packed)
    if not tables.tied or tables.head is None:
        return {name: spec}
    replace_module(model, tables.head[0], TiedCodebookLinear(packed))
    return {name: spec, tables.head[0]: record.spec(shared_with=name)}


def quantize_head(
    model: Any, tables: Tables, options: QuantizeOptions, inputs: LayerStatistics | None = None
) -> dict[str, LayerSpec]:
    """Replace an untied output layer by a packed module; return its spec by name."""
    if not options.quantize_lm_head or tables.tied or tables.head is None:
        return {}
    name, module = tables.head
    weight: Tensor = module.weight  # type: ignore[assignment]
    record = quantize_table(name, weight, module.bias, options.quantize_lm_head, options, inputs)  # type: ignore[arg-type]
    replace_module(model, name, CodebookLinear.from_record(record, weight.dtype))
    return {name: record.spec()}


def quantize_table(
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
    method = METHODS["rtn" if bits != _FITTED_BITS else "lcq" if options.method == "lcq" else "gptq"]
    group = options.group(weight.shape[1])
    if options.group_size == "auto":  # not the preference of another format
        group = QuantizeOptions(method="rtn").group(weight.shape[1])
    config = method.config_type(bits=bits, group_size=group)
    statistics = LayerStatistics.empty(weight.shape[1]) if inputs is None else inputs

    def problem(rows: Tensor) -> LayerProblem:
        return LayerProblem(name, rows.detach().float(), None, statistics)

    pieces = torch.split(weight, _ROWS_AT_ONCE)
    if isinstance(config, lcq.LcqConfig):
        config = replace(config, rank=options.rank or config.rank)
        first = lcq.quantize(problem(weight[:: len(pieces)]), config)  # an even choice of rows finds the levels of all
        parts = [first] if len(pieces) == 1 else [lcq.quantize(problem(rows), config, first.levels) for rows in pieces]
    else:
        parts = [method.quantize(problem(rows), config) for rows in pieces]
    return _stack(parts, None if bias is None else bias.detach().float())


def _of_both(inputs: LayerStatistics) -> LayerStatistics:
    """Return statistics for a table that is embedding and output layer: all inputs count, and these as much again."""
    mean = inputs.gram.diagonal().mean()
    return replace(inputs, gram=inputs.gram + mean * torch.eye(len(inputs.gram)))


def _stack(parts: list[QuantizedLinear], bias: Tensor | None) -> QuantizedLinear:
    top = parts[0]
    if any(not torch.equal(part.levels, top.levels) for part in parts):
        raise ValueError(f"{top.method} gave different levels for different rows; tables need one fixed set of levels")
    columns = {
        field: [getattr(part.params, field) for part in parts if getattr(part.params, field) is not None]
        for field in ("codes", "step", "base", "values")
    }
    params = GroupParams(**{field: torch.cat(tensors) for field, tensors in columns.items() if tensors})
    codes = torch.cat([part.codes for part in parts])
    return QuantizedLinear(codes, top.bits, top.levels, params, top.has_offset, bias, None, top.method)


def _wants_embedding(tables: Tables, options: QuantizeOptions) -> bool:
    return bool(options.quantize_embeddings or (tables.tied and options.quantize_lm_head))


def _embedding_scale(module: nn.Module) -> float:
    """Return the factor on an embedding's rows.

    Raises:
        ValueError: A kind of embedding whose output is unknown.
    """
    if type(module) is nn.Embedding:
        return 1.0
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
    if scale is None or not isinstance(module, nn.Embedding):
        raise ValueError(
            f"embeddings of type {type(module).__name__} cannot be quantized; leave out --quantize-embeddings"
        )
    return float(scale)
