"""Statistics of inputs: sums of several, and few tokens filled up with the mean of others."""

from __future__ import annotations

import torch

from rankbook.calibration.fitting.statistics import LayerStatistics


def test_statistics_of_batches_add_up() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(count, 8) for count in (5, 3)]
    one, total = LayerStatistics.empty(8), LayerStatistics.empty(8)
    for x in batches:
        one.update(x)
        part = LayerStatistics.empty(8)
        part.update(x)
        total.add(part)
    assert total.tokens == one.tokens == 8
    for name in ("gram", "mean_abs", "peak_mean_abs", "peak"):
        torch.testing.assert_close(getattr(total, name), getattr(one, name))


def test_few_tokens_are_filled_up_with_the_mean_of_all() -> None:
    torch.manual_seed(0)
    columns, counts = 8, (20, 3, 0)
    statistics = [LayerStatistics.empty(columns) for _ in counts]
    inputs = [torch.randn(count, columns) for count in counts]
    everyone = LayerStatistics.empty(columns)
    for x, item in zip(inputs, statistics, strict=True):
        if len(x):
            item.update(x)
        everyone.add(item)
    shared = [item.filled_up(everyone) for item in statistics[1:]]
    mean = torch.cat(inputs).T @ torch.cat(inputs) / sum(counts)
    own = inputs[1].T @ inputs[1]
    torch.testing.assert_close(shared[0].gram, own + (columns - 3) * mean)
    torch.testing.assert_close(shared[1].gram, columns * mean)
    assert shared[1].tokens == columns
    torch.testing.assert_close(shared[1].peak, torch.cat(inputs).abs().amax(0))


def test_sums_are_exact_whatever_the_block_multiplies_in() -> None:
    torch.manual_seed(0)
    x, before = torch.randn(512, 96) * torch.rand(96), torch.get_float32_matmul_precision()
    statistics = LayerStatistics.empty(96)
    with torch.autocast("cpu", torch.bfloat16):
        for batch in x.split(128):
            statistics.update(batch)
    errors = []
    for multiplied in (x.bfloat16().double(), x.double()):  # the second where the processor does not multiply bfloat16
        want = multiplied.T @ multiplied
        errors.append(float((statistics.gram.double() - want).abs().max() / want.diagonal().max()))
    assert min(errors) < 1e-5  # sums in bfloat16 would leave 1e-3
    torch.testing.assert_close(statistics.mean_abs, x.abs().sum(0))
    assert torch.get_float32_matmul_precision() == before
