"""Names of settings that the command line offers, without the libraries that carry them out."""

from __future__ import annotations

import pkgutil
from importlib.util import find_spec

ACTIVATION_FORMATS = ("none", "static8", "static8-asymmetric", "token8", "token8-symmetric", "mxint8", "mxint6")
"""What ``--activations`` takes, see `rankbook.calibration.activations.inputs`."""
RANGES = ("minmax", "percentile", "mse")
"""How a static range is chosen, what ``--activation-range`` takes."""
KV_BITS = (0, 8, 4)
"""What ``--kv-bits`` takes; 0 leaves keys and values alone."""
ALLOCATED = ("bits", "rank", "branch")
"""What ``--allocate`` takes: bits per code, planes of the codebooks, rank of the error branch."""
ERROR_BRANCHES = ("none", "lqer", "l2qer", "qera-diag", "qera")
"""Kinds of the low-rank error branch, see `rankbook.calibration.fitting.error_branch`."""
INPUT_BRANCHES = ("l2qer", "qera-diag", "qera")
"""Those that are fitted to what enters a layer."""
SCALINGS = ("none", "awq", "smoothquant")
"""Kinds of input scaling that norms hide, see `rankbook.calibration.driver.scaling`."""
FORMATS = ("affine", "symmetric", "nf4", "mxint")
"""Fixed levels, see `rankbook.calibration.fitting.grids`."""
EFFORTS = ("fast", "default", "high")
"""Training budgets: ``fast`` is the closed form alone."""


def method_names() -> tuple[str, ...]:
    """Return the names of the methods: the modules of their package but its base; imports none of them."""
    package = find_spec("rankbook.calibration.methods")
    folders = package.submodule_search_locations if package else None
    return tuple(sorted(info.name for info in pkgutil.iter_modules(folders) if info.name != "base"))
