"""Putting the numbers of layers into a model as packed layers: linear layers, embeddings, all experts of a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rankbook.calibration.imports.base import ImportRefusedError, Numbers
from rankbook.calibration.imports.places import Place
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.experts import ExpertMatrices
from rankbook.calibration.model.packed_modules import (
    CodebookEmbedding,
    CodebookLinear,
    TiedCodebookLinear,
    replace_module,
)


def check_parts(model: Any, target: str, places: Sequence[Place]) -> None:
    """Check that the layers of a folder that belong in one of the model are all there, and that the model has it.

    Raises:
        ImportRefusedError: They are not.
    """
    first, module = places[0], _module(model, target)
    if isinstance(module, ExpertMatrices):
        experts = [None] if first.expert is None else list(range(len(module)))
    else:
        experts = [None]
    want = {(expert, part) for expert in experts for part in range(first.parts)}
    have = {(place.expert, place.part) for place in places}
    if lacking := sorted(want - have, key=str):
        raise ImportRefusedError(
            f"{target} lacks {len(lacking)} of {len(want)} matrices that lie in it (the first is {_said(lacking[0])});"
            " they are missing, or in float, and experts are quantized all or none"
        )
    if excess := sorted(have - want, key=str):
        raise ImportRefusedError(f"{target} has no place for {_said(excess[0])}; config.json belongs to another model")


def pack(model: Any, target: str, numbers: Numbers, bias: Tensor | None) -> None:
    """Put packed layers in the place of a linear layer, an embedding, or the matrices of all experts.

    Args:
        model: Its fused experts are linear layers already (`rankbook.calibration.model.plain.make_plain`).
        target: Name of the layer, or of the matrix of experts, whose rows then lie below each other in ``numbers``.
        numbers: What the layer is made of.
        bias: Of all rows, or None.

    Raises:
        ImportRefusedError: Another shape or bias than the model's, or what a record cannot hold.
    """
    module = _module(model, target)
    if isinstance(module, nn.Embedding):
        _pack_embedding(model, target, module, numbers)
        return
    layers = {f"{target}.{index}": one for index, one in enumerate(module)} if _is_stack(module) else {target: module}
    if not all(isinstance(layer, nn.Linear) for layer in layers.values()):
        raise ImportRefusedError(f"the model has a {type(module).__name__} there, not a linear layer")
    first = next(iter(layers.values()))
    _check_shape(numbers, len(layers) * first.out_features, first.in_features)
    bias = _bias(first.bias is not None, bias)
    records = numbers.records(len(layers))
    for index, (name, record) in enumerate(zip(layers, records, strict=True)):
        own = None if bias is None else bias.view(len(layers), -1)[index].clone()
        replace_module(model, name, CodebookLinear.from_record(replace(record, bias=own), model.dtype))


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, ExpertMatrices)


def _module(model: Any, target: str) -> Any:
    try:
        return model.get_submodule(target)
    except AttributeError as error:
        raise ImportRefusedError(
            f"{type(model).__name__} has no layer {target}; config.json belongs to another model"
        ) from error


def _pack_embedding(model: Any, target: str, module: nn.Embedding, numbers: Numbers) -> None:
    _check_shape(numbers, module.num_embeddings, module.embedding_dim)
    adapter = adapter_of(model)
    tied = adapter.embeddings()
    packed = CodebookEmbedding.from_record(numbers.record(), model.dtype, adapter.embedding_scale(module))
    replace_module(model, target, packed)
    if tied.tied and tied.head is not None:
        replace_module(model, tied.head[0], TiedCodebookLinear(packed))


def _check_shape(numbers: Numbers, rows: int, columns: int) -> None:
    found = tuple(numbers.codes.shape)
    if found != (rows, columns):
        raise ImportRefusedError(f"it has {found[0]} x {found[1]} weights, and config.json asks for {rows} x {columns}")


def _bias(wanted: bool, bias: Tensor | None) -> Tensor | None:
    """Return the bias that a layer gets: AutoGPTQ stores zeros where a model has none."""
    if bias is not None and not wanted and bool(bias.any()):
        raise ImportRefusedError("it has a bias, and the model of config.json has none there")
    if bias is None and wanted:
        raise ImportRefusedError("its bias is missing")
    return bias if wanted else None


def _said(key: tuple[int | None, int]) -> str:
    return f"part {key[1]}" if key[0] is None else f"expert {key[0]}, part {key[1]}"
