"""Changes of valid files: of their bytes, and of the values that they hold."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

DEEP = 3000
"""Levels of nested lists; Python's own limit of recursion is 1000."""
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 255, 2**31, 2**31 - 1, 2**40, 2**63 - 1, -(2**63), 10**30, 0.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "../x", "/etc/passwd", "a/b", ".", "\x1b[31mred\n", "\ud800", "9" * 400),
    *([], {}, [[]], [None], [-1], [2**40, 2**40], [1.5], {"": None}, "Z" * 100_000),
)
"""Values of the wrong type, size or content."""


def mutated(content: bytes, name: str, rng: random.Random) -> bytes:
    """Return a changed file: mostly of its kind still, so that it passes the first check."""
    by_kind: dict[str, Callable[[bytes, random.Random], bytes]] = {
        ".json": _json,
        ".onnx": _onnx,
        ".safetensors": _safetensors,
    }
    structured = by_kind.get(Path(name).suffix)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content = structured(content, rng) if structured and rng.random() < 0.8 else _bytes(content, rng)
    return content


def replace_file(path: Path, outside: Path, rng: random.Random) -> None:
    """Put nothing, a folder, or a link out of the folder or to itself in the place of a file."""
    path.unlink()
    match rng.randrange(4):
        case 0:
            path.mkdir()
        case 1:
            path.symlink_to(outside / "nothing")
        case 2:
            path.symlink_to(path.name)


def _bytes(content: bytes, rng: random.Random) -> bytes:
    data, place = bytearray(content), rng.randrange(len(content) + 1)
    match rng.randrange(7):
        case 0:
            del data[place:]
        case 1:
            del data[place : place + rng.randrange(1, 64)]
        case 2:
            data[place:place] = rng.randbytes(rng.randrange(1, 32))
        case 3:
            data[place : place + 8] = struct.pack("<q", rng.choice((-1, 2**62, 2**32, 2**31, 0, 1)))
        case 4:
            data[place:place] = data[rng.randrange(len(data) + 1) :][:256]
        case 5:
            data[place : place + 4] = b"\xff" * 4
        case _:
            for _ in range(rng.randrange(1, 9)):
                if data:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _json(content: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return _bytes(content, rng)
    if rng.random() < 0.02:
        return b"[" * DEEP + b"]" * DEEP
    return json.dumps(_value(value, rng)).encode()


def _text(text: str, rng: random.Random) -> str:
    """Change a text that may be JSON itself, as the metadata of a file are."""
    return _json(text.encode(), rng).decode(errors="replace") if text[:1] in "{[" else rng.choice(("", "x", text * 2))


def _value(value: Any, rng: random.Random) -> Any:
    """Return a JSON value of which one part, at any depth, is another one."""
    places = [*_places(value)]
    if not places or rng.random() < 0.02:
        return rng.choice(HOSTILE)
    holder, key = rng.choice(places)
    match rng.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(("", "../x", "x", "\u202e", key + "2"))] = holder.pop(key)
        case 2:
            other, at = rng.choice(places)
            holder[key] = copy.deepcopy(other.get(at) if isinstance(other, dict) else other[at : at + 1])
        case 3 if isinstance(holder[key], int):
            holder[key] += rng.choice((-1, 1, 2, 2**32))
        case 4 if isinstance(holder[key], str):
            holder[key] = _text(holder[key], rng)
        case _:
            holder[key] = rng.choice(HOSTILE)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return every (holder, key or index) of a JSON value."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        found += [(holder, key) for key in keys]
        waiting += [holder[key] for key in keys]
    return found


def _safetensors(content: bytes, rng: random.Random) -> bytes:
    """Change the header, which is JSON behind its length."""
    if len(content) < 8 or rng.random() < 0.2:  # the tensors themselves
        return _bytes(content, rng)
    size = int.from_bytes(content[:8], "little")
    header = _header(content[8 : 8 + size], rng)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def _header(content: bytes, rng: random.Random) -> bytes:
    """Change the header, or of it only the metadata: they are looked at only where the tensors are well."""
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        return _json(content, rng)
    metadata = whole.get("__metadata__") if isinstance(whole, dict) else None
    texts = [key for key, text in metadata.items() if isinstance(text, str)] if isinstance(metadata, dict) else []
    if not texts or not isinstance(metadata, dict) or rng.random() < 0.5:
        return _json(content, rng)
    key = rng.choice(texts)
    metadata[key] = _text(metadata[key], rng)
    return json.dumps(whole).encode()


def _onnx(content: bytes, rng: random.Random) -> bytes:
    """Change a field of a message of the graph, at any depth."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception:
        return _bytes(content, rng)
    inside = [tensor for tensor in _tensors(model) if tensor.raw_data and not tensor.external_data]
    if inside and rng.random() < 0.3:
        _reshape(rng.choice(inside), rng)
        return model.SerializeToString()
    message: Any = model
    for _ in range(rng.randrange(1, 9)):
        below = [item for field, held in message.ListFields() if field.message_type for item in _items(held)]
        if not below or rng.random() < 0.1:
            break
        message = rng.choice(below)
    fields = message.ListFields()
    if not fields:
        return content
    field, held = rng.choice(fields)
    if field.message_type:
        _change_messages(message, field.name, held, rng)
    else:
        _change_scalars(message, field, held, rng)
    return model.SerializeToString()


def _tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    attributes = (item for node in model.graph.node for item in node.attribute)
    return [*model.graph.initializer, *(item.t for item in attributes if item.HasField("t"))]


def _reshape(tensor: onnx.TensorProto, rng: random.Random) -> None:
    """Give a tensor other sizes or another type, and as many elements as they say: a file that ONNX Runtime opens."""
    dims, kind = list(tensor.dims), tensor.data_type
    match rng.randrange(6):
        case 0:
            kind = rng.choice((1, 2, 3, 6, 7, 10, 11, 16))  # of the usual types
        case 1:
            rng.shuffle(dims)
        case 2 if dims:
            del dims[rng.randrange(len(dims))]
        case 3:
            dims.insert(rng.randrange(len(dims) + 1), rng.choice((1, 2)))
        case _ if dims:
            at = rng.randrange(len(dims))
            dims[at] = rng.choice((0, 1, 2, 32, dims[at] - 1, dims[at] + 1, 2 * dims[at]))
    if kind not in onnx.helper.get_all_tensor_dtypes():  # another change has been here
        return
    size = math.prod(dims) * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
    if not 0 <= size < 1 << 20:
        return
    held = tensor.raw_data or b"\0"
    tensor.CopyFrom(onnx.TensorProto(name=tensor.name, dims=dims, data_type=kind))
    tensor.raw_data = (held * (size // len(held) + 1))[:size]


def _items(held: Any) -> list[Any]:
    return [held] if hasattr(held, "ListFields") else list(held)


def _change_messages(message: Any, name: str, held: Any, rng: random.Random) -> None:
    if hasattr(held, "ListFields"):
        message.ClearField(name)
    elif rng.random() < 0.5:
        del held[rng.randrange(len(held))]
    else:
        held.append(rng.choice(list(held)))


def _change_scalars(message: Any, field: Any, held: Any, rng: random.Random) -> None:
    texts = ("", "x", "../x", "/etc/passwd", "x" * 10_000, "\x1b[2J")
    numbers = (0, 1, -1, 3, 2**31 - 1, -(2**31), 2**62)
    kinds = {field.CPPTYPE_STRING: texts, field.CPPTYPE_FLOAT: (0.0, -1.0, float("nan"), 1e38)}
    value: Any = rng.choice(kinds.get(field.cpp_type, numbers))
    if field.type == field.TYPE_BYTES:
        value = rng.choice((b"", b"\xff\xfe", b"0" * 100, bytes(held if isinstance(held, bytes) else held[0])[:-1]))
    try:
        if isinstance(held, (int, float, str, bytes)):
            setattr(message, field.name, value)
        else:
            held[rng.randrange(len(held))] = value
    except (ValueError, TypeError):  # an enumeration or a range that does not hold it
        message.ClearField(field.name)
