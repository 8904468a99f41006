"""Experts of other tools' checkpoints, stored one by one or all in one tensor, become the records of their matrices."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankbook.calibration.imports.run import import_model
from rankbook.tools.dev.family_models import tiny
from tests.calibration.imports import writers

Written = Callable[[tuple[int, int], int], tuple[writers.Parts, torch.Tensor]]
EXPERTS = r"experts\.\d+\.|self_attn\.\w+$"


def integers(write: Callable[[writers.Layer], writers.Parts], group: int, bits: int = 4) -> Written:
    """Return the writer of random layers in one layout."""

    def random(shape: tuple[int, int], seed: int) -> tuple[writers.Parts, torch.Tensor]:
        layer = writers.random_layer(shape, bits, group, seed, symmetric=seed % 2 == 0)
        return write(layer), layer.weight()

    return random


CASES: dict[str, tuple[str, dict[str, Any], Written]] = {
    "gptq": ("mixtral", {"quant_method": "gptq", "bits": 4, "group_size": 32}, integers(writers.gptq, 32)),
    "awq": ("qwen3_moe", {"quant_method": "awq", "bits": 4, "version": "gemm"}, integers(writers.awq_gemm, 32)),
    "compressed-tensors": (
        "qwen2_moe",
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        integers(writers.compressed, 16, bits=8),
    ),
    "modelopt": ("mixtral", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, writers.random_nvfp4),
    "fp8": (
        "deepseek_v3",
        {"quant_method": "fp8", "weight_block_size": [32, 32]},
        lambda shape, seed: writers.random_fp8(shape, seed, 32),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_experts_have_the_weights_of_the_definition(case: str, tmp_path: Path) -> None:
    """Layers of one tensor of the model differ in form here: one zero point for all, and one of each group."""
    family, entry, write = CASES[case]
    source = tmp_path / "source"
    tiny(family, source)
    shutil.copytree(source, tmp_path / "dense")
    dense = writers.rewritten(source, entry, EXPERTS, write)
    save_file(dense, tmp_path / "dense/model.safetensors", {"format": "pt"})
    import_model(source, tmp_path / "q")
    writers.check_same(tmp_path / "q", tmp_path / "dense")


def test_experts_of_gpt_oss_are_those_that_transformers_decodes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny("gpt_oss", source)
    stored = load_file(source / "model.safetensors")
    draw = torch.Generator().manual_seed(1)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = stored.pop(name).shape
        shape = (experts, rows, columns // 32)
        stored[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=draw).to(torch.uint8)
        stored[f"{name}_scales"] = torch.randint(118, 123, shape, generator=draw).to(torch.uint8)
    save_file({name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in stored.items()},
              source / "model.safetensors", {"format": "pt"})  # fmt: skip
    writers.rewritten(source, {"quant_method": "mxfp4"}, "nothing", writers.random_nvfp4)
    report = import_model(source, tmp_path / "q")
    writers.check_same(tmp_path / "q", source)
    parts, weights = report.totals["linear"]["parts"], report.totals["linear"]["weights"]
    assert (parts["codes"] + parts["params"]) / weights == pytest.approx(4.25)


def test_experts_without_a_rule_of_transformers_are_found_by_their_names(tmp_path: Path) -> None:
    """Tools take the experts of gpt-oss apart before they quantize; its rows of gate and up take turns."""
    source = tmp_path / "source"
    tiny("gpt_oss", source)
    shutil.copytree(source, tmp_path / "dense")
    stored = load_file(source / "model.safetensors")
    dense, write = dict(stored), integers(writers.compressed, 32)
    for seed, name in enumerate([name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]):
        owner, matrix = name.rpartition(".")[::2]
        bias = stored.pop(f"{name}_bias")
        whole = torch.empty_like(stored.pop(name).transpose(1, 2))
        for expert in range(len(whole)):
            for part, leaf in enumerate(("gate_proj", "up_proj") if matrix == "gate_up_proj" else ("down_proj",)):
                rows = slice(part, None, 2) if matrix == "gate_up_proj" else slice(None)
                parts, weight = write(whole[expert, rows].shape, 10 * seed + expert)  # type: ignore[arg-type]
                whole[expert, rows] = weight.float()
                parts["bias"] = bias[expert, rows].clone()
                stored |= {f"{owner}.{expert}.{leaf}.{key}": tensor for key, tensor in parts.items()}
        dense[name] = whole.transpose(1, 2).contiguous()
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    save_file(dense, tmp_path / "dense/model.safetensors", {"format": "pt"})
    writers.rewritten(
        source, {"quant_method": "compressed-tensors", "format": "pack-quantized"}, "nothing", writers.random_nvfp4
    )
    import_model(source, tmp_path / "q")
    writers.check_same(tmp_path / "q", tmp_path / "dense")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts.1.w2.qweight": None}, r"layer model.*experts.1.w2 lacks qweight"),
        ({"experts.1.w2.": None}, r"down_proj lacks 1 of 4 matrices .*expert 1, part 0.*all or none"),
        ({"experts.9.w2.": "experts.1.w2."}, r"has no place for expert 9"),
    ],
)
def test_a_matrix_without_one_of_its_experts_is_refused(
    change: dict[str, str | None], message: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    tiny("mixtral", source)
    writers.rewritten(source, CASES["gptq"][1], EXPERTS, CASES["gptq"][2])
    stored = load_file(source / "model.safetensors")
    for part, other in change.items():
        for name in list(stored):
            if other and other in name:
                stored[name.replace(other, part)] = stored[name].clone()
            elif not other and part in name:
                del stored[name]
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        import_model(source, tmp_path / "q")
