"""The runtimes, discovered: a module here that defines ``RUNTIMES`` adds them. Heavy imports are inside functions."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rankbook.calibration.source import Kind, Source, identify
from rankbook.tools.errors import MissingError, UsageError
from rankbook.tools.runtimes.base import LanguageModel, Runtime, Setting

if TYPE_CHECKING:
    from rankbook.tools.deploy.manifest import EngineReport
    from rankbook.tools.deploy.options import BuildOptions

__all__ = ["AUTO", "LanguageModel", "Runtime", "Setting", "build_engine", "builders", "find", "kernels", "open_model"]
__all__ += ["peers", "runtimes"]

AUTO = "auto"
"""Stands for the first automatic runtime that is available for a model."""


@functools.cache
def runtimes() -> Mapping[str, Runtime]:
    """Return every runtime by name."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return {runtime.name: runtime for module in modules for runtime in getattr(module, "RUNTIMES", ())}


def kernels(*, exact: bool = False) -> tuple[str, ...]:
    """Return what may compute an exported file, ``auto`` first; with ``exact``, only what rounds no activations."""
    found = [item for item in runtimes().values() if item.open and Kind.ONNX in item.kinds and not item.peer]
    return (AUTO, *(item.name for item in found if item.exact or not exact))


def peers() -> Mapping[str, Runtime]:
    """Return the runtimes of other projects by name."""
    return {name: item for name, item in runtimes().items() if item.peer}


def builders() -> tuple[str, ...]:
    """Return the names of the runtimes that build engines: the targets of ``rankbook build``."""
    return tuple(name for name, item in runtimes().items() if item.build)


def find(source: str | Path, name: str = AUTO) -> tuple[Runtime, Source]:
    """Say what ``source`` is and what runs it.

    Args:
        source: Hugging Face folder or id, GGUF, checkpoint, exported folder or ``.onnx`` file.
        name: A runtime, or ``auto``.

    Raises:
        UsageError: There is no model, or it is not one that the runtime opens.
        MissingError: The runtime cannot be used on this machine.
    """
    named = runtimes().get(name)
    if named is not None:
        named.require()
    try:
        found = identify(source, named.kinds if named else frozenset(Kind))
    except ValueError as error:
        what = f"; {name} opens {named.opens}" if named and named.opens else ""
        raise UsageError(f"{error}{what}") from None
    return named or _automatic(found), found


def _automatic(source: Source) -> Runtime:
    opening = [item for item in runtimes().values() if item.automatic and item.open and source.kind in item.kinds]
    fitting = [item for item in opening if item.fits(source)]
    if not fitting:
        raise UsageError(f"{source.path} is {source.kind.value}, which no runtime opens; give the model it came from")
    reasons = [item.unavailable() for item in fitting]
    for item, reason in zip(fitting, reasons, strict=True):
        if reason is None:
            return item
    raise MissingError("; ".join(filter(None, reasons)))


def open_model(
    source: str | Path, runtime: str = AUTO, setting: Setting | None = None, *, tokenizer: str | None = None
) -> LanguageModel:
    """Load a model.

    >>> model = rankbook.open_model("onnx", "bodies", rankbook.Setting(threads=1))
    >>> model.start(model.tokenizer("the", return_tensors="np").input_ids).ndim
    1

    Args:
        source: See `find`.
        runtime: The runtime, or ``auto``.
        setting: How it is opened.
        tokenizer: Model whose tokenizer is used instead of the model's own.

    Raises:
        UsageError: There is no model, or the runtime refuses it.
        MissingError: The runtime is needed and cannot be used on this machine.
    """
    chosen, found = find(source, runtime)
    if chosen.open is None:
        raise UsageError(f"{chosen.name} builds engines and does not run models; choose another runtime")
    setting = setting or Setting()
    if setting.device != AUTO and not chosen.devices:
        raise UsageError(
            f"--device {setting.device} says where PyTorch computes, and {found.path} is run by {chosen.title};"
            " leave it out (an exported file runs on an NVIDIA GPU with --kernels native-cuda)"
        )
    model = chosen.open(found, setting)
    if tokenizer is not None:
        from rankbook.calibration.model.loading import load_tokenizer

        model.tokenizer = load_tokenizer(tokenizer)
    return model


def build_engine(
    target: str, source: Path, output: Path, options: BuildOptions, progress: Callable[[float, str | None], None]
) -> EngineReport:
    """Build an engine from an exported file, see `rankbook.tools.deploy.engine.build`.

    Raises:
        MissingError: The builder cannot be used on this machine.
        UsageError: There is no such builder.
    """
    runtime = runtimes()[target]
    if runtime.build is None:
        raise UsageError(f"{target} builds no engines; choose from {', '.join(builders())}")
    if reason := runtime.unavailable():
        raise MissingError(f"--target {target} cannot be built: {reason}")
    return runtime.build(source, output, options, progress)
