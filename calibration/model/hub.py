"""Models of the Hugging Face hub at a revision."""

from __future__ import annotations

from dataclasses import dataclass

from rankbook.calibration.checkpoint.extras import WEIGHTS
from rankbook.calibration.option import WHERE, Options, option
from rankbook.calibration.source import LOADABLE, Kind, fetched, identify

_UNREAD = [f"*{end}" for end in WEIGHTS if end not in (".safetensors", ".index.json")]
"""Weights in other formats than the one that is read."""


@dataclass(frozen=True, kw_only=True)
class CodeOptions(Options):
    """Options of what loads models, which may bring their own code."""

    trust_remote_code: bool = option(False, "run Python code from the model's folder; read it first", group=WHERE)


@dataclass(frozen=True, kw_only=True)
class HubOptions(CodeOptions):
    """Options of what loads models of the hub."""

    revision: str | None = option(
        None, "branch, tag or commit of MODEL, a model of the Hugging Face hub", metavar="REVISION", group=WHERE
    )


def at_revision(source: str, revision: str | None) -> str:
    """Return what to load: ``source``, or the folder of its revision, fetched where need be.

    Raises:
        ValueError: A revision of something that is no model of the hub, or one that cannot be fetched.
    """
    if revision is None:
        return source
    found = identify(source, LOADABLE)
    if found.kind is not Kind.HUB:
        raise ValueError(f"--revision is for models of the Hugging Face hub, and {source} is {found.kind.value}")
    try:
        return str(fetched(source, _UNREAD, revision))
    except Exception as error:  # the network, the hub and the library raise many types
        raise ValueError(f"revision {revision!r} of {source} cannot be fetched: {error}") from error
