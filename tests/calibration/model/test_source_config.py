"""What config.json says of quantized weights, and where `quantize` sends them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from rankbook.calibration.imports.formats import formats
from rankbook.calibration.model import source_config

AWQ = Path(__file__).parents[1] / "imports/fixtures/awq"


def test_quantize_names_import_where_it_reads_the_format() -> None:
    with pytest.raises(ValueError, match=r"quantized already to 4 bits, by AWQ.*`rankbook import .*awq -o DIR`"):
        source_config.read_config(str(AWQ))
    with pytest.raises(ValueError, match=r"by torchao") as caught:
        source_config._check_stored_format("model", "quantization_config", {"quant_method": "torchao"})
    assert "import" not in str(caught.value)


def test_the_formats_named_are_those_that_are_read() -> None:
    assert set(source_config._IMPORTED) == set(formats())


def test_what_is_stored_is_found_in_either_entry() -> None:
    config = SimpleNamespace(sub_configs={}, quantization_config=None, compression_config={"format": "pack-quantized"})
    assert source_config.stored_format(config) == {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    assert source_config.stored_format(SimpleNamespace(sub_configs={})) is None
    assert source_config.stored_format(source_config.read_config(str(AWQ), quantized=True))["version"] == "gemm"  # type: ignore[index]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_hidden_layers", 2**31, "asks for num_hidden_layers = 2147483648, and its weights have 1000 bytes"),
        ("vocab_size", 2**40, r"vocab_size x hidden_size \(1099511627776 x 8\)"),
        ("hidden_size", 10**30, "vocab_size x hidden_size"),
    ],
)
def test_sizes_beyond_the_weights_are_refused_before_they_are_taken(field: str, value: int, said: str) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=2, num_attention_heads=1)
    source_config.check_sizes("m", config, 1000)
    setattr(config, field, value)
    with pytest.raises(ValueError, match=said):
        source_config.check_sizes("m", config, 1000)


def test_a_damaged_configuration_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 0.5}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot be loaded as a causal language model.*num_hidden_layers"):
        source_config.read_config(str(tmp_path))
