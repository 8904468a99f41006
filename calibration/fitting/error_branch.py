"""The error branch: a low-rank correction of what quantization lost, fitted in closed form.

With ``E = W - W_hat`` (N, K) and inputs x, the branch ``up @ down`` minimizes ``|| (up @ down - E) M ||_F`` at its
rank:

* ``lqer``: M = identity (LQER, Zhang et al. 2024, equation 7).
* ``l2qer``: M = diag of the largest batch mean of |x| (LQER, equation 11 and official code).
* ``qera-diag``: M = diag of the root mean square of x (QERA, Zhang et al. 2024, approximate solution).
* ``qera``: ``M @ M.T = E[x.T x]`` (QERA, exact solution). The paper takes the symmetric square root; any square root
  gives the same branch, because the error depends on ``M @ M.T`` alone, and a Cholesky factor is much faster.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rankbook.calibration.fitting import feedback
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.record.quantized_linear import Factor, LowRank, QuantizedLinear
from rankbook.calibration.settings import ERROR_BRANCHES as ERROR_BRANCHES

_EXACT_SIZE = 2048
"""Up to this many rows or columns singular vectors come from an eigendecomposition, above from random projections."""
_OVERSAMPLE, _POWER_ITERATIONS = 16, 6
_DAMPING = 1e-4


def fit_error_branch(
    problem: LayerProblem, record: QuantizedLinear, kind: str, rank: int, factor_bits: int = 8
) -> LowRank | None:
    """Fit a branch to ``problem.weight - record.weight()``; a branch the record has already is not looked at.

    Args:
        problem: The layer, with the statistics of its inputs.
        record: The quantized layer.
        kind: One of `ERROR_BRANCHES`.
        rank: R; at most min(N, K), larger values are cut to that.
        factor_bits: 8 (int8, one scale per rank) or 16 (float16); 32 for tests of the algebra.

    Returns:
        The branch, or None for kind ``none`` or rank 0.

    Raises:
        ValueError: Unknown kind, negative rank, or values that are not finite.
    """
    if kind not in ERROR_BRANCHES:
        raise ValueError(f"error branch {kind!r} is unknown; choose one of {', '.join(ERROR_BRANCHES)}")
    if rank < 0:
        raise ValueError(f"error rank {rank} is negative; choose 0 (no branch) to {min(problem.weight.shape)}")
    if kind == "none" or rank == 0:
        return None
    problem.check()
    error = problem.weight.float() - record.weight()
    rank = min(rank, *error.shape)
    return (
        _exact(problem, error, rank, factor_bits)
        if kind == "qera"
        else _diagonal(problem, error, kind, rank, factor_bits)
    )


def channel_scale(problem: LayerProblem, kind: str) -> Tensor:
    """Return the diagonal of M (K,) for the kinds other than ``qera``, normalized as LQER's code does it.

    Channels that hardly are active count with 1e-4 of the mean; LQER's code has 1e-4, whatever the size of the inputs.
    """
    statistics = problem.statistics
    if kind == "lqer" or statistics.tokens == 0:
        return torch.ones(problem.weight.shape[1], device=problem.weight.device)
    magnitude = statistics.peak_mean_abs if kind == "l2qer" else statistics.second_moment().sqrt()
    magnitude = magnitude.float()
    floored = magnitude.clamp_min(1e-4 * float(magnitude.mean()) + torch.finfo(torch.float32).tiny)
    return floored / (floored.min() * floored.max()).sqrt()


def _diagonal(problem: LayerProblem, error: Tensor, kind: str, rank: int, factor_bits: int) -> LowRank:
    scale = channel_scale(problem, kind)
    up, down = truncated_svd(error * scale, rank)
    return _store(error, up, down / scale, lambda dense: dense * scale.square(), factor_bits)


def _exact(problem: LayerProblem, error: Tensor, rank: int, factor_bits: int) -> LowRank:
    gram = feedback.scaled_gram(problem, _DAMPING)
    root = square_root(gram)
    up, down = truncated_svd(error @ root, rank)
    down = torch.linalg.solve_triangular(root, down, upper=False, left=False)
    return _store(error, up, down, lambda dense: (gram @ dense.T).T, factor_bits)


def square_root(gram: Tensor) -> Tensor:
    """Return a lower triangular M with ``M @ M.T = gram`` for a positive definite matrix.

    Raises:
        ValueError: The matrix is not positive definite.
    """
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        root, failed = torch.linalg.cholesky_ex(gram.double())
    if int(failed):
        raise ValueError(
            "the Gram matrix of the inputs is not positive definite; it is damaged or too few tokens were seen"
        )
    return root.to(gram.dtype)


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors (N, R) and (R, K) of the best approximation of a matrix (N, K) at rank R.

    The singular values are shared evenly between the factors.
    """
    rows, columns = matrix.shape
    if min(rows, columns) > _EXACT_SIZE and rank + _OVERSAMPLE < min(rows, columns) // 4:
        basis = _leading(matrix, rank + _OVERSAMPLE)
        left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        half = values[:rank].sqrt()
        return (basis @ left[:, :rank]) * half, half[:, None] * right[:rank]
    if rank > min(rows, columns) // 2:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        half = values[:rank].sqrt()
        return left[:, :rank] * half, half[:, None] * right[:rank]
    if rows > columns:
        up, down = truncated_svd(matrix.T, rank)
        return down.T.contiguous(), up.T.contiguous()
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)
    left = vectors[:, -rank:].flip(1)
    right = left.T @ matrix
    half = right.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    return left * half, right / half[:, None]


def _leading(matrix: Tensor, count: int) -> Tensor:
    """Return orthonormal columns (N, count) that nearly span the leading left singular vectors of a matrix (N, K).

    Subspace iteration from random directions (Halko et al. 2011, algorithm 4.4), the same ones on every device and in
    every call.
    """
    probe = torch.randn(matrix.shape[1], count, generator=torch.Generator().manual_seed(0)).to(matrix)
    basis: Tensor = torch.linalg.qr(matrix @ probe)[0]
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    return basis


def _store(error: Tensor, up: Tensor, down: Tensor, weigh: Callable[[Tensor], Tensor], bits: int) -> LowRank:
    """Store ``down`` first, solve ``up`` again for what was stored, then store ``up``.

    ``weigh`` multiplies rows (R, K) with the symmetric ``M @ M.T`` of the inputs.
    """
    stored_down = Factor.quantize(down, bits, 0)
    if bits != 32:
        dense = stored_down.dense()
        weighted = weigh(dense).T  # (K, R)
        system = dense @ weighted
        ridge = 1e-6 * system.diagonal().mean() + torch.finfo(torch.float32).tiny
        up = torch.linalg.solve(system + ridge * torch.eye(len(system), device=system.device), (error @ weighted).T).T
    return LowRank.joined(stored_down, Factor.quantize(up.contiguous(), bits, 1))
