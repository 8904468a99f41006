"""The quantizer that lets ``AutoModelForCausalLM.from_pretrained`` load a checkpoint (``quant_method: rankbook``).

`register` runs while transformers itself is being imported (`rankbook._transformers_hook`), so it may
import only what transformers has loaded by then: the base classes that it joins with the ones here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankbook.calibration.activations import settings
from rankbook.calibration.checkpoint.format import (
    FORMAT_VERSION,
    QUANT_METHOD,
    CheckpointError,
    check_version,
    guard,
    is_checkpoint,
    open_checkpoint,
)
from rankbook.calibration.checkpoint.integrity import check_tensors, read_layers, tensor_names
from rankbook.calibration.memory import relieve
from rankbook.calibration.model import experts
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.completeness import check_complete
from rankbook.calibration.model.packed_modules import (
    CodebookEmbedding,
    CodebookLinear,
    PackedModule,
    TiedCodebookLinear,
    packed_modules,
    replace_module,
)
from rankbook.calibration.record.compact import widened
from rankbook.calibration.record.finite import is_finite
from rankbook.plugins.layer_spec import LayerSpec


class ConfigPart:
    """``quantization_config`` of a checkpoint.

    Attributes:
        quant_method: ``rankbook``.
        format_version: Of the checkpoint.
        layers: Entries of `LayerSpec` by layer name.
        activations: Entry of `rankbook.calibration.activations.settings`, or None.
        kv_bits: Bits of keys and values, 0 where they are left alone.
    """

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        layers: dict[str, Any] | None = None,
        activations: dict[str, Any] | None = None,
        kv_bits: int = 0,
        **_: Any,
    ) -> None:
        """Check the version and every entry.

        Raises:
            CheckpointError: Another format version, or a damaged entry.
        """
        check_version(format_version, "quantization_config")
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.layers = {} if layers is None else layers
        self.activations = activations
        self.kv_bits = kv_bits
        self.specs()

    def specs(self) -> dict[str, LayerSpec]:
        """Return the packed layers by name."""
        return read_layers(self.layers, "quantization_config")


class QuantizerPart:
    """Puts packed modules in the place of dense ones before the weights are read.

    Attributes:
        quantization_config: Of the checkpoint.
    """

    requires_calibration = True
    quantization_config: ConfigPart
    _stored: frozenset[str] = frozenset()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing beyond torch is needed."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> Any:
        _check_folder(getattr(model.config, "_name_or_path", ""))
        dtype = model.config.dtype if isinstance(model.config.dtype, torch.dtype) else torch.get_default_dtype()
        specs = self.quantization_config.specs()
        install_modules(model, specs, dtype)
        self._stored = frozenset(name for file in checkpoint_files or () for name in tensor_names(Path(file)))
        if self._stored:
            check_tensors("the checkpoint", specs, self._stored)
        ignored = {rf"^{re.escape(name)}$" for name in guard(specs)}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        _check_loaded(model, self._stored)
        for name, module in packed_modules(model).items():
            if isinstance(module, PackedModule):
                module.compute_dtype = model.dtype
                _check_values(name, module)
                relieve()
        config = self.quantization_config
        settings.install(model, {"activations": config.activations, "kv_bits": config.kv_bits})
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, module in packed_modules(model).items():
            replace_module(model, name, _dense(module, dtype or model.dtype))
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """``save_pretrained`` writes the packed tensors (without the manifest)."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Return what ``save_pretrained`` writes."""
        return {**model.state_dict(), **guard(self.quantization_config.specs())}, {}

    @property
    def is_trainable(self) -> bool:
        """Codes are integers: there is nothing to train."""
        return False


def register() -> None:
    """Add the quantizer to the tables of transformers. Safe to call twice."""
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        config = type("RankbookConfig", (ConfigPart, QuantizationConfigMixin), {"__module__": __name__})
        quantizer = type("RankbookQuantizer", (QuantizerPart, HfQuantizer), {"__module__": __name__})
        auto.register_quantization_config(QUANT_METHOD)(config)
        auto.register_quantizer(QUANT_METHOD)(quantizer)


def install_modules(model: Any, specs: dict[str, LayerSpec], dtype: torch.dtype) -> None:
    """Replace modules of ``model`` by packed ones on the ``meta`` device that compute in ``dtype``.

    Raises:
        ValueError: The model has no such module.
    """
    owners = {matrix.rpartition(".")[0] for matrix in experts.stacks(specs)}
    if owners:
        adapter_of(model).unify_experts()
    for owner in owners:
        if experts.fused(found := _module(model, owner)):
            experts.split(found)
    for name, spec in sorted(specs.items(), key=lambda item: bool(item[1].shared_with)):
        _module(model, name)
        if spec.shared_with:
            module: nn.Module = TiedCodebookLinear(model.get_submodule(spec.shared_with))
        elif spec.kind == "embedding":
            module = CodebookEmbedding(spec, dtype=dtype)
        else:
            module = CodebookLinear(spec, dtype=dtype)
        replace_module(model, name, module.eval())
    _forget_ties(model, set(specs))


def _module(model: Any, name: str) -> Any:
    """Return a module of a model by name; a model without it is another one."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"{type(model).__name__} has no layer {name!r}; config.json belongs to another model"
        ) from error


def _forget_ties(model: Any, packed: set[str]) -> None:
    """Packed layers have no ``weight`` to tie; the sharing is in their entries."""

    def keep(ties: dict[str, str]) -> dict[str, str]:
        return {a: b for a, b in ties.items() if not {a.rpartition(".")[0], b.rpartition(".")[0]} & packed}

    model.all_tied_weights_keys = keep(model.all_tied_weights_keys)
    if isinstance(model._tied_weights_keys, dict):
        model._tied_weights_keys = keep(model._tied_weights_keys)


def _check_folder(location: str) -> None:
    """Name a missing or truncated file before the loader stumbles over it."""
    if location and Path(location).is_dir() and is_checkpoint(location):
        open_checkpoint(location)


def _check_loaded(model: Any, stored: Collection[str]) -> None:
    """Refuse a model of which the loader made up tensors that the checkpoint lacks: it warns and goes on.

    It marks what it read. ``stored`` are the names in the files: they speak for what has lost its mark on the way.
    """
    optional = re.compile("|".join(model._keys_to_ignore_on_load_missing or ["(?!)"]))
    made_up = [
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not (getattr(tensor, "_is_hf_initialized", False) or name in stored or optional.search(name))
    ]
    try:
        check_complete("the checkpoint", model, {"missing_keys": made_up, "unexpected_keys": ()})
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _check_values(name: str, module: PackedModule) -> None:
    """Refuse damaged tensors; the bias follows the dtype of the model, the others are data."""
    for part, form in module.spec.tensors().items():
        tensor = module.get_buffer(part)
        try:
            (replace(form, dtype=str(tensor.dtype).removeprefix("torch.")) if part == "bias" else form).check(
                f"{name}.{part}", tensor
            )
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    if module.spec.compact and not is_finite(widened(module.packed(), module.spec)["step"]):
        raise CheckpointError(f"{name}.params times {name}.step is NaN or infinity; write or copy the checkpoint again")


def _dense(module: Any, dtype: torch.dtype) -> nn.Module:
    weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
    rows, columns = weight.shape
    if isinstance(module, CodebookEmbedding):
        if module.spec.scale != 1.0:
            raise ValueError(
                "an embedding with a scale cannot be made dense; quantize again without --quantize-embeddings"
            )
        return nn.Embedding(rows, columns, _weight=weight, _freeze=True)
    bias = module.get_buffer("bias") if isinstance(module, PackedModule) and module.spec.bias else None
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    linear.weight = weight
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return linear
