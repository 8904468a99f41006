"""Objects in JSON files from outside: read with one sentence for all that can be wrong, and held against type hints."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


class SchemaError(ValueError):
    """A JSON file that is missing, damaged, or holds something else than what belongs there."""


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: The file.
        advice: What to do about a damaged one, for the message.

    Raises:
        SchemaError: The file cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        return parse_object(path.read_text(encoding="utf-8"), str(path), advice)
    except (OSError, UnicodeDecodeError) as error:
        raise SchemaError(f"{path} cannot be read: {error}; {advice}") from error


def parse_object(text: str, where: str, advice: str) -> dict[str, Any]:
    """`read_object` of text that lies somewhere else.

    Raises:
        SchemaError: As there.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        told = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise SchemaError(f"{where} cannot be read: {told}; {advice}") from error
    if not isinstance(found, dict):
        raise SchemaError(f"{where} holds a {type(found).__name__}, not a JSON object; {advice}")
    return found


def mismatch(value: Any, hint: Any, name: str) -> str:
    """Return what of a JSON value is not as a type hint says, or "".

    A tuple is a list in JSON, a dataclass an object, of which entries may be missing (older versions wrote fewer) and
    unknown ones are left alone.

    Args:
        value: What ``json.loads`` returned.
        hint: A type, a generic of the built-in containers, a union, a dataclass or ``Any``.
        name: Of the value, for the message.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return ""
    if origin in (Union, UnionType):
        return "" if any(not mismatch(value, item, name) for item in inner) else _wrong(value, hint, name)
    if is_dataclass(hint):
        if not isinstance(value, dict):
            return _wrong(value, dict, name)
        kind: Any = hint
        hints = _hints(kind)
        held = [item.name for item in fields(hint) if item.name in value]
        return _first(mismatch(value[key], hints[key], f"{name}.{key}") for key in held)
    container = origin or hint
    items: list[tuple[Any, Any]] | None
    if container in (dict, Mapping):
        kind = inner[1] if inner else Any
        items = list(value.items()) if isinstance(value, dict) else None
    elif container in (list, tuple):
        kind = inner[0] if inner else Any
        items = list(enumerate(value)) if isinstance(value, list) else None
    elif container is float:
        return "" if isinstance(value, (int, float)) and not isinstance(value, bool) else _wrong(value, hint, name)
    else:
        exact = isinstance(value, container) and (container is bool or not isinstance(value, bool))
        return "" if exact else _wrong(value, hint, name)
    if items is None:
        return _wrong(value, container, name)
    return _first(mismatch(item, kind, f"{name}.{key}") for key, item in items)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """Return the type hints of a class: each call of `get_type_hints` evaluates them anew, most of a check's time."""
    return get_type_hints(kind)


def _first(found: Iterable[str]) -> str:
    return next(filter(None, found), "")


def _wrong(value: Any, hint: Any, name: str) -> str:
    wanted = getattr(hint, "__name__", str(hint))
    shown = repr(value) if isinstance(value, (int, float, str, type(None))) else type(value).__name__
    return f"{name} is {shown[:60]}, not {wanted}"
