"""Runs an exported model step by step and compares its logits with those of the checkpoint in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

STEPS = (7, 1, 1, 4)
"""Tokens of each call: a prompt with an empty past, two single tokens, then several at once."""
PADDING = 3
"""Positions at the left of the second row that are padding."""


def torch_logits(model: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the logits (batch, sequence, vocabulary) of all positions in one call."""
    with torch.no_grad():
        result: np.ndarray[Any, Any] = (
            model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float().numpy()
        )
    return result


def batch(vocabulary: int = 256, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, mask and positions of ``rows`` sequences, the second one padded at the left."""
    total = sum(STEPS)
    ids = torch.randint(0, vocabulary, (rows, total), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(rows, total, dtype=torch.int64)
    if rows > 1:
        mask[1, :PADDING] = 0
    return ids, mask, (mask.cumsum(1) - 1).clamp_min(0)


def step_logits(folder: Path, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> list[Any]:
    """Return the logits of each call over `STEPS`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # as rankbook.tools sets it
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    past = {}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            past[value.name] = np.zeros((ids.shape[0], value.shape[1], 0, value.shape[3]), dtype)
    names = [value.name for value in session.get_outputs()]
    logits, start = [], 0
    for count in STEPS:
        end = start + count
        feeds = {
            "input_ids": ids[:, start:end].numpy(),
            "attention_mask": mask[:, :end].numpy(),
            "position_ids": positions[:, start:end].numpy(),
            **past,
        }
        outputs = dict(zip(names, session.run(None, feeds), strict=True))
        logits.append(outputs["logits"])
        past = {name.replace("present.", "past_key_values."): v for name, v in outputs.items() if name != "logits"}
        start = end
    return logits


def worst_error(folder: Path, model: Any, *, logits: str, rows: int = 2) -> float:
    """Return the largest difference of logits at real positions, relative to the largest logit."""
    ids, mask, positions = batch(rows=rows)
    want = torch_logits(model, ids, mask, positions)
    worst, start = 0.0, 0
    for got, count in zip(step_logits(folder, ids, mask, positions), STEPS, strict=True):
        end = start + count
        first = start if logits == "all" else end - 1
        assert got.shape == (rows, end - first, want.shape[2])
        real = mask[:, first:end].bool().numpy()
        assert np.isfinite(got).all()
        worst = max(worst, float(np.abs(got - want[:, first:end])[real].max()))
        start = end
    return worst / float(np.abs(want).max())
