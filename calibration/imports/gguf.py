"""Loading a GGUF file with its blocks as records; every record is compared with what llama.cpp's own reader decodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankbook.calibration.imports.base import ImportRefusedError, Numbers
from rankbook.calibration.imports.gguf_blocks import TYPES
from rankbook.calibration.imports.packing import pack
from rankbook.calibration.model.experts import ExpertMatrices
from rankbook.calibration.model.loading import load_model
from rankbook.calibration.model.packed_modules import packed_modules
from rankbook.calibration.model.plain import make_plain, restore
from rankbook.calibration.source import Source

_FLOATS = ("F64", "F32", "F16", "BF16")
_UP = "_up_exps."
"""What the names of tensors contain that lie below others in one tensor of the model, expert by expert."""


@dataclass
class _Matrix:
    """What a file holds of one matrix of the model.

    Attributes:
        kinds: Its type, or those of its parts (gate and up of experts).
        parts: What they are made of, in the order of their rows; empty where it is in float.
    """

    kinds: list[str] = field(default_factory=list)
    parts: list[Numbers] = field(default_factory=list)


def load_gguf(found: Source) -> tuple[Any, dict[str, int]]:
    """Return the model of a GGUF file with packed layers, and how many of its matrices have each type.

    Raises:
        ValueError: Nothing in it is quantized, or a matrix is of a type that is not known.
    """
    model, _ = load_model(found.path)
    names = _names(found, model)  # before experts are taken apart
    plain = make_plain(model)
    counts: Counter[str] = Counter()
    for name, matrix in _matrices(found, model, names).items():
        counts.update(matrix.kinds)
        if not matrix.parts:
            continue
        if len(matrix.parts) < len(matrix.kinds):
            raise ImportRefusedError(f"{found.path}: parts of {name} are in float, and others in {matrix.kinds[0]}")
        module = model.get_submodule(name)
        before = _weights(module)
        try:
            pack(model, name, _together(matrix.parts, module), _bias(module))
        except ValueError as error:
            raise ImportRefusedError(f"{found.path}: {name}: {error}") from error
        after = _weights(model.get_submodule(name))
        if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            raise ValueError(
                f"{found.path}: {name} in {matrix.kinds[0]} is not decoded as its file says; a fault of rankbook"
            )
    restore(model, plain, packed_modules(model))
    if not set(counts) - {*_FLOATS}:
        raise ValueError(f"{found.path} holds no quantized matrix; `rankbook quantize` is what quantizes it")
    return model, dict(counts)


def _names(found: Source, model: Any) -> dict[str, str]:
    """Return the names of tensors of the model by those in the file."""
    from transformers import modeling_gguf_pytorch_utils as names_of

    library: Any = names_of
    return dict(library.get_gguf_hf_weights_map(model, _processor(found, model)))


def _processor(found: Source, model: Any) -> Any:
    """Return what transformers changes in the tensors of a family."""
    from gguf import GGUFReader
    from transformers import modeling_gguf_pytorch_utils as names_of

    library: Any = names_of
    family = bytes(GGUFReader(found.path).fields["general.architecture"].parts[-1]).decode()
    return library.TENSOR_PROCESSORS.get(family, library.TensorProcessor)(config=model.config.to_dict())


def _matrices(found: Source, model: Any, names: dict[str, str]) -> dict[str, _Matrix]:
    """Return what the file holds of every matrix that a layer of the model, or the experts of a block, hold."""
    matrices: dict[str, _Matrix] = {}
    modules, processor = dict(model.named_modules()), _processor(found, model)
    for tensor in sorted(_tensors(found), key=lambda tensor: _UP in tensor.name):
        experts = len(tensor.shape) == 3
        name = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"), "")
        layer, leaf = (name, "weight") if experts else name.rpartition(".")[::2]
        if leaf != "weight" or len(tensor.shape) not in (2, 3):
            continue
        matrix, kind = matrices.setdefault(layer, _Matrix()), tensor.tensor_type.name
        matrix.kinds.append(kind)
        if kind in _FLOATS:
            continue
        module = modules.get(layer)
        if kind not in TYPES or not isinstance(module, ExpertMatrices if experts else (nn.Embedding, nn.Linear)):
            raise ImportRefusedError(
                f"{found.path}: {tensor.name} is a matrix of {type(module).__name__} in {kind}; what can be imported is"
                f" linear layers, experts and embeddings in {', '.join(TYPES)}"
            )
        matrix.parts.append(_numbers(tensor, None if experts else processor))
    return matrices


def _tensors(found: Source) -> Iterator[Any]:
    from gguf import GGUFReader

    yield from GGUFReader(found.path).tensors


def _numbers(tensor: Any, processor: Any) -> Numbers:
    """Return what a matrix is made of, with rows in the order of the model (heads of llama); those of all experts."""
    import numpy as np

    kind, columns = tensor.tensor_type.name, int(tensor.shape[0])
    data = np.asarray(tensor.data)
    numbers = TYPES[kind].numbers(data.reshape(-1, data.shape[-1]), columns, f"gguf-{kind.lower()}")
    if processor is None:
        return numbers
    order = processor.process(np.arange(len(numbers.codes))[:, None], tensor.name).weights[:, 0]
    return numbers.ordered(torch.from_numpy(np.ascontiguousarray(order)))


def _together(parts: list[Numbers], module: nn.Module) -> Numbers:
    """Return gate and up of all experts as the model has them: the rows of one expert behind those of the other."""
    joined = Numbers.joined(parts)
    if len(parts) == 1 or not isinstance(module, ExpertMatrices):
        return joined
    rows = torch.arange(len(joined.codes)).view(len(parts), len(module), -1)
    return joined.ordered(rows.transpose(0, 1).flatten())


def _layers(module: Any) -> list[Any]:
    return list(module) if isinstance(module, ExpertMatrices) else [module]


def _weights(module: Any) -> list[Tensor]:
    return [layer.weight for layer in _layers(module)]


def _bias(module: Any) -> Tensor | None:
    """Return the bias that a layer, or all experts of a matrix, have."""
    biases: list[Any] = [getattr(layer, "bias", None) for layer in _layers(module)]
    return None if biases[0] is None else torch.cat(biases)
