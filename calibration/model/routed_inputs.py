"""What enters the experts of a block, kept on disk, so that one Gram matrix of an expert at a time is in memory.

Of K inputs it has K**2 elements: those of 256 experts of 7168 inputs would be 53 GB. What is kept are the tokens that
entered the block's experts and the numbers of the experts that they were sent to; what enters the second matrix of an
expert is computed from it again, which costs what one more pass through the experts does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.model.experts import gated, linears


class RoutedInputs:
    """The inputs of the experts of one module."""

    def __init__(self, module: Any, device: torch.device) -> None:
        """Begin without inputs.

        Args:
            module: Experts that were split (`rankbook.calibration.model.experts.split`), on the device.
            device: Where statistics are computed.
        """
        self._module, self._device = module, device
        self._calls: list[tuple[Tensor, Tensor]] = []
        self._everyone: tuple[str, LayerStatistics] | None = None
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Send what was kept alone: whoever gets it has the experts, see `extend`."""
        return _sent, (type(self), self._calls)

    def extend(self, other: RoutedInputs) -> None:
        """Keep the inputs of another one too, after those that are kept already."""
        self._calls += [(_on_disk(hidden), chosen.clone()) for hidden, chosen in other._calls]

    def note(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what a call of the module is given: a forward pre-hook with keywords."""
        given = dict(zip(("hidden_states", "top_k_index"), args, strict=False)) | kwargs
        self._calls.append((_on_disk(given["hidden_states"]), given["top_k_index"].cpu()))

    def tokens(self, expert: int) -> int:
        """Return how many tokens were sent to an expert."""
        return sum(int((chosen == expert).sum()) for _, chosen in self._calls)

    def is_scarce(self, matrix: str, expert: int) -> bool:
        """Return whether an expert saw fewer tokens than the named matrix has inputs, and another one saw some."""
        columns = linears(self._module, matrix).columns()
        return self.tokens(expert) < columns and any(chosen.numel() for _, chosen in self._calls)

    @torch.no_grad()
    def statistics(self, matrix: str, expert: int) -> LayerStatistics:
        """Return the statistics of what enters the named matrix of an expert.

        A Gram matrix of fewer tokens than inputs is singular: such an expert is given the missing ones as copies of the
        mean of all experts of its matrix, in numbers; its own tokens keep their weight.
        """
        own = self._own(matrix, expert)
        return own.filled_up(self._of_all(matrix)) if self.is_scarce(matrix, expert) else own

    def _own(self, matrix: str, expert: int) -> LayerStatistics:
        layers, first = linears(self._module, matrix), linears(self._module)
        found = LayerStatistics.empty(layers.columns(), self._device)
        for x in self._inputs(expert):
            found.update(x if layers is first else gated(self._module, first[expert](x)))
        return found

    def _of_all(self, matrix: str) -> LayerStatistics:
        """Return the sum over all experts of a matrix, of which one is kept."""
        with self._lock:
            if self._everyone is None or self._everyone[0] != matrix:
                self._everyone = None
                total = self._own(matrix, 0)
                for expert in range(1, len(linears(self._module, matrix))):
                    total.add(self._own(matrix, expert))
                self._everyone = (matrix, total)
            return self._everyone[1]

    def _inputs(self, expert: int) -> Iterator[Tensor]:
        """Yield the tokens (rows, H) that were sent to an expert, call after call."""
        for hidden, chosen in self._calls:
            rows = (chosen == expert).any(-1).nonzero()[:, 0]
            if len(rows):
                yield hidden[rows].to(self._device)


class MatrixInputs(RoutedInputs):
    """The inputs of one matrix of experts whose family computes them in its own way: they are kept as they enter it."""

    def note(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what a call of the matrix is given: rows (S, K), and the expert of each, (S,)."""
        x, experts = (*args, *kwargs.values())
        self._calls.append((_on_disk(x), experts.cpu()[:, None]))

    def _own(self, matrix: str, expert: int) -> LayerStatistics:
        found = LayerStatistics.empty(linears(self._module, matrix).columns(), self._device)
        for x in self._inputs(expert):
            found.update(x)
        return found


def inputs_of(module: Any, matrix: str, device: torch.device) -> tuple[nn.Module, RoutedInputs]:
    """Return what keeps the inputs of a matrix of experts, and the module whose calls it notes.

    Args:
        module: Experts that were split.
        matrix: Name of the matrix.
        device: Where statistics are computed.
    """
    if hasattr(module, "expert_matrices"):
        return getattr(module, matrix), MatrixInputs(module, device)
    return module, RoutedInputs(module, device)


def _sent(kind: type[RoutedInputs], calls: list[tuple[Tensor, Tensor]]) -> RoutedInputs:
    found = kind(None, torch.device("cpu"))
    found._calls = calls
    return found


def _on_disk(values: Tensor) -> Tensor:
    """Return values in a file without a name, which ends with the tensor."""
    array = values.detach().float().cpu().numpy()
    with tempfile.TemporaryFile() as file:
        array.tofile(file)
        file.flush()
        return torch.from_numpy(np.memmap(file, array.dtype, "r+", shape=array.shape))
