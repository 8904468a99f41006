"""Numbers in the place of a model's layers: shapes, biases and kinds of layers that do not fit are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rankbook.calibration.imports.base import ImportRefusedError, Numbers
from rankbook.calibration.imports.packing import check_parts, pack
from rankbook.calibration.imports.places import Place
from rankbook.calibration.model.experts import ExpertMatrices
from rankbook.calibration.model.packed_modules import packed_modules


class Model(nn.Module):
    """A layer with a bias, one of another kind, and a matrix of two experts."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 8)
        self.norm = nn.LayerNorm(32)
        self.matrix = ExpertMatrices(nn.Linear(32, 8, bias=False) for _ in range(2))


def numbers(rows: int = 8, bits: int = 4, zeros: int = 8) -> Numbers:
    """Return numbers of a layer of 32 inputs."""
    return Numbers(torch.full((rows, 32), 9, dtype=torch.uint8), bits, [torch.ones(rows, 2)], "test", zeros=zeros)


@pytest.mark.parametrize(
    ("target", "rows", "bias", "message"),
    [
        ("layer", 8, None, "its bias is missing"),
        ("layer", 9, torch.ones(9), "9 x 32 weights, and config.json asks for 8 x 32"),
        ("norm", 8, None, "has a LayerNorm there"),
        ("matrix", 8, None, "8 x 32 weights, and config.json asks for 16 x 32"),
        ("matrix", 16, torch.ones(16), "has a bias, and the model of config.json has none"),
        ("other", 8, None, "Model has no layer other"),
    ],
)
def test_what_does_not_fit_is_refused(target: str, rows: int, bias: Tensor | None, message: str) -> None:
    with pytest.raises(ImportRefusedError, match=message):
        pack(Model(), target, numbers(rows), bias)


def test_the_experts_of_a_matrix_get_their_rows() -> None:
    model, made = Model(), numbers(16)
    made.codes[8:] = 7
    pack(model, "matrix", made, None)
    assert set(packed_modules(model)) == {"matrix.0", "matrix.1"}
    assert [float(layer.weight[0, 0]) for layer in model.matrix] == [1, -1]  # type: ignore[index]
    assert model.matrix[0].spec == model.matrix[1].spec


def test_parts_are_joined_only_if_they_are_alike() -> None:
    whole = Numbers.joined([numbers(zeros=8), numbers(zeros=7)])
    assert whole.record().weight()[::8, 0].tolist() == [1, 2]
    with pytest.raises(ImportRefusedError, match="another way"):
        Numbers.joined([numbers(), numbers(bits=8)])


def test_every_part_of_every_expert_is_asked_for() -> None:
    places = [Place("matrix", expert, part, 2) for expert in range(2) for part in range(2)]
    check_parts(Model(), "matrix", places)
    with pytest.raises(ImportRefusedError, match=r"lacks 1 of 4 matrices .*expert 1, part 0"):
        check_parts(Model(), "matrix", [*places[:2], places[3]])
    with pytest.raises(ImportRefusedError, match="no place for expert 2, part 0"):
        check_parts(Model(), "matrix", [*places, Place("matrix", 2, 0, 2)])
    with pytest.raises(ImportRefusedError, match="no place for expert 0, part 0"):
        check_parts(Model(), "layer", [Place("layer"), Place("layer", 0)])
