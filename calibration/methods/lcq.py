"""LCQ: low-rank codebook quantization (Cai, Li, Li 2024, arXiv 2405.20973).

The codebooks of all groups of a layer form a matrix of low rank plus an offset per group. No code was published with
the paper: the closed form, the training recipe and the storage are this project's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rankbook.calibration.fitting import codebook_fit as _lcq_fit
from rankbook.calibration.fitting import codebook_store as _lcq_store
from rankbook.calibration.fitting import feedback, rounding
from rankbook.calibration.fitting.problem import BlockProblem, LayerProblem
from rankbook.calibration.methods.base import Method
from rankbook.calibration.record.codebooks import LEVEL_DTYPES
from rankbook.calibration.record.quantized_linear import LEVEL_LIMIT, QuantizedLinear, check_group
from rankbook.calibration.training.learned_rounding import LearnedRounding, StepSizes
from rankbook.calibration.training.reconstruct import TrainableLayer, TrainConfig, train_block
from rankbook.calibration.training.trained_codebooks import GRADIENTS, TrainedCodebooks

RECIPES = ("rounding", "codebook")
EFFORTS = ("fast", "default", "high")
STEPS = {"default": 100, "high": 600}
"""Training steps per block of each effort that trains."""


@dataclass(frozen=True)
class LcqConfig:
    """Options of LCQ."""

    bits: int = field(default=3, metadata={"help": "Bits per code: 2, 3, 4 or 8."})
    group_size: int = field(default=64, metadata={"help": "Weights of one row that share a codebook."})
    rank: int = field(default=2, metadata={"help": "Planes of the codebook matrix, 1 to 2**bits - 1."})
    param_bits: int = field(default=8, metadata={"help": "Bits of each per-group number: 8 or 16."})
    level_dtype: str = field(default="int8", metadata={"help": "Storage of the levels: int8 (7 bits used) or float16."})
    effort: str = field(
        default="default", metadata={"help": "fast: closed form alone; default, high: trained by block."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the batch order in training."})
    fit_rounds: int = field(default=10, metadata={"help": "Alternations of the activation-weighted least squares."})
    feedback_rounds: int = field(
        default=2, metadata={"help": "Rounds of codes by error feedback and refit; 0 for none."}
    )
    damping: float = field(default=0.01, metadata={"help": "Share of the mean input energy added to the Gram matrix."})
    steps: int = field(default=0, metadata={"help": "Training steps per block; 0 takes what the effort asks for."})
    recipe: str = field(default="rounding", metadata={"help": "Training: rounding (learned rounding) or codebook."})
    gradient: str = field(
        default="straight-through", metadata={"help": "Gradient of recipe codebook: straight-through or assignment."}
    )
    batch: int = field(default=1, metadata={"help": "Calibration sequences per training step."})
    compute: str = field(default="auto", metadata={"help": "Arithmetic of training: auto, float32 or bfloat16."})
    rounding_step: float = field(default=0.5, metadata={"help": "Twice the reach of learned rounding, in level gaps."})
    coeff_step: float = field(default=0.05, metadata={"help": "Twice the reach of the coefficients, relative."})
    offset_step: float = field(default=0.03, metadata={"help": "Twice the reach of the offsets, in level gaps."})
    level_step: float = field(default=0.01, metadata={"help": "Twice the reach of the levels, relative to their mean."})

    def __post_init__(self) -> None:
        if self.bits not in LEVEL_LIMIT:
            raise ValueError(f"{self.bits} bits are not supported; choose one of {', '.join(map(str, LEVEL_LIMIT))}")
        if not 1 <= self.rank < 1 << self.bits:
            raise ValueError(
                f"rank {self.rank} is not possible at {self.bits} bits; choose 1 to {(1 << self.bits) - 1}"
            )
        if self.level_dtype not in LEVEL_DTYPES:
            raise ValueError(f"level_dtype {self.level_dtype!r} is unknown; choose one of {', '.join(LEVEL_DTYPES)}")
        if self.param_bits not in (8, 16):
            raise ValueError(f"param_bits {self.param_bits} is not supported; choose 8 or 16")
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe {self.recipe!r} is unknown; choose one of {', '.join(RECIPES)}")
        if self.gradient not in GRADIENTS:
            raise ValueError(f"gradient {self.gradient!r} is unknown; choose one of {', '.join(GRADIENTS)}")
        if self.effort not in EFFORTS:
            raise ValueError(f"effort {self.effort!r} is unknown; choose one of {', '.join(EFFORTS)}")


def quantize(problem: LayerProblem, config: LcqConfig, levels: Tensor | None = None) -> QuantizedLinear:
    """Fit one layer in closed form; with given ``levels`` (P, L) only codes and group parameters.

    Raises:
        ValueError: The group size does not divide the layer, or weights or statistics are not finite.
    """
    columns = problem.weight.shape[1]
    check_group(columns, config.group_size)
    grouped = rounding.to_groups(problem.weight.float(), config.group_size)
    gram = scaled_gram(problem, config.damping)
    energy = gram.diagonal().view(-1, config.group_size).contiguous()
    count = 1 << config.bits
    if levels is None:
        books = _lcq_fit.fit(grouped, energy, config.rank, count, config.fit_rounds)
        books = _lcq_store.round_levels(books, config.bits, config.level_dtype)
    else:
        books = _lcq_fit.fit_params(grouped, energy, levels.float())
    codes = _lcq_fit.nearest_chunked(grouped, books.tables())
    books = _lcq_fit.solve_params(_lcq_fit.moments_of(grouped, energy, codes, count), books.levels)
    plan = feedback.plan(gram, 0.0) if config.feedback_rounds else None
    for _ in range(config.feedback_rounds):
        codes = _assign(grouped, books.tables(), plan)
        books = _lcq_store.refit_params(grouped, codes, books, gram)
    params = _lcq_store.quantize_params(grouped, codes, books, gram, config.param_bits)
    tables = _lcq_store.from_params(params, books.levels).tables()
    codes = _assign(grouped, tables, plan)
    return QuantizedLinear(
        codes=rounding.from_groups(codes),
        bits=config.bits,
        levels=books.levels.to(LEVEL_DTYPES[config.level_dtype]),
        params=params,
        has_offset=True,
        bias=problem.bias,
        method="lcq",
    )


def _assign(grouped: Tensor, tables: Tensor, columns: feedback.Plan | None) -> Tensor:
    """Choose codes by error feedback, or without a plan the nearest levels."""
    if columns is None:
        return _lcq_fit.nearest_chunked(grouped, tables)
    return feedback.assign(grouped, tables, columns)


def scaled_gram(problem: LayerProblem, damping: float) -> Tensor:
    """Return the damped Gram matrix of a layer's inputs with mean diagonal near 1; the identity without statistics.

    Raises:
        ValueError: The statistics or the weights hold NaN or infinity.
    """
    gram = problem.statistics.gram.float()
    if not bool(torch.isfinite(gram).all()):
        raise ValueError(
            f"the inputs of {problem.name} hold NaN or infinity: the model overflows even in float32; convert it again"
        )
    if not bool(torch.isfinite(problem.weight).all()):
        raise ValueError(f"the weights of {problem.name} hold NaN or infinity; repair or re-download the model")
    mean = gram.diagonal().mean()
    if problem.statistics.tokens == 0 or float(mean) <= 0:
        return torch.eye(problem.weight.shape[1])
    return feedback.damped_gram(gram / mean, damping)


def trains(config: LcqConfig) -> bool:
    """Return whether blocks are trained."""
    return config.effort != "fast"


def refine(
    problem: BlockProblem, records: Mapping[str, QuantizedLinear], config: LcqConfig
) -> dict[str, QuantizedLinear]:
    """Train the records of a block by its output; with effort ``fast`` they are returned as they are.

    Error branches stay as they are; the codebooks are trained around them.
    """
    if not trains(config) or not records:
        return dict(records)
    steps = config.steps or STEPS[config.effort]
    sizes = StepSizes(config.rounding_step, config.coeff_step, config.offset_step, config.level_step)
    layers: dict[str, TrainableLayer] = {}
    for name, record in records.items():
        weight = problem.layers[name].weight
        if config.recipe == "codebook":
            layers[name] = TrainedCodebooks(weight, record, config.gradient)
        else:
            layers[name] = LearnedRounding(weight, record, steps, sizes)
    train = TrainConfig(steps=steps, batch=config.batch, compute=config.compute)
    return train_block(problem, records, layers, train).records


METHOD = Method("lcq", LcqConfig, quantize, refine, trains, feedback=True, rank_is_stored=True)
