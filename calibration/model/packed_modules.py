"""Packed layers as torch modules: for evaluation, for `from_pretrained`, and as placeholders while a graph is traced.

The buffers are the packed tensors of `QuantizedLinear.pack`, under the same names, so a state dict is a checkpoint.
Each forward decodes the weight, with the error branch folded in, unless `materialize` keeps it; results are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankbook.calibration.record.layer_meta import LayerMeta
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.plugins import layout


class PackedModule(nn.Module):
    """A module whose buffers are the packed tensors of one layer.

    Attributes:
        meta: Shapes and types of the layer.
        compute_dtype: Dtype in which the layer works; follows ``model.to(dtype)``, the packed tensors do not.
    """

    def __init__(
        self, meta: LayerMeta, tensors: Mapping[str, Tensor] | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Build the module from packed tensors, or on the ``meta`` device without them.

        Raises:
            ValueError: The tensors do not fit ``meta``.
        """
        super().__init__()
        self.meta = meta
        self.compute_dtype = dtype
        self._dense: Tensor | None = None
        if tensors is not None:
            meta.check(tensors)
        for name, template in meta.template().items():
            self.register_buffer(name, template if tensors is None else tensors[name])

    def packed(self) -> dict[str, Tensor]:
        """Return the packed tensors by name."""
        return {name: self.get_buffer(name) for name in self.meta.template()}

    def record(self) -> QuantizedLinear:
        """Return the layer as the central record, on the CPU."""
        tensors = {name: tensor.cpu() for name, tensor in self.packed().items()}
        meta = self.meta
        return QuantizedLinear.unpack(tensors, meta.out_features, meta.in_features, meta.method)

    @property
    def weight(self) -> Tensor:
        """The decoded weight (N, K) in the compute dtype, error branch included."""
        if self._dense is not None:
            return self._dense
        return self.record().weight(with_low_rank=True).to(self.get_buffer("codes").device, self.compute_dtype)

    def materialize(self) -> None:
        """Keep the decoded weight, so that a forward costs as much as that of a dense layer."""
        self._dense = self.weight

    def dematerialize(self) -> None:
        """Drop the decoded weight."""
        self._dense = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        """Move the packed tensors but keep their dtypes: they are data, and a cast would change the weights."""
        dtypes = {name: tensor.dtype for name, tensor in self.packed().items() if name != "bias"}
        originals = self.packed()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, dtype in dtypes.items():
            if self.get_buffer(name).dtype != dtype:
                setattr(self, name, originals[name].to(self.get_buffer(name).device))
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        if self._dense is not None:
            self.dematerialize()
            self.materialize()
        return self

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        meta = self.meta
        return (
            f"in_features={meta.in_features}, out_features={meta.out_features}, method={meta.method}, bits={meta.bits},"
            f" group={meta.group}, planes={meta.planes}, rank={meta.rank}"
        )


class CodebookLinear(PackedModule):
    """A linear layer whose weight is decoded from codebooks: ``y = x @ W.T + bias``."""

    def __init__(
        self, meta: LayerMeta, tensors: Mapping[str, Tensor] | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """See `PackedModule`."""
        super().__init__(meta, tensors, dtype)
        self.in_features, self.out_features = meta.in_features, meta.out_features

    @classmethod
    def from_record(cls, record: QuantizedLinear, dtype: torch.dtype = torch.float32) -> CodebookLinear:
        """Return the record as a layer that computes in ``dtype``."""
        return cls(LayerMeta.of(record), record.pack(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., K) of any floating dtype; the result (..., N) has the same dtype."""
        bias = self.get_buffer("bias").to(x.dtype) if self.meta.bias else None
        return functional.linear(x, self.weight.to(x.dtype), bias)


class CodebookEmbedding(PackedModule):
    """An embedding whose rows are decoded from codebooks."""

    def __init__(
        self, meta: LayerMeta, tensors: Mapping[str, Tensor] | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """See `PackedModule`."""
        super().__init__(meta, tensors, dtype)
        self.num_embeddings, self.embedding_dim = meta.out_features, meta.in_features

    @classmethod
    def from_record(
        cls, record: QuantizedLinear, dtype: torch.dtype = torch.float32, scale: float = 1.0
    ) -> CodebookEmbedding:
        """Return the record as an embedding whose rows are multiplied by ``scale``."""
        return cls(LayerMeta.of(record, "embedding", scale=scale), record.pack(), dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows (..., K) of ids (...) in the compute dtype."""
        rows = self.rows(ids) if self._dense is None else functional.embedding(ids, self._dense)
        # The factor is rounded to the compute dtype first, as the layers of transformers that have one do.
        return rows if self.meta.scale == 1.0 else rows * torch.tensor(self.meta.scale).to(rows.device, rows.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Return unscaled rows (..., K) of ids (...), decoding only the panels of 32 rows that are asked for."""
        panels, position = torch.unique(ids.cpu() // layout.PANEL, return_inverse=True)
        total = layout.ceil_div(self.meta.out_features, layout.PANEL)
        tensors = {name: tensor.cpu() for name, tensor in self.packed().items()}
        for name in ("codes", "params", "step", "base"):
            if tensors[name].shape[0] == total:  # the parts of a panel; the rest are placeholders of one element
                tensors[name] = tensors[name][panels]
        if "down" in tensors:
            raise ValueError("an embedding with an error branch is not supported; quantize it without one")
        part = QuantizedLinear.unpack(tensors, len(panels) * layout.PANEL, self.meta.in_features)
        index = position * layout.PANEL + ids.cpu() % layout.PANEL
        return functional.embedding(index, part.weight()).to(ids.device, self.compute_dtype)


class TiedCodebookLinear(nn.Module):
    """An output layer that shares the record of an embedding: it holds no tensors of its own."""

    def __init__(self, source: CodebookEmbedding) -> None:
        """Share the record of ``source``."""
        super().__init__()
        self._source = (source,)  # in a tuple, so that the state dict holds the tensors once
        self.in_features, self.out_features = source.embedding_dim, source.num_embeddings

    @property
    def source(self) -> CodebookEmbedding:
        """The embedding that holds the tensors."""
        return self._source[0]

    @property
    def weight(self) -> Tensor:
        """The decoded weight (N, K)."""
        return self.source.weight

    def record(self) -> QuantizedLinear:
        """Return the shared record."""
        return self.source.record()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., K)."""
        return functional.linear(x, self.weight.to(x.dtype))


def materialize_all(model: nn.Module) -> None:
    """Keep the decoded weight of every packed layer: the speed of the dense model, and its memory."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.materialize()


def dematerialize_all(model: nn.Module) -> None:
    """Undo `materialize_all`."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.dematerialize()


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule ``name`` (dotted path)."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def packed_modules(model: nn.Module) -> dict[str, Any]:
    """Return the packed layers and the layers tied to one, by name."""
    kinds = (PackedModule, TiedCodebookLinear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
