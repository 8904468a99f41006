"""Whether a model can be exported is known before it is quantized, with a sentence; `export` refuses with the same."""

from __future__ import annotations

import importlib.metadata
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import rankbook
from rankbook.calibration.model.custom_code import trusted_code
from rankbook.exporter import attention, exportable, skeleton, verdicts
from rankbook.exporter.exportable import _shortened, check_exportable
from rankbook.exporter.skeleton import empty_model
from rankbook.tools import errors
from rankbook.tools.dev.family_models import configuration
from tests.tiny import tiny_model, tiny_tokenizer, write_text
from tests.tools.files import run_cli

SIZES = {"vocab_size": 259, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
GEMMA = {**SIZES, "lru_width": 48, "num_attention_heads": 4, "block_types": ["recurrent", "attention"]}
STATE = "layer 0 keeps its state outside of the cache"


def config(kind: str, **more: Any) -> Any:
    return AutoConfig.for_model(kind, **more)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (config("recurrent_gemma", **GEMMA), STATE),
        (configuration("qwen4_exp_text"), "cannot be traced"),
        (configuration("deepseek_v4"), "its cache has a form of its own"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_is_not_served_is_said(asked: Any, reason: str) -> None:
    assert reason in check_exportable(asked)


def test_attention_is_given_nothing_that_the_operator_would_leave_out() -> None:
    x = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="attention with bias cannot be exported"):
        attention.attend(torch.nn.Module(), x, x, x, None, bias=torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match="attention with indices cannot be exported without a mask"):
        attention.attend(torch.nn.Module(), x, x, x, None, indices=torch.zeros(1, 3, 2))


def test_an_output_layer_of_which_the_bias_alone_is_stored_is_tied() -> None:
    stored = {"model.embeddings.tok_embeddings.weight", "decoder.bias"}
    model = empty_model(configuration("modernbert-decoder"), stored=stored)
    assert model.decoder.weight is model.model.embeddings.tok_embeddings.weight


def test_a_deep_model_is_judged_by_two_blocks() -> None:
    deep = tiny_model("gemma2").config
    deep.num_hidden_layers, deep.layer_types = 40, ["sliding_attention"] * 39 + ["full_attention"]
    assert check_exportable(deep) == ""
    assert deep.num_hidden_layers == 40
    deep.layer_types = ["full_attention"] * 39 + ["indexed_attention"]
    assert "indexed_attention" in check_exportable(deep)


def test_what_was_exported_once_is_known_until_anything_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(verdicts.VARIABLE, str(tmp_path / "cache"))
    asked = config("llama", **SIZES, num_attention_heads=4)
    exportable._check.cache_clear()
    assert check_exportable(asked) == ""
    monkeypatch.setattr(exportable, "_check", lambda _: "tried again")
    assert check_exportable(asked) == ""
    assert check_exportable(config("llama", **SIZES, num_attention_heads=2)) == "tried again"
    assert len(list((tmp_path / "cache/exportable").iterdir())) == 1, "a refusal is not kept"
    with trusted_code():
        assert check_exportable(asked) == ""
        asked.auto_map = {"AutoModelForCausalLM": "own.Model"}
        assert check_exportable(asked) == "tried again"
        del asked.auto_map
    (tmp_path / "exporter").mkdir()
    (tmp_path / "exporter/changed.py").touch()
    changes: list[tuple[Any, str, Any]] = [
        (importlib.metadata, "distributions", list),
        (rankbook, "__file__", str(tmp_path / "__init__.py")),
        (inspect, "getfile", lambda _: str(tmp_path / "modeling.py")),
    ]
    for where, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            assert check_exportable(asked) == "tried again", name
    assert check_exportable(asked) == ""
    monkeypatch.setenv(verdicts.VARIABLE, "")
    assert check_exportable(asked) == "tried again"


def test_a_cache_that_cannot_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(verdicts.VARIABLE, str(tmp_path / "file"))
    monkeypatch.setattr(exportable, "_check", lambda _: "")
    assert check_exportable(config("llama", **SIZES, num_attention_heads=4)) == ""


def test_where_nothing_can_be_remembered_it_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No home, a folder that may not be read, a class that is not of transformers, code that cannot be read."""
    asked = config("llama", **SIZES, num_attention_heads=4)
    monkeypatch.setattr(exportable, "_check", lambda _: "")
    monkeypatch.setenv(verdicts.VARIABLE, str(tmp_path / "cache"))
    own = type("Own", (type(asked),), {"__module__": "own"})
    with monkeypatch.context() as patch:
        patch.setattr(inspect, "getfile", lambda _: str(tmp_path / "code/own.py"))
        (tmp_path / "code").mkdir()
        (tmp_path / "code/.#gone.py").symlink_to(tmp_path / "gone")
        for one in (asked, own(**SIZES, num_attention_heads=4)):
            assert check_exportable(one) == ""
    assert check_exportable(own(**SIZES, num_attention_heads=4)) == ""
    assert not (tmp_path / "cache").exists()

    def refuse(*_: Any) -> bool:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", refuse)
        assert check_exportable(asked) == ""
    for name in (verdicts.VARIABLE, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert check_exportable(asked) == ""


@pytest.mark.parametrize(
    ("asked", "kinds"),
    [
        (config("jamba"), ["linear_attention"] * 4 + ["full_attention"]),
        (config("bamba", attn_layer_indices=[2, 5]), ["linear_attention", "linear_attention", "full_attention"]),
        (config("qwen3_next"), ["linear_attention", "full_attention"]),
        (config("llama"), [None, None]),
        (
            config("nemotron_h", layers_block_type=["linear_attention", "moe"] * 4 + ["full_attention", "mlp"]),
            ["linear_attention", "moe", "full_attention", "mlp"],
        ),
        (config("zamba2"), ["linear_attention", "hybrid"]),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_block_of_every_kind_is_tried(asked: Any, kinds: list[str | None]) -> None:
    short = _shortened(asked)
    assert (getattr(short, "layer_types", None) or [None, None]) == kinds
    assert short.num_hidden_layers == len(kinds)
    if asked.model_type == "zamba2":
        assert short.hybrid_layer_ids == [1]


def test_quantize_warns_or_refuses_and_export_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    auto.from_config(config("recurrent_gemma", **GEMMA)).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    text = write_text(tmp_path / "text.txt")
    how = ["--method", "rtn", "--bits", 4, "--calib", text, "--calib-sequences", 2, "--calib-length", 16, "-o"]
    refused = run_cli("quantize", tmp_path / "model", *how, tmp_path / "q", "--require-export", "--quiet")
    assert refused == errors.USAGE
    assert STATE in capsys.readouterr().err
    assert not (tmp_path / "q").exists()
    assert run_cli("quantize", tmp_path / "model", *how, tmp_path / "q", "--json") == 0
    captured = capsys.readouterr()
    assert f"cannot be exported: {STATE}" in captured.err
    assert f'"cannot_export": "{STATE}"' in captured.out
    assert run_cli("export", tmp_path / "q", "-o", tmp_path / "onnx", "--quiet") == errors.USAGE
    assert f"a model of type 'recurrent_gemma' cannot be exported: {STATE}" in capsys.readouterr().err


def test_parameters_that_no_memory_holds_are_made_without_any() -> None:
    """As in real mixtures, whose fused experts were allocated for a moment; the refusal then named another reason."""
    with skeleton._parameters_on_meta():
        module = torch.nn.Module()
        module.experts = torch.nn.Parameter(torch.empty(1 << 22, 1 << 22))
        kept = torch.empty(8).fill_(2)
    assert module.experts.device.type == "meta"
    assert kept.sum() == 16


def test_a_short_copy_has_blocks_that_read_the_keys_of_earlier_ones() -> None:
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 4
    settings = {"layer_types": types, "num_hidden_layers": 12, "num_kv_shared_layers": 6}
    settings |= {"intermediate_size": [128] * 12, "activation_sparsity_pattern": [0.95] * 4 + [0.0] * 8}
    asked = configuration("gemma3n_text").to_dict() | settings
    short = _shortened(AutoConfig.for_model(**asked))
    assert short.layer_types == [types[place] for place in (0, 2, 4, 6, 8)]
    assert short.num_kv_shared_layers == 2
    assert check_exportable(AutoConfig.for_model(**asked)) == ""
