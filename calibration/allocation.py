"""Bits for each layer under a budget of stored bits: where rounding hurts the model's output most, more of them.

Rounding errors E of a layer change the model's output distribution by about (nats per token, second order)

    KL = 1/2 sum_nk F_nk E_nk^2        F_nk = mean over tokens of x_k^2 (d loss / d y_n)^2

with labels drawn from the model itself: F is the diagonal of the Fisher information of the weights, one token apart
from the other (SqueezeLLM, Kim et al. 2024, section 4.1, weights its codebooks by it). Errors of different layers add.
One backward pass through the whole model gives F of every layer; E is that of rounding to nearest on a searched grid.
The choice is an integer program with one number of bits per layer, solved by HiGHS.

Measured on SmolLM2-135M, rounding to nearest with searched ranges, group 64, 6144 tokens of WikiText-2, at 3.255 stored
bits: perplexity 41.3 with 3 bits everywhere, 37.9 with this choice (22.0 unquantized); at 4.256 stored bits nothing is
gained (25.0 with 4 bits everywhere, 25.2). With the product of the mean squares of inputs and gradients in place of F,
which attention sinks dominate, nothing was gained at 3.255 either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankbook.calibration.layer_meta import LayerMeta
from rankbook.calibration.methods import LayerProblem, rtn
from rankbook.calibration.options import QuantizeOptions
from rankbook.calibration.record import MIN_GROUP, QuantizedLinear
from rankbook.calibration.solve import solve_layer
from rankbook.calibration.statistics import LayerStatistics
from rankbook.plugins import layout

_SEQUENCES = 4
"""Calibration windows for the backward pass."""
_ROWS = 128
"""Rows of a layer that are looked at, evenly spaced."""
_GAP = 1e-4
"""Relative distance from the best choice at which the solver stops."""


@dataclass(frozen=True)
class Candidates:
    """What each number of bits costs one layer.

    Attributes:
        harm: Predicted divergence in nats per token, by bits.
        stored: Stored bits of the whole layer, by bits.
    """

    harm: Mapping[int, float]
    stored: Mapping[int, int]


def allocate(model: Any, names: Sequence[str], tokens: Tensor, options: QuantizeOptions) -> dict[str, int]:
    """Return the bits of each layer so that all of them together keep to ``options.target_bits``.

    Memory: the activations of one window through the whole model, besides its weights.

    Args:
        model: The original model.
        names: Full names of the linear layers to quantize.
        tokens: Calibration windows (sequences, length).
        options: Method, group size, branch and target.

    Raises:
        ValueError: The target is below what the fewest bits need.
        ModuleNotFoundError: scipy is missing.
    """
    if options.target_bits is None:
        raise ValueError("allocation needs target_bits")
    layers = {name: model.get_submodule(name) for name in names}
    fisher = sensitivities(model, layers, tokens[:_SEQUENCES], options.seed)
    found: dict[str, Candidates] = {}
    widths = possible_bits(options)
    stored: dict[tuple[int, int], dict[int, int]] = {}
    for name, module in layers.items():
        weight = module.weight.detach().float()
        rows, columns = weight.shape
        if (rows, columns) not in stored:
            stored[rows, columns] = {bits: stored_bits(rows, columns, replace(options, bits=bits)) for bits in widths}
        harm = harms(weight[:: _stride(rows)], fisher[name], options.group(columns), widths)
        found[name] = Candidates(harm, stored[rows, columns])
    weights = sum(module.weight.numel() for module in layers.values())
    return choose(found, options.target_bits * weights, weights)


def possible_bits(options: QuantizeOptions) -> list[int]:
    """Return the widths at which the method accepts its options."""
    widths = []
    for bits in layout.BITS:
        try:
            replace(options, bits=bits)
        except ValueError:
            continue
        widths.append(bits)
    return widths


def sensitivities(model: Any, layers: Mapping[str, nn.Module], tokens: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Return the diagonal of the Fisher information of up to 128 evenly spaced rows of each layer, (rows, K).

    Scaled so that half its sum with squared weight errors is nats per token for the whole layer. Large inputs that the
    output does not depend on (attention sinks) count for nothing, unlike in a product of mean squares.
    """
    fisher = {name: torch.zeros(()) for name in layers}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, output: Tensor) -> None:
            inputs = args[0].detach()

            def add(grad: Tensor) -> None:
                stride = _stride(grad.shape[-1])
                flow = grad[..., ::stride].reshape(-1, grad[..., ::stride].shape[-1]).float().square()
                energy = inputs.reshape(-1, inputs.shape[-1]).float().square()
                fisher[name] = fisher[name] + flow.T @ energy * (stride / tokens.numel())

            output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in layers.items()]
    start = model.get_input_embeddings()
    hooks.append(start.register_forward_hook(lambda _module, _args, output: output.detach().requires_grad_()))
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.enable_grad():
            for window in tokens:
                logits = model(input_ids=window[None], use_cache=False).logits[0].float()
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return fisher


def _stride(rows: int) -> int:
    """Return the distance between the rows of a layer that are looked at."""
    return -(-rows // _ROWS)


def harms(weight: Tensor, fisher: Tensor, group: int, widths: Sequence[int]) -> dict[int, float]:
    """Return the predicted divergence of rows (N, K) with Fisher information (N, K), rounded at each width."""
    statistics = LayerStatistics.empty(weight.shape[1])
    statistics.gram.diagonal().copy_(fisher.mean(0))
    problem = LayerProblem("sensitivity", weight, None, replace(statistics, tokens=1))
    found = {}
    for bits in widths:
        error = rtn.quantize(problem, rtn.RtnConfig(bits, group, clip_search=True)).weight() - weight
        found[bits] = 0.5 * float((fisher * error.square()).sum())
    return found


def stored_bits(rows: int, columns: int, options: QuantizeOptions) -> int:
    """Return what a layer (rows, columns) will take with these options, side data and error branch included.

    A record of one small corner tells which numbers the method stores.
    """
    corner = replace(options, group_size=MIN_GROUP, branch_passes=1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(layout.PANEL, MIN_GROUP, generator=generator)
    record: QuantizedLinear = solve_layer(
        LayerProblem("corner", weight, None, LayerStatistics.empty(MIN_GROUP)), corner
    )
    meta = replace(LayerMeta.of(record), out_features=rows, in_features=columns, group=options.group(columns))
    if meta.rank:
        meta = replace(meta, rank=min(options.error_rank, rows, columns))
    return sum(8 * tensor.numel() * tensor.element_size() for tensor in meta.template().values())


def choose(layers: Mapping[str, Candidates], budget: float, weights: int) -> dict[str, int]:
    """Return the bits of each layer with the least sum of harms whose stored bits keep to the budget.

    Raises:
        ValueError: Even the fewest bits do not keep to it.
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
    options = [(index, name, bits) for index, (name, layer) in enumerate(layers.items()) for bits in layer.harm]
    harm = [layers[name].harm[bits] for _, name, bits in options]
    stored = [layers[name].stored[bits] / budget for _, name, bits in options]
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
    return {name: bits for (_, name, bits), taken in zip(options, solution.x, strict=True) if taken > 0.5}
