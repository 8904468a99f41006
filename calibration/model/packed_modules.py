"""Packed layers as torch modules: for evaluation, for `from_pretrained`, and as placeholders while a graph is traced.

The buffers are the packed tensors of `QuantizedLinear.pack`, under the same names, so a state dict is a checkpoint.
On the CPU each forward decodes the weight, with the error branch folded in, unless `materialize` keeps it; results are
the same. On a GPU the kernels compute from the packed tensors (`rankbook.calibration.model.packed_ops`); where there
are none for a layer, it decodes its weight once and says so.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankbook.calibration.model import packed_ops
from rankbook.calibration.notes import note
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.plugins import layout
from rankbook.plugins.layer_spec import LayerSpec


class PackedModule(nn.Module):
    """A module whose buffers are the packed tensors of one layer.

    Attributes:
        spec: Shapes and types of the layer.
        compute_dtype: Dtype in which the layer works; follows ``model.to(dtype)``, the packed tensors do not.
    """

    def __init__(
        self, spec: LayerSpec, tensors: Mapping[str, Tensor] | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Build the module from packed tensors, or on the ``meta`` device without them.

        Raises:
            ValueError: The tensors do not fit ``spec``.
        """
        super().__init__()
        self.spec = spec
        self.compute_dtype = dtype
        self._dense: Tensor | None = None
        self._constants: dict[str, Tensor] = {}
        if tensors is not None:
            spec.check(tensors)
        for name, part in spec.tensors().items():
            empty = torch.empty(part.shape, dtype=getattr(torch, part.dtype), device="meta")
            self.register_buffer(name, empty if tensors is None else tensors[name])

    def packed(self) -> dict[str, Tensor]:
        """Return the packed tensors by name."""
        found = {name: self.get_buffer(name) for name in self.spec.tensors()}
        if self._constants:
            found["codes"] = found["codes"] ^ packed_ops.CARRIER
        return found

    def record(self) -> QuantizedLinear:
        """Return the layer as the central record, on the CPU."""
        return QuantizedLinear.unpack({name: tensor.cpu() for name, tensor in self.packed().items()}, self.spec)

    @property
    def weight(self) -> Tensor:
        """The decoded weight (N, K) in the compute dtype, error branch included."""
        if self._dense is not None:
            return self._dense
        record = QuantizedLinear.unpack(self.packed(), self.spec)
        return record.weight(with_low_rank=True).to(self.compute_dtype)

    def on(self, device: torch.device) -> PackedModule:
        """Return the layer with its tensors on a device; itself where they are there, without copies."""
        if self.get_buffer("codes").device == device:
            return self
        twin = copy.copy(self)
        twin._buffers, twin._dense = dict(self._buffers), None
        return twin.to(device)

    def materialize(self) -> None:
        """Keep the decoded weight, so that a forward costs as much as that of a dense layer."""
        self._dense = self.weight

    def dematerialize(self) -> None:
        """Drop the decoded weight."""
        self._dense = None

    def served(self, x: Tensor | None = None) -> bool:
        """Return whether kernels compute the layer where it is (applied to x); get it ready for them."""
        device = self.get_buffer("codes").device
        if self._dense is not None:
            return False
        if x is not None and (x.dtype not in packed_ops.TYPES or (torch.is_grad_enabled() and x.requires_grad)):
            return False
        if not self._constants and packed_ops.serves(self.spec, device.type):
            constants = packed_ops.constants(self.spec, self.packed())
            self.codes = constants["codes"].view(torch.uint8)  # in memory once: `packed` and state dicts turn them back
            self._constants = constants
        return bool(self._constants)

    def share(self, stack: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """Take the constants of the kernels from a stack of those of several layers, so that memory holds them once.

        Returns:
            The constants, this layer's own dict: another one once the stack is not what the layer computes with.
        """
        self._constants = {name: tensor[number] for name, tensor in stack.items()}
        self.codes = self._constants["codes"].view(torch.uint8)
        return self._constants

    def _weight_for(self, x: Tensor) -> Tensor:
        """Return the decoded weight for x, kept from now on where decoding it again would be a detour to the host."""
        device = self.get_buffer("codes").device
        if self._dense is None and device.type == "cuda" and not torch.is_grad_enabled():
            _say_decoded(packed_ops.unavailable(device.type) or "they have more planes than the kernels take")
            self.materialize()
        return self.weight.to(x.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._constants:
            destination[f"{prefix}codes"] = destination[f"{prefix}codes"] ^ packed_ops.CARRIER

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget_constants()
        super()._load_from_state_dict(*args, **kwargs)

    def forget_constants(self) -> None:
        """Hold the packed tensors again as they are stored; `served` gets them ready anew."""
        if self._constants:
            self.codes, self._constants = self.get_buffer("codes") ^ packed_ops.CARRIER, {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        """Move the packed tensors but keep their dtypes: they are data, and a cast would change the weights."""
        self.forget_constants()
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
        spec = self.spec
        return (
            f"in_features={spec.in_features}, out_features={spec.out_features}, method={spec.method}, bits={spec.bits},"
            f" group={spec.group}, planes={spec.planes}, branch_rank={spec.branch_rank}"
        )


class CodebookLinear(PackedModule):
    """A linear layer whose weight is decoded from codebooks: ``y = x @ W.T + bias``."""

    def __init__(
        self, spec: LayerSpec, tensors: Mapping[str, Tensor] | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """See `PackedModule`."""
        super().__init__(spec, tensors, dtype)
        self.in_features, self.out_features = spec.in_features, spec.out_features

    @classmethod
    def from_record(cls, record: QuantizedLinear, dtype: torch.dtype = torch.float32) -> CodebookLinear:
        """Return the record as a layer that computes in ``dtype``."""
        return cls(record.spec(), record.pack(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., K) of any floating dtype; the result (..., N) has the same dtype."""
        if self.served(x):
            return packed_ops.product(x, self._constants, self.spec)
        bias = self.get_buffer("bias").to(x.dtype) if self.spec.bias else None
        return functional.linear(x, self._weight_for(x), bias)


class CodebookEmbedding(PackedModule):
    """An embedding whose rows are decoded from codebooks."""

    def __init__(
        self, spec: LayerSpec, tensors: Mapping[str, Tensor] | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """See `PackedModule`."""
        super().__init__(spec, tensors, dtype)
        self.num_embeddings, self.embedding_dim = spec.out_features, spec.in_features

    @classmethod
    def from_record(
        cls, record: QuantizedLinear, dtype: torch.dtype = torch.float32, scale: float = 1.0
    ) -> CodebookEmbedding:
        """Return the record as an embedding whose rows are multiplied by ``scale``."""
        return cls(record.spec("embedding", scale=scale), record.pack(), dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows (..., K) of ids (...) in the compute dtype."""
        if self.served():
            rows = packed_ops.rows(ids, self._constants, self.spec).to(self.compute_dtype)
        else:
            rows = self.rows(ids) if self._dense is None else functional.embedding(ids, self._dense)
        # The factor is rounded to the compute dtype first, as the layers of transformers that have one do.
        return rows if self.spec.scale == 1.0 else rows * torch.tensor(self.spec.scale).to(rows.device, rows.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Return unscaled rows (..., K) of ids (...), decoding only the panels of 32 rows that are asked for."""
        panels, position = torch.unique(ids // layout.PANEL, return_inverse=True)
        if self.spec.branch_rank:
            raise ValueError("an embedding with an error branch is not supported; quantize it without one")
        tensors = self.packed()
        for name, held in self.spec.tensors().items():
            if name in ("codes", "params", "step", "base") and held.value is None:
                tensors[name] = tensors[name][panels]
        part = QuantizedLinear.unpack(tensors, replace(self.spec, out_features=len(panels) * layout.PANEL))
        index = position * layout.PANEL + ids % layout.PANEL
        return functional.embedding(index, part.weight()).to(self.compute_dtype)


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
        if self.source.served(x):
            return packed_ops.product(x, self.source._constants, self.source.spec)
        return functional.linear(x, self.source._weight_for(x))


def materialize_all(model: nn.Module) -> None:
    """Keep the decoded weight of every packed layer that no kernels compute: a dense model's speed, and its memory."""
    for module in model.modules():
        if isinstance(module, PackedModule) and not module.served():
            module.materialize()


@functools.cache
def _say_decoded(reason: str) -> None:
    note(f"packed layers are decoded to dense weights, once: {reason}")


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule ``name`` (dotted path)."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def packed_modules(model: nn.Module) -> dict[str, Any]:
    """Return the packed layers and the layers tied to one, by name."""
    kinds = (PackedModule, TiedCodebookLinear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
