"""The JSON that eval, parity, bench and the demo write: known by its keys, and made into what it was written from."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from rankbook.calibration.evaluate import EvalResult
from rankbook.calibration.schema import SchemaError, read_object
from rankbook.tools.bench.device_bench import DeviceReport
from rankbook.tools.bench.layer_bench import LayerResult
from rankbook.tools.bench.model_bench import ModelResult
from rankbook.tools.evaluate.engine_parity import EngineParityReport
from rankbook.tools.evaluate.parity import ParityReport

LARGEST = 256 << 20
"""Bytes of a file that are read: the longest report of a bench has some kilobytes, and a page is made of all of it."""
_ADVICE = "write the report again"
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class _Evaluated:
    """What both reports of ``rankbook eval`` say of how it ran.

    Attributes:
        model: As it was given.
        kernels: What computed packed layers.
        flags: Further flags that change the result, by name; empty in reports of before they were written.
    """

    model: str
    kernels: str = ""
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def runtime(self) -> str:
        """What computed it, with what was rounded beside the weights whatever the model says."""
        rounded = [f"--{name} {self.flags[name]}" for name in ("activations", "kv-bits") if name in self.flags]
        return " ".join([self.kernels, *rounded])

    def _command(self, *words: object) -> str:
        """Return the command that repeats it."""
        typed = ["rankbook", "eval", self.model, *map(str, words)]
        for name, value in self.flags.items():
            typed += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return shlex.join(typed)


@dataclass(frozen=True, kw_only=True)
class Evaluation(_Evaluated, EvalResult):
    """What ``rankbook eval --text --json`` prints.

    Attributes:
        text: As it was given; empty in reports of before it was written.
        reference: The unquantized model, as it was given.
    """

    text: str | None = None
    reference: str | None = None

    @property
    def on(self) -> str:
        """What was evaluated on; perplexities are comparable where it is the same."""
        shape = " x ".join(str(self.windows[key]) for key in ("count", "length") if key in self.windows)
        chat = ", in the chat template" if self.flags.get("chat") else ""
        name = Path(self.text).name if self.text else "a text that is not named"
        return f"{name}, {shape or self.tokens} tokens{chat}"

    @property
    def command(self) -> str:
        """The command that repeats it; empty where the text is not named."""
        if not self.text:
            return ""
        given = {**self.windows.get("asked", {}), "reference": self.reference}
        flags = [(f"--{name.replace('_', '-')}", value) for name, value in given.items() if value]
        return self._command("--text", self.text, *(word for flag in flags for word in flag))


@dataclass(frozen=True, kw_only=True)
class TaskScores(_Evaluated):
    """What ``rankbook eval --tasks --json`` prints.

    Attributes:
        tasks: Metrics of each task.
        asked: Tasks as they were named, and the flags that say how much of them; empty in reports of before it was
            written.
    """

    tasks: dict[str, dict[str, Any]]
    asked: dict[str, Any] = field(default_factory=dict)

    @property
    def on(self) -> str:
        """What of the tasks was taken, where it is not all of them as they are."""
        words = {"limit": "the first {} documents", "fewshot": "{} examples"}
        return ", ".join(text.format(self.asked[name]) for name, text in words.items() if name in self.asked)

    @property
    def command(self) -> str:
        """The command that repeats it; empty in reports that do not say what was asked."""
        flags = [(f"--{name}", value) for name, value in self.asked.items() if name != "tasks"]
        tasks = self.asked.get("tasks")
        return self._command("--tasks", *tasks, *(word for flag in flags for word in flag)) if tasks else ""


@dataclass(frozen=True)
class ModelSpeeds:
    """What ``rankbook bench MODEL...`` writes."""

    machine: dict[str, Any]
    models: list[ModelResult]


@dataclass(frozen=True)
class LayerSpeeds:
    """What ``rankbook bench`` writes of single layers."""

    machine: dict[str, Any]
    layers: list[LayerResult]


@dataclass
class DeviceSpeeds(DeviceReport):
    """What ``rankbook bench --device cuda`` writes."""

    machine: dict[str, Any] = field(default_factory=dict)
    copy_bandwidth: float | None = None


@dataclass(frozen=True)
class DemoStage:
    """A stage of the demo, see `rankbook.tools.stages.Stage`."""

    name: str
    command: str
    seconds: float
    peak_rss_bytes: int
    passed: bool


@dataclass(frozen=True)
class DemoReport:
    """What ``rankbook demo`` writes, as far as the page shows it."""

    model: str
    stages: list[DemoStage]
    note: str = ""


Speeds = ModelSpeeds | LayerSpeeds | DeviceSpeeds
Document = Evaluation | TaskScores | ParityReport | EngineParityReport | Speeds | DemoReport
_KNOWN: Mapping[frozenset[str], type] = {
    frozenset(keys.split()): kind
    for keys, kind in (
        ("stages perplexity_before", DemoReport),
        ("engine runtime references tolerance", EngineParityReport),
        ("model checkpoint tolerance operators", ParityReport),
        ("model perplexity tokens", Evaluation),
        ("model kernels tasks", TaskScores),
        ("machine decode prefill footprints", DeviceSpeeds),
        ("machine models", ModelSpeeds),
        ("machine layers", LayerSpeeds),
    )
}
"""Keys that tell what a report is; the first that fits."""


def read(path: Path) -> Document | None:
    """Return the report in a file, or None where it is JSON of something else.

    Raises:
        SchemaError: It cannot be read, is no JSON object, or a field of it holds what does not belong there.
    """
    if path.stat().st_size > LARGEST:
        raise SchemaError(f"{path} has {path.stat().st_size} bytes, more than a report has; give reports only")
    data = read_object(path, _ADVICE)
    kind = next((kind for keys, kind in _KNOWN.items() if keys <= data.keys()), None)
    if kind is None:
        return None
    found: Document = make(kind, data, str(path))
    return found


def make(kind: type[_T], value: Any, name: str) -> _T:
    """Return a JSON value as ``kind``: a type, a generic of the built-in containers, a union or a dataclass.

    JSON has no infinity: where a float is wanted, null is not-a-number. Entries that ``kind`` does not know are left
    out.

    Raises:
        SchemaError: It is something else; the message begins with ``name``.
    """
    made: _T = _make(kind, value, name)
    return made


def _make(hint: Any, value: Any, name: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        if value is None and type(None) in inner:
            return None
        return _first_that_fits([item for item in inner if item is not type(None)], value, name)
    if is_dataclass(hint):
        return _dataclass(hint, _checked(value, dict, name), name)
    container: Any = origin or hint
    if container in (dict, Mapping):
        kind = inner[1] if inner else Any
        return {key: _make(kind, item, f"{name}: {key}") for key, item in _checked(value, dict, name).items()}
    if container in (list, tuple):
        return container(_make(inner[0], item, f"{name}: {at}") for at, item in enumerate(_checked(value, list, name)))
    if container is float:
        try:
            return math.nan if value is None else float(_checked(value, (int, float), name))
        except OverflowError:
            return math.inf
    return _checked(value, container, name)


def _first_that_fits(hints: list[Any], value: Any, name: str) -> Any:
    try:
        return _make(hints[0], value, name)
    except SchemaError:
        if len(hints) == 1:
            raise
        return _first_that_fits(hints[1:], value, name)


def _dataclass(kind: Any, value: dict[str, Any], name: str) -> Any:
    hints, held = get_type_hints(kind), {}
    for item in fields(kind):
        if item.name in value:
            held[item.name] = _make(hints[item.name], value[item.name], f"{name}: {item.name}")
        elif item.default is MISSING and item.default_factory is MISSING:
            raise SchemaError(f"{name} lacks {item.name}; {_ADVICE}")
    return kind(**held)


def _checked(value: Any, kind: Any, name: str) -> Any:
    """Return the value if it is of the type; true and false are no numbers."""
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    wanted = " or ".join(item.__name__ for item in (kind if isinstance(kind, tuple) else (kind,)))
    shown = repr(value)[:60] if isinstance(value, (int, float, str, type(None))) else type(value).__name__
    raise SchemaError(f"{name} is {shown}, not {wanted}; {_ADVICE}")
