"""What of other tools' checkpoints cannot be kept is refused with the reason, and what is left out is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankbook.calibration.checkpoint.format import open_checkpoint
from rankbook.calibration.imports.run import import_model
from rankbook.calibration.notes import Note

FIXTURES = Path(__file__).parent / "fixtures"


def changed(
    name: str, folder: Path, entry: Mapping[str, Any], tensors: Mapping[str, torch.Tensor | None] | None = None
) -> Path:
    """Copy a checkpoint with other entries of its quantization_config and other tensors (None removes one)."""
    shutil.copytree(FIXTURES / name, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"].update(entry)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    stored = load_file(folder / "model.safetensors")
    for key, tensor in (tensors or {}).items():
        stored.pop(key, None)
        if tensor is not None:
            stored[key] = tensor
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "entry", "tensors", "message"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, {}, "layout of one kernel"),
        ("awq", {"version": "gemv_fast"}, {}, "take a 'gemm' or 'gemv' checkpoint"),
        ("awq", {"version": "gemv"}, {}, "not in the layout of AutoAWQ's gemv"),
        ("awq", {"bits": 3}, {}, "its layout has 4"),
        ("gptq", {"bits": 8}, {}, "its shapes are those of 4 bits, and quantization_config says 8"),
        ("auto-round", {"bits": 2}, {}, "its shapes are those of 4 bits, and quantization_config says 2"),
        ("auto-round", {"packing_format": "auto_round:fp8"}, {}, "packing_format 'auto_round:fp8' is not known"),
        ("compressed-w4", {"format": "marlin-24", "config_groups": {"a": {}}}, {}, "marlin-24 is not"),
        ("compressed-w4", {"transform_config": {"config_groups": {"u": {}}}}, {}, "transform_config changes"),
        ("bitsandbytes-nf4", {"load_in_8bit": True}, {}, "LLM.int8"),
        ("gptq", {"quant_method": "quip"}, {}, "'quip'; what can be imported is.*GPTQ"),
        ("awq", {}, {f"{Q}.bias": torch.ones(32)}, "has a bias, and the model of config.json has none"),
        ("awq", {}, {"model.norm.weight": None}, "lacks 1 tensor .model.norm.weight"),
        ("awq", {}, {f"{Q}.scales": torch.full((1, 32), torch.inf, dtype=torch.half)}, "NaN or infinity"),
        ("compressed-mxfp4", {}, {f"{Q}.weight_scale": torch.full((32, 1), 255, dtype=torch.uint8)}, "NaN in E8M0"),
        ("awq", {}, {f"{Q}.scales": None}, "q_proj: what is stored is not as the format has it .KeyError"),
        ("gptq", {}, {f"{Q}.scales": torch.ones(4)}, "is not as the format has it .ValueError"),
        ("compressed-w4", {"config_groups": 3}, {}, "its quantization_config is not as the format has it"),
        ("compressed-w4", {}, {f"{Q}.weight_shape": torch.tensor([2**40, 32])}, "no dense packing of 1099511627776"),
        ("awq", {}, {"model.layers.0.mlp.experts.0.up_proj.qweight": torch.ones(2, 2)}, "no layer model.*experts.0.up"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused(
    name: str, entry: dict[str, Any], tensors: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        import_model(changed(name, tmp_path / "source", entry, tensors), tmp_path / "q")


def test_a_bias_of_zeros_that_the_model_does_not_have_is_left_out(tmp_path: Path) -> None:
    source = changed("gptq", tmp_path / "source", {}, {f"{Q}.bias": torch.zeros(32)})
    import_model(source, tmp_path / "q")
    assert open_checkpoint(tmp_path / "q").layers[Q].bias == ""


def test_rounding_of_inputs_is_said_to_be_left_out(tmp_path: Path) -> None:
    groups = {"g": {"targets": ["Linear"], "input_activations": {"num_bits": 8}, "weights": {}}}
    source = changed("compressed-w8", tmp_path / "source", {"config_groups": groups})
    with pytest.warns(Note, match="rounds the inputs of its layers as well"):
        import_model(source, tmp_path / "q")


def test_shards_lie_in_the_folder(tmp_path: Path) -> None:
    source = changed("awq", tmp_path / "source", {})
    (source / "model.safetensors").rename(tmp_path / "other.safetensors")
    index = {"weight_map": {f"{Q}.qweight": "../other.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match=r"names '\.\./other\.safetensors', which is not a file of this folder"):
        import_model(source, tmp_path / "q")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 2**31, "asks for num_hidden_layers = 2147483648"),
        ("vocab_size", 2**31, "asks for vocab_size x hidden_size"),
        ("num_attention_heads", 0, "describes no model|cannot be loaded"),
    ],
)
def test_a_damaged_configuration_is_refused(field: str, value: int, message: str, tmp_path: Path) -> None:
    source = changed("awq", tmp_path / "source", {})
    config = json.loads((source / "config.json").read_text("utf-8"))
    (source / "config.json").write_text(json.dumps(config | {field: value}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        import_model(source, tmp_path / "q")


def test_a_name_of_many_parts_is_refused(tmp_path: Path) -> None:
    """What stands before its dots would have taken half the square of its length, gigabytes for a file of 100 KB."""
    source = changed("gptq", tmp_path / "source", {}, {".".join("a" * 5000): torch.zeros(1)})
    with pytest.raises(ValueError, match=r"the name of a tensor, a\.a.*, has 9999 characters; the file is damaged"):
        import_model(source, tmp_path / "q")


def test_a_plain_model_is_sent_to_quantize(tmp_path: Path) -> None:
    source = changed("gptq", tmp_path / "source", {})
    config = json.loads((source / "config.json").read_text("utf-8"))
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"is not quantized.*rankbook quantize"):
        import_model(source, tmp_path / "q")
