"""What a model's code asks of sizes while it is traced, and a graph would answer alike for every text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from rankbook.exporter.bounds import broken
from rankbook.exporter.export import export
from rankbook.exporter.refusal import NotExportableError
from tests.exporter.checkpoints import make_checkpoint

AXES = ({0: "batch", 1: "sequence"}, {0: "batch", 1: "past_sequence"})
TABLE = torch.arange(64.0)


class _Model(nn.Module):
    def __init__(self, code: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.code = code

    def forward(self, tokens: Tensor, past: Tensor) -> Tensor:
        return self.code(torch.cat([past, tokens], 1))


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (lambda x: x * x.shape[1], None),
        (lambda x: x * 2 if x.shape[1] > 64 else x, "past_sequence + sequence <= 64"),
        (lambda x: x * 2 if x.shape[1] == 8 else x, "Eq(past_sequence, 8 - sequence)"),
        (lambda x: x * TABLE[: x.shape[1]], "past_sequence + sequence <= 64"),
    ],
    ids=["any", "longer", "equal", "table"],
)
def test_a_condition_that_a_long_text_breaks_is_found(code: Callable[[Tensor], Tensor], told: str | None) -> None:
    shapes = [dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in AXES]
    program = torch.export.export(
        _Model(code),
        (torch.zeros(2, 3), torch.zeros(2, 5)),
        dynamic_shapes=tuple(shapes),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    texts = {length: [{"batch": 2, "sequence": 3, "past_sequence": length - 3}] for length in (8, 65)}
    assert broken(program, AXES, texts[8]) is None
    assert str(broken(program, AXES, texts[65])).startswith(str(told))


def test_a_model_that_asks_how_long_a_text_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As code does that keeps some keys of a longer text: the file would hold the way of short texts."""
    checkpoint = make_checkpoint(tmp_path, "llama", bits=4)
    forward = modeling_llama.LlamaMLP.forward

    def asking(self: modeling_llama.LlamaMLP, x: Tensor) -> Tensor:
        return forward(self, x if x.shape[1] <= 64 else x[:, :64])

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", asking)
    with pytest.raises(NotExportableError, match="the graph holds while sequence <= 64, and texts have up to"):
        export(checkpoint, tmp_path / "out")
