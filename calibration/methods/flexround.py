"""FlexRound (Lee et al. 2023, arXiv 2306.00317): LRQ with as many divisors as weights."""

from __future__ import annotations

from dataclasses import dataclass

from rankbook.calibration.methods import lrq
from rankbook.calibration.methods.base import Method
from rankbook.calibration.option import option


@dataclass(frozen=True)
class FlexRoundConfig(lrq.LrqConfig):
    """Options of FlexRound: those of LRQ, the rank being without effect."""

    full_rank: bool = option(True, "a full scaling matrix; without it this is LRQ")


METHOD = Method("flexround", FlexRoundConfig, lrq.quantize, lrq.refine, FlexRoundConfig.trains)
