"""Loading a Hugging Face folder whose layers another tool has quantized, with records in the place of these layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankbook.calibration.checkpoint.integrity import INDEX, WEIGHTS, member, opened, read_json, tensor_names
from rankbook.calibration.imports.base import Format, ImportRefusedError, Numbers, refusing
from rankbook.calibration.imports.formats import format_of
from rankbook.calibration.imports.packing import check_parts, pack
from rankbook.calibration.imports.places import Place, Places
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.completeness import check_complete
from rankbook.calibration.model.custom_code import is_trusted
from rankbook.calibration.model.loading import auto_class
from rankbook.calibration.model.packed_modules import packed_modules
from rankbook.calibration.model.plain import make_plain, restore
from rankbook.calibration.model.source_config import check_sizes, entry_beside, read_config, stored_format
from rankbook.calibration.source import file_of

Read = tuple[Numbers, "Tensor | None"]
"""What a layer is made of, and its bias."""

_NOT_OWN = ("weight", "bias", "input_scale", "k_scale", "v_scale")
"""Parts of quantized layers that other modules have too."""
_LONGEST = 1000
"""Characters of a tensor's name."""


@dataclass(frozen=True)
class Stored:
    """The tensors of a folder, read when asked for.

    Attributes:
        files: File of each tensor by name.
        joint: What stands between the name of a layer and the rest.
        layers: For each quantized layer, the rest of the names of its tensors.
    """

    files: Mapping[str, Path]
    joint: str
    layers: Mapping[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, location: str, form: Format) -> Stored:
        """Find the tensors of a folder or model id, and the layers of a format among them.

        Raises:
            ValueError: There are no safetensors, or no layer of the format.
        """
        files = dict(_files(location))
        ends = f"{form.joint}{form.mark}"
        layers: dict[str, list[str]] = {name.removesuffix(ends): [] for name in files if name.endswith(ends)}
        if not layers:
            raise ValueError(f"{location} says that it is {form.title}, but none of its tensors is named *{ends}")
        others = []
        for name in files:
            owners = [layer for layer in _heads(name, form.joint) if layer in layers]
            for layer in owners:
                layers[layer].append(name.removeprefix(f"{layer}{form.joint}"))
            if not owners:
                others.append(name)
        own = {part for parts in layers.values() for part in parts} - {*_NOT_OWN}
        for layer, _, part in (name.rpartition(form.joint) for name in others):
            if part in own:
                raise ImportRefusedError(f"layer {layer} lacks {form.mark}; download the checkpoint again")
        return cls(files, form.joint, layers)

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
        found = self.read([f"{name}{self.joint}{part}" for part in self.layers[name]])
        return {part: found[f"{name}{self.joint}{part}"] for part in self.layers[name]}

    def others(self) -> dict[str, Tensor]:
        """Return the tensors outside of quantized layers."""
        inside = {f"{layer}{self.joint}{part}" for layer, parts in self.layers.items() for part in parts}
        return self.read([name for name in self.files if name not in inside])


def load_folder(location: str) -> tuple[Any, Format, Mapping[str, Any]]:
    """Return the model of a folder or model id with packed layers, the format, and what config.json says of it.

    Raises:
        ValueError: It is not quantized, or in a way that cannot be imported; the message names the first layer.
    """
    config = read_config(location, quantized=True)
    entry = stored_format(config) or entry_beside(location)
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
    adapter_of(model).unify_experts()
    places = Places(model)
    targets: dict[str, dict[Place, str]] = defaultdict(dict)
    for name in stored.layers:
        place = places.of_layer(name)
        targets[place.target][place] = name
    _fill(location, model, places.others(stored.others()), targets)
    found = make_plain(model)
    for target, layers in targets.items():
        _put(model, target, layers, lambda name: read_layer(name, form, stored, entry))
    restore(model, found, packed_modules(model))
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


def _fill(location: str, model: Any, tensors: dict[str, Tensor], packed: Collection[str]) -> None:
    """Give a model the tensors that are not of quantized layers; ``packed`` are the names of those that are."""
    names = {*model.state_dict()}
    if odd := [name for name in names & {*tensors} if tensors[name].dtype.itemsize == 1]:
        raise ImportRefusedError(
            f"{odd[0]} is stored as {tensors[odd[0]].dtype} without the scales of the format beside it; a folder of"
            " mixed formats cannot be imported"
        )
    try:
        info = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{location} does not fit its config.json: {error}") from error
    if any(parameter.is_meta for parameter in model.get_output_embeddings().parameters()):
        model.tie_weights()
    left = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
    missing = [name for name in info.missing_keys if name in left and not _belongs(name, packed)]
    check_complete(location, model, {"missing_keys": missing, "unexpected_keys": info.unexpected_keys})


def _belongs(name: str, packed: Collection[str]) -> bool:
    """Return whether a tensor of the model is the weight or bias of a packed layer or of packed experts."""
    return not {name, name.rpartition(".")[0], name.removesuffix("_bias")}.isdisjoint(packed)


def _put(model: Any, target: str, layers: Mapping[Place, str], read: Callable[[str], Read]) -> None:
    """Put what the layers of a folder hold for one layer, or one matrix of experts, of the model in its place."""
    order = sorted(layers, key=lambda place: (place.expert or 0, place.part))
    check_parts(model, target, order)
    found = [read(layers[place]) for place in order]
    try:
        with refusing("what is stored"):
            numbers = Numbers.joined([each for each, _ in found])
            biases = [bias.flatten() for _, bias in found if bias is not None]
            if biases and len(biases) < len(found):
                raise ImportRefusedError("some of the parts that lie in it have a bias, and others have none")
            bias = torch.cat(biases) if biases else None
            if order[0].interleaved:
                rows = torch.arange(len(numbers.codes)).view(len(order) // 2, 2, -1).transpose(1, 2).flatten()
                numbers, bias = numbers.ordered(rows), None if bias is None else bias[rows]
            pack(model, target, numbers, bias)
    except ImportRefusedError as error:
        raise ImportRefusedError(f"layer {target}: {error}") from error


def check_entry(form: Format, entry: Mapping[str, Any]) -> None:
    """Check what config.json says of a format.

    Raises:
        ImportRefusedError: It is damaged, or no layer could be imported with it.
    """
    with refusing("its quantization_config"):
        form.check(entry)


def read_layer(name: str, form: Format, stored: Stored, entry: Mapping[str, Any]) -> Read:
    """Return what a layer is made of, and its bias.

    Raises:
        ImportRefusedError: Its tensors are damaged, or of another layout.
    """
    tensors = stored.layer(name)
    try:
        with refusing("what is stored"):
            return form.numbers(tensors, entry), tensors.get("bias")
    except ImportRefusedError as error:
        raise ImportRefusedError(f"layer {name}: {error}") from error


def _heads(name: str, joint: str) -> Iterator[str]:
    """Yield what stands before each joint of a name.

    Raises:
        ImportRefusedError: It is longer than names are: what stands before its joints would fill the memory.
    """
    if len(name) > _LONGEST:
        raise ImportRefusedError(
            f"the name of a tensor, {name[:40]}..., has {len(name)} characters; the file is damaged"
        )
    at = name.find(joint)
    while at >= 0:
        yield name[:at]
        at = name.find(joint, at + len(joint))


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
