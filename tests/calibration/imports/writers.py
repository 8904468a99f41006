"""Layers in the layouts of other tools, written from the definitions of these, and folders that hold them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankbook.calibration.checkpoint.format import open_checkpoint
from rankbook.calibration.imports.floats import TWICE_E2M1
from rankbook.calibration.model.experts import matrix_of, stacks
from rankbook.calibration.model.loading import load_model
from rankbook.calibration.model.plain import make_plain

FIXTURES = Path(__file__).parent / "fixtures"
Parts = dict[str, Tensor]
"""Tensors of a layer by the rest of their names."""
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs lies at each place of a word of AutoAWQ's gemm."""


@dataclass(frozen=True)
class Layer:
    """Integers of a layer, and what they mean.

    Attributes:
        codes: (N, K) uint8.
        bits: Of a code.
        scales: (N, G) float16.
        zeros: (N, G) integers.
    """

    codes: Tensor
    bits: int
    scales: Tensor
    zeros: Tensor

    def weight(self) -> Tensor:
        """Return the weight, float64 (N, K)."""
        group = self.codes.shape[1] // self.scales.shape[1]
        scales, zeros = (each.double().repeat_interleave(group, 1) for each in (self.scales, self.zeros))
        return scales * (self.codes.double() - zeros)


def random_layer(shape: tuple[int, int], bits: int, group: int, seed: int, *, symmetric: bool = False) -> Layer:
    """Return random integers."""
    draw = torch.Generator().manual_seed(seed)
    groups = (shape[0], shape[1] // group)
    scales = (torch.rand(groups, generator=draw) * 0.02 + 1e-3).half()
    zeros = torch.randint(1, 1 << bits, groups, generator=draw)
    zeros = torch.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros
    return Layer(torch.randint(0, 1 << bits, shape, generator=draw).to(torch.uint8), bits, scales, zeros)


def words(values: Tensor, bits: int) -> Tensor:
    """Return integers (A, B) one behind the other in int32, lowest first, (A, ceil(B bits / 32))."""
    rows = []
    for row in values.tolist():
        number = sum(int(value) << (bits * index) for index, value in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(4 * -(-len(row) * bits // 32), "little"), np.int32))
    return torch.from_numpy(np.stack(rows))


def gptq(layer: Layer, *, less_one: bool = True) -> Parts:
    """Return a layer as AutoGPTQ stores it."""
    zeros = (layer.zeros - int(less_one)) & ((1 << layer.bits) - 1)
    group = layer.codes.shape[1] // layer.scales.shape[1]
    return {
        "qweight": words(layer.codes, layer.bits).T.contiguous(),
        "qzeros": words(zeros.T, layer.bits),
        "scales": layer.scales.T.contiguous(),
        "g_idx": (torch.arange(layer.codes.shape[1]) // group).int(),
    }


def awq_gemm(layer: Layer) -> Parts:
    """Return a layer as AutoAWQ's gemm takes it."""
    order = torch.arange(layer.codes.shape[0]).view(-1, 8)[:, AWQ_PLACES].flatten()
    parts = {"qweight": words(layer.codes.T[:, order], 4), "qzeros": words(layer.zeros.T[:, order], 4)}
    return {**parts, "scales": layer.scales.T.contiguous()}


def awq_gemv(layer: Layer) -> Parts:
    """Return a layer as AutoAWQ's gemv takes it: groups are padded to whole words, and to two of them or more."""
    groups = layer.scales.shape[1]
    padding = (0, -groups % 16)
    zeros, scales = torch.nn.functional.pad(layer.zeros, padding), torch.nn.functional.pad(layer.scales, padding)
    return {"qweight": words(layer.codes, 4), "qzeros": words(zeros, 4), "scales": scales}


def compressed(layer: Layer) -> Parts:
    """Return a layer as compressed-tensors packs it."""
    return {
        "weight_packed": words(layer.codes, layer.bits),
        "weight_scale": layer.scales,
        "weight_zero_point": words(layer.zeros.T, layer.bits).T.contiguous(),
        "weight_shape": torch.tensor(layer.codes.shape),
    }


def e2m1_values(codes: Tensor) -> Tensor:
    """Return the values of codes of E2M1, float64."""
    return torch.tensor(TWICE_E2M1, dtype=torch.float64)[codes.long()] / 2


def random_nvfp4(shape: tuple[int, int], seed: int) -> tuple[Parts, Tensor]:
    """Return a layer as ModelOpt stores NVFP4, and its float32 weight."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, shape, generator=draw).to(torch.uint8)
    scales = (torch.rand(shape[0], shape[1] // 16, generator=draw) * 400 + 1).to(torch.float8_e4m3fn)
    second = torch.rand((), generator=draw) * 1e-4 + 1e-5
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    weight = e2m1_values(codes) * (scales.float() * second).double().repeat_interleave(16, 1)
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": second, "input_scale": 2 * second}, weight


def random_fp8(shape: tuple[int, int], seed: int, block: int = 0) -> tuple[Parts, Tensor]:
    """Return a layer in E4M3 with one scale, or with those of blocks (``weight_scale_inv``), and its float32 weight."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=draw).to(torch.float8_e4m3fn)
    if not block:
        scale = torch.rand((), generator=draw) * 0.1 + 0.01
        return {"weight": weight, "weight_scale": scale, "input_scale": 2 * scale}, weight.double() * scale
    scales = torch.rand(-(-shape[0] // block), -(-shape[1] // block), generator=draw) * 0.1 + 0.01
    spread = scales.repeat_interleave(block, 0)[: shape[0]].repeat_interleave(block, 1)[:, : shape[1]]
    return {"weight": weight, "weight_scale_inv": scales}, weight.double() * spread


def rewritten(
    folder: Path, entry: Mapping[str, Any], pattern: str, write: Callable[[tuple[int, int], int], tuple[Parts, Tensor]]
) -> dict[str, Tensor]:
    """Quantize the layers of a folder of transformers whose names match, in place.

    Args:
        folder: With config.json and model.safetensors.
        entry: The quantization entry of config.json.
        pattern: Regular expression for names of layers.
        write: Returns the tensors of a random layer of a shape, and its weight, by a seed.

    Returns:
        The dense tensors of the model that was written, the weights of these layers in float32.
    """
    stored, dense = load_file(folder / "model.safetensors"), {}
    for seed, name in enumerate(sorted(stored)):
        tensor = stored.pop(name)
        layer = name.removesuffix(".weight")
        if tensor.ndim != 2 or not re.search(pattern, layer):
            stored[name] = dense[name] = tensor
            continue
        parts, weight = write((tensor.shape[0], tensor.shape[1]), seed)
        stored |= {f"{layer}.{part}": made.contiguous() for part, made in parts.items()}
        dense[name] = weight.float()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": dict(entry)}), encoding="utf-8")
    return dense


def check_same(checkpoint: Path, dense: Path, dtype: torch.dtype = torch.float32) -> None:
    """Compare every packed weight, to the last bit, and the logits with those of a dense model."""
    want, got = load_model(dense, dtype)[0], load_model(checkpoint, dtype)[0]
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        torch.testing.assert_close(got(input_ids=ids).logits, want(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    make_plain(want)
    layers = open_checkpoint(checkpoint).layers
    experts = [name for name in layers if matrix_of(name)]
    assert experts
    for names in stacks(layers).values():
        assert len({layers[name] for name in names}) == 1, "a matrix of experts is one operator"
    for name in layers:
        assert torch.equal(got.get_submodule(name).weight, want.get_submodule(name).weight), name
