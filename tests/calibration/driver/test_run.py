"""The driver: resuming, memory, what is left alone, and bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rankbook.calibration.checkpoint.format import MANIFEST, load_records
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.report import Progress
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.methods import METHODS, Method
from rankbook.calibration.model import capture
from rankbook.calibration.model.adapter import ModelAdapter
from rankbook.calibration.model.families.dbrx import Dbrx
from rankbook.calibration.model.loading import load_model
from rankbook.calibration.notes import Note
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.plugins import layout
from rankbook.tools.dev import family_models
from tests.calibration import toy_method
from tests.calibration.runs import files, interrupted, options
from tests.tiny import tiny_model, tiny_tokenizer, write_text

ROOT = Path(__file__).parents[3]
AUTO: Any = AutoModelForCausalLM


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "toy", toy_method.TOY)
    monkeypatch.setitem(METHODS, "trained-toy", toy_method.TRAINED_TOY)


KILLED = """
import os, sys
from pathlib import Path
from rankbook.calibration.methods import METHODS
from rankbook.calibration.driver.run import quantize_model
from tests.calibration import runs, toy_method
METHODS["trained-toy"] = toy_method.TRAINED_TOY
folder = Path(sys.argv[1])
def die(step):
    if step.block == int(sys.argv[2]) and step.stage == "training":
        os._exit(9)
quantize_model(folder / "model", folder / "out", runs.options(folder), progress=die)
"""


@pytest.mark.parametrize("block", [0, 2])
def test_a_killed_run_goes_on_with_the_same_result(tmp_path: Path, block: int) -> None:
    tiny_model("gemma2", tmp_path / "model", num_hidden_layers=4)
    chosen = options(tmp_path)
    quantize_model(tmp_path / "model", tmp_path / "whole", chosen)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / '.pkg'}:{ROOT}",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(block)]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 9, done.stderr.decode()
    assert not (tmp_path / "out").exists()
    report = quantize_model(tmp_path / "model", tmp_path / "out", chosen, resume=True)
    assert report.resumed_at == block
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    whole, resumed = (json.loads((tmp_path / name / MANIFEST).read_text()) for name in ("whole", "out"))
    assert resumed["layers"] == whole["layers"]
    assert not list(tmp_path.glob(".*"))


def test_a_run_that_failed_while_writing_the_result_is_finished_without_computing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama", tmp_path / "model")
    quantize_model(tmp_path / "model", tmp_path / "whole", options(tmp_path))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", fail)
    with pytest.raises(OSError, match="No space"):
        quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path))
    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", save_torch_state_dict)
    monkeypatch.setattr("rankbook.calibration.model.capture.advance", None)  # would fail if it were called
    report = quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path), resume=True)
    assert report.resumed_at == 2
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        # Two blocks: both streams pass the first, that of the targets the second too.
        ({"effort": "fast"}, [False]),
        ({"method_options": {"steps": 1, "compute": "float32"}}, [False] * 3),
        ({"method_options": {"steps": 1, "compute": "bfloat16"}}, [True] * 3),
    ],
    ids=str,
)
def test_streams_are_those_that_training_needs_in_its_arithmetic(
    changes: dict[str, Any], wanted: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama", tmp_path / "model")
    found = []
    advance = capture.advance

    def watched(*args: Any) -> None:
        found.append(torch.is_autocast_enabled("cpu"))
        advance(*args)

    monkeypatch.setattr(capture, "advance", watched)
    quantize_model(tmp_path / "model", tmp_path / "q", options(tmp_path, method="lcq", rank=1, **changes))
    assert found == wanted


def test_rounded_inputs_are_the_same_after_a_resume(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "model")
    chosen = options(tmp_path, activations="static8", scale_inputs="smoothquant")
    quantize_model(tmp_path / "model", tmp_path / "whole", chosen)
    interrupted(tmp_path, chosen)
    quantize_model(tmp_path / "model", tmp_path / "out", chosen, resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_resume_refuses_other_options_and_another_model(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "model")
    chosen = options(tmp_path)
    interrupted(tmp_path, chosen)
    with pytest.raises(ValueError, match=r"options\.bits was 4, now 3"):
        quantize_model(tmp_path / "model", tmp_path / "out", replace(chosen, bits=3), resume=True)
    (tmp_path / "text.txt").write_text("Another text of more than a few letters.")
    with pytest.raises(ValueError, match="calibration was"):
        quantize_model(tmp_path / "model", tmp_path / "out", chosen, resume=True)
    tiny_model("llama", tmp_path / "model", seed=1)
    with pytest.raises(ValueError, match="model was"):
        quantize_model(tmp_path / "model", tmp_path / "out", chosen, resume=True)


def test_a_damaged_state_is_named_and_a_fresh_start_ignores_it(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "model")
    interrupted(tmp_path, options(tmp_path))
    block = tmp_path / ".out.partial" / "block-00000.safetensors"
    block.write_bytes(block.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"block-00000\.safetensors is damaged"):
        quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path), resume=True)
    assert quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path)).resumed_at == 0


def test_resume_of_a_run_on_sampled_text_keeps_the_text(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "model")
    chosen = options(tmp_path, calib=None)
    quantize_model(tmp_path / "model", tmp_path / "whole", chosen)
    interrupted(tmp_path, chosen)
    report = quantize_model(tmp_path / "model", tmp_path / "out", chosen, resume=True)
    assert "sampled from the model itself" in report.calibration
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_weights_are_memory_mapped_and_one_block_at_a_time_is_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    model, _ = load_model(tmp_path / "model")
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line]
    ranges = [tuple(int(part, 16) for part in line[0].split("-")) for line in maps]
    for name, parameter in model.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in ranges), f"{name} is a copy"

    wide: list[set[torch.dtype]] = []
    monkeypatch.setattr("rankbook.calibration.driver.run.load_model", lambda _: (model, None))

    def spy(problem: LayerProblem, config: Any) -> QuantizedLinear:
        wide.append({p.dtype for block in model.model.layers for p in list(block.parameters())[:1]})
        blocks = [block.input_layernorm.weight.dtype for block in model.model.layers]
        assert blocks.count(torch.float32) == 1
        return toy_method.quantize(problem, config)

    monkeypatch.setitem(METHODS, "toy", Method("toy", toy_method.ToyConfig, spy))
    quantize_model(
        tmp_path / "model", tmp_path / "out", QuantizeOptions(method="toy", calib_sequences=2, calib_length=8)
    )
    assert len(wide) == 14
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_progress_reaches_one_and_names_every_block(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "model")
    steps: list[Progress] = []
    quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path), progress=steps.append)
    fractions = [step.fraction for step in steps]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert {step.block for step in steps} >= {0, 1}
    assert all(step.peak_rss_bytes > 1 << 20 for step in steps)
    assert all(step.eta_s is not None and step.eta_s >= 0 for step in steps[-4:])


def test_manifest_accounts_for_every_stored_bit(tmp_path: Path) -> None:
    tiny_model("qwen3", tmp_path / "model")
    report = quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path))
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    packed = sum(8 * tensor.nbytes for name, tensor in stored.items() if name.rpartition(".")[0] in report.layers)
    totals = manifest["totals"]
    assert totals["linear"]["stored_bits"] == packed == sum(totals["linear"]["parts"].values())
    assert totals["linear"]["bits_per_weight"] == report.bits_per_weight
    assert totals["embeddings"]["bits_per_weight"] == 32
    assert totals["lm_head"]["shared_with"] == "model.embed_tokens"
    assert manifest["options"] == json.loads(json.dumps(dataclasses.asdict(options(tmp_path))))
    assert set(manifest["layers"]) == set(load_records(tmp_path / "out"))
    json.dumps(report.to_json())


def test_skipped_and_unknown_layers_are_left_alone_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dbrx, "unify_experts", ModelAdapter.unify_experts)  # experts of a form that nobody knows
    ffn = {"ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1}
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
    config = AutoConfig.for_model(
        "dbrx", vocab_size=259, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, ffn_config=ffn,
        attn_config=attention, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = AUTO.from_config(config)
    model.save_pretrained(tmp_path / "model")
    chosen = options(tmp_path, calib=None, skip=("*.1.*.Wqkv",))
    # Each block has 2048 and 1024 weights in attention, 64 in the router and 9216 in experts of a form of their own.
    with pytest.raises(ValueError, match=r"only 24\.9% of the weights .* \(74\.6% in DbrxExpertGLU, 0\.5% in Linear"):
        quantize_model(tmp_path / "model", tmp_path / "out", chosen)
    with pytest.warns(Note, match=r"83\.4% of the weights in the blocks stay in float"):
        report = quantize_model(tmp_path / "model", tmp_path / "out", replace(chosen, allow_partial=True))
    packed = 2 * 3072 - 2048
    assert report.totals["blocks"]["float_share"] == 1 - packed / (2 * (3072 + 64 + 9216))
    assert report.totals["model"]["float_weights"] == 2 * (3072 + 64 + 9216) - packed + 2 * 259 * 32
    assert "2 such as transformer.blocks.0.ffn.experts.mlp (DbrxExpertGLU is not a linear layer" in report.unknown
    assert report.left_alone["transformer.blocks.1.norm_attn_norm.attn.Wqkv"] == "skipped by option"
    assert report.left_alone["transformer.blocks.0.ffn.router.layer"] == "router or gate of experts of 2 outputs"
    assert len(report.layers) == 3
    loaded, _ = load_model(tmp_path / "out")
    before, after = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert torch.equal(
        before["transformer.blocks.0.ffn.experts.mlp.w1"], after["transformer.blocks.0.ffn.experts.mlp.w1"]
    )


@pytest.mark.parametrize("method", ["lcq", "gptq"])
def test_every_expert_is_a_layer_of_its_own(method: str, tmp_path: Path) -> None:
    family_models.tiny("mixtral", tmp_path / "model")
    more = {"method": method, "bits": 3, "error_branch": "lqer", "error_rank": 2, "skip": ("*.1.mlp.experts.*",)}
    report = quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path, **more))
    experts = [name for name in report.layers if "experts" in name]
    assert experts == [
        f"model.layers.0.mlp.experts.{part}.{i}" for part in ("gate_up_proj", "down_proj") for i in range(4)
    ]
    assert all(0 < (report.layers[name].error or 0) < 0.2 for name in experts)
    assert set(report.few_tokens) <= set(experts)
    assert report.left_alone["model.layers.0.mlp.gate"] == "router or gate of experts of 4 outputs"
    assert report.unknown == ""
    loaded, _ = load_model(tmp_path / "out")
    tokens = torch.arange(20)[None]
    source, _ = load_model(tmp_path / "model")
    want, got = source(input_ids=tokens).logits, loaded(input_ids=tokens).logits
    assert 0 < float((got - want).abs().max()) < 0.5 * float(want.abs().max())
    fused = source.get_parameter("model.layers.1.mlp.experts.down_proj")
    assert torch.equal(loaded.get_parameter("model.layers.1.mlp.experts.down_proj"), fused)


def test_experts_that_the_user_skips_are_no_surprise(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "model")
    report = quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path, skip=("*.mlp.*", "*.q_proj")))
    assert report.unknown == ""
    assert report.totals["blocks"]["float_share"] > 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip": ("down_proj",)}, r"skip 'down_proj' matches none .*write '\*\.down_proj'"),
        ({"activations": "static8", "activation_skip": ("re:.*o_proj",)}, "activation_skip 're:.*o_proj' matches none"),
        ({"activations": "static8", "activation_skip": ("*",)}, "leaves no layer whose input"),
        ({"skip": ("lm_head",), "quantize_lm_head": 8}, "skip names 'lm_head', which --quantize-lm-head"),
    ],
)
def test_patterns_are_checked_before_work_begins(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tiny_model("llama", tmp_path / "model")
    steps: list[Progress] = []
    with pytest.raises(ValueError, match=message):
        quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path, **changes), progress=steps.append)
    assert not steps


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "rtn"},
        {"method": "gptq"},
        {"method": "rtn", "activations": "static8", "calib": None},
        {"method": "lcq", "rank": 1, "method_options": {"steps": 2, "compute": "float32"}},
        {
            "method": "lrq",
            "method_options": {"steps": 2, "compute": "bfloat16"},
            "error_branch": "qera",
            "error_rank": 2,
        },
        {"method": "rtn", "target_bits": 5.0},
    ],
    ids=str,
)
def test_fp16_weights_whose_activations_leave_fp16(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The residual stream passes 65,504 after the first block, as in models trained in bfloat16; no file holds NaN."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 200.0
        model.model.layers[0].self_attn.v_proj.weight[:, 3] = 1000.0
        model.model.layers[0].self_attn.o_proj.weight[3] = 1.0
    model.half().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    ids = torch.arange(32)[None]
    with torch.no_grad():
        states = model.float()(input_ids=ids, output_hidden_states=True).hidden_states
    assert float(states[1].abs().max()) > 65_504
    report = quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path, **changes))
    errors = {name: layer.error for name, layer in report.layers.items()}
    if options(tmp_path, **changes).weighs_inputs():
        assert all(error is not None and 0 <= error < 1 for error in errors.values()), errors
    else:
        assert set(errors.values()) == {None}
    json.loads((tmp_path / "out" / MANIFEST).read_text(), parse_constant=pytest.fail)
    json.loads((tmp_path / "out" / "config.json").read_text(), parse_constant=pytest.fail)
    loaded, _ = load_model(tmp_path / "out", torch.float32)
    assert bool(torch.isfinite(loaded(input_ids=ids).logits).all())


def test_a_model_with_nothing_to_quantize(tmp_path: Path) -> None:
    sizes = {"n_embd": 8, "n_inner": 8, "n_layer": 1, "n_head": 2}  # rows shorter than the smallest group
    config = AutoConfig.for_model("gpt2", vocab_size=259, **sizes, bos_token_id=0, eos_token_id=1)
    AUTO.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no layer of GPT2LMHeadModel is left to quantize"):
        quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path, calib=None))


def damage(folder: Path, name: str) -> None:
    """Put one NaN into a tensor of a saved model."""
    tensors: Mapping[str, Tensor] = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = torch.nan
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_nan_is_named_and_the_earlier_output_stays(tmp_path: Path, name: str) -> None:
    tiny_model("llama", tmp_path / "model")
    quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path))
    before = files(tmp_path / "out")
    damage(tmp_path / "model", name)
    with pytest.raises(ValueError, match=f"{name} holds NaN"):
        quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path))
    assert files(tmp_path / "out") == before


def test_a_group_size_that_does_not_fit_is_refused_before_work_begins(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "model")
    steps: list[Progress] = []
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj: group size 48 .* choose one of 16, 80"):
        quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path, group_size=48), progress=steps.append)
    assert not steps


def test_other_bad_input(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path))
    tiny_model("qwen3", tmp_path / "tied")
    mixed = options(tmp_path, quantize_lm_head=4, quantize_embeddings=8)
    with pytest.raises(ValueError, match="cannot both be had"):
        quantize_model(tmp_path / "tied", tmp_path / "out", mixed)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        quantize_model(tmp_path / "model", tmp_path / "notes", options(tmp_path))
    write_text(tmp_path / "text.txt")
    quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path))
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model(tmp_path / "out", tmp_path / "again", options(tmp_path))


def test_a_layer_is_packed_once_on_its_way_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {"pack_codes": 0, "unpack_codes": 0}

    def count(name: str, work: Any) -> Any:
        def counting(*args: Any) -> Any:
            counted[name] += 1
            return work(*args)

        return counting

    for name in counted:
        monkeypatch.setattr(layout, name, count(name, getattr(layout, name)))
    tiny_model("llama", tmp_path / "model")
    chosen = options(tmp_path, method="rtn", clip_search=True, quantize_lm_head=8)
    report = quantize_model(tmp_path / "model", tmp_path / "out", chosen)
    # Decoded once, to compute the inputs of the next block; behind the last one there is none.
    first = [name for name in report.layers if ".layers.0." in name]
    assert counted == {"pack_codes": len(report.layers), "unpack_codes": len(first)}
