"""Configuration files: one YAML or TOML file serves every verb, and flags override it.

Top-level keys are names of flags (``bits: 3``), used by every verb that has such a flag, or names of verbs that hold
the flags of that verb alone (``quantize: {bits: 3}``).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from rankbook.calibration.checkpoint.files import write_text_atomic
from rankbook.calibration.option import WHERE, near
from rankbook.tools.errors import UsageError
from rankbook.tools.flags import Flag
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
    values = _parsed(path, text)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"configuration {path} holds a {type(values).__name__}; it must map names of flags to values")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _parsed(path: Path, text: str) -> Any:
    import yaml

    try:
        import tomllib as toml
    except ModuleNotFoundError:  # Python 3.10
        import tomli as toml  # type: ignore[no-redef,import-not-found,unused-ignore]
    try:
        return toml.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (toml.TOMLDecodeError, yaml.YAMLError) as error:
        kind = "TOML" if path.suffix == ".toml" else "YAML"
        raise UsageError(f"configuration {path} is not valid {kind}: {error}") from None


def select(
    values: Mapping[str, Any], verb: str, flags: Mapping[str, Mapping[str, Flag]], source: str
) -> dict[str, Any]:
    """Return the entries of a configuration that concern ``verb``, checked and converted, by the names of fields.

    Args:
        values: What `read` returned.
        verb: The verb that runs.
        flags: The flags of every verb, by verb and field.
        source: Named in errors.

    Raises:
        UsageError: A key that no verb knows, two names of one option, or a value that the option does not take.
    """
    keys = {name: {key: flag for flag in items.values() for key in flag.keys} for name, items in flags.items()}
    everything = {key for items in keys.values() for key in items}
    chosen: dict[str, Any] = {}
    for key, value in values.items():
        if key in flags and isinstance(value, Mapping):
            section = {str(name).replace("-", "_"): item for name, item in value.items()}
            _check_known(section, keys[key], f"{source}, section {key}", key)
            if key == verb:
                chosen |= section
        elif key in everything:
            if key in keys[verb]:
                chosen.setdefault(key, value)
        else:
            _check_known([key], {*everything, *flags}, source, verb)
    found: dict[str, Any] = {}
    for key, value in chosen.items():
        if value is None:  # a key without a value says nothing
            continue
        flag = keys[verb][key]
        if flag.option.name in found:
            raise UsageError(f"{source}: {' and '.join(flag.keys)} are one option; give one of them")
        found[flag.option.name] = flag.convert(value, f"{source}: {key}")
    return found


def _check_known(keys: Iterable[str], known: Collection[str], source: str, verb: str) -> None:
    for key in keys:
        if key not in known:
            raise UsageError(
                f"{source}: unknown key {key!r}; keys are flags without dashes, which `rankbook {verb} --help` lists"
                f"{near(key, known)}"
            )


def _located(value: Any, flag: Flag) -> Any:
    """Return a path from the root; of a text that may be one, such as a model, where something lies there."""
    if isinstance(value, Path) or (
        isinstance(value, str) and flag.option.about.group == WHERE and Path(value).exists()
    ):
        return os.path.abspath(value)  # noqa: PTH100 - without what lies behind a link, but without ".."
    return value


def write_resolved(folder: Path, verb: str, flags: Mapping[str, Flag], options: Any) -> Path:
    """Write the options that a verb ran with as ``rankbook-<verb>.yaml``, usable as ``--config`` from every folder."""
    import yaml

    kept = {
        flag.keys[0]: plain(_located(getattr(options, name), flag))
        for name, flag in flags.items()
        if name not in NOT_STORED and getattr(options, name) is not None
    }
    path = folder / f"rankbook-{verb}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, yaml.safe_dump({verb: kept}, sort_keys=True, allow_unicode=True))
    return path
