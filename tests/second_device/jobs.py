"""What tests have done in a process that knows the second device; results travel back by value or in files."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import second_device


def command(*words: object) -> tuple[int, str, str]:
    """Run the command line; return its exit code, stdout and stderr."""
    from rankbook.tools.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def with_little_memory(more: int, *words: object) -> tuple[int, str, str]:
    """`command`, while the device has room for ``more`` bytes only."""
    with second_device.limited(more):
        return command(*words)


def mixed() -> dict[str, str]:
    """Return what operations on tensors of two devices, or with another device's generator, say."""
    import torch

    host, there = torch.ones(2, 2), torch.ones(2, 2, device=second_device.NAME)
    other = torch.ones(2, 2, device=f"{second_device.NAME}:1")
    attempts: dict[str, Callable[[], Any]] = {
        "sum": lambda: host + there,
        "product": lambda: there @ host,
        "two indexes": lambda: there + other,
        "list": lambda: torch.cat([there, host]),
        "index": lambda: there[torch.tensor([0])],
        "in place": lambda: there.add_(host),
        "generator": lambda: there.uniform_(generator=torch.Generator()),
        "number": lambda: there + torch.tensor(1.0),
        "copy": lambda: there.copy_(host),
    }
    return {name: _told(attempt) for name, attempt in attempts.items()}


def _told(attempt: Callable[[], Any]) -> str:
    try:
        return f"is on {attempt().device}"
    except RuntimeError as error:
        return str(error)


def gradients() -> tuple[list[float], str]:
    """Return gradients that were computed on the device, as numbers, and where they were."""
    import torch

    x = torch.arange(6.0).view(2, 3).to(second_device.NAME).requires_grad_()
    layer = torch.nn.Linear(3, 2, device=second_device.NAME)
    torch.nn.functional.silu(layer(x)).square().sum().backward()
    grad = x.grad
    assert grad is not None
    host = torch.arange(6.0).view(2, 3).requires_grad_()
    torch.nn.functional.silu(layer.cpu()(host)).square().sum().backward()
    assert host.grad is not None
    return (grad.cpu() - host.grad).flatten().tolist(), str(grad.device)


def stored(folder: Path) -> dict[str, bytes]:
    """Return what a checkpoint holds, but for its manifest and resolved flags, which tell of the run."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix == ".safetensors" or path.name == "config.json"
    }
