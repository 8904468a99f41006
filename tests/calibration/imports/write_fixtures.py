"""Writes the fixtures of `test_formats`: tiny random models that the real packages have quantized.

Run in an environment with the packages (not those of this project), from the root of the repository:

    pip install torch transformers gptqmodel autoawq auto-round compressed-tensors bitsandbytes nvidia-modelopt
    python tests/calibration/imports/write_fixtures.py [NAME ...]

Each folder holds the checkpoint as the package wrote it, and ``expected.json``: for each layer the SHA-256 of the
weight that the package itself decodes, in its dtype, and the logits of a dense model with these weights. ModelOpt's
holds single layers, each beside what the package decodes.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).parent / "fixtures"
IDS = [[3, 14, 15, 9, 26, 5, 31, 8]]


def model(dtype: torch.dtype = torch.float16, hidden: int = 32) -> Any:
    """Return the model that is quantized, with 10 thousand weights in its linear layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=32, hidden_size=hidden, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    made: Any = LlamaForCausalLM(config)
    made = made.to(dtype).eval()
    for name, weight in made.named_parameters():
        if "proj" in name:  # no two groups alike
            weight.data *= torch.linspace(0.5, 3, weight.shape[0]).to(dtype)[:, None]
            weight.data += 0.01 * torch.linspace(-1, 1, weight.shape[1]).to(dtype)
    return made


def linears(made: nn.Module) -> dict[str, Any]:
    """Return the layers that are quantized."""
    return {name: module for name, module in made.named_modules() if name.endswith("_proj")}


def expect(folder: Path, weights: dict[str, torch.Tensor], package: str, hidden: int = 32) -> None:
    """Write what the package itself decodes, and the logits of a dense model with it."""
    dtype = next(iter(weights.values())).dtype
    dense = model(dtype, hidden)
    for name, module in linears(dense).items():
        module.weight.data = weights[name].clone()
    with torch.no_grad():
        logits = dense(torch.tensor(IDS)).logits[0].float()
    hashes = {  # without the sign of zero
        name: hashlib.sha256((weight + 0).contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, weight in weights.items()
    }
    expected = {
        "written_by": {name: version(name) for name in (package, "torch", "transformers")},
        "dtype": str(dtype).removeprefix("torch."),
        "ids": IDS,
        "weights": hashes,
        "logits": [[round(value, 5) for value in row] for row in logits[-1:].tolist()],
    }
    for name in ("generation_config.json", "README.md", ".gitattributes", "quant_log.csv", "quantize_config.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "expected.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n")


def compressed(folder: Path, scheme: dict[str, Any], dtype: torch.dtype) -> None:
    """compressed-tensors writes a model that it has calibrated with min and max."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    made = model(dtype)
    config = QuantizationConfig.model_validate(
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}}, "ignore": ["lm_head"],
         "quantization_status": "calibration"}
    )  # fmt: skip
    apply_quantization_config(made, config)
    for layer in linears(made).values():
        fit_compressed(layer, scheme)
    compressor = ModelCompressor.from_pretrained_model(made)
    compressor.compress_model(made)
    made.save_pretrained(folder)
    compressor.update_config(folder)
    compressor.decompress_model(made)
    expect(folder, {name: layer.weight.data for name, layer in linears(made).items()}, "compressed-tensors")


def fit_compressed(layer: Any, scheme: dict[str, Any]) -> None:
    """Set scales and zero points of a layer to the range of each group."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    arguments = layer.quantization_scheme.weights
    weight = layer.weight.data
    group = scheme.get("group_size") or weight.shape[1]
    parts = weight.view(weight.shape[0], -1, group)
    extra = {}
    if hasattr(layer, "weight_global_scale"):
        layer.weight_global_scale.data = generate_gparam(weight.amin(), weight.amax())
        extra["global_scale"] = layer.weight_global_scale.data
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), arguments, **extra)
    layer.weight_scale.data = scale.to(layer.weight_scale.dtype)
    if hasattr(layer, "weight_zero_point"):
        layer.weight_zero_point.data = zero.to(layer.weight_zero_point.dtype)


def nf4(folder: Path) -> None:
    """Bitsandbytes through transformers, with double quantization.

    Its kernel for CPUs decodes rows that are shorter than a block of 64 with the first block's scale, so none are here.
    """
    import bitsandbytes  # type: ignore[import-not-found]
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        model(hidden=64).save_pretrained(temporary)
        made = LlamaForCausalLM.from_pretrained(
            temporary, quantization_config=config, dtype=torch.float16, device_map="cpu"
        )
    decoded = {
        name: bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for name, layer in linears(made).items()
    }
    made.save_pretrained(folder)
    expect(folder, decoded, "bitsandbytes", hidden=64)


def awq(folder: Path) -> None:
    """AutoAWQ's own packing of layers (its loop over models needs older transformers)."""
    import importlib.util
    import sys
    import types

    site = Path(importlib.util.find_spec("awq").submodule_search_locations[0])  # type: ignore[union-attr,index]
    for name in ("awq", "awq.utils", "awq.modules"):  # their __init__ import models of older transformers
        package = types.ModuleType(name)
        package.__path__ = [str(site.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    from awq.modules.linear.gemm import WQLinear_GEMM  # type: ignore[import-not-found]
    from awq.utils.packing_utils import dequantize_gemm  # type: ignore[import-not-found]

    made, decoded = model(), {}
    for name, layer in linears(made).items():
        parts = layer.weight.data.float().view(layer.out_features, -1, 32)
        low, high = parts.amin(-1), parts.amax(-1)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15)
        steps, points = (each.repeat_interleave(32, 1) for each in (scales.float(), zeros))
        rounded = ((layer.weight.float() / steps + points).round().clamp(0, 15) - points) * steps
        layer.weight.data = rounded.half()
        packed = WQLinear_GEMM.from_linear(layer, 4, 32, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
        made.set_submodule(name, packed)
        decoded[name] = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, 32).T.contiguous()
    made.config.quantization_config = {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None,
    }  # fmt: skip
    made.save_pretrained(folder)
    expect(folder, decoded, "autoawq")


def gptq(folder: Path, **settings: Any) -> None:
    """GPTQModel quantizes and saves."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as temporary:
        save_plain(temporary)
        made = GPTQModel.load(temporary, QuantizeConfig(group_size=32, **settings), device="cpu")
        torch.manual_seed(0)
        texts = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
                 for ids in torch.randint(3, 32, (16, 32))]  # fmt: skip
        made.quantize(texts, batch_size=1)
        made.save(str(folder))
        loaded = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
        decoded = {name: layer.dequantize_weight().T.contiguous()
                   for name, layer in linears(loaded.model).items()}  # fmt: skip
    for path in folder.glob("token*"):
        path.unlink()
    expect(folder, decoded, "gptqmodel")


def auto_round(folder: Path, form: str, **settings: Any) -> None:
    """AutoRound quantizes without tuning and saves in one of its packings."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        save_plain(temporary)
        tuned = AutoRound(
            AutoModelForCausalLM.from_pretrained(temporary, dtype=torch.float16),
            AutoTokenizer.from_pretrained(temporary), iters=0, group_size=32, disable_opt_rtn=True, **settings,
        )  # fmt: skip
        tuned.quantize_and_save(temporary + "/out", format=form)
        found = next(path.parent for path in sorted(Path(temporary, "out").rglob("config.json")))
        shutil.copytree(found, folder, dirs_exist_ok=True)
    for path in [*folder.glob("token*"), *folder.glob("special*"), *folder.glob("quantization_config.json")]:
        path.unlink()
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float16)
    decoded = {}
    for name, layer in linears(loaded).items():  # the layer of the package applied to the identity
        with torch.no_grad():
            decoded[name] = layer(torch.eye(layer.infeatures if hasattr(layer, "infeatures") else layer.in_features,
                                            dtype=torch.float16)).T.contiguous()  # fmt: skip
    expect(folder, decoded, "auto-round")


def modelopt(folder: Path) -> None:
    """ModelOpt's own tensors, one layer in each format, beside what they decode to.

    It calibrates a model in NVFP4 on a GPU only; what it packs there goes through these classes.
    """
    from modelopt.torch.quantization.qtensor import (  # type: ignore[import-not-found]
        FP8QTensor,
        INT8QTensor,
        MXFP4QTensor,
        NVFP4QTensor,
    )
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weight, found = torch.randn(8, 64), {}
    packed, scale, double = NVFP4QTensor.quantize(weight, 16)
    decoded = packed.dequantize(scale=scale, double_scale=double, block_sizes={-1: 16}, dtype=torch.float32)
    found["nvfp4"] = (packed, {"weight_scale": scale, "weight_scale_2": double}, decoded)
    packed, scale = MXFP4QTensor.quantize(weight, 32)
    decoded = packed.dequantize(scale=scale, block_sizes={-1: 32}, dtype=torch.float32)
    found["mxfp4"] = (packed, {"weight_scale": scale.reshape(8, 2)}, decoded)
    for name, kind, axis, shape in (("fp8", FP8QTensor, {}, ()), ("int8", INT8QTensor, {"axis": 0}, (8,))):
        packed, scale = kind.quantize(weight, **axis)
        decoded = packed.dequantize(scale=scale, dtype=torch.float32)
        found[name] = (packed, {"weight_scale": scale.reshape(shape)}, decoded)
    tensors = {
        f"{name}.{part}": tensor.contiguous()
        for name, (packed, scales, decoded) in found.items()
        for part, tensor in {"weight": packed._quantized_data, **scales, "decoded": decoded}.items()
    }
    written = f"nvidia-modelopt {version('nvidia-modelopt')}"
    save_file(tensors, folder / "layers.safetensors", {"written_by": written})


def save_plain(folder: str) -> None:
    """Save the model before quantization, with a tokenizer of 32 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(3, 32))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    ).save_pretrained(folder)
    model().save_pretrained(folder)


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FIXTURES: dict[str, Callable[[Path], None]] = {
    "compressed-w4-symmetric": lambda at: compressed(at, {**INT4, "symmetric": True}, torch.bfloat16),
    "compressed-w4": lambda at: compressed(at, {**INT4, "symmetric": False}, torch.bfloat16),
    "compressed-w8": lambda at: compressed(
        at, {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}, torch.float16
    ),
    "compressed-nvfp4": lambda at: compressed(
        at, {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
             "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}, torch.bfloat16,
    ),
    "compressed-mxfp4": lambda at: compressed(
        at, {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True,
             "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}, torch.bfloat16,
    ),
    "bitsandbytes-nf4": nf4,
    "awq": awq,
    "gptq": lambda at: gptq(at, bits=4, sym=False, desc_act=False, format="gptq"),
    "gptq-v2-3bit": lambda at: gptq(at, bits=3, sym=True, desc_act=False, format="gptq_v2"),
    "gptq-act-order": lambda at: gptq(at, bits=4, sym=True, desc_act=True, act_group_aware=False, format="gptq"),
    "auto-round": lambda at: auto_round(at, "auto_round", bits=4, sym=True),
    "auto-round-awq": lambda at: auto_round(at, "auto_round:auto_awq", bits=4, sym=False),
    "auto-round-raw-2bit": lambda at: auto_round(at, "auto_round", bits=2, sym=False),
    "modelopt": modelopt,
}  # fmt: skip

if __name__ == "__main__":
    for chosen in sys.argv[1:] or FIXTURES:
        shutil.rmtree(HERE / chosen, ignore_errors=True)
        (HERE / chosen).mkdir(parents=True)
        FIXTURES[chosen](HERE / chosen)
        gc.collect()
