"""The flags that say what computes packed layers; the same for every command that runs exported files."""

from __future__ import annotations

import argparse

from rankbook.tools.command import Flags
from rankbook.tools.errors import UsageError
from rankbook.tools.runtimes.ort import EXACT_KERNELS, KERNELS


def add_kernel_flags(flags: Flags, *, default: str = "auto", exact: bool = False) -> None:
    """Declare ``--kernels`` and ``--no-native``; with ``exact``, without the kernels that round activations."""
    text = "bodies in the ONNX file, our native library, or auto; native-cuda is our library on an NVIDIA GPU"
    if not exact:
        text += "; native-int8 rounds activations to 8 bits inside, the fastest"
    flags.add("--kernels", choices=EXACT_KERNELS if exact else KERNELS, default=default, text=text)
    flags.add("--no-native", action="store_true", default=False, text="the same as --kernels bodies")


def chosen_kernels(options: argparse.Namespace) -> str:
    """Return one of `KERNELS`.

    Raises:
        UsageError: The two flags contradict each other.
    """
    kernels: str = options.kernels
    if not options.no_native:
        return kernels
    if kernels.startswith("native"):
        raise UsageError(f"--no-native and --kernels {kernels} contradict each other; give one of them")
    return "bodies"
