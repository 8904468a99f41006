"""The model as it is traced: real small parameters, and placeholders in place of every large weight.

A placeholder is one symbolic ONNX node named after its layer; `rankbook.exporter.passes.weights` gives it its weights.
So no large tensor exists while the graph is traced, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankbook.calibration.checkpoint.format import Checkpoint, CheckpointError
from rankbook.calibration.model import experts
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.custom_code import is_trusted
from rankbook.calibration.model.packed_modules import replace_module
from rankbook.calibration.model.source_config import read_config
from rankbook.calibration.record import halves
from rankbook.exporter import attention, indexer, refusal
from rankbook.exporter.rewrite import TRACE_DOMAIN
from rankbook.plugins.layer_spec import LayerSpec

PACKED = "Packed"
"""Placeholder of a packed layer; the dialect chooses its operator."""
EXPERTS = "Experts"
"""Placeholder of the packed layers of all experts of a matrix."""
DENSE = "Dense"
"""Placeholder of a linear layer that is not quantized."""
LAYER = "layer"
"""Attribute of a placeholder: the name of its layer."""
SMALL_BYTES = 1 << 20
"""Parameters up to this size are real while the graph is traced; larger ones are a single zero, expanded."""

_LARGE = 1 << 28
"""Elements of a tensor for which no memory is taken even for a moment; what a model computes with when it is made, such
as rotary frequencies, is smaller.
"""


@dataclass(frozen=True)
class Skeleton:
    """A model ready to be traced.

    Attributes:
        model: The transformers model.
        dtype: Dtype of the activations.
        owners: Name of the stored tensor for each parameter of a layer that is not quantized, tied ones included.
    """

    model: Any
    dtype: torch.dtype
    owners: dict[str, str]


class _Weight:
    """The weight of a placeholder, for code that multiplies with it in place of a call of the layer (Mamba)."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        self._layer, self.dtype = layer, dtype

    def __matmul__(self, x: Tensor) -> Tensor:
        """Return the layer's result, its bias included (..., N, sequence), for x (..., K, sequence)."""
        result: Tensor = self._layer(x.transpose(-1, -2)).transpose(-1, -2)
        return result


class _Placeholder(nn.Module):
    """A linear layer as one node; the node has the bias, and nobody else adds one."""

    bias = None

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.dtype = name, dtype

    @property
    def weight(self) -> _Weight:
        """See `_Weight`."""
        return _Weight(self, self.dtype)


class PackedPlaceholder(_Placeholder):
    """A packed linear layer as one node with one input."""

    def __init__(self, name: str, spec: LayerSpec, dtype: torch.dtype) -> None:
        super().__init__(name, dtype)
        self.spec = spec

    def forward(self, x: Tensor) -> Tensor:
        """Return a symbolic result (..., N) in the dtype of x (..., K)."""
        return _node(PACKED, [x], self.name, x.dtype, [*x.shape[:-1], self.spec.out_features])


class ExpertsPlaceholder(PackedPlaceholder):
    """The packed layers of all experts of a matrix as one node with two inputs."""

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:  # type: ignore[override]
        """Return a symbolic result (S, N) in the dtype of x (S, K); ``numbers`` (S,) are the experts of the rows."""
        return _node(EXPERTS, [x, numbers], self.name, x.dtype, [x.shape[0], self.spec.out_features])


class EmbeddingPlaceholder(PackedPlaceholder):
    """A packed embedding as one node."""

    def forward(self, x: Tensor) -> Tensor:
        """Return symbolic rows (..., K) for indices (...)."""
        rows = _node(PACKED, [x], self.name, torch.float32, [*x.shape, self.spec.in_features]).to(self.dtype)
        # Rounded to the dtype first, as in CodebookEmbedding.
        return rows if self.spec.scale == 1.0 else rows * torch.tensor(self.spec.scale).to(self.dtype)


class DensePlaceholder(_Placeholder):
    """A linear layer that is not quantized, as one node: the exporter would fold its transposed weight into a copy."""

    def __init__(self, name: str, source: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(name, dtype)
        self.in_features, self.out_features = source.in_features, source.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return a symbolic result (..., N) in the dtype of x (..., K)."""
        return _node(DENSE, [x], self.name, x.dtype, [*x.shape[:-1], self.out_features])


def build(checkpoint: Checkpoint, dtype: torch.dtype, config: Any = None) -> Skeleton:
    """Build the skeleton of a checkpoint.

    Args:
        checkpoint: Where small parameters come from.
        dtype: Of the activations.
        config: Configuration of the model; that in the checkpoint's folder without.

    Raises:
        CheckpointError: transformers does not know the model, or a parameter is missing.
        NotExportableError: A model that is not served.
    """
    if config is None:
        try:
            config = read_config(str(checkpoint.folder))
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.folder}/config.json cannot be used: {error}") from error
    model = empty_model(config, dtype, checkpoint.files)
    owners = _owners(model, checkpoint)
    _place(model, checkpoint, dtype)
    _load(model, checkpoint, dtype, owners)
    return Skeleton(model.eval().requires_grad_(False), dtype, owners)


def _own_class(config: Any) -> Any:
    """Return the class in the model's own code, or None where it has none or is not trusted."""
    name = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if name is None or not is_trusted():
        return None
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(name, config.name_or_path)


def empty_model(config: Any, dtype: torch.dtype = torch.float32, stored: Collection[str] | None = None) -> Any:
    """Return a language model with its parameters on the meta device and its attention ready to be traced.

    Args:
        config: Configuration of the model, or of the model with towers around it.
        dtype: Of the activations.
        stored: Names of the tensors that a checkpoint holds: whether the output layer is tied follows from them, since
            flags of a wrapper and of its language model may differ. Without, the configuration says so.

    Raises:
        NotExportableError: A model that is not served.
    """
    from transformers.models.auto import modeling_auto as auto

    attention.register()
    text = config.get_text_config()
    if hasattr(text, "quantization_config"):
        del text.quantization_config
    inner = type(text) in auto.MODEL_FOR_CAUSAL_LM_MAPPING
    table = auto.MODEL_FOR_CAUSAL_LM_MAPPING if inner else auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    config = text if inner else config
    kind: Any = table[type(config)] if type(config) in table else _own_class(config)
    if kind is None:
        raise refusal.NotExportableError(text, "transformers has no class for it alone")
    if stored is not None:
        heads = {name.rpartition(".")[0] for name in kind._tied_weights_keys or {}}
        weights = (name for name in stored if not name.endswith(".bias"))  # which is no part of what is tied
        config.tie_word_embeddings = not any(name.rpartition(".")[0] in heads for name in weights)
    through_interface = kind._can_set_attn_implementation()
    chosen = {"attn_implementation": attention.IMPLEMENTATION if through_interface else "eager"}
    if kind._can_set_experts_implementation():  # of experts in float; packed ones have a node
        chosen["experts_implementation"] = "batched_mm"
    try:
        with _parameters_on_meta():
            model = kind._from_config(config, dtype=dtype, **chosen)
    except refusal.TRACE_ERRORS as error:
        raise refusal.traced(text, error) from error
    if not through_interface:
        own = attention.replace_own(model)
        model.config._attn_implementation = attention.IMPLEMENTATION if own else attention.ADDITIVE
    adapter = adapter_of(model)
    adapter.keep_frequencies()
    adapter.unify_experts()
    adapter.make_traceable()
    attention.without_complex_axes(model)
    indexer.make_traceable(model)
    model.tie_weights()
    return model if inner or config is text else _Language(model)  # one without a table of its own has no towers


class _Language(nn.Module):
    """The language model within a model with towers, under the names that it would have alone."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        adapter = adapter_of(whole)
        self.config, self.lm_head = adapter.config, whole.get_output_embeddings()
        self.model: Any = adapter.language_module()

    def get_input_embeddings(self) -> Any:
        """Return the token embedding."""
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """Return the output layer."""
        return self.lm_head

    def forward(self, **inputs: Any) -> Any:
        """Return the logits and the cache."""
        output = self.model(**inputs)
        output["logits"] = self.lm_head(output.last_hidden_state)
        return output


def _node(op: str, inputs: list[Tensor], layer: str, dtype: torch.dtype, shape: list[Any]) -> Tensor:
    name = f"{TRACE_DOMAIN}::{op}"
    result: Tensor = torch.onnx.ops.symbolic(name, inputs, {LAYER: layer}, dtype=dtype, shape=shape, version=1)
    return result


def _place(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Replace linear layers, packed experts and packed embeddings by placeholders."""
    _place_experts(model, checkpoint, dtype)
    for name, module in list(model.named_modules()):
        spec = checkpoint.layers.get(name)
        if spec is not None and isinstance(module, nn.Embedding):
            if spec.branch_rank:
                raise CheckpointError(f"{name} is an embedding with an error branch, for which there is no operator")
            replace_module(model, name, EmbeddingPlaceholder(name, spec, dtype))
        elif spec is not None:  # also where tied to an embedding
            replace_module(model, name, PackedPlaceholder(name, spec, dtype))
        elif type(module) is nn.Linear:
            replace_module(model, name, DensePlaceholder(name, module, dtype))


def _place_experts(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Replace the fused matrices of experts by placeholders, where they are packed.

    Raises:
        CheckpointError: Some of the experts of a block are packed and others are not.
    """
    packed = experts.stacks(checkpoint.layers)
    for owner in {matrix.rpartition(".")[0] for matrix in packed}:
        module: Any = model.get_submodule(owner)
        matrices = experts.fused(module)
        experts.split(module)
        counts = {len(getattr(module, name)) for name in matrices}
        for matrix in matrices:
            layers = packed.get(f"{owner}.{matrix}", [])
            if {len(layers)} != counts:
                raise CheckpointError(
                    f"{len(layers)} experts of {owner}.{matrix} are packed of {max(counts)}; quantize all experts of a"
                    " block, or skip all"
                )
            placeholder = ExpertsPlaceholder(f"{owner}.{matrix}", checkpoint.layers[layers[0]], dtype)
            delattr(module, matrix)
            setattr(module, matrix, placeholder)


def _owners(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the stored name of every parameter; tied parameters are stored under one of their names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    owners: dict[str, str] = {}
    for group in names.values():
        stored = next((name for name in group if name in checkpoint.files), None)
        owners |= {name: stored for name in group if stored is not None}
    return owners


def _load(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, owners: dict[str, str]) -> None:
    """Give every parameter that is left its values, or an expanded zero if it is large."""
    for name, parameter in list(model.named_parameters()):
        stored = owners.get(name)
        if stored is None:
            raise CheckpointError(
                f"{checkpoint.folder} holds no tensor {name!r}, which the model needs; write the checkpoint again"
            )
        if parameter.numel() * dtype.itemsize <= SMALL_BYTES:
            values = halves.narrowed(stored, checkpoint.tensor(stored), dtype).clone()
        else:
            values = torch.zeros((), dtype=dtype).expand(parameter.shape)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(values, requires_grad=False))
    for name, buffer in list(model.named_buffers()):
        if name in checkpoint.files:
            buffer.copy_(checkpoint.tensor(name))


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Create modules whose parameters take no memory and whose buffers (rotary frequencies) are real."""
    register, empty = nn.Module.register_parameter, torch.empty

    def none(*size: Any, **how: Any) -> Tensor:
        """Return no memory for what is larger than any buffer: all experts of a block, which may be 25 GB."""
        found = empty(*size, **{**how, "device": "meta"})
        return found if found.numel() > _LARGE or how.get("device") == "meta" else empty(*size, **how)

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    torch.empty = none
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        torch.empty = empty
