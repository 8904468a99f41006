"""Bits and ranks for each layer under a budget of stored bits: where rounding hurts the output most, more of them.

Rounding errors E of a layer change the model's output distribution by about (nats per token, second order)

    KL = 1/2 sum_nk F_nk E_nk^2        F_nk = mean over tokens of x_k^2 (d loss / d y_n)^2

with labels drawn from the model itself: F is the diagonal of the Fisher information of the weights, one token apart
from the other (SqueezeLLM, Kim et al. 2024, section 4.1, weights its codebooks by it). Errors of different layers add.
One backward pass through the whole model gives F of every layer; E is that of rounding to nearest on a searched grid.
The choice is an integer program with one `Choice` per layer, solved by HiGHS. Where ranks are chosen too, E with more
planes is that of codebooks fitted to the sampled rows, and what an error branch of rank R takes away follows from the
spectrum of the inputs, see `branch_share`.

Measured on SmolLM2-135M, rounding to nearest with searched ranges, group 64, 6144 tokens of WikiText-2, at 3.255 stored
bits: perplexity 41.3 with 3 bits everywhere, 37.9 with this choice (22.0 unquantized); at 4.256 stored bits nothing is
gained (25.0 with 4 bits everywhere, 25.2). With the product of the mean squares of inputs and gradients in place of F,
which attention sinks dominate, nothing was gained at 3.255 either.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.solve import solve_layer
from rankbook.calibration.fitting.grids import Grid, round_nearest
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.methods import METHODS, Method
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.experts import matrix_of, stacks
from rankbook.calibration.record.finite import is_finite
from rankbook.plugins import layout
from rankbook.plugins.layer_spec import MIN_GROUP, LayerSpec

_MOST_PLANES = 3
"""Planes that are tried where the options name no number."""
_SKETCH = 128
"""Random directions in which the inputs' second moment is remembered."""
SEQUENCES = 4
"""Calibration windows for the backward pass."""
_ROWS = 128
"""Rows of a layer that are looked at, evenly spaced."""
_GAP = 1e-4
"""Relative distance from the best choice at which the solver stops."""


@dataclass(frozen=True)
class Choice:
    """What is chosen for one layer.

    Attributes:
        bits: Bits per code.
        planes: Rank of the codebook matrix, or None for that of the options.
        branch: Rank of the error branch, 0 for none, or None for that of the options.
    """

    bits: int
    planes: int | None = None
    branch: int | None = None

    def applied(self, options: QuantizeOptions) -> QuantizeOptions:
        """Return the options with this choice in place of theirs."""
        chosen = replace(options, bits=self.bits, target_bits=None, allocate=("bits",))
        if self.planes is not None:
            chosen = replace(chosen, rank=self.planes)
        if self.branch is not None:
            chosen = replace(chosen, error_rank=self.branch) if self.branch else replace(chosen, error_branch="none")
        return chosen


@dataclass(frozen=True)
class Candidates:
    """What each choice costs one layer.

    Attributes:
        harm: Predicted divergence in nats per token, by choice.
        stored: Stored bits of the whole layer, by choice.
    """

    harm: Mapping[Choice, float]
    stored: Mapping[Choice, int]


@dataclass(frozen=True)
class Sensitivity:
    """How the model's output depends on the weights of one layer (N, K).

    Attributes:
        fisher: Diagonal of the Fisher information of up to 128 evenly spaced rows, (rows, K), scaled so that half its
            sum with squared weight errors is nats per token for the whole layer.
        spectrum: Share of each of the largest principal directions in the energy of the inputs, tokens weighted by
            the squares of what flows back to them; falling, empty where all count the same.
    """

    fisher: Tensor
    spectrum: Tensor


def allocate(model: Any, names: Sequence[str], tokens: Tensor, options: QuantizeOptions) -> dict[str, Choice]:
    """Return the choice for each layer so that all of them together keep to ``options.target_bits``.

    Memory: the activations of one window through the whole model, besides its weights.

    Args:
        model: The original model.
        names: Full names of the linear layers to quantize.
        tokens: Calibration windows (sequences, length).
        options: Method, group size, branch, target, and what is chosen.

    Raises:
        ValueError: The target is below what the smallest choice needs.
        ModuleNotFoundError: scipy is missing.
    """
    if options.target_bits is None:
        raise ValueError("allocation needs target_bits")
    together = by_choice(candidates(model, names, tokens, options))
    weights = sum(model.get_submodule(name).weight.numel() for name in names)
    solution = choose({name: cost for name, (_, cost) in together.items()}, options.target_bits * weights, weights)
    return {member: solution[name] for name, (members, _) in together.items() for member in members}


def candidates(model: Any, names: Sequence[str], tokens: Tensor, options: QuantizeOptions) -> dict[str, Candidates]:
    """Return what each choice that the options leave costs each layer; arguments as of `allocate`."""
    layers = {name: model.get_submodule(name) for name in names}
    spectra = "branch" in options.allocate and not _shaped(options)
    sensitive = sensitivities(model, layers, tokens[:SEQUENCES], options.seed, spectra=spectra)
    found: dict[str, Candidates] = {}
    possible = {item: item.applied(options) for item in choices(options)}
    corners: dict[Choice, LayerSpec] = {}
    for item, chosen in possible.items():
        if _kind(item) not in corners:
            corners[_kind(item)] = corner(chosen)
    for name, module in layers.items():
        weight = module.weight.detach().float()
        rows, columns = weight.shape
        stored = {item: stored_bits(rows, columns, corners[_kind(item)], chosen) for item, chosen in possible.items()}
        found[name] = Candidates(harms(weight, sensitive[name], options.group(columns), possible), stored)
    return found


def by_choice(found: Mapping[str, Candidates]) -> dict[str, tuple[list[str], Candidates]]:
    """Return the layers for which one choice is made, and what it costs: the experts of one matrix belong together."""
    groups = {name: [name] for name in found if not matrix_of(name)} | stacks(found)
    return {name: (members, _together(found, members)) for name, members in groups.items()}


def _together(found: Mapping[str, Candidates], names: Sequence[str]) -> Candidates:
    harm, stored = ([getattr(found[name], part) for name in names] for part in ("harm", "stored"))
    return Candidates(*({item: sum(each[item] for each in all_) for item in all_[0]} for all_ in (harm, stored)))


def _shaped(options: QuantizeOptions) -> bool:
    """Return whether feedback or training spreads a layer's errors evenly over the directions of its output."""
    method = METHODS[options.method]
    return method.feedback or (method.refine is not None and method.trains(options.method_config()))


def _kind(choice: Choice) -> Choice:
    """Return the choice with all ranks of an error branch made one: they differ in sizes only."""
    return replace(choice, branch=choice.branch and 1)


def choices(options: QuantizeOptions) -> list[Choice]:
    """Return what may be chosen for a layer: ``options.allocate`` says what varies.

    The rank of the options is the largest number of planes that is tried, their rank of the error branch the largest of
    a branch; of that a half, a quarter and none are tried too.
    """
    planes: Sequence[int | None] = (None,)
    branches: Sequence[int | None] = (None,)
    if "rank" in options.allocate:
        planes = range(1, (options.rank or _MOST_PLANES) + 1)
    if "branch" in options.allocate:
        branches = sorted({options.error_rank // part for part in (1, 2, 4)} | {0})
    bits = layout.BITS if "bits" in options.allocate else (options.code_bits(),)
    found = []
    for item in itertools.starmap(Choice, itertools.product(bits, planes, branches)):
        try:
            item.applied(options)
        except ValueError:  # the method does not take it
            continue
        if item.bits < 8 or (item.planes or 1) == 1:  # at 8 bits nothing is left for more planes to gain
            found.append(item)
    return found


def sensitivities(
    model: Any, layers: Mapping[str, nn.Module], tokens: Tensor, seed: int = 0, *, spectra: bool = False
) -> dict[str, Sensitivity]:
    """Return how the model's output depends on each layer; with ``spectra`` also the spectrum of its inputs.

    Large inputs that the output does not depend on (attention sinks) count for nothing, unlike in a product of mean
    squares.
    """
    # Experts that no token is sent to stay at zero.
    sizes: dict[str, Any] = {name: module.weight.shape for name, module in layers.items()}
    fisher = {name: torch.zeros(len(range(0, rows, _stride(rows))), columns) for name, (rows, columns) in sizes.items()}
    sketches: dict[str, Tensor] = {}
    if spectra:
        sketches = {name: torch.zeros(columns, min(_SKETCH, columns)) for name, (_, columns) in sizes.items()}

    def add(name: str, inputs: Tensor, grad: Tensor) -> None:
        stride = _stride(grad.shape[-1])
        flow = grad[..., ::stride].reshape(-1, grad[..., ::stride].shape[-1]).float().square()
        flat = inputs.reshape(-1, inputs.shape[-1]).float()
        fisher[name] = fisher[name] + flow.T @ flat.square() * (stride / tokens.numel())
        if spectra:
            sketch = flat.T @ (flow.sum(1)[:, None] * (flat @ _directions(flat.shape[1])))
            sketches[name] += sketch * (stride / tokens.numel())

    def watch(name: str, _module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(partial(add, name, args[0].detach()))  # type: ignore[no-untyped-call]

    _, start = adapter_of(model).embeddings().embedding
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as hooks, torch.enable_grad():
        hooks.callback(model.zero_grad, set_to_none=True)
        for name, module in layers.items():
            hooks.enter_context(module.register_forward_hook(partial(watch, name)))
        hooks.enter_context(
            start.register_forward_hook(lambda _module, _args, output: output.detach().requires_grad_())
        )
        for window in tokens:
            logits = model(input_ids=window[None], use_cache=False).logits[0].float()
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
    if damaged := [name for name, found in fisher.items() if not is_finite(found)]:
        raise ValueError(f"the gradients of {damaged[0]} overflow, so a budget cannot be spent; give --bits instead")
    return {
        name: Sensitivity(found, _spectrum(sketches[name], found) if spectra else torch.empty(0))
        for name, found in fisher.items()
    }


def _directions(columns: int) -> Tensor:
    """Return orthonormal random directions (K, up to 128), the same ones for every call."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(columns, min(_SKETCH, columns), generator=generator)
    basis: Tensor = torch.linalg.qr(normal)[0]
    return basis


def _spectrum(sketch: Tensor, fisher: Tensor) -> Tensor:
    """Return shares of the largest eigenvalues of A from ``A @ directions`` (Nystroem); fisher sums to its trace."""
    directions = _directions(len(sketch)).double()
    total = float(fisher.sum())
    if total <= 0:
        return torch.zeros(sketch.shape[1])
    inner = directions.T @ sketch.double()
    for share in (1e-6, 1e-4, 1e-2):  # more where few tokens, as some experts see, leave rounding errors alone
        shift = share * inner.diagonal().mean()
        lower, failed = torch.linalg.cholesky_ex((inner + inner.T) / 2 + shift * torch.eye(len(inner)).double())
        if not int(failed):
            break
    else:
        raise ValueError("the inputs or gradients of a layer hold NaN or infinity; give --bits without a budget")
    half = torch.linalg.solve_triangular(lower, sketch.double().T, upper=False)
    eigenvalues: Tensor = torch.linalg.eigvalsh(half @ half.T).flip(0)
    return (eigenvalues / total).float()


def branch_share(spectrum: Tensor, rows: int, columns: int, rank: int) -> float:
    """Return the share of the output error of a layer (rows, columns) that an error branch takes away.

    Errors of rounding are as good as independent. Weighted by the inputs they are N draws in K dimensions whose
    principal variances are the spectrum, what it leaves spread evenly over the other dimensions. The branch takes the
    largest eigenvalues of what was drawn (spiked covariance: Baik and Silverstein 2006). Error feedback and training
    leave a flat spectrum: an empty one. Measured in one block of SmolLM2-135M at 3 bits, rank 8, ``down_proj`` and
    ``gate_proj``: rounding to nearest 0.24 and 0.43 (this function 0.26 and 0.58), GPTQ 0.06 and 0.06, LCQ the same
    (this function 0.04 and 0.04).
    """
    if rank >= min(rows, columns):
        return 1.0
    bulk = max(0.0, 1 - float(spectrum.sum())) / max(1, columns - len(spectrum))
    ratio = columns / rows
    edge = bulk * (1 + math.sqrt(ratio)) ** 2
    spikes = spectrum[:rank].double()
    drawn = spikes * (1 + ratio * bulk / (spikes - bulk).clamp_min(1e-30))
    taken = torch.where(spikes > bulk * (1 + math.sqrt(ratio)), drawn, edge)
    return min(1.0, float(taken.sum()) + max(0, rank - len(spikes)) * edge)


def _stride(rows: int) -> int:
    """Return the distance between the rows of a layer that are looked at."""
    return -(-rows // _ROWS)


def harms(
    weight: Tensor, sensitivity: Sensitivity, group: int, possible: Mapping[Choice, QuantizeOptions]
) -> dict[Choice, float]:
    """Return the predicted divergence of a layer (N, K) for each choice, given with the options that it makes."""
    rows, columns = weight.shape
    some, fisher = weight[:: _stride(rows)], sensitivity.fisher
    methods = {(item.bits, item.planes): METHODS[options.method] for item, options in possible.items()}
    harm = {item: _harm(some, fisher, group, method, *item) for item, method in methods.items()}
    left = {
        rank: 1 - branch_share(sensitivity.spectrum, rows, columns, rank) if rank else 1.0
        for rank in {item.branch for item in possible}
    }
    return {item: harm[item.bits, item.planes] * left[item.branch] for item in possible}


def _harm(weight: Tensor, fisher: Tensor, group: int, method: Method, bits: int, planes: int | None) -> float:
    """Return the divergence of rows (N, K) with this Fisher information, rounded to nearest or as the method fits."""
    energy = fisher.mean(0)
    if method.predict is not None and planes is not None and bits < 8:
        decoded = method.predict(weight, energy, group, bits, planes)
    else:
        statistics = LayerStatistics.empty(weight.shape[1])
        statistics.gram.diagonal().copy_(energy)
        problem = LayerProblem("sensitivity", weight, None, replace(statistics, tokens=1))
        decoded = round_nearest(problem, Grid(bits, group, clip_search=True), method.name).weight()
    return 0.5 * float((fisher * (decoded - weight).square()).sum())


def corner(options: QuantizeOptions) -> LayerSpec:
    """Return what a record of one small corner of a layer is: it tells which numbers the method stores."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(layout.PANEL, MIN_GROUP, generator=generator)
    problem = LayerProblem("corner", weight, None, LayerStatistics.empty(MIN_GROUP))
    return solve_layer(problem, replace(options, group_size=MIN_GROUP, branch_passes=1)).spec()


def stored_bits(rows: int, columns: int, spec: LayerSpec, options: QuantizeOptions) -> int:
    """Return what a layer (rows, columns) takes whose `corner` is ``spec``, side data and error branch included."""
    rank = min(options.error_rank, rows, columns) if spec.branch_rank else 0
    whole = replace(spec, out_features=rows, in_features=columns, group=options.group(columns), branch_rank=rank)
    return sum(whole.stored_bits().values())


def choose(layers: Mapping[str, Candidates], budget: float, weights: int) -> dict[str, Choice]:
    """Return the choice for each layer with the least sum of harms whose stored bits keep to the budget.

    Raises:
        ValueError: Even the smallest choices do not keep to it.
        ModuleNotFoundError: scipy is missing.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix
    except ModuleNotFoundError as error:
        message = "--target-bits needs scipy: pip install 'rankbook[allocation]'"
        raise ModuleNotFoundError(message, name="scipy") from error
    least = sum(min(layer.stored.values()) for layer in layers.values())
    if least > budget:
        raise ValueError(
            f"{budget / weights:.3f} bits per weight are too few: the smallest choice takes {least / weights:.3f} with"
            " its side data; give more, or a larger group size"
        )
    options = [(index, name, item) for index, (name, layer) in enumerate(layers.items()) for item in layer.harm]
    harm = [layers[name].harm[item] for _, name, item in options]
    stored = [layers[name].stored[item] / budget for _, name, item in options]
    worst = max(*harm, 1e-30)
    one_each = csr_matrix(([1.0] * len(options), ([index for index, _, _ in options], range(len(options)))))
    solution = milp(
        [value / worst for value in harm],
        integrality=[1] * len(options),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint([stored], 0, 1)],
        options={"mip_rel_gap": _GAP, "time_limit": 60},
    )
    if solution.x is None:
        raise ValueError(f"no allocation was found: {solution.message}")
    return {name: item for (_, name, item), taken in zip(options, solution.x, strict=True) if taken > 0.5}
