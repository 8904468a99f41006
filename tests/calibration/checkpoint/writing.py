"""A checkpoint of layers in every form, and what a card has as results, for the tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from rankbook.calibration.checkpoint import format as ck
from rankbook.calibration.checkpoint.card import CARD
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from tests.calibration.records import FORMS, random_record


def write(
    folder: Path, shard_bytes: int = ck.SHARD_BYTES, seed: int = 0, forms: Iterable[str] = tuple(FORMS)
) -> dict[str, QuantizedLinear]:
    """Write one layer of every form (or of some), one that shares another's tensors, and two plain tensors."""
    records = {f"blocks.{i}.linear": random_record(seed=seed, **FORMS[form]) for i, form in enumerate(forms)}
    layers = {name: record.spec() for name, record in records.items()}
    first = "blocks.0.linear"
    layers["head"] = records[first].spec(shared_with=first)
    tensors = {f"{name}.{part}": tensor for name, record in records.items() for part, tensor in record.pack().items()}
    tensors |= {"norm.weight": torch.ones(8, dtype=torch.bfloat16), "embedding.weight": torch.randn(4, 8)}
    parts = ck.CheckpointParts({"model_type": "toy"}, layers, tensors, {"options": {"bits": 3}})
    ck.write_checkpoint(folder, parts, shard_bytes)
    return {**records, "head": records[first]}


def result_rows(folder: Path) -> list[list[str]]:
    """Return the rows of the results in a card."""
    text = (folder / CARD).read_text("utf-8")
    lines = text[text.index("## Results") : text.index("```sh", text.index("## Results"))].splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("|")][2:]
