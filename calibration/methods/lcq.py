"""LCQ: low-rank codebook quantization (Cai, Li, Li 2024, arXiv 2405.20973).

The codebooks of all groups of a layer form a matrix of low rank plus an offset per group. No code was published with
the paper: the closed form, the training recipe and the storage are this project's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rankbook.calibration.fitting import codebook_fit, codebook_store, feedback, rounding
from rankbook.calibration.fitting.problem import BlockProblem, LayerProblem
from rankbook.calibration.methods.base import Method
from rankbook.calibration.option import option
from rankbook.calibration.record.codebooks import LEVEL_DTYPES
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.calibration.training.learned_rounding import LearnedRounding, StepSizes
from rankbook.calibration.training.reconstruct import TrainableLayer, TrainingOptions, train_records
from rankbook.calibration.training.trained_codebooks import GRADIENTS, TrainedCodebooks
from rankbook.plugins.layer_spec import check_group
from rankbook.plugins.widths import BITS

RECIPES = ("rounding", "codebook")
_PREDICT_ROUNDS = 4
"""Alternations of the fits that compare numbers of planes."""


@dataclass(frozen=True)
class LcqConfig(TrainingOptions):
    """Options of LCQ."""

    bits: int = option(3, "bits of a code", choices=BITS)
    group_size: int = option(64, "weights of one row that share a codebook")
    rank: int = option(2, "planes of the codebook matrix, 1 to 2**bits - 1")
    param_bits: int = option(8, "bits of each parameter of a group: 8 or 16")
    level_dtype: str = option("int8", "storage of the levels; int8 uses 7 bits", choices=tuple(LEVEL_DTYPES))
    seed: int = option(0, "seed of the batch order in training")
    fit_rounds: int = option(10, "alternations of the activation-weighted least squares", least=1)
    feedback_rounds: int = option(2, "rounds of choosing codes by error feedback and refitting; 0 for none", least=0)
    damping: float = option(0.01, "share of the mean input energy added to the Gram matrix")
    recipe: str = option("rounding", "what is trained: the rounding, or the codebooks", choices=RECIPES)
    gradient: str = option("straight-through", "gradient used by the recipe codebook", choices=GRADIENTS)
    rounding_step: float = option(0.5, "twice the reach of learned rounding, in level gaps")
    coeff_step: float = option(0.05, "twice the reach of the coefficients, relative")
    offset_step: float = option(0.03, "twice the reach of the offsets, in level gaps")
    level_step: float = option(0.01, "twice the reach of the levels, relative to their mean")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.rank < 1 << self.bits:
            raise ValueError(
                f"rank {self.rank} is not possible at {self.bits} bits; choose 1 to {(1 << self.bits) - 1}"
            )
        if self.param_bits not in (8, 16):
            raise ValueError(f"param_bits {self.param_bits} is not supported; choose 8 or 16")
        if self.steps and self.effort == "fast":
            raise ValueError(f"steps is {self.steps}, and effort fast trains nothing; leave one of the two out")


def quantize(problem: LayerProblem, config: LcqConfig, levels: Tensor | None = None) -> QuantizedLinear:
    """Fit one layer in closed form; with given ``levels`` (P, L) only codes and group parameters.

    Raises:
        ValueError: The group size does not divide the layer, or weights or statistics are not finite.
    """
    columns = problem.weight.shape[1]
    check_group(columns, config.group_size)
    grouped = rounding.to_groups(problem.weight.float(), config.group_size)
    gram = feedback.scaled_gram(problem, config.damping)
    energy = gram.diagonal().view(-1, config.group_size).contiguous()
    count = 1 << config.bits
    if levels is None:
        books = codebook_fit.fit(grouped, energy, config.rank, count, config.fit_rounds)
        books = codebook_store.round_levels(books, config.bits, config.level_dtype)
    else:
        books = codebook_fit.fit_params(grouped, energy, levels.float())
    codes = codebook_fit.nearest_chunked(grouped, books.dense())
    books = codebook_fit.solve_params(codebook_fit.moments_of(grouped, energy, codes, count), books.levels)
    plan = feedback.plan(gram, 0.0) if config.feedback_rounds else None
    for _ in range(config.feedback_rounds):
        codes = _assign(grouped, books.dense(), plan)
        books = codebook_store.refit_params(grouped, codes, books, gram)
    params = codebook_store.quantize_params(grouped, codes, books, gram, config.param_bits)
    codebooks = codebook_store.from_params(params, books.levels).dense()
    codes = _assign(grouped, codebooks, plan)
    return QuantizedLinear(
        codes=rounding.from_groups(codes),
        bits=config.bits,
        levels=books.levels.to(LEVEL_DTYPES[config.level_dtype]),
        params=params,
        has_offset=True,
        bias=problem.bias,
        method="lcq",
    )


def _assign(grouped: Tensor, codebooks: Tensor, columns: feedback.Plan | None) -> Tensor:
    """Choose codes by error feedback, or without a plan the nearest levels."""
    if columns is None:
        return codebook_fit.nearest_chunked(grouped, codebooks)
    return feedback.assign(grouped, codebooks, columns)


def rows(sample: LayerProblem, config: LcqConfig) -> Callable[[LayerProblem], QuantizedLinear]:
    """Fit levels to a sample of the rows of a large matrix; return what quantizes others with the same levels."""
    levels = quantize(sample, config).levels
    return lambda problem: quantize(problem, config, levels)


def predict(weight: Tensor, energy: Tensor, group: int, bits: int, planes: int) -> Tensor:
    """Return rows (N, K) as a few rounds of the fit decode them, for inputs of mean squares ``energy`` (K,)."""
    grouped = rounding.to_groups(weight, group)
    energy = (energy + 1e-3 * energy.mean() + torch.finfo(torch.float32).tiny).view(-1, group)
    codebooks = codebook_fit.fit(grouped, energy, planes, 1 << bits, _PREDICT_ROUNDS).dense()
    return rounding.from_groups(rounding.lookup(codebooks, rounding.nearest(grouped, codebooks)))


def refine(
    problem: BlockProblem, records: Mapping[str, QuantizedLinear], config: LcqConfig
) -> dict[str, QuantizedLinear]:
    """Train codes and codebooks of a block, or the codebooks alone, see `train_records`."""
    sizes = StepSizes(config.rounding_step, config.coeff_step, config.offset_step, config.level_step)

    def layer(part: LayerProblem, record: QuantizedLinear) -> TrainableLayer:
        if config.recipe == "codebook":
            return TrainedCodebooks(part.weight, record, config.gradient)
        return LearnedRounding(part.weight, record, config.training_steps(), sizes)

    return train_records(problem, records, config, layer)


METHOD = Method("lcq", LcqConfig, quantize, refine, LcqConfig.trains, feedback=True, rows=rows, predict=predict)
