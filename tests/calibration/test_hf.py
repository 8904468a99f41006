"""``import rankbook`` is enough for transformers to load a checkpoint, and costs nothing until it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from rankbook.calibration.checkpoint.format import CheckpointError
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.methods import METHODS
from rankbook.calibration.model.packed_modules import CodebookLinear, materialize_all, packed_modules
from tests.calibration import toy_method
from tests.tiny import tiny_model

AUTO: Any = AutoModelForCausalLM
IDS = torch.arange(60, 72)[None]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tied model with packed embedding."""
    monkeypatch.setitem(METHODS, "toy", toy_method.TOY)
    monkeypatch.setitem(METHODS, "rtn", toy_method.TOY)
    tiny_model("gemma2", tmp_path / "model")
    options = QuantizeOptions(method="toy", bits=4, calib_sequences=2, calib_length=8, quantize_embeddings=8)
    quantize_model(tmp_path / "model", tmp_path / "out", options)
    return tmp_path / "out"


ORDERS = {
    "rankbook first": "import rankbook; import transformers",
    "transformers first": "import transformers; import rankbook",
    "everything first": "import transformers; transformers.AutoModelForCausalLM, transformers.Trainer; import rankbook",
    "twice": "import rankbook, importlib; importlib.reload(rankbook); import transformers; importlib.reload(rankbook)",
    "a class first": "from transformers import Gemma2ForCausalLM; import rankbook, transformers",
}


@pytest.mark.parametrize("order", ORDERS)
def test_import_order_does_not_matter(checkpoint: Path, order: str) -> None:
    script = f"""
{ORDERS[order]}
import sys, torch
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp.up_proj).__name__ == "CodebookLinear"
print(model(torch.arange(60, 72)[None]).logits.double().abs().sum().item())
"""
    done = run(script, str(checkpoint))
    model = AUTO.from_pretrained(checkpoint)
    assert float(done) == pytest.approx(model(IDS).logits.double().abs().sum().item(), rel=1e-6)


def test_importing_rankbook_loads_neither_torch_nor_transformers() -> None:
    heavy = "{'torch', 'transformers', 'safetensors', 'numpy', 'onnx'}"
    assert run(f"import rankbook, sys; print({heavy} & set(sys.modules))").strip() == "set()"


def test_a_quantizer_of_another_kind_is_not_disturbed() -> None:
    script = """
import rankbook
from transformers import BitsAndBytesConfig, AutoConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
import inspect, transformers.quantizers.auto as auto
print("rankbook" in AUTO_QUANTIZER_MAPPING, len(inspect.getsource(auto)) > 1000, auto.__spec__.name)
"""
    assert run(script).split() == ["True", "True", "transformers.quantizers.auto"]


def child(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a new process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".pkg"), "OMP_NUM_THREADS": "1"}
    environment["TRANSFORMERS_VERBOSITY"] = "warning"  # the verbs, run by other tests, ask for less
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def run(script: str, *arguments: str) -> str:
    """Return what Python prints in a new process."""
    done = child(script, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dtype_is_that_of_the_call_and_packed_tensors_keep_theirs(checkpoint: Path) -> None:
    wide, narrow = (AUTO.from_pretrained(checkpoint, dtype=d) for d in (torch.float32, torch.bfloat16))
    assert narrow(IDS).logits.dtype == torch.bfloat16
    for name, module in packed_modules(narrow).items():
        if isinstance(module, CodebookLinear):
            other = wide.get_submodule(name).packed()
            assert all(torch.equal(tensor, other[part]) for part, tensor in module.packed().items())
    a, b = wide(IDS).logits, narrow(IDS).logits.float()
    assert (a - b).norm() < 0.05 * a.norm()  # bfloat16: 0.4 % per operation


def test_saving_the_loaded_model_again(checkpoint: Path, tmp_path: Path) -> None:
    model = AUTO.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "again")
    again = AUTO.from_pretrained(tmp_path / "again")
    assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_generate(checkpoint: Path) -> None:
    model = AUTO.from_pretrained(checkpoint)
    before = model.generate(IDS, max_new_tokens=5, do_sample=False)
    materialize_all(model)
    assert torch.equal(before, model.generate(IDS, max_new_tokens=5, do_sample=False))


def test_dequantize_gives_a_dense_model(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "toy", toy_method.TOY)
    tiny_model("llama", tmp_path / "plain")
    quantize_model(
        tmp_path / "plain",
        tmp_path / "packed",
        QuantizeOptions(method="toy", bits=4, calib_sequences=2, calib_length=8),
    )
    model = AUTO.from_pretrained(tmp_path / "packed")
    want = model(IDS).logits
    dense = model.dequantize()
    assert type(dense.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.equal(dense(IDS).logits, want)


def test_another_format_version(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="version 99"):
        AUTO.from_pretrained(checkpoint)


def test_truncated_weights(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        AUTO.from_pretrained(checkpoint)


def test_a_layer_of_another_model(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    layers["model.layers.9.mlp.up_proj"] = layers["model.layers.0.mlp.up_proj"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no layer 'model\.layers\.9\.mlp\.up_proj'"):
        AUTO.from_pretrained(checkpoint)


def rewrite(checkpoint: Path, drop: str = "", version: int | None = None) -> None:
    """Leave out the tensors whose names begin so, and the manifest, so that only the loader can notice."""
    (checkpoint / "rankbook.json").unlink()
    tensors = load_file(checkpoint / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not (drop and name.startswith(drop))}
    assert len(kept) < len(tensors) or not drop
    save_file(kept, checkpoint / "model.safetensors", metadata={"format": "pt"})
    if version is not None:
        config = json.loads((checkpoint / "config.json").read_text())
        config["quantization_config"]["format_version"] = version
        (checkpoint / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("model.layers.0.mlp.up_proj.", r"lacks 5 tensors, the first is model\.layers\.0\.mlp\.up_proj"),
        ("model.norm.", r"lacks 1 tensor \(model\.norm\.weight\) of \d+ that the model has; random numbers"),
        ("model.layers.1.input_layernorm.", r"lacks 1 tensor \(model\.layers\.1\.input_layernorm\.weight\)"),
    ],
)
def test_missing_tensors_are_an_error_not_random_numbers(checkpoint: Path, drop: str, message: str) -> None:
    rewrite(checkpoint, drop)
    with pytest.raises(CheckpointError, match=message):
        AUTO.from_pretrained(checkpoint)


def test_a_checkpoint_of_the_first_version_has_no_guard_and_is_read(checkpoint: Path) -> None:
    want = AUTO.from_pretrained(checkpoint)(IDS).logits
    rewrite(checkpoint, "model.embed_tokens.weight", version=1)
    assert torch.equal(AUTO.from_pretrained(checkpoint)(IDS).logits, want)


LOAD = "import transformers, sys; m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]); print(type(m))"
WITHOUT = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'rankbook' not in type(f).__module__]; " + LOAD
"""The same where rankbook is not installed: without what an installed wheel does at the start of Python."""


@pytest.mark.parametrize("saved_again", [False, True])
def test_transformers_alone_refuses_a_checkpoint(checkpoint: Path, tmp_path: Path, saved_again: bool) -> None:
    """It would warn, fill what it does not find with random numbers and go on."""
    if saved_again:
        AUTO.from_pretrained(checkpoint).save_pretrained(tmp_path / "again")
        checkpoint = tmp_path / "again"
    done = child(WITHOUT, str(checkpoint))
    assert done.returncode != 0
    assert "RuntimeError" in done.stderr
    assert "Unknown quantization type, got rankbook" in done.stderr


PIPELINE = "import transformers, sys; p = transformers.pipeline('text-generation', sys.argv[1]); print(type(p.model))"


def test_an_installed_wheel_needs_no_import(checkpoint: Path) -> None:
    """Python runs the .pth files of site-packages when it starts; a pipeline loads the model then."""
    start = f"import site; site.addsitedir({str(ROOT / '.pkg')!r}); "
    assert "Gemma2" in run(start + PIPELINE, str(checkpoint))
