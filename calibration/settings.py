"""Names of settings that the command line offers, without the libraries that carry them out."""

from __future__ import annotations

ACTIVATIONS = ("none", "static8", "static8-asymmetric", "token8", "token8-symmetric", "mxint8", "mxint6")
"""What ``--activations`` takes, see `rankbook.calibration.activations.inputs`."""
RANGES = ("minmax", "percentile", "mse")
"""How a static range is chosen, what ``--activation-range`` takes."""
KV_BITS = (0, 8, 4)
"""What ``--kv-bits`` takes; 0 leaves keys and values alone."""
ALLOCATED = ("bits", "rank", "branch")
"""What ``--allocate`` takes: bits per code, planes of the codebooks, rank of the error branch."""
