"""What of a checkpoint is checked before anything in it is used: files, hashes, and the schema of its JSON."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rankbook.calibration.checkpoint.files import sha256_file
from rankbook.calibration.schema import SchemaError, read_object
from rankbook.plugins.layer_spec import LayerSpec

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The weights in one file, and the list of those in several."""
_SHA256_DIGITS = 64


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, of another version, or none at all."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: The file is missing, is not JSON, or holds something else than an object.
    """
    try:
        return read_object(path, "the checkpoint is damaged, write or copy it again")
    except SchemaError as error:
        raise CheckpointError(str(error)) from error


def member(content: Mapping[str, Any], key: str, where: Path) -> dict[str, Any]:
    """Return an object within one that a file holds.

    Raises:
        CheckpointError: It is missing or something else.
    """
    return _object(content.get(key), f"{key!r} in {where}")


def read_layers(entries: object, where: Path | str) -> dict[str, LayerSpec]:
    """Return the layers that ``quantization_config`` describes, by name.

    Raises:
        CheckpointError: An entry is damaged, or a layer shares the tensors of one that has none.
    """
    try:
        layers = {
            name: LayerSpec.from_json(name, entry) for name, entry in _object(entries, f"'layers' in {where}").items()
        }
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    for name, spec in layers.items():
        if spec.shared_with and (spec.shared_with not in layers or layers[spec.shared_with].shared_with):
            raise CheckpointError(f"{where}: layer {name!r} shares the tensors of {spec.shared_with!r}, which has none")
    return layers


def check_files(folder: Path, manifest: Mapping[str, Any], *, verify: bool) -> None:
    """Check that a folder holds the files of its manifest, weights in their size, and no other weights.

    Args:
        folder: The checkpoint.
        manifest: Contents of rankbook.json.
        verify: Also compare the SHA-256 of the weights and of their index.

    Raises:
        CheckpointError: A file is missing, truncated, changed or not listed, or the list itself is damaged.
    """
    files = member(manifest, "files", folder / "rankbook.json")
    for name, entry in files.items():
        _check_entry(folder, name, entry)
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the checkpoint is incomplete, write or copy it again")
        # Small text files may be edited by hand (a chat template, a generation setting); weights may not.
        if path.suffix != ".safetensors" and name != INDEX:
            continue
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, not {entry['bytes']}: truncated or changed; copy it again"
            )
        if verify and sha256_file(path) != entry["sha256"]:
            raise CheckpointError(f"{path} has changed since it was written (SHA-256 differs); copy it again")
    if extra := sorted({path.name for path in folder.glob("*.safetensors")} - set(files)):
        raise CheckpointError(
            f"{folder} holds {', '.join(extra)}, which its rankbook.json does not list: weights of another model, or"
            " saved here by another program; remove them, or copy the checkpoint again"
        )


def tensor_files(folder: Path) -> dict[str, str]:
    """Return the file of each stored tensor by the tensor's name.

    Raises:
        CheckpointError: There are no weights, or the index names files that are not weights of this folder.
    """
    present = {path.name for path in folder.glob("*.safetensors")}
    if not (folder / INDEX).is_file():
        names = dict.fromkeys(tensor_names(folder / WEIGHTS), WEIGHTS)
    else:
        names = member(read_json(folder / INDEX), "weight_map", folder / INDEX)
    if foreign := sorted({str(file) for file in names.values()} - present):
        raise CheckpointError(f"{folder / INDEX} names {foreign[0]!r}, which is not a file of weights in this folder")
    if unused := sorted(present - set(names.values())):
        raise CheckpointError(
            f"{folder} holds {', '.join(unused)}, of which no tensor is used; copy the checkpoint again"
        )
    return names


def check_tensors(where: Path | str, layers: Mapping[str, LayerSpec], stored: Collection[str]) -> None:
    """Check that every tensor of every packed layer is stored.

    Raises:
        CheckpointError: Some are not; the message says how many and names the first.
    """
    wanted = {f"{name}.{part}": name for name, spec in layers.items() for part in spec.tensors()}
    missing = [name for name in wanted if name not in stored]
    if not missing:
        return
    layer = wanted[missing[0]]
    whole = not any(f"{layer}.{part}" in stored for part in layers[layer].tensors())
    reason = f"there is no layer {layer!r}: config.json belongs to another model" if whole else "it is incomplete"
    raise CheckpointError(
        f"{where} lacks {len(missing)} tensors, the first is {missing[0]}; {reason}, write or copy the checkpoint again"
    )


def tensor_names(path: Path) -> list[str]:
    """Return the names of the tensors in a file.

    Raises:
        CheckpointError: It cannot be read.
    """
    with opened(path) as stream:
        return list(stream.keys())


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """`safe_open` whose errors are `CheckpointError`."""
    with _readable(path), safe_open(path, framework="pt") as stream:
        yield stream


class Streams:
    """Files of weights that stay open between reads: safetensors reads the list of a file's tensors at each opening.

    Tensors of a file that stays open must not be changed in place, since later reads see the same pages.
    """

    def __init__(self, piece_bytes: int = 0) -> None:
        """Open files anew when ``piece_bytes`` were read: pages of an open file stay in memory."""
        self._piece_bytes, self._read = piece_bytes, 0
        self._open: dict[Path, Any] = {}

    def tensor(self, path: Path, name: str) -> Tensor:
        """Return a tensor by its name in a file.

        Raises:
            CheckpointError: The file cannot be read, or holds none.
        """
        with _readable(path):
            if (stream := self._open.get(path)) is None:
                stream = self._open[path] = safe_open(path, framework="pt")
            tensor: Tensor = stream.get_tensor(name)
        self._read += tensor.nbytes
        if self._read >= self._piece_bytes:
            self._open, self._read = {}, 0
        return tensor


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; it is missing or truncated, copy it again") from error


def _object(content: object, what: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise CheckpointError(f"{what} holds {type(content).__name__}, not an object; the checkpoint is damaged")
    return content


def _check_entry(folder: Path, name: str, entry: object) -> None:
    plain = PurePosixPath(name)
    if plain.is_absolute() or ".." in plain.parts or "\\" in name or str(plain) != name:
        raise CheckpointError(f"{folder}/rankbook.json lists {name!r}, which is not a plain name in this folder")
    well = isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
    if not well or len(entry["sha256"]) != _SHA256_DIGITS:  # type: ignore[index]
        raise CheckpointError(f"{folder}/rankbook.json: the entry of {name!r} lacks its size or its SHA-256")
