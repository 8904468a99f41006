"""What the rest of the project asks a model about: its blocks, embeddings, attention and cache, whatever its family.

`ModelAdapter` holds the rules that most families of transformers keep. A family that keeps another one is a file in
`rankbook.calibration.model.families` with a subclass; nothing else knows families.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from rankbook.calibration.model.packed_modules import TiedCodebookLinear

_STATIC_ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles follow from the position alone."""
_CHANGING_ROTARY = ("dynamic", "longrope")
"""Kinds whose frequencies change once the text is longer than the original context, those of earlier tokens too."""


@dataclass(frozen=True)
class Blocks:
    """The decoder blocks of a model.

    Attributes:
        name: Name of the list within the model, e.g. ``model.layers``.
        modules: The blocks.
    """

    name: str
    modules: Sequence[nn.Module]


@dataclass(frozen=True)
class Embeddings:
    """The token embedding and output layer of a model.

    Attributes:
        embedding: Name and module of the token embedding.
        head: Name and module of the output layer, or None where the model has none of its own.
        tied: Whether both share one weight. What was stored decides: a flag of the configuration may be wrong.
    """

    embedding: tuple[str, nn.Module]
    head: tuple[str, nn.Module] | None
    tied: bool


@dataclass(frozen=True)
class CachedOutput:
    """Output features of a module that are keys or values, as they enter the cache but for the rotary embedding.

    Attributes:
        module: The module.
        start: The first of these features; those after it are all keys or values.
        kinds: How many of keys and values there are among them, 1 or 2.
    """

    module: nn.Module
    start: int = 0
    kinds: int = 1


class ModelAdapter:
    """The rules that most families keep.

    Attributes:
        families: ``model_type`` of the models for which a subclass is used, of a wrapper or of its language model.
        towers: How the names of modules begin that are not part of the language model.
        language: Where models with towers keep their language model; its own name for the same modules is ``model.``.
        hidden: Name of the blocks' argument that is the hidden state, where it is not the first positional one.
        attention_method: Name of the method of attention modules that computes attention of queries, keys and values
            (batch, heads, sequence, size) with a mask, in code of the model's own; it divides scores by ``scale_attn``.
        sees_by_mask: Whether attention in code of the model's own sees a key by the mask alone, wherever among the keys
            the text ends.
        model: The model.
        config: Configuration of its language model.
    """

    families: ClassVar[tuple[str, ...]] = ()
    towers: ClassVar[tuple[str, ...]] = ("vision", "visual", "audio")
    language: ClassVar[str] = "model.language_model."
    hidden: ClassVar[str] = "hidden_states"
    attention_method: ClassVar[str] = ""
    sees_by_mask: ClassVar[bool] = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config.get_text_config()

    def blocks(self) -> Blocks:
        """Return the decoder blocks: the outermost module list of the language model as long as its layer count.

        Raises:
            ValueError: There is none.
        """
        wanted = getattr(self.config, "num_hidden_layers", None)
        lists = [
            (name, module)
            for name, module in self.model.named_modules()
            # A tower may have as many blocks, and need not lie deeper than the language model.
            if isinstance(module, nn.ModuleList)
            and len(module) == wanted
            and len(module) > 0
            and self.in_language(name)
        ]
        if not lists:
            raise ValueError(
                f"{type(self.model).__name__} has no list of {wanted} blocks; only decoder-only models are supported"
            )
        lists.sort(key=lambda item: (item[0].count("."), -sum(p.numel() for p in item[1].parameters())))
        name, modules = lists[0]
        return Blocks(name, list(modules))

    def in_language(self, name: str) -> bool:
        """Return whether a module belongs to the language model."""
        return not any(part.startswith(self.towers) for part in name.split("."))

    @classmethod
    def language_name(cls, name: str) -> str:
        """Return the name of a module or tensor of the whole model within the language model."""
        return f"model.{name.removeprefix(cls.language)}" if name.startswith(cls.language) else name

    def language_module(self) -> nn.Module:
        """Return the language model without its output layer, of a model with towers."""
        module: nn.Module = self.model.get_submodule(self.language.removesuffix("."))
        return module

    def embeddings(self) -> Embeddings:
        """Return the token embedding and the output layer."""
        names = {id(module): name for name, module in self.model.named_modules()}
        tokens, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        found = None if head is None else (names[id(head)], head)
        weight = None if head is None else head._parameters.get("weight")
        tied = isinstance(head, TiedCodebookLinear) or (
            weight is not None and weight is tokens._parameters.get("weight")
        )
        return Embeddings((names[id(tokens)], tokens), found, tied)

    def embedding_scale(self, module: nn.Module) -> float:
        """Return the factor on the rows of a token embedding.

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

    @property
    def vocabulary(self) -> int:
        """Tokens that the embedding has rows for."""
        return int(self.embeddings().embedding[1].num_embeddings)  # type: ignore[arg-type]

    @property
    def start_token(self) -> int | None:
        """The token that a text begins with, or None."""
        token = getattr(self.config, "bos_token_id", None)
        return int(token) if token is not None and token < self.vocabulary else None

    @property
    def layers(self) -> int:
        """Number of decoder blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def heads(self) -> int:
        """Query heads of a layer."""
        return int(self.config.num_attention_heads)

    @property
    def key_heads(self) -> int:
        """Heads of keys and values of a layer."""
        return int(getattr(self.config, "num_key_value_heads", None) or self.heads)

    @property
    def head_size(self) -> int:
        """Features of a head."""
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads)

    @property
    def hidden_size(self) -> int:
        """Features of a hidden state."""
        return int(self.config.hidden_size)

    def new_cache(self) -> Any:
        """Return a cache of transformers that holds nothing yet; what its layers are follows from the configuration."""
        from transformers import DynamicCache

        return DynamicCache(config=self.config)

    @property
    def cache_argument(self) -> str:
        """Name of the model's argument that is the cache, and of the field of its result."""
        return "cache_params" if self._takes("cache_params") else "past_key_values"

    @property
    def takes_positions(self) -> bool:
        """Whether the model is called with the positions of tokens."""
        return self._takes("position_ids")

    def _takes(self, argument: str) -> bool:
        return argument in inspect.signature(self.model.forward).parameters

    def cached_outputs(self) -> list[CachedOutput]:
        """Return the outputs that are keys or values.

        Raises:
            ValueError: Some layers have theirs in an unknown place.
        """
        found = self._cached_outputs()
        kinds = sum(output.kinds for output in found)
        if kinds != 2 * self.layers:
            raise ValueError(
                f"{type(self.model).__name__} has k_proj and v_proj, or what rankbook knows in their place, in"
                f" {kinds / 2:g} of {self.layers} layers; leave out --kv-bits"
            )
        return found

    def _cached_outputs(self) -> list[CachedOutput]:
        return [CachedOutput(module) for module in self._named("k_proj", "v_proj")]

    def _named(self, *leaves: str) -> list[nn.Module]:
        """Return the modules of the language model whose names end so."""
        named = self.model.named_modules()
        return [item for name, item in named if name.rpartition(".")[2] in leaves and self.in_language(name)]

    def windows(self) -> list[int]:
        """Return how many positions a query sees in each layer, itself included; -1 for all, 0 if that is no window."""
        width = getattr(self.config, "sliding_window", None)
        standard = "sliding_attention" if width else "full_attention"
        kinds = getattr(self.config, "layer_types", None) or [standard] * self.layers
        known = {"full_attention": -1, "hybrid": -1, "sliding_attention": int(width or -1)}
        return [known.get(kind, 0) for kind in kinds]

    def rotary(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """Return the module that computes cos and sin of all layers from positions alone; None where there is none.

        That is also where layers differ in their embedding, or where it depends on the length of the text.
        """
        found: list[Any] = [module for module in self.model.modules() if hasattr(module, "inv_freq")]
        return found[0] if len(found) == 1 and getattr(found[0], "rope_type", None) in _STATIC_ROTARY else None

    def context(self) -> int:
        """Return up to how many positions a cache that only grows is right; 0 where the configuration sets no limit.

        Where frequencies change with the length of the text (LongRoPE, dynamic NTK) that is the original context:
        beyond it every key in the cache would have to be computed again.
        """
        limit = int(getattr(self.config, "max_position_embeddings", 0) or 0)
        for rope in self._ropes():
            if _fixed(str(rope.get("rope_type", ""))) != rope.get("rope_type", ""):
                original = rope.get("original_max_position_embeddings") or limit
                limit = min(limit, int(original)) if limit else int(original)
        return limit

    def longest_text(self) -> int | None:
        """Return how long a text may be without a cache that only grows; None where the configuration sets no limit.

        That is the positions of the configuration; dynamic NTK, whose frequencies follow the length, goes beyond them.
        """
        limit = getattr(self.config, "max_position_embeddings", None)
        factors = [rope.get("factor") or 1 for rope in self._ropes() if rope.get("rope_type") == "dynamic"]
        return int(limit * max(factors, default=1)) if limit else None

    def _ropes(self) -> list[Mapping[str, Any]]:
        """Return the settings of every rotary embedding of the configuration."""
        found = getattr(self.config, "rope_parameters", None) or {}
        return [found, *(entry for entry in found.values() if isinstance(entry, dict))]

    def positions_have_parts(self) -> bool:
        """Return whether the position of a token is three numbers, so that those of images have rows and columns."""
        return any("mrope_section" in rope for rope in self._ropes())

    def unify_experts(self) -> None:
        """Describe experts that transformers does not mark, see `rankbook.calibration.model.experts.layout`."""

    def make_traceable(self) -> None:
        """Put code that torch can trace in the place of code that it cannot; what is computed stays."""

    def keep_frequencies(self) -> None:
        """Keep rotary frequencies from now on as they are up to `context`."""
        for module in self.model.modules():
            kinds = getattr(module, "rope_type", None)
            if isinstance(kinds, str):
                module.rope_type = _fixed(kinds)
            elif isinstance(kinds, dict):
                module.rope_type = {layer: _fixed(kind) for layer, kind in kinds.items()}

    def restart_at(self) -> int:
        """Return the length of text beyond which ``generate`` of transformers computes the cache again; 0 for never."""
        return 0


def _fixed(kind: str) -> str:
    """Return the kind of rotary embedding that computes, up to the original context, what ``kind`` does."""
    return "default" if any(name in kind for name in _CHANGING_ROTARY) else kind


def adapter_of(model: Any) -> ModelAdapter:
    """Return the adapter of a transformers model.

    Raises:
        ValueError: It is not one.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} is not a decoder-only model of transformers; no other is supported")
    return family_of(config.model_type, config.get_text_config().model_type)(model)


def family_of(*kinds: str | None) -> type[ModelAdapter]:
    """Return the adapter's class for the ``model_type`` of a model and of its language model."""
    return next((_families()[kind] for kind in kinds if kind in _families()), ModelAdapter)


@functools.cache
def _families() -> dict[str | None, type[ModelAdapter]]:
    """Return the classes of the modules in `families`, discovered, by ``model_type``."""
    from rankbook.calibration.model import families

    names = [f"{families.__name__}.{info.name}" for info in pkgutil.iter_modules(families.__path__)]
    adapters = [importlib.import_module(name).ADAPTER for name in names]
    return {kind: adapter for adapter in adapters for kind in adapter.families}
