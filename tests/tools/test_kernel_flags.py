"""The flags that choose what computes packed layers."""

from __future__ import annotations

import argparse

import pytest

from rankbook.tools.command import Flags
from rankbook.tools.errors import UsageError
from rankbook.tools.kernel_flags import add_kernel_flags, chosen_kernels
from rankbook.tools.runtimes.ort import KERNELS


def parse(*arguments: str, exact: bool = False) -> str:
    """Parse a command line of these flags alone."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    flags = Flags(parser)
    add_kernel_flags(flags, exact=exact)
    return chosen_kernels(argparse.Namespace(**{**flags.defaults, **vars(parser.parse_args(arguments))}))


def test_choices() -> None:
    """Each name is itself, nothing is auto, and --no-native is the bodies, also beside a flag that says the same."""
    assert parse() == "auto"
    assert [parse("--kernels", name) for name in KERNELS] == list(KERNELS)
    assert parse("--no-native") == parse("--no-native", "--kernels", "bodies") == "bodies"


def test_contradiction() -> None:
    """Both at once is an error, not a silent choice."""
    with pytest.raises(UsageError, match="contradict"):
        parse("--no-native", "--kernels", "native-int8")


def test_checks_of_exactness_do_not_offer_rounding() -> None:
    """Kernels that round activations cannot pass a parity check, so they are not offered there."""
    with pytest.raises(argparse.ArgumentError, match="native-int8"):
        parse("--kernels", "native-int8", exact=True)
