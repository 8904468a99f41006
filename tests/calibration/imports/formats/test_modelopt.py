"""Layouts of ModelOpt, written from their definitions: the weight is that of the definition to the last bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rankbook.calibration.imports.base import ImportRefusedError
from rankbook.calibration.imports.formats.modelopt import numbers
from rankbook.calibration.imports.run import import_model
from rankbook.calibration.model.loading import load_model
from rankbook.calibration.notes import Note
from tests.calibration.imports import writers

SIZES = st.tuples(st.integers(1, 3).map(lambda n: 8 * n), st.integers(1, 3).map(lambda n: 32 * n))


@given(shape=SIZES, seed=st.integers(0, 99))
def test_floats_keep_their_weight(shape: tuple[int, int], seed: int) -> None:
    for parts, weight in (writers.random_nvfp4(shape, seed), writers.random_fp8(shape, seed)):
        record = numbers(parts, {}).record()
        assert torch.equal(record.weight(), weight.float())
        assert record.levels.shape == (1, 1 << record.bits)


def test_integers_and_mxfp4_keep_their_weight() -> None:
    layer = writers.random_layer((8, 64), 4, 32, 3, symmetric=True)
    signed = layer.codes ^ 8
    found = numbers({"weight": signed[::2] | signed[1::2] << 4, "weight_scale": layer.scales}, {}).record()
    assert torch.equal(found.weight().double(), layer.weight())
    wide = writers.random_layer((8, 64), 8, 64, 4, symmetric=True)
    parts = {"weight": (wide.codes.short() - 128).to(torch.int8), "weight_scale": wide.scales[:, 0]}
    assert torch.equal(numbers(parts, {}).record().weight().double(), wide.weight())
    exponents = torch.tensor([[120, 123]] * 8, dtype=torch.uint8)
    packed = layer.codes[:, ::2] | layer.codes[:, 1::2] << 4
    found = numbers({"weight": packed, "weight_scale": exponents}, {}).record()
    scales = (exponents.double() - 127).exp2().repeat_interleave(32, 1)
    assert torch.equal(found.weight().double(), writers.e2m1_values(layer.codes) * scales)
    assert found.params.form.name == "INT8"


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8", "int8"])
def test_layers_that_the_package_wrote_decode_as_it_decodes_them(name: str) -> None:
    tensors = load_file(writers.FIXTURES / "modelopt" / "layers.safetensors")
    parts = {full.removeprefix(f"{name}."): tensor for full, tensor in tensors.items() if full.startswith(f"{name}.")}
    decoded = parts.pop("decoded")
    assert torch.equal(numbers(parts, {}).record().weight(), decoded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_quant_scale": torch.full((32,), 2.0)}, "multiplies its inputs"),
        ({"weight": None}, "no weight"),
        ({"weight_scale_2": None}, "no weight_scale_2"),
        ({"weight_scale_2": torch.ones(2)}, r"its scale of the whole tensor is \(2,\)"),
        ({"weight": torch.ones(8, 16)}, r"torch.float32 \(8, 16\)"),
        ({"weight": torch.ones(2, 8, 16, dtype=torch.uint8)}, r"torch.uint8 \(2, 8, 16\)"),
        ({"weight_scale": torch.full((8, 2), torch.nan).to(torch.float8_e4m3fn)}, "NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, torch.Tensor | None], message: str) -> None:
    parts = {**writers.random_nvfp4((8, 32), 0)[0], **change}
    with pytest.raises(ImportRefusedError, match=message):
        numbers({name: tensor for name, tensor in parts.items() if tensor is not None}, {}).record()


def test_older_versions_say_it_in_a_file_of_their_own(tmp_path: Path) -> None:
    """Such a folder has a plain config.json; it must not be taken for one that is not quantized."""
    source = tmp_path / "source"
    shutil.copytree(writers.FIXTURES / "awq", source)
    config = json.loads((source / "config.json").read_text("utf-8"))
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    said = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (source / "hf_quant_config.json").write_text(json.dumps(said), encoding="utf-8")
    model = load_random(source)
    stored = {name: tensor for name, tensor in model.items() if not name.endswith("_proj.weight")}
    for seed, name in enumerate(sorted(set(model) - set(stored))):
        parts, weight = writers.random_fp8((model[name].shape[0], model[name].shape[1]), seed)
        stored |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
        model[name] = weight.float()
    stored["model.layers.0.self_attn.k_proj.k_scale"] = torch.ones(1)
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"by NVIDIA ModelOpt \(see hf_quant_config.json.*`rankbook import"):
        load_model(source)
    with pytest.warns(Note, match="rounds its cache as well"):
        report = import_model(source, tmp_path / "q")
    assert report.format == "modelopt"
    imported, _ = load_model(tmp_path / "q")
    for name in report.layers:
        assert torch.equal(
            imported.get_submodule(name).weight.float(), model[f"{name}.weight"].to(imported.dtype).float()
        )


def load_random(folder: Path) -> dict[str, torch.Tensor]:
    """Return random tensors of the model of a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return {name: tensor.clone() for name, tensor in made.state_dict().items() if name != "lm_head.weight"}
