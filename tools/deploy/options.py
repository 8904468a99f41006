"""What a user chooses about an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rankbook.calibration.option import Options, option
from rankbook.exporter.options import DTYPES, SAMPLES, ExportOptions
from rankbook.plugins import library
from rankbook.tools.deploy.profiles import Limits
from rankbook.tools.errors import MissingError, UsageError
from rankbook.tools.runtimes import builders, trt


@dataclass(frozen=True)
class BuildOptions(Options):
    """What to build."""

    target: str = option("rtx", "TensorRT-RTX (no GPU needed) or TensorRT", choices=builders())
    compute_capability: tuple[str, ...] = option(
        ("SM80", "SM86", "SM89", "SM120"),
        f"GPUs to build for, of {', '.join(trt.RTX_CAPABILITIES)}; rtx only",
        metavar="SM",
    )
    max_batch: int = option(1, "largest batch", metavar="N", least=1)
    max_sequence: int | None = option(
        None,
        "longest prompt of one call, in tokens; default: 512, or the context if that is shorter",
        metavar="N",
        least=1,
    )
    max_context: int | None = option(
        None,
        "longest context, in tokens; default: 1024, or the model's context if that is shorter; a file with a static"
        " cache has its own",
        metavar="N",
        least=1,
    )
    dtype: str | None = option(
        None, "for a checkpoint: type of activations and unquantized weights; default: fp16", choices=DTYPES
    )
    sample: str | None = option(
        None,
        "for a checkpoint: greedy adds the best token as an output, top-k the best tokens; default: none",
        choices=SAMPLES,
    )
    workspace: int | None = option(None, "limit of the builder's workspace, in MiB", metavar="MIB")
    plugins: str = option(
        "library",
        "kernels from the plugin library, or as PTX inside the engine (trt only; never tried on a GPU)",
        choices=("library", "aot"),
    )
    no_plugins: bool = option(
        False, "build the function bodies even if the plugin library (`make native-cuda`) is there"
    )
    self_contained: bool = option(
        False, "store the plugin library in the engine (loading it needs runtime.engine_host_code_allowed = True)"
    )
    keep_files: bool = option(False, "keep the builder's log (and an inlined graph)")

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Compute capabilities to build for, e.g. ``SM86``; empty is the present GPU (trt).

        Raises:
            UsageError: TensorRT-RTX does not build for one.
        """
        return capabilities(self.compute_capability) if self.target == "rtx" else ()

    def limits(self, held: int | None = None) -> Limits:
        """Return the shapes to serve; ``held`` is the length of a static cache.

        Raises:
            UsageError: The cache has another length than is asked for.
            ValueError: They contradict each other.
        """
        if held and self.max_context not in (None, held):
            raise UsageError(
                f"--max-context is {self.max_context} and the file's static cache holds {held} positions; leave the"
                " flag out, or export with it"
            )
        context = held or self.max_context or Limits.context
        return Limits(self.max_batch, self.max_sequence or min(Limits.sequence, context), context)

    def graph(self) -> ExportOptions:
        """Return how a checkpoint is exported for the engine."""
        return ExportOptions(
            dtype=self.dtype or "fp16",
            graph="static",
            sample=self.sample or "none",
            max_context=self.max_context,
        )

    def check_source(self, *, checkpoint: bool) -> None:
        """Refuse options of a checkpoint where there is none.

        Raises:
            UsageError: The message names them.
        """
        if given := [f"--{name}" for name in ("dtype", "sample") if getattr(self, name) and not checkpoint]:
            raise UsageError(
                f"{' and '.join(given)} say how a checkpoint is exported, and the model is exported already; leave them"
                " out, or give the checkpoint"
            )

    @property
    def workspace_bytes(self) -> int | None:
        """Bound of the builder's workspace, or None."""
        return self.workspace * 2**20 if self.workspace else None

    @property
    def aot(self) -> bool:
        """Whether the kernels are stored as PTX in the engine (`rankbook.plugins.aot`)."""
        return self.plugins == "aot"

    def check(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            UsageError: Options that exclude each other, or compute capabilities that do not exist.
            ValueError: Limits that contradict each other.
            MissingError: The PTX is not built.
        """
        _ = self.capabilities, self.limits(), self.graph()
        if not self.aot:
            return
        if self.target == "rtx":
            raise UsageError(
                "TensorRT-RTX has no plugins of the form --plugins aot; give --target trt, or --self-contained to store"
                " the plugin library in the engine"
            )
        if self.self_contained or self.no_plugins:
            other = "--self-contained" if self.self_contained else "--no-plugins"
            raise UsageError(f"--plugins aot and {other} contradict each other; give one of them")
        from rankbook.plugins import aot

        if reason := aot.unavailable():
            raise MissingError(reason)

    def form(self) -> str:
        """Return where the kernels are, for people."""
        if self.aot:
            return "PTX in the engine"
        return "library in the engine" if self.self_contained else "library loaded from its file"

    def plugin_library(self) -> Path | None:
        """Return the plugin library to build with, or None for the function bodies."""
        usable = not self.no_plugins and not self.aot and library.unavailable("trt") is None
        return library.library("trt") if usable else None


def capabilities(names: Sequence[str]) -> tuple[str, ...]:
    """Return compute capabilities as ``SM86``, from ``86``, ``8.6``, ``sm86`` and comma-separated lists of these.

    Raises:
        UsageError: TensorRT-RTX does not build for one, or none is named.
    """
    wanted = [part for name in names for part in name.replace(",", " ").split()]
    found = tuple(
        dict.fromkeys("SM" + name.upper().removeprefix("SM").removeprefix("_").replace(".", "") for name in wanted)
    )
    unknown = [name for name in found if name not in trt.RTX_CAPABILITIES]
    if unknown or not found:
        allowed = ", ".join(trt.RTX_CAPABILITIES)
        raise UsageError(
            f"--compute-capability {', '.join(unknown) or '(none)'} is not available; choose from {allowed}"
        )
    return found
