"""What a user chooses about a parity check."""

from __future__ import annotations

from dataclasses import dataclass

from rankbook.calibration.option import Seeded, Threaded, option


@dataclass(frozen=True)
class ParityOptions(Seeded, Threaded):
    """What to check."""

    tolerance: float | None = option(
        None, "largest difference relative to the largest value; by type if not given", metavar="X"
    )
    every_node: bool = option(False, "check every custom node, not one of each kind")
    no_layers: bool = option(False, "leave out the comparison layer by layer")
    greedy: int = option(0, "also continue five prompts by N tokens with both, greedily", metavar="N", least=0)
