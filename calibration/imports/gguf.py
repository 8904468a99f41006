"""Loading a GGUF file with its blocks as records; every record is compared with what llama.cpp's own reader decodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rankbook.calibration.imports.base import ImportRefusedError
from rankbook.calibration.imports.gguf_blocks import TYPES
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.loading import load_model
from rankbook.calibration.model.packed_modules import (
    CodebookEmbedding,
    CodebookLinear,
    TiedCodebookLinear,
    replace_module,
)
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.calibration.source import Source

_FLOATS = ("F64", "F32", "F16", "BF16")


def load_gguf(found: Source) -> tuple[Any, dict[str, int]]:
    """Return the model of a GGUF file with packed layers, and how many of its matrices have each type.

    Raises:
        ValueError: Nothing in it is quantized, or a matrix is of a type that is not known.
    """
    model, _ = load_model(found.path)
    counts: dict[str, int] = {}
    tied = adapter_of(model).embeddings()
    for name, kind, record in _records(found, model):
        counts[kind] = counts.get(kind, 0) + 1
        if record is None:
            continue
        module = model.get_submodule(name)
        if not torch.equal(record.weight(), module.weight):
            raise ValueError(
                f"{found.path}: {name} in {kind} is not decoded as its file says; this is a fault of rankbook"
            )
        if isinstance(module, nn.Embedding):
            packed = CodebookEmbedding.from_record(record, model.dtype, adapter_of(model).embedding_scale(module))
            replace_module(model, name, packed)
            if tied.tied and tied.head is not None:
                replace_module(model, tied.head[0], TiedCodebookLinear(packed))
        else:
            replace_module(model, name, CodebookLinear.from_record(record, model.dtype))
    if not set(counts) - {*_FLOATS}:
        raise ValueError(f"{found.path} holds no quantized matrix; `rankbook quantize` is what quantizes it")
    return model, counts


def _records(found: Source, model: Any) -> Iterator[tuple[str, str, QuantizedLinear | None]]:
    """Yield name, type and record (None where it is in float) of every matrix that a layer of the model holds."""
    import numpy as np
    from gguf import GGUFReader
    from transformers import modeling_gguf_pytorch_utils as names_of

    reader = GGUFReader(found.path)
    family = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    library: Any = names_of
    processor = library.TENSOR_PROCESSORS.get(family, library.TensorProcessor)(config=model.config.to_dict())
    names = library.get_gguf_hf_weights_map(model, processor)
    modules = dict(model.named_modules())
    for tensor in reader.tensors:
        name, leaf = names.get(tensor.name, "").rpartition(".")[::2]
        kind, module = tensor.tensor_type.name, modules.get(name)
        if len(tensor.shape) > 2 and kind not in _FLOATS:
            raise ImportRefusedError(f"{found.path}: {tensor.name}: experts of GGUF files cannot be imported yet")
        if leaf != "weight" or len(tensor.shape) != 2:
            continue
        if kind in _FLOATS:
            yield name, kind, None
            continue
        if kind not in TYPES or not (isinstance(module, nn.Embedding) or type(module) is nn.Linear):
            raise ImportRefusedError(
                f"{found.path}: {tensor.name} is a matrix of {type(module).__name__} in {kind}; what can be imported is"
                f" linear layers and embeddings in {', '.join(TYPES)}"
            )
        columns, rows = (int(size) for size in tensor.shape)
        record = TYPES[kind].record(np.asarray(tensor.data).reshape(rows, -1), columns, f"gguf-{kind.lower()}")
        order = processor.process(np.arange(rows)[:, None], tensor.name).weights[:, 0]  # of rows: heads of llama
        yield name, kind, _reordered(record, torch.from_numpy(np.ascontiguousarray(order)))


def _reordered(record: QuantizedLinear, rows: torch.Tensor) -> QuantizedLinear:
    values = record.params.values
    if values is None:
        raise ValueError("parameters in 8 bits cannot change rows")
    return replace(record, codes=record.codes[rows], params=replace(record.params, values=values[rows]))
