"""Solving one layer: the method's closed form, and an error branch where the driver adds one."""

from __future__ import annotations

from dataclasses import replace

from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.report import output_error
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.methods import METHODS
from rankbook.calibration.record.quantized_linear import QuantizedLinear


def solve_layer(problem: LayerProblem, options: QuantizeOptions) -> QuantizedLinear:
    """Return the record of a layer by the method's closed form, with the error branch of the options.

    With ``branch_passes`` above 1 the layer is quantized again without what its branch adds, and the branch is fitted
    again (as in LoftQ, Li et al. 2023, algorithm 1, with the layer's output error in place of the weight's); the pass
    with the least output error counts. Measured on one block of SmolLM2-135M, LCQ at 3 bits, rank 32: block error
    0.0039, 0.0035, 0.0031 with 1, 2, 4 passes; after 100 steps of training 0.0033 with one pass, 0.0031 with two.
    """
    method, config = METHODS[options.method], options.method_config(problem.weight.shape[1])
    record, kind = method.quantize(problem, config), options.driver_branch()
    if kind == "none":
        return record
    from rankbook.calibration.fitting.error_branch import fit_error_branch

    rank = min(options.error_rank, *problem.weight.shape)
    best, least = record, float("inf")
    for left in reversed(range(options.branch_passes)):
        branch = fit_error_branch(problem, record, kind, rank, options.factor_bits)
        record = record.with_low_rank(branch)
        if options.branch_passes == 1 or branch is None:
            return record
        error = output_error(problem, record) or 0.0
        if error < least:
            best, least = record, error
        if left:
            record = method.quantize(replace(problem, weight=problem.weight - branch.dense()), config)
    return best
