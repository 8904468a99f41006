"""What a model keeps between two calls: the parts of its cache, found by running it, and the cache that is traced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankbook.calibration.model.adapter import ModelAdapter, adapter_of
from rankbook.exporter import cache_names, refusal

if TYPE_CHECKING:
    from rankbook.exporter.skeleton import Skeleton

BATCH, SEQUENCE = 2, 3
"""Sizes of the tokens that a model is called with to find out what it does."""


@dataclass(frozen=True)
class Part:
    """A tensor that one layer keeps.

    Attributes:
        layer: Number of the layer.
        name: ``key``, ``value``, ``index``, ``conv`` or ``state``.
        shape: Its shape for one text; the axis of positions, where it has one, has size 0.
        dtype: Its type.
    """

    layer: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def grows(self) -> bool:
        """Whether it has an axis of positions, axis 2 of (batch, heads, positions, size)."""
        return self.name in cache_names.GROWING

    def example(self, batch: int, positions: int) -> Tensor:
        """Return a tensor of its size. Nobody reads the elements, and what nobody writes takes no memory."""
        shape = (self.shape[0], positions, self.shape[2]) if self.grows else self.shape
        return torch.empty(batch, *shape, dtype=self.dtype)


def parts_of(skeleton: Skeleton) -> list[Part]:
    """Return what a model keeps, layer after layer.

    Layers may keep nothing (those without attention, and those that read the keys of another layer).

    Raises:
        NotExportableError: The model cannot be run, or keeps something else.
    """
    config = skeleton.model.config
    try:
        cache = called(skeleton, input_ids=torch.zeros(BATCH, SEQUENCE, dtype=torch.int64))
        return [part for layer, kept in enumerate(cache.layers) for part in _parts(config, layer, kept)]
    except refusal.NotExportableError:
        raise
    except refusal.TRACE_ERRORS as error:
        raise refusal.traced(config, error) from error


def called(skeleton: Skeleton, **tokens: Tensor) -> Any:
    """Call a model with tokens, without computing anything; return its cache."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    adapter = adapter_of(skeleton.model)
    cache = adapter.new_cache()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        skeleton.model(
            **tokens,
            attention_mask=torch.ones(BATCH, SEQUENCE, dtype=torch.int64),
            position_ids=torch.arange(SEQUENCE).expand(BATCH, -1),
            use_cache=True,
            **{adapter.cache_argument: cache},
        )
    return cache


_KNOWN = (
    *("DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer"),
    *("LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer"),
    "DummyLayer",
)
"""What transformers keeps of a layer, by the name of its class; older versions lack some."""


def _of(known: Any, name: str) -> tuple[type, ...]:
    """Return a class of transformers, or nothing where an older version has none."""
    return (getattr(known, name),) if hasattr(known, name) else ()


def _parts(config: Any, layer: int, kept: Any) -> Iterator[Part]:
    from transformers import cache_utils as known

    if type(kept) not in [getattr(known, name, None) for name in _KNOWN]:
        raise refusal.NotExportableError(config, f"its cache has a form of its own ({type(kept).__name__})")
    found: dict[str, Tensor | None] = {}
    if isinstance(kept, known.DynamicLayer):
        found |= {"key": kept.keys, "value": kept.values}
    if any(isinstance(kept, kind) for kind in _of(known, "DynamicIndexedLayer")):
        if kept.indexer_position_ids is not None:
            raise refusal.NotExportableError(config, f"layer {layer} keeps positions beside the keys of its indexer")
        found |= {cache_names.INDEX: None if kept.indexer_keys is None else kept.indexer_keys[:, None]}
    if isinstance(kept, known.LinearAttentionLayer):
        if len(kept.conv_states) > 1:
            raise refusal.NotExportableError(config, f"layer {layer} keeps the inputs of several convolutions")
        found |= {"conv": kept.conv_states[0], "state": kept.recurrent_states[0]}
    tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
    if found and not tensors:
        raise refusal.NotExportableError(config, f"layer {layer} keeps its state outside of the cache")
    for name, tensor in tensors.items():
        shape = tuple(int(size) for size in tensor.shape[1:])
        yield Part(layer, name, (shape[0], 0, shape[2]) if name in cache_names.GROWING else shape, tensor.dtype)


def traced_cache(adapter: ModelAdapter, parts: Sequence[Part], tensors: Sequence[Tensor]) -> Any:
    """Return a cache of transformers that holds the parts; every layer keeps all positions.

    Also one with a sliding window: its mask hides the older ones, and the cache of all layers has one length. The cache
    has attributes ``asked``, the recurrent state that a layer asked for last, and ``real``: whether a token is one,
    (batch, sequence), where padding may come behind a text; None where it comes first.
    """
    from transformers import cache_utils as known

    own: Any = type(adapter.new_cache())

    class Cache(own):  # type: ignore[misc]
        """Notes which state was asked for: some functions that continue it are not given it."""

        asked: Tensor | None = None
        real: Tensor | None = None

        def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
            self.asked = super().get_recurrent_state(layer_idx, state_idx)
            return self.asked

    # transformers asks for classes of its own, which have no types
    plain: Any = known.DynamicLayer
    none: Any = getattr(known, "DummyLayer", plain)
    indexed: Any = type(_Indexed.__name__, (_Indexed, *_of(known, "DynamicIndexedLayer")), {})
    states: Any = type(_States.__name__, (_States, known.LinearAttentionLayer), {})
    both: Any = type(_States.__name__, (_States, known.LinearAttentionAndFullAttentionLayer), {})
    cache: Any = Cache()
    given = dict(zip(parts, tensors, strict=True))
    for layer in range(adapter.layers):
        kept = {part.name: tensor for part, tensor in given.items() if part.layer == layer}
        grows, fixed = ([name for name in names if name in kept] for names in (cache_names.GROWING, cache_names.STATES))
        keys = indexed if cache_names.INDEX in grows else plain
        made = (both if grows else states)() if fixed else (keys if grows else none)()
        if grows:
            made.lazy_initialization(kept["key"], kept["value"])
            made.keys, made.values, made.index = kept["key"], kept["value"], kept.get(cache_names.INDEX)
        if fixed:
            made.hold(kept.get("conv"), kept.get("state"))
        cache.layers.append(made)
    return cache


def tensors_of(cache: Any, parts: Sequence[Part]) -> list[Tensor]:
    """Return the parts of a cache after a call."""
    where = {"key": "keys", "value": "values", "conv": "conv_states", "state": "recurrent_states"} | {
        cache_names.INDEX: "index"
    }
    found = [getattr(cache.layers[part.layer], where[part.name]) for part in parts]
    return [item if part.grows else item[0] for item, part in zip(found, parts, strict=True)]


class _Indexed:
    """Keys of an indexer in one layer, as a trace sees them, (batch, 1, positions, size)."""

    index: Tensor

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Append new keys (batch, sequence, size); return all."""
        self.index = torch.cat([self.index, indexer_key_states[:, None]], 2)
        return self.index[:, 0]


class _States:
    """States of one layer, as a trace sees them: never written in place, and zero where a text begins."""

    lengths: Tensor | None = None
    """Real tokens of each row (batch,), where padding may come behind them; without, padding is at the left."""
    conv_states: dict[int, Tensor | None]
    recurrent_states: dict[int, Tensor | None]

    def hold(self, conv: Tensor | None, state: Tensor | None) -> None:
        """Hold the last inputs of a convolution (batch, features, positions), and a state (batch, ...)."""
        self.conv_states, self.recurrent_states, self.has_previous_state = {0: conv}, {0: state}, {0: True}

    def update_conv_state(self, conv_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Put new inputs (batch, features, sequence) behind the last ones; return both."""
        past = self.conv_states[0]
        if past is None:
            raise ValueError("a layer has a convolution that it had not when its cache was looked at")
        both = torch.cat([past, conv_states.to(past.dtype)], -1)
        width = past.shape[-1]
        if self.lengths is None:
            self.conv_states = {0: both[..., -width:]}
        else:
            place = (self.lengths[:, None] + torch.arange(width))[:, None].expand(-1, past.shape[1], -1)
            self.conv_states = {0: both.gather(2, place)}
        return both

    def update_recurrent_state(self, recurrent_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Take the place of the state."""
        past = self.recurrent_states[0]
        self.recurrent_states = {0: recurrent_states.to(past.dtype) if past is not None else recurrent_states}
        return recurrent_states
