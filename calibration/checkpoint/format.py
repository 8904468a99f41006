"""The checkpoint: a Hugging Face folder with packed safetensors and a manifest, read without importing transformers.

* config.json: with quantization_config = {quant_method: rankbook, format_version, layers}
* model.safetensors: or shards with model.safetensors.index.json; packed layers as <layer>.<part>, and one `guard`
* rankbook.json: the manifest: versions, options, file hashes, stored bits and errors
* README.md: the model card, in front of what the source's says
* tokenizer and generation_config files
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rankbook.calibration.checkpoint.card import write_checkpoint_card
from rankbook.calibration.checkpoint.extras import settle_tokenizer
from rankbook.calibration.checkpoint.files import describe_file, sha256_file
from rankbook.calibration.checkpoint.integrity import (
    INDEX,
    Streams,
    check_files,
    check_tensors,
    member,
    read_json,
    read_layers,
    tensor_files,
    tensor_names,
)
from rankbook.calibration.checkpoint.integrity import CheckpointError as CheckpointError
from rankbook.calibration.checkpoint.output import replaced_folder
from rankbook.calibration.memory import relieve
from rankbook.calibration.record.compact import widened
from rankbook.calibration.record.finite import is_finite
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.calibration.source import MANIFEST as MANIFEST
from rankbook.calibration.source import is_checkpoint as is_checkpoint
from rankbook.calibration.versions import versions
from rankbook.plugins.layer_spec import LayerSpec

FORMAT_VERSION = 3
"""Version of the checkpoint format that is written."""
READABLE = (1, 2, 3)
"""Versions that are read: the first had no `guard`, the second no compact parameters."""
QUANT_METHOD = "rankbook"
"""Value of ``quant_method`` in config.json."""
SHARD_BYTES = 2 << 30
"""Largest size of one safetensors file, unless a single tensor is larger."""
_PIECE_BYTES = 64 << 20
"""What is read of files that stay open before they are opened anew."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; tensors are read (memory-mapped) when asked for.

    Attributes:
        folder: Where it is.
        config: Contents of config.json.
        manifest: Contents of rankbook.json.
        layers: Packed layers by name, those that share another's tensors included.
        files: File of each tensor by the tensor's full name.
        stored_names: Name under which a file holds a tensor, where that is another one, see
            `rankbook.calibration.model.language`.
        compact: Of layers whose parameters are stored compactly, the entries as they are stored, see `for_operators`.
        streams: Reads the files of weights.
    """

    folder: Path
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    layers: Mapping[str, LayerSpec]
    files: Mapping[str, str]
    stored_names: Mapping[str, str] = field(default_factory=dict)
    compact: Mapping[str, LayerSpec] = field(default_factory=dict)
    streams: Streams = field(default_factory=Streams, repr=False, compare=False)

    def kept_open(self) -> Checkpoint:
        """Return the checkpoint for one who reads all of it: files stay open, see `Streams`."""
        return replace(self, streams=Streams(_PIECE_BYTES))

    def for_operators(self) -> Checkpoint:
        """Return the checkpoint with parameters as operators take them: `part` decodes what is stored compactly."""
        compact = {name: spec for name, spec in self.layers.items() if spec.compact and not spec.shared_with}
        return replace(self, layers={name: spec.wide() for name, spec in self.layers.items()}, compact=compact)

    def record(self, name: str) -> QuantizedLinear:
        """Return the record of a packed layer.

        Raises:
            KeyError: No such layer.
            CheckpointError: Its tensors are missing or do not fit.
        """
        if name not in self.layers:
            raise KeyError(f"{self.folder} has no packed layer {name!r}; it has {len(self.layers)} others")
        owner = self.layers[name].shared_with or name
        spec = self.layers[owner]
        try:
            return QuantizedLinear.unpack({part: self.part(owner, part) for part in spec.tensors()}, spec)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: {owner}: {error}") from error

    def part(self, name: str, part: str) -> Tensor:
        """Return one tensor of a packed layer that has its own.

        Raises:
            CheckpointError: There is none, its file is damaged, or it is not what the layer's entry says.
        """
        if name in self.compact and part in ("params", "step", "base"):
            stored = replace(self, layers=self.compact, compact={})
            held = {each: stored.part(name, each) for each in ("params", "step", "base")}
            tensor = widened(held, self.compact[name])[part]
        else:
            tensor = self.tensor(f"{name}.{part}")
        try:
            self.layers[name].tensors()[part].check(f"{name}.{part}", tensor)
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: {error}") from error
        return tensor

    @property
    def settings(self) -> Mapping[str, Any]:
        """Entries of quantization_config beside the layers, see `rankbook.calibration.activations.settings`."""
        entries = self.config.get("quantization_config", {})
        return {key: entries[key] for key in ("activations", "kv_bits") if entries.get(key)}

    def tensor(self, name: str) -> Tensor:
        """Return one stored tensor by its full name.

        Raises:
            CheckpointError: There is none, its file is damaged, or it holds NaN or infinity.
        """
        file = self.files.get(name)
        if file is None:
            raise CheckpointError(
                f"{self.folder} holds no tensor {name!r}; the checkpoint is incomplete, write it again"
            )
        tensor = self.streams.tensor(self.folder / file, self.stored_names.get(name, name))
        if tensor.is_floating_point() and not is_finite(tensor):
            raise CheckpointError(f"{self.folder}: {name} holds NaN or infinity; write or copy the checkpoint again")
        return tensor

    def unquantized(self) -> list[str]:
        """Return the names of the tensors that belong to no packed layer (norms, embeddings, ...)."""
        return [name for name in self.files if name.rpartition(".")[0] not in self.layers]


@dataclass(frozen=True)
class CheckpointParts:
    """What `write_checkpoint` puts into the folder.

    Attributes:
        config: config.json without its quantization_config.
        layers: Packed layers.
        tensors: Every stored tensor by full name, packed ones included; tied ones once.
        manifest: The caller's part of the manifest; versions and hashes of files are added.
        save_extras: Called with the temporary folder to add tokenizer and generation config.
        settings: Further entries of quantization_config, see `rankbook.calibration.activations.settings`.
    """

    config: Mapping[str, Any]
    layers: Mapping[str, LayerSpec]
    tensors: Mapping[str, Tensor]
    manifest: Mapping[str, Any]
    save_extras: Callable[[Path], None] = lambda _: None
    settings: Mapping[str, Any] = field(default_factory=dict)


def write_checkpoint(folder: Path, parts: CheckpointParts, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a checkpoint as a whole: ``folder`` holds the complete new one afterwards, or what it held before.

    Raises:
        CheckpointError: Tensors of packed layers are not among those given, or share memory.
        FileExistsError: ``folder`` exists and is no checkpoint.
        OSError: Writing failed (disk full, no permission).
    """
    with replaced_folder(folder, MANIFEST) as temporary:
        write_tensors(temporary, {**parts.tensors, **guard(parts.layers)}, shard_bytes)
        check_tensors(temporary, parts.layers, tensor_files(temporary))  # of tensors that share memory one is written
        quantization = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "layers": {name: spec.to_json() for name, spec in parts.layers.items()},
            **parts.settings,
        }
        _write_json(temporary / "config.json", {**parts.config, "quantization_config": quantization})
        parts.save_extras(temporary)
        settle_tokenizer(temporary)
        write_checkpoint_card(temporary, parts.layers, parts.manifest)
        manifest = {"format_version": FORMAT_VERSION, "versions": versions(), **parts.manifest}
        manifest["files"] = {path.name: describe_file(path) for path in sorted(temporary.iterdir()) if path.is_file()}
        _write_json(temporary / MANIFEST, manifest)


def guard(layers: Mapping[str, LayerSpec]) -> dict[str, Tensor]:
    """Return the tensor that no loader passes over: the dense weight of one packed layer, without an element.

    transformers without the quantizer of this project warns that it does not know the method, puts tensors without a
    place aside and fills those it misses with random numbers. A tensor of a wrong shape it refuses.
    """
    own = [name for name, spec in layers.items() if not spec.shared_with]
    return {f"{name}.weight": torch.empty(0, dtype=torch.uint8) for name in own[:1]}


def open_checkpoint(folder: str | Path, *, verify: bool = False) -> Checkpoint:
    """Open a checkpoint.

    One that transformers saved again (``save_pretrained``) has no manifest: its files say all that is known.

    Args:
        folder: What `write_checkpoint` wrote.
        verify: Also compare the SHA-256 of every file of weights; without it only sizes are compared.

    Raises:
        CheckpointError: Not a checkpoint, another version, or a file is missing, truncated or changed.
    """
    folder = Path(folder)
    if not is_checkpoint(folder):
        raise CheckpointError(f"{folder} holds no {MANIFEST}; give a folder written by 'rankbook quantize'")
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else _resaved(folder, verify)
    check_version(manifest.get("format_version"), folder / MANIFEST)
    check_files(folder, manifest, verify=verify)
    if "layers" in manifest:
        member(manifest, "layers", folder / MANIFEST)
    config = read_json(folder / "config.json")
    quantization = member(config, "quantization_config", folder / "config.json")
    if quantization.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{folder}/config.json has no quantization_config of rankbook; write it again")
    check_version(quantization.get("format_version"), folder / "config.json")
    layers = read_layers(quantization.get("layers"), folder / "config.json")
    files = {name: file for name, file in tensor_files(folder).items() if name not in guard(layers)}
    check_tensors(folder, layers, files)
    return Checkpoint(folder, config, manifest, layers, files)


def _resaved(folder: Path, verify: bool) -> dict[str, Any]:
    """Return a manifest for a checkpoint that another program has saved: what its files are now."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path) if verify else "-" * 64}
        for path in sorted(folder.glob("*.safetensors"))
    }
    note = f"saved again without {MANIFEST}: errors of layers, and whether weights have changed, are not known"
    return {"format_version": FORMAT_VERSION, "note": note, "files": files}


def load_records(folder: str | Path) -> dict[str, QuantizedLinear]:
    """Return every packed layer of a checkpoint by name; layers that share tensors share the record.

    Raises:
        CheckpointError: See `open_checkpoint`.
    """
    checkpoint = open_checkpoint(folder).kept_open()
    records = {name: checkpoint.record(name) for name, spec in checkpoint.layers.items() if not spec.shared_with}
    return {name: records[spec.shared_with or name] for name, spec in checkpoint.layers.items()}


def check_version(version: object, where: Path | str) -> None:
    """Check a format version.

    Raises:
        CheckpointError: It is not one that this version reads.
    """
    if version not in READABLE:
        raise CheckpointError(
            f"{where} has format version {version!r}; this rankbook reads versions {', '.join(map(str, READABLE))}:"
            " quantize the model again, or install the version of rankbook that wrote it"
        )


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or shards of it with an index.

    Raises:
        OSError: Writing failed (disk full, no permission).
    """
    from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards

    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(plain, max_shard_size=shard_bytes)
    held: dict[str, str] = {}
    for file, names in split.filename_to_tensors.items():  # one by one: what is mapped is let go of in between
        pattern = file.replace(".safetensors", "{suffix}.safetensors")
        shard = {name: plain[name] for name in names}
        try:
            save_torch_state_dict(shard, folder, filename_pattern=pattern, max_shard_size=sys.maxsize)
        except SafetensorError as error:  # the library wraps the system's error in its own type
            raise OSError(f"writing the weights of {folder} failed ({error}); nothing was replaced") from error
        held |= dict.fromkeys(tensor_names(folder / file), file)
        relieve()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": held}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
