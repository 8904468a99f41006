"""The options that say what computes packed layers; the same for every verb that runs exported files."""

from __future__ import annotations

from dataclasses import dataclass

from rankbook.calibration.option import Options, option
from rankbook.tools.errors import UsageError
from rankbook.tools.runtimes import AUTO, kernels

_TEXT = (
    "bodies: the function bodies in the ONNX file; native: the native library; auto: native where it is built;"
    " native-cuda: the library on an NVIDIA GPU; reference: numpy only, slow, to check the others"
)


@dataclass(frozen=True, kw_only=True)
class KernelOptions(Options):
    """What computes packed layers.

    Raises:
        UsageError: The two options contradict each other.
    """

    kernels: str = option(
        AUTO, f"{_TEXT}; native-int8: native, with activations rounded to 8 bits; the fastest", choices=kernels()
    )
    no_native: bool = option(False, "the same as --kernels bodies")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.no_native and self.kernels.startswith("native"):
            raise UsageError(f"--no-native and --kernels {self.kernels} contradict each other; give one of them")

    def chosen_kernels(self) -> str:
        """Return the name of a runtime, or ``auto``."""
        return "bodies" if self.no_native else self.kernels


@dataclass(frozen=True, kw_only=True)
class ExactKernelOptions(KernelOptions):
    """The same without the kernels that round activations, for checks of exactness."""

    kernels: str = option("bodies", _TEXT, choices=kernels(exact=True))
