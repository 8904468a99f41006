"""Loading a Hugging Face folder whose layers another tool has quantized, with records in the place of these layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankbook.calibration.checkpoint.integrity import INDEX, WEIGHTS, member, opened, read_json, tensor_names
from rankbook.calibration.imports.base import Format, ImportRefusedError, refusing
from rankbook.calibration.imports.formats import format_of
from rankbook.calibration.model.completeness import check_complete
from rankbook.calibration.model.custom_code import is_trusted
from rankbook.calibration.model.loading import auto_class
from rankbook.calibration.model.packed_modules import CodebookLinear, replace_module
from rankbook.calibration.model.source_config import check_sizes, read_config, stored_format
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.calibration.source import file_of


@dataclass(frozen=True)
class Stored:
    """The tensors of a folder, read when asked for.

    Attributes:
        files: File of each tensor by name.
        layers: For each quantized layer, the rest of the names of its tensors.
    """

    files: Mapping[str, Path]
    layers: Mapping[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, location: str, form: Format) -> Stored:
        """Find the tensors of a folder or model id, and the layers of a format among them.

        Raises:
            ValueError: There are no safetensors, or no layer of the format.
        """
        files = dict(_files(location))
        ends = f".{form.mark}"
        layers: dict[str, list[str]] = {name.removesuffix(ends): [] for name in files if name.endswith(ends)}
        if not layers:
            raise ValueError(f"{location} says that it is {form.title}, but none of its tensors is named *{ends}")
        for name in files:
            parts = name.split(".")
            for cut in range(1, len(parts)):
                if (layer := ".".join(parts[:cut])) in layers:
                    layers[layer].append(".".join(parts[cut:]))
        return cls(files, layers)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Return tensors by name; each file is opened once."""
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.files[name]].append(name)
        found: dict[str, Tensor] = {}
        for path, held in by_file.items():
            with opened(path) as stream:
                found |= {name: stream.get_tensor(name) for name in held}
        return found

    def layer(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a quantized layer by the rest of their names."""
        found = self.read([f"{name}.{part}" for part in self.layers[name]])
        return {part: found[f"{name}.{part}"] for part in self.layers[name]}

    def others(self) -> dict[str, Tensor]:
        """Return the tensors outside of quantized layers."""
        inside = {f"{layer}.{part}" for layer, parts in self.layers.items() for part in parts}
        return self.read([name for name in self.files if name not in inside])


def load_folder(location: str) -> tuple[Any, Format, Mapping[str, Any]]:
    """Return the model of a folder or model id with packed layers, the format, and what config.json says of it.

    Raises:
        ValueError: It is not quantized, or in a way that cannot be imported; the message names the first layer.
    """
    config = read_config(location, quantized=True)
    entry = stored_format(config)
    if entry is None:
        raise ValueError(
            f"{location} is not quantized: its config.json has no quantization_config; `rankbook quantize`"
            " is what quantizes it"
        )
    form = format_of(location, entry)
    try:
        return _load(location, config, form, entry), form, entry
    except ImportRefusedError as error:
        raise ValueError(f"{location} cannot be imported from {form.title}: {error}") from error


def _load(location: str, config: Any, form: Format, entry: Mapping[str, Any]) -> Any:
    stored = Stored.of(location, form)
    check_entry(form, entry)
    for part in (config, config.get_text_config()):
        for name in ("quantization_config", "compression_config"):
            part.__dict__.pop(name, None)
    check_sizes(location, config, sum(path.stat().st_size for path in {*stored.files.values()}))
    model = _empty(location, config)
    _fill(location, model, stored)
    for name in stored.layers:
        _pack(model, name, form, stored, entry)
    return model.eval().requires_grad_(False)


def _empty(location: str, config: Any) -> Any:
    """Return the model of a configuration without memory for its weights.

    Raises:
        ValueError: The configuration is damaged.
    """
    from transformers import GenerationConfig

    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=is_trusted())
    except ImportError:
        raise
    except Exception as error:  # each class of models takes its configuration apart in its own way
        kind = type(error).__name__
        raise ValueError(f"{location}: its config.json describes no model ({kind}: {error}); copy it again") from error
    if path := file_of(location, "generation_config.json"):
        model.generation_config = GenerationConfig.from_dict(read_json(path))
    return model


def _fill(location: str, model: Any, stored: Stored) -> None:
    """Give a model the tensors that are not of quantized layers."""
    try:
        info = model.load_state_dict(stored.others(), strict=False, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{location} does not fit its config.json: {error}") from error
    if any(parameter.is_meta for parameter in model.get_output_embeddings().parameters()):
        model.tie_weights()
    left = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
    missing = [name for name in info.missing_keys if name in left and name.rpartition(".")[0] not in stored.layers]
    check_complete(location, model, {"missing_keys": missing, "unexpected_keys": info.unexpected_keys})


def _pack(model: Any, name: str, form: Format, stored: Stored, entry: Mapping[str, Any]) -> None:
    """Put the record of a layer in its place.

    Raises:
        ImportRefusedError: There is no such place, or the record cannot hold the layer.
    """
    try:
        linear = model.get_submodule(name)
    except AttributeError as error:
        raise ImportRefusedError(
            f"{type(model).__name__} has no layer {name}; experts that are stored one by one cannot be imported yet"
        ) from error
    record, bias = read_layer(name, form, stored, entry)
    if (record.out_features, record.in_features) != (linear.out_features, linear.in_features):
        raise ImportRefusedError(
            f"layer {name} has {record.out_features} x {record.in_features} weights, and config.json asks for"
            f" {linear.out_features} x {linear.in_features}"
        )
    if bias is not None and linear.bias is None and bool(bias.any()):
        raise ImportRefusedError(f"layer {name} has a bias, and the model of config.json has none there")
    if bias is None and linear.bias is not None:
        raise ImportRefusedError(f"the bias of layer {name} is missing")
    # AutoGPTQ stores zeros where a model has no bias.
    record = replace(record, bias=None if linear.bias is None else bias)
    replace_module(model, name, CodebookLinear.from_record(record, model.dtype))


def check_entry(form: Format, entry: Mapping[str, Any]) -> None:
    """Check what config.json says of a format.

    Raises:
        ImportRefusedError: It is damaged, or no layer could be imported with it.
    """
    with refusing("its quantization_config"):
        form.check(entry)


def read_layer(
    name: str, form: Format, stored: Stored, entry: Mapping[str, Any]
) -> tuple[QuantizedLinear, Tensor | None]:
    """Return the record of a layer, and its bias.

    Raises:
        ImportRefusedError: Its tensors are damaged, or no record can hold them.
    """
    tensors = stored.layer(name)
    try:
        with refusing("what is stored"):
            return form.record(tensors, entry), tensors.get("bias")
    except ImportRefusedError as error:
        raise ImportRefusedError(f"layer {name}: {error}") from error


def _files(location: str) -> Iterator[tuple[str, Path]]:
    if single := file_of(location, WEIGHTS):
        yield from ((name, single) for name in tensor_names(single))
    elif index := file_of(location, INDEX):
        shards: dict[str, Path] = {}
        for name, file in member(read_json(index), "weight_map", index).items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{index} names {file!r:.200}, which is not a file of this folder; download it again")
            if file not in shards and (path := file_of(location, file)):
                shards[file] = path
            if file not in shards:
                raise ValueError(f"{location} lacks {file}, which its {INDEX} names; download it again")
            yield name, shards[file]
    else:
        raise ValueError(f"{location} holds no {WEIGHTS} and no {INDEX}; pickled weights are not read")
