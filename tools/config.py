"""Configuration files: one YAML or TOML file serves every verb, and flags override it.

Top-level keys are names of flags (``bits: 3``), used by every verb that has such a flag, or names of verbs that hold
the flags of that verb alone (``quantize: {bits: 3}``).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rankbook.calibration.checkpoint.files import write_text_atomic
from rankbook.tools.errors import UsageError
from rankbook.tools.report import plain

NOT_STORED = ("json", "config", "quiet", "debug")
"""Flags about how a command talks, not about what it does."""


def read(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        UsageError: The file is missing, is not YAML or TOML, or does not hold a mapping.
    """
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise UsageError(f"configuration {path} has suffix {path.suffix!r}; give a .yaml, .yml or .toml file")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"configuration {path} does not exist; check the path") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"configuration {path} is not UTF-8 text: {error}") from None
    values = _parse_toml(path, text) if path.suffix == ".toml" else _parse_yaml(path, text)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"configuration {path} holds a {type(values).__name__}; it must map names of flags to values")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _parse_yaml(path: Path, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"configuration {path} is not valid YAML: {error}") from None


def _parse_toml(path: Path, text: str) -> Any:
    try:
        import tomllib as toml
    except ModuleNotFoundError:  # Python 3.10
        import tomli as toml  # type: ignore[no-redef,import-not-found,unused-ignore]
    try:
        return toml.loads(text)
    except toml.TOMLDecodeError as error:
        raise UsageError(f"configuration {path} is not valid TOML: {error}") from None


def select(
    values: Mapping[str, Any], verb: str, flags: Mapping[str, Mapping[str, argparse.Action]], source: str
) -> dict[str, Any]:
    """Return the entries of a configuration that concern ``verb``, checked and converted.

    Args:
        values: What `read` returned.
        verb: The verb that runs.
        flags: The flags of every verb, by verb and name.
        source: Named in errors.

    Raises:
        UsageError: A key that no verb knows, or a value that the flag does not accept.
    """
    everything = {name for actions in flags.values() for name in actions}
    chosen: dict[str, Any] = {}
    for key, value in values.items():
        if key in flags and isinstance(value, Mapping):
            section = {str(name).replace("-", "_"): item for name, item in value.items()}
            _check_known(section, flags[key], f"{source}, section {key}")
            if key == verb:
                chosen |= section
        elif key in everything:
            if key in flags[verb]:
                chosen.setdefault(key, value)
        else:
            _check_known([key], sorted({*everything, *flags}), source)
    actions = flags[verb]
    return {key: _convert(actions[key], value, f"{source}: {key}") for key, value in chosen.items()}


def _check_known(keys: Iterable[str], known: Iterable[str], source: str) -> None:
    names = sorted(known)
    for key in keys:
        if key not in names:
            raise UsageError(f"{source}: unknown key {key!r}; the known ones are {', '.join(names)}")


def _convert(action: argparse.Action, value: Any, source: str) -> Any:
    if action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction):
        items = value if isinstance(value, (list, tuple)) else [value]
        return [_convert_one(action, item, source) for item in items]
    if isinstance(action, (argparse._StoreTrueAction, argparse.BooleanOptionalAction)):
        if not isinstance(value, bool):
            raise UsageError(f"{source} is {value!r}; give true or false")
        return value
    return None if value is None else _convert_one(action, value, source)


def _convert_one(action: argparse.Action, value: Any, source: str) -> Any:
    if isinstance(value, (dict, list)):
        raise UsageError(f"{source} is a {type(value).__name__}; give one value")
    converter = action.type if callable(action.type) else str
    try:
        converted = converter(str(value))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UsageError(f"{source} is {value!r}: {error}") from None
    if action.choices is not None and converted not in action.choices:
        raise UsageError(f"{source} is {value!r}; choose one of {', '.join(map(str, action.choices))}")
    return converted


def write_resolved(folder: Path, verb: str, values: Mapping[str, Any]) -> Path:
    """Write the values that a verb ran with as ``rankbook-<verb>.yaml``, usable as ``--config``."""
    import yaml

    kept = {name: plain(value) for name, value in values.items() if name not in NOT_STORED and value is not None}
    path = folder / f"rankbook-{verb}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, yaml.safe_dump({verb: kept}, sort_keys=True, allow_unicode=True))
    return path
