"""Learned rounding starts at the record it is given."""

from __future__ import annotations

import torch

from rankbook.calibration.fitting import rounding
from rankbook.calibration.methods import lcq
from rankbook.calibration.methods.lcq import LcqConfig
from rankbook.calibration.training.learned_rounding import LearnedRounding, anchored
from tests.calibration import problems


def test_training_starts_exactly_at_the_record() -> None:
    problem = problems.layer(40, 128)
    record = lcq.quantize(problem, LcqConfig())
    layer = LearnedRounding(problem.weight, record, 10)
    assert torch.equal(layer.record().codes, record.codes)
    # Parameters stored in 8 bits are stored again, which moves them by float rounding only.
    torch.testing.assert_close(layer.weight(), record.weight(), rtol=1e-4, atol=1e-6)


def test_anchors_lie_in_the_cell_of_their_code() -> None:
    grouped, codebooks = torch.randn(2, 64, 5), torch.randn(2, 8, 5)
    codes = torch.randint(0, 8, (2, 64, 5)).to(torch.uint8)
    place = anchored(grouped, codebooks, codes)
    assert torch.equal(rounding.nearest(place, codebooks), codes)
    kept = rounding.nearest(grouped, codebooks) == codes
    assert float((place - grouped).abs()[kept].max()) <= 1e-3
