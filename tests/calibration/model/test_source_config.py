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
