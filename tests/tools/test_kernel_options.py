"""The options that choose what computes packed layers."""

from __future__ import annotations

import argparse

import pytest

from rankbook.tools.errors import UsageError
from rankbook.tools.flags import add_flags, flags_of
from rankbook.tools.kernel_options import ExactKernelOptions, KernelOptions
from rankbook.tools.runtimes import kernels


def parse(*arguments: str, exact: bool = False) -> str:
    """Parse a command line of these flags alone."""
    kind = ExactKernelOptions if exact else KernelOptions
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, flags_of(kind))
    return kind(**vars(parser.parse_args(arguments))).chosen_kernels()


def test_choices() -> None:
    """Each name is itself, nothing is auto, and --no-native is the bodies, also beside a flag that says the same."""
    assert parse() == "auto"
    assert parse(exact=True) == "bodies"
    assert [parse("--kernels", name) for name in kernels()] == list(kernels())
    assert parse("--no-native") == parse("--no-native", "--kernels", "bodies") == "bodies"


def test_contradiction() -> None:
    """Both at once is an error, not a silent choice."""
    with pytest.raises(UsageError, match="contradict"):
        parse("--no-native", "--kernels", "native-int8")


def test_checks_of_exactness_do_not_offer_rounding() -> None:
    """Kernels that round activations cannot pass a parity check, so they are not offered there."""
    with pytest.raises(argparse.ArgumentError, match="native-int8"):
        parse("--kernels", "native-int8", exact=True)
